"""Sampled tokens as text while they come: an incremental decoder, and a parser of thinking and answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN


@dataclass(frozen=True)
class StreamEvent:
    """Some text of an assistant turn."""

    kind: str
    """"thinking", "answer", or "text" for what stands outside both."""
    text: str


class LastToken:
    """The token that a stream ended with, to say why an answer is empty."""

    def __init__(self, chat: ChatFormat):
        self.chat = chat
        self.token: int | None = None

    def of(self, ids: Iterator[int]) -> Iterator[int]:
        """The same ids."""
        self.token = None
        for self.token in ids:
            yield self.token

    def text(self) -> str:
        """How the tokenizer spells it."""
        return "no token" if self.token is None else self.chat.tokenizer.decode([self.token])


def stream_text(text_of: Callable[[Sequence[int]], str], ids: Iterator[int]) -> Iterator[str]:
    """Text as it becomes certain: half characters wait for their other half. text_of: the text of all ids so far."""
    drawn: list[int] = []
    sent = ""
    for token in ids:
        drawn.append(token)
        text = text_of(drawn)
        if not text.endswith("\ufffd") and len(text) > len(sent):
            yield text[len(sent) :]
            sent = text
    rest = text_of(drawn)[len(sent) :]
    if rest:
        yield rest


MARKS = {THINK_OPEN: "thinking", THINK_CLOSE: "text", ANSWER_OPEN: "answer", ANSWER_CLOSE: "text"}


def parse_stream(chunks: Iterator[str]) -> Iterator[StreamEvent]:
    """Sort streamed text into thinking, answer and the rest; tags are dropped, half tags wait for their other half."""
    kind, buffer = "text", ""
    for chunk in chunks:
        buffer += chunk
        while True:
            places = [(buffer.index(mark), mark) for mark in MARKS if mark in buffer]
            if not places:
                break
            place, mark = min(places)
            if buffer[:place]:
                yield StreamEvent(kind, buffer[:place])
            kind, buffer = MARKS[mark], buffer[place + len(mark) :]
        held = max((size for mark in MARKS for size in range(1, len(mark)) if buffer.endswith(mark[:size])), default=0)
        ready = buffer[: len(buffer) - held]
        if ready:
            yield StreamEvent(kind, ready)
        buffer = buffer[len(ready) :]
    if buffer:
        yield StreamEvent(kind, buffer)
