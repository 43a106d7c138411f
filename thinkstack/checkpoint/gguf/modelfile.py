"""A Modelfile for Ollama next to a GGUF: template, system text, stop tokens, sampling parameters.

Ollama uses its own templates, in Go's syntax. A chat format is matched to a known template by its output, not by its
name. For any other format the Modelfile has no template, and Ollama tries the Jinja template inside the GGUF.
Source: github.com/ollama/ollama, docs/modelfile.md and docs/template.md.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from thinkstack.checkpoint.hf.side_files import CHAT_SAMPLING
from thinkstack.log import write_text
from thinkstack.text.chat import ZERO_PREAMBLE, ChatFormat
from thinkstack.text.tokenizer import ASSISTANT, EOS, THINK_OPEN, USER
from thinkstack.types import Message, RequestError


@dataclass(frozen=True)
class TurnTemplate:
    """A chat template that puts fixed text around each message."""

    system: tuple[str, str]
    """Text before and after the content."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation_prompt: str
    """Text that starts the next assistant turn."""
    begin: str = ""

    def wrapper_of(self, role: str) -> tuple[str, str]:
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def text(self, messages: Sequence[Message]) -> str:
        """Return a prompt without BOS, which llama.cpp adds."""
        return self.begin + "".join(m.content.join(self.wrapper_of(m.role)) for m in messages) + self.generation_prompt

    def to_go(self) -> str:
        """Return the template in Ollama's (Go's) syntax."""
        cases = (
            f'{{{{ {word} eq .Role "{role}" }}}}' + "{{ .Content }}".join(self.wrapper_of(role))
            for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
        )
        return (
            f"{self.begin}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.generation_prompt}"
        )


def _tagged(opening: str, closing: str) -> TurnTemplate:
    """Return a template with the same tags for every role; the opening contains the role."""
    system, user, assistant = ((opening.format(role), closing) for role in ("system", "user", "assistant"))
    return TurnTemplate(system, user, assistant, assistant[0])


def _deepseek(prefill: str) -> TurnTemplate:
    return TurnTemplate(("", ""), (USER, ""), (ASSISTANT, EOS), ASSISTANT + prefill)


def _zero(begin: str) -> TurnTemplate:
    return TurnTemplate(("", "\n"), ("User: ", "\n"), ("Assistant: ", "\n"), "Assistant: ", begin)


KNOWN_TEMPLATES = (
    _tagged("<|im_start|>{}\n", "<|im_end|>\n"),
    _tagged("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    _deepseek(""),
    _deepseek(f"{THINK_OPEN}\n"),
    _zero(ZERO_PREAMBLE),
    _zero(""),
)
"""ChatML, Llama 3, DeepSeek V3 and R1, and R1-Zero with and without its preamble."""

_log = logging.getLogger(__name__)

_QUESTION = (Message(role="user", content="What is 12 + 30?"),)
_PROBES = (
    (Message(role="system", content="Be brief."), *_QUESTION),
    (*_QUESTION, Message(role="assistant", content="42"), Message(role="user", content="And 4 more?\nWhy?")),
)


def write_modelfile(path: Path, gguf_name: str, chat: ChatFormat | None = None) -> None:
    """Write a Modelfile for the GGUF `gguf_name` in the same folder. Raises ConfigError for a disk error."""
    lines = [f"FROM ./{gguf_name}"]
    if chat is not None:
        template, system = template_of(chat)
        if template is not None:
            lines.append(f'TEMPLATE """{template.to_go()}"""')
        else:
            _log.warning(
                "no known Ollama template matches the chat format %s; Ollama will try the Jinja template", chat.name
            )
        if system:
            lines.append(f'SYSTEM """{system}"""')
        lines += [f'PARAMETER stop "{chat.tokenizer.decode([token])}"' for token in chat.stop_token_ids]
        lines += [f"PARAMETER {key} {CHAT_SAMPLING[key]}" for key in ("temperature", "top_p")]
    write_text(path, "\n".join(lines) + "\n")


def template_of(chat: ChatFormat) -> tuple[TurnTemplate | None, str]:
    """Return the known template with the same output as `chat`, or None, and the default system text of `chat`."""
    for template in KNOWN_TEMPLATES:
        system = _default_system(template, chat)
        if system is None:
            continue
        first = (Message(role="system", content=system),) if system else ()
        texts = [template.text(probe if probe[0].role == "system" else (*first, *probe)) for probe in _PROBES]
        if texts == [_prompt_text(chat, probe) for probe in _PROBES] and _has_same_ids(texts, chat):
            return template, system
    return None, ""


def _has_same_ids(texts: Sequence[str], chat: ChatFormat) -> bool:
    """Whether tokenizing the texts, with control tokens found by spelling, gives the ids of the prompts."""
    full = tokenizers.Tokenizer.from_str(chat.tokenizer.spec)
    ids = [full.encode(text, add_special_tokens=False).ids for text in texts]
    return ids == [_without_bos(chat, probe) for probe in _PROBES]


def _default_system(template: TurnTemplate, chat: ChatFormat) -> str | None:
    """Return the default system text of `chat`; None if the rest of the prompt does not match `template`."""
    written, known = _prompt_text(chat, _QUESTION), template.text(_QUESTION)
    if written == known:
        return ""
    before, after = template.system
    rest = after + known.removeprefix(template.begin)
    is_alike = bool(before) and written.startswith(template.begin + before) and written.endswith(rest)
    return written.removeprefix(template.begin + before).removesuffix(rest) if is_alike else None


def _prompt_text(chat: ChatFormat, messages: Sequence[Message]) -> str:
    """Return a prompt of `chat` as text, without BOS; empty if `chat` rejects these messages."""
    return chat.tokenizer.decode(_without_bos(chat, messages))


def _without_bos(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    try:
        ids = chat.prompt(messages)
    except RequestError:
        return []
    begin = chat.tokenizer.begin_ids
    return ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids
