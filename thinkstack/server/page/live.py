"""An answer while it is made, for the readers of this process.

A position is (characters of reasoning, characters of content). What a reader at a position has seen is a function of
the text alone, so any process can go on from there: finished blocks of Markdown as HTML, the rest as plain text.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from thinkstack.server.page.conversations import StoredMessage
from thinkstack.server.page.markdown import BlockSplitter, render_block
from thinkstack.server.sse import to_json

Position = tuple[int, int]
State = Literal["waiting", "thinking", "answering"]
REPLACED = "\ufffd"
"""What stands for NUL, which PostgreSQL does not store."""
PROGRESS_SECONDS = 1.0
LONG_BLOCK = 2_000
"""Number of characters from which a block is rendered in a thread."""


class GrowingText:
    """A text to which parts are appended; its end is read without a copy of the rest."""

    def __init__(self, text: str = ""):
        self._parts, self.length = [text], len(text)

    def append(self, text: str) -> None:
        """Append a part."""
        self._parts.append(text)
        self.length += len(text)

    def since(self, place: int) -> str:
        """The text from a place on."""
        missing, first = self.length - place, len(self._parts)
        while missing > 0:
            first -= 1
            missing -= len(self._parts[first])
        return "".join(self._parts[first:])[-missing if missing < 0 else 0 :]

    def __str__(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0]


class LiveAnswer:
    """The text of a running answer and those who wait for more of it."""

    def __init__(
        self, message: StoredMessage, siblings: Sequence[str], describe: Callable[["LiveAnswer"], dict[str, Any]]
    ):
        """siblings: ids of the answers to the same message. describe: the answer as the page's JSON."""
        self.message, self.siblings, self._describe = message, siblings, describe
        self.reasoning, self.content = GrowingText(message.reasoning), GrowingText(message.content)
        self.splitter = BlockSplitter()
        self.blocks = [render_block(source) for source in self.splitter.feed(message.content)]
        """HTML of the finished blocks."""
        self.state: State = "answering" if message.content else "thinking" if message.reasoning else "waiting"
        self.num_tokens = self.num_reasoning_tokens = 0
        self.began = time.monotonic() - max(time.time() - message.created_ms / 1000, 0.0)
        self._thinking_began = self.began if self.state == "thinking" else None
        self._thinking_ended: float | None = None
        self._readers: set[asyncio.Event] = set()

    @property
    def is_ended(self) -> bool:
        """Whether the answer is complete."""
        return self.message.status != "running"

    @property
    def num_readers(self) -> int:
        """Number of readers in this process."""
        return len(self._readers)

    @property
    def position(self) -> Position:
        """The end of the text so far."""
        return self.reasoning.length, self.content.length

    def add_reasoning(self, text: str) -> None:
        """New thinking."""
        if self._thinking_began is None:
            self._thinking_began = time.monotonic()
        self.state = "thinking"
        self.reasoning.append(text.replace("\0", REPLACED))
        self._wake()

    async def add_content(self, text: str) -> None:
        """New content. Calls must not overlap."""
        self._end_thinking()
        self.state = "answering"
        text = text.replace("\0", REPLACED)
        blocks = await _render(self.splitter.feed(text))
        self.content.append(text)
        self.blocks += blocks
        self._wake()

    async def finish(self, message: StoredMessage) -> None:
        """The answer is complete. message: with its status and statistics; its text is set here."""
        self._end_thinking()
        self.blocks += await _render(self.splitter.finish())
        self.message = self.snapshot(message)
        self._wake()

    def snapshot(self, message: StoredMessage | None = None) -> StoredMessage:
        """The message as far as it is."""
        found = replace(message or self.message, reasoning=str(self.reasoning), content=str(self.content))
        if found.status != "running":
            return replace(found, html="".join(self.blocks))
        tokens = {"completion_tokens": self.num_tokens, "reasoning_tokens": self.num_reasoning_tokens}
        return replace(found, stats=replace(found.stats, **tokens))

    async def events(self, after: Position) -> AsyncIterator[bytes]:
        """What comes after a position, as server-sent events."""
        news = asyncio.Event()
        self._readers.add(news)
        try:
            num_reasoning, num_content = after
            if num_reasoning > self.reasoning.length or num_content > self.content.length:
                yield self._event("reset", {"message": self._describe(self)})
                num_reasoning, num_content, num_blocks = *self.position, len(self.blocks)
            else:
                num_blocks = len(BlockSplitter().feed(str(self.content)[:num_content]))
            told_at, told_state = 0.0, ""
            while True:
                if num_reasoning < self.reasoning.length:
                    yield self._event("reasoning", {"text": self.reasoning.since(num_reasoning)}, num_content)
                    num_reasoning = self.reasoning.length
                if num_content < self.content.length and not self.is_ended:
                    if num_blocks < len(self.blocks):
                        change: dict[str, Any] = {"blocks": self.blocks[num_blocks:], "tail": self.splitter.tail}
                    else:
                        change = {"append": self.content.since(num_content)}
                    num_content, num_blocks = self.content.length, len(self.blocks)
                    yield self._event("content", change)
                if self.is_ended:
                    yield self._event("end", {"message": self._describe(self), "blocks": self.blocks[num_blocks:]})
                    return
                if time.monotonic() - told_at >= PROGRESS_SECONDS or told_state != self.state:
                    told_at, told_state = time.monotonic(), self.state
                    yield self._event("progress", self.progress(), num_content)
                await _wait(news, PROGRESS_SECONDS)
        finally:
            self._readers.discard(news)

    @property
    def thinking_seconds(self) -> float | None:
        """Duration of the thinking so far; None if there was none."""
        if self._thinking_began is None:
            return None
        return round((self._thinking_ended or time.monotonic()) - self._thinking_began, 3)

    def progress(self) -> dict[str, Any]:
        """Where the answer is."""
        return {
            "state": self.state,
            "tokens": self.num_tokens,
            "thinking_tokens": self.num_reasoning_tokens,
            "seconds": round(time.monotonic() - self.began, 3),
            "thinking_seconds": self.thinking_seconds,
        }

    def _event(self, name: str, body: dict[str, Any], num_content: int | None = None) -> bytes:
        """An event whose id is the position after it. num_content: of a reader that has not seen all content."""
        place = self.content.length if num_content is None else num_content
        return f"id: {self.reasoning.length}.{place}\nevent: {name}\ndata: ".encode() + to_json(body) + b"\n\n"

    def _end_thinking(self) -> None:
        if self._thinking_began is not None and self._thinking_ended is None:
            self._thinking_ended = time.monotonic()

    def _wake(self) -> None:
        for news in self._readers:
            news.set()


async def _render(sources: list[str]) -> list[str]:
    if sum(map(len, sources)) < LONG_BLOCK:
        return [render_block(source) for source in sources]
    return await asyncio.to_thread(lambda: [render_block(source) for source in sources])


async def _wait(news: asyncio.Event, seconds: float) -> None:
    """Wait for news, or for some seconds."""
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return
    news.clear()
