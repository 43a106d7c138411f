"""Conversations to token ids: R1-Zero's plain template, V3's and R1's chat templates, and templates shipped by others.

Structure comes from control tokens and fixed strings written here or in a shipped template; what people wrote is
encoded apart from it, so it can never become a control token. Every prompt begins with exactly one BOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jinja2
import jinja2.sandbox

from thinkstack.text.tokenizer import ASSISTANT, BOS, EOS, THINK_CLOSE, THINK_OPEN, USER, Tokenizer
from thinkstack.types import ConfigError, Message, RequestError

ZERO_PREAMBLE = (
    "Below, a User puts a question to an Assistant. The Assistant thinks first and answers then: its thoughts stand "
    "between <think> and </think>, its answer stands between <answer> and </answer>. "
)
"""What the plain template says before the question, in the sense of R1 paper's table 1."""


class ChatFormat(Protocol):
    """How one model's conversations look in tokens."""

    @property
    def name(self) -> str:
        """Name that `chat_format` knows it by, or "template"."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns the text of a turn into ids."""

    @property
    def prefill(self) -> str:
        """What the prompt has already written of the answer; reward and parser read prefill + completion."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids that ask for the next assistant turn. Raises RequestError for an order of roles it cannot write."""

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The assistant's whole turn as text: prefill and decoded ids, without the token that ended it."""

    def answer(self, text: str) -> list[int]:
        """Ids of a whole assistant turn for training, its end token included."""


@dataclass(frozen=True)
class _Base:
    tokenizer: Tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.control_id(EOS),)

    def text_of(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.prefill + self.tokenizer.decode(ids)  # type: ignore[attr-defined]

    def answer(self, text: str) -> list[int]:
        """Ids of a whole assistant turn for training: think tags in `text` become control tokens, EOS ends it."""
        ids: list[int] = []
        for piece in _split_keeping(text.removeprefix(self.prefill), (THINK_OPEN, THINK_CLOSE)):  # type: ignore[attr-defined]
            is_tag = piece in (THINK_OPEN, THINK_CLOSE)
            ids += [self.tokenizer.control_id(piece)] if is_tag else self.tokenizer.encode(piece)
        return [*ids, self.tokenizer.control_id(EOS)]


@dataclass(frozen=True)
class ZeroFormat(_Base):
    """R1-Zero: plain text without chat tokens (R1 paper, table 1)."""

    preamble: str = ZERO_PREAMBLE
    """Instruction before the question; empty for models too small to follow one."""
    prefill = ""

    @property
    def name(self) -> str:
        return "r1_zero" if self.preamble else "r1_zero_short"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        turns = []
        for message in messages:
            speaker = {"user": "User: ", "assistant": "Assistant: ", "system": ""}[message.role]
            turns.append(f"{speaker}{message.content}\n")
        text = f"{self.preamble}{''.join(turns)}Assistant: "
        return [self.tokenizer.control_id(BOS), *self.tokenizer.encode(text)]


@dataclass(frozen=True)
class DeepSeekFormat(_Base):
    """V3, V3-0324, R1: BOS, system text without a marker, then marked turns; earlier reasoning is left out."""

    name: str
    prefill: str

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        if not messages or messages[-1].role != "user":
            raise RequestError("the last message must come from the user; nothing else asks for an answer")
        encode, control = self.tokenizer.encode, self.tokenizer.control_id
        ids = [control(BOS), *encode("\n\n".join(m.content for m in messages if m.role == "system"))]
        for message in messages:
            if message.role == "user":
                ids += [control(USER), *encode(message.content)]
            elif message.role == "assistant":
                ids += [control(ASSISTANT), *encode(message.content), control(EOS)]
        ids.append(control(ASSISTANT))
        if self.prefill:
            ids += [control(THINK_OPEN), *encode(self.prefill.removeprefix(THINK_OPEN))]
        return ids


@dataclass(frozen=True)
class TemplateFormat(_Base):
    """A Jinja template shipped with somebody's checkpoint, run in a sandbox.

    The template sees placeholders where people's text goes; what it writes around them is read with control tokens.
    """

    template: str
    bos: str
    eos: str
    name = "template"
    prefill = ""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.control_id(self.eos),)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            text = environment.from_string(self.template).render(
                messages=[{"role": m.role, "content": mark} for m, mark in zip(messages, marks, strict=True)],
                add_generation_prompt=True,
                bos_token=self.bos,
                eos_token=self.eos,
                raise_exception=_refuse,
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template does not take this conversation: {error}") from error
        ids: list[int] = []
        for piece in _split_keeping(text, (*marks, *self.tokenizer.control)):
            if piece in marks:
                ids += self.tokenizer.encode(messages[marks.index(piece)].content)
            elif piece in self.tokenizer.control:
                ids.append(self.tokenizer.control[piece])
            else:
                ids += self.tokenizer.encode(piece)
        return ids


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _split_keeping(text: str, marks: Sequence[str]) -> list[str]:
    """Cut `text` at every mark and keep the marks; at one place the longest mark wins."""
    pieces, start, place = [], 0, 0
    ordered = sorted(marks, key=len, reverse=True)
    while place < len(text):
        mark = next((m for m in ordered if text.startswith(m, place)), None)
        if mark is None:
            place += 1
            continue
        pieces += [text[start:place], mark]
        start = place = place + len(mark)
    return [piece for piece in (*pieces, text[start:]) if piece]


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """One of our families' formats by name."""
    if name == "r1_zero":
        return ZeroFormat(tokenizer)
    if name == "r1_zero_short":
        return ZeroFormat(tokenizer, preamble="")
    if name in ("v3", "r1"):
        return DeepSeekFormat(tokenizer, name, f"{THINK_OPEN}\n" if name == "r1" else "")
    raise ConfigError(f"unknown chat format {name!r}; known: r1_zero, r1_zero_short, v3, r1")
