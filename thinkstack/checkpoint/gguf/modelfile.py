"""A Modelfile for Ollama beside a GGUF: template, system text, what ends an answer, how to draw.

Ollama renders templates of its own, in Go's syntax. Whether a chat format is one of those known here is decided by what
it writes, not by its name; of any other, Ollama is left to make what it can of the Jinja template inside the GGUF.
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
class Turns:
    """A chat format that puts fixed text around each message."""

    system: tuple[str, str]
    """Before and after what is said."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str
    """What asks for the next answer."""
    begin: str = ""

    def around(self, role: str) -> tuple[str, str]:
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def text(self, messages: Sequence[Message]) -> str:
        """A prompt without BOS, which llama.cpp puts first."""
        return self.begin + "".join(m.content.join(self.around(m.role)) for m in messages) + self.ask

    def go(self) -> str:
        """The same as a template of Ollama."""
        cases = (
            f'{{{{ {word} eq .Role "{role}" }}}}' + "{{ .Content }}".join(self.around(role))
            for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
        )
        return f"{self.begin}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.ask}"


def _tagged(opening: str, closing: str) -> Turns:
    """Every role alike, its name in the opening."""
    system, user, assistant = ((opening.format(role), closing) for role in ("system", "user", "assistant"))
    return Turns(system, user, assistant, assistant[0])


def _deepseek(prefill: str) -> Turns:
    return Turns(("", ""), (USER, ""), (ASSISTANT, EOS), ASSISTANT + prefill)


def _zero(begin: str) -> Turns:
    return Turns(("", "\n"), ("User: ", "\n"), ("Assistant: ", "\n"), "Assistant: ", begin)


KNOWN = (
    _tagged("<|im_start|>{}\n", "<|im_end|>\n"),
    _tagged("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    _deepseek(""),
    _deepseek(f"{THINK_OPEN}\n"),
    _zero(ZERO_PREAMBLE),
    _zero(""),
)
"""ChatML, Llama 3, DeepSeek V3 and R1, and R1-Zero's plain text with and without its preamble."""

_log = logging.getLogger(__name__)

_QUESTION = (Message(role="user", content="What is 12 + 30?"),)
_PROBES = (
    (Message(role="system", content="Be brief."), *_QUESTION),
    (*_QUESTION, Message(role="assistant", content="42"), Message(role="user", content="And 4 more?\nWhy?")),
)


def write_modelfile(path: Path, gguf_name: str, chat: ChatFormat | None = None) -> None:
    """Write a Modelfile for the GGUF `gguf_name` beside it. Raises ConfigError if the disk refuses."""
    lines = [f"FROM ./{gguf_name}"]
    if chat is not None:
        turns, system = turns_of(chat)
        if turns is not None:
            lines.append(f'TEMPLATE """{turns.go()}"""')
        else:
            _log.warning("no template of Ollama is known that writes %s; it will try the Jinja template", chat.name)
        if system:
            lines.append(f'SYSTEM """{system}"""')
        lines += [f'PARAMETER stop "{chat.tokenizer.decode([token])}"' for token in chat.stop_token_ids]
        lines += [f"PARAMETER {key} {CHAT_SAMPLING[key]}" for key in ("temperature", "top_p")]
    write_text(path, "\n".join(lines) + "\n")


def turns_of(chat: ChatFormat) -> tuple[Turns | None, str]:
    """The known format that writes what `chat` writes, or None; and the system text it begins with by default."""
    for turns in KNOWN:
        system = _default_system(turns, chat)
        if system is None:
            continue
        first = (Message(role="system", content=system),) if system else ()
        texts = [turns.text(probe if probe[0].role == "system" else (*first, *probe)) for probe in _PROBES]
        if texts == [_written(chat, probe) for probe in _PROBES] and _gives_ids(texts, chat):
            return turns, system
    return None, ""


def _gives_ids(texts: Sequence[str], chat: ChatFormat) -> bool:
    """Whether control tokens found by their spelling make the prompts' ids of their texts."""
    full = tokenizers.Tokenizer.from_str(chat.tokenizer.spec)
    ids = [full.encode(text, add_special_tokens=False).ids for text in texts]
    return ids == [_without_bos(chat, probe) for probe in _PROBES]


def _default_system(turns: Turns, chat: ChatFormat) -> str | None:
    """What stands before the question when nobody gave a system text; None if the rest is not as in `turns`."""
    written, known = _written(chat, _QUESTION), turns.text(_QUESTION)
    if written == known:
        return ""
    before, after = turns.system
    rest = after + known.removeprefix(turns.begin)
    is_alike = bool(before) and written.startswith(turns.begin + before) and written.endswith(rest)
    return written.removeprefix(turns.begin + before).removesuffix(rest) if is_alike else None


def _written(chat: ChatFormat, messages: Sequence[Message]) -> str:
    """A prompt of `chat` in text, without BOS; empty if it does not take these messages."""
    return chat.tokenizer.decode(_without_bos(chat, messages))


def _without_bos(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    try:
        ids = chat.prompt(messages)
    except RequestError:
        return []
    begin = chat.tokenizer.begin_ids
    return ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids
