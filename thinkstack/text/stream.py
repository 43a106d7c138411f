"""Streaming: an incremental decoder of sampled tokens, and an incremental parser of thinking and answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN


@dataclass(frozen=True)
class StreamEvent:
    """A chunk of text of an assistant turn."""

    kind: str
    """"thinking", "answer", or "text" for text outside both."""
    text: str


class LastToken:
    """Records the last token of a stream, to explain an empty answer."""

    def __init__(self, chat: ChatFormat):
        self.chat = chat
        self.token: int | None = None

    def track(self, ids: Iterator[int]) -> Iterator[int]:
        """Yield the same ids and record the last one."""
        self.token = None
        for self.token in ids:
            yield self.token

    def text(self) -> str:
        """Return the text of the last token."""
        return "no token" if self.token is None else self.chat.tokenizer.decode([self.token])


def stream_text(text_of: Callable[[Sequence[int]], str], ids: Iterator[int]) -> Iterator[str]:
    """Yield text as it becomes final; incomplete characters are held back. text_of: decodes all ids so far."""
    sampled: list[int] = []
    sent_text = ""
    for token in ids:
        sampled.append(token)
        text = text_of(sampled)
        if not text.endswith("\ufffd") and len(text) > len(sent_text):
            yield text[len(sent_text) :]
            sent_text = text
    rest = text_of(sampled)[len(sent_text) :]
    if rest:
        yield rest


TAG_KINDS = {THINK_OPEN: "thinking", THINK_CLOSE: "text", ANSWER_OPEN: "answer", ANSWER_CLOSE: "text"}


def parse_stream(chunks: Iterator[str]) -> Iterator[StreamEvent]:
    """Classify streamed text as thinking, answer or other text; tags are dropped, incomplete tags are held back."""
    kind, buffer = "text", ""
    for chunk in chunks:
        buffer += chunk
        while True:
            matches = [(buffer.index(tag), tag) for tag in TAG_KINDS if tag in buffer]
            if not matches:
                break
            place, tag = min(matches)
            if buffer[:place]:
                yield StreamEvent(kind, buffer[:place])
            kind, buffer = TAG_KINDS[tag], buffer[place + len(tag) :]
        partial_length = max(
            (size for tag in TAG_KINDS for size in range(1, len(tag)) if buffer.endswith(tag[:size])), default=0
        )
        ready = buffer[: len(buffer) - partial_length]
        if ready:
            yield StreamEvent(kind, ready)
        buffer = buffer[len(ready) :]
    if buffer:
        yield StreamEvent(kind, buffer)
