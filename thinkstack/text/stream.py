"""Streaming: token ids in, text or events out, with constant work per token.

A stream equals the parse of the whole text (`parse_message` in text/parse.py, cut at a stop string), however its tokens
are grouped.
"""

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN, ThinkingFormat, find_stop, parse_tool_calls
from thinkstack.text.tokenizer import CALLS_BEGIN, CALLS_END, THINK_CLOSE, THINK_OPEN, Tokenizer
from thinkstack.types import FinishReason, ToolCall

Kind = Literal["reasoning", "content", "tool_call", "finish"]


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A part of an assistant turn."""

    kind: Kind
    text: str = ""
    """New text, with kind="reasoning" or "content". The texts of one kind add up to those of `parse_message`."""
    tool_call: ToolCall | None = None
    """A complete call, with kind="tool_call"."""
    finish_reason: FinishReason | None = None
    """With kind="finish", the last event."""


class TextDecoder:
    """Decodes token ids as they come; together the texts equal `Tokenizer.decode` of all ids. Incomplete characters are
    held back, and so is a stop token, which is left out at the end."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Collection[int] = ()):
        self._tokenizer, self._stop_token_ids = tokenizer, frozenset(stop_token_ids)
        self._held_stop: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []
        """The last token whose text is out, and the tokens after it; for tokenizers that are not byte-level."""
        self._sent = ""
        """Text of the first token of the window."""

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that is final after these ids."""
        found = ""
        for token in token_ids:
            ready, self._held_stop = self._held_stop, []
            if token in self._stop_token_ids:
                self._held_stop = [token]
            else:
                ready = [*ready, token]
            found += "".join(map(self._decode, ready))
        return found

    def finish(self) -> str:
        """The rest of the text."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._window)[len(self._sent) :]

    def _decode(self, token: int) -> str:
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.bytes_of(token))
        if not self._tokenizer.has_text(token):
            return ""
        self._window.append(token)
        if self._tokenizer.is_fallback_byte(token):
            return ""  # the characters of bytes depend on the whole run of bytes
        text = self._tokenizer.decode(self._window)[len(self._sent) :]
        self._window = [token]
        self._sent = self._tokenizer.decode(self._window)
        return text


class Markers:
    """Strings to find in a text that comes in chunks; none of them starts another one."""

    def __init__(self, markers: Iterable[str]):
        self._pattern = re.compile("|".join(map(re.escape, markers)) or "(?!)")
        self._prefixes = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
        self._longest = max(map(len, self._prefixes), default=0)

    def find(self, text: str) -> re.Match[str] | None:
        """The first marker."""
        return self._pattern.search(text)

    def partial(self, text: str) -> int:
        """Length of the longest end of `text` that may become a marker."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[len(text) - size :] in self._prefixes:
                return size
        return 0


class Stripper:
    """Strips line breaks around a text that comes in chunks."""

    def __init__(self) -> None:
        self._num_breaks: int | None = None
        """Line breaks that are held back; None before the first other character."""

    def feed(self, text: str) -> str:
        """The text that is final."""
        if self._num_breaks is None:
            text = text.lstrip("\n")
            if not text:
                return ""
        body = text.rstrip("\n")
        breaks = self._num_breaks or 0
        self._num_breaks = len(text) - len(body) + (0 if body else breaks)
        return "\n" * breaks + body if body else ""


_NEXT = {
    "thinking": {THINK_CLOSE: "content"},
    "content": {CALLS_BEGIN: "calls"},
    "calls": {CALLS_END: "after calls"},
}
"""By state: the strings that end it, and the state after each. There are also the states "start", "plain" (content
after malformed calls) and "stopped"."""
_NEXT_TAGGED = {
    "thinking": {THINK_CLOSE: "content"},
    "content": {THINK_OPEN: "thinking", THINK_CLOSE: "content", ANSWER_OPEN: "content", ANSWER_CLOSE: "content"},
}
_NONE = Markers(())
_MARKERS, _MARKERS_TAGGED = ({state: Markers(ends) for state, ends in each.items()} for each in (_NEXT, _NEXT_TAGGED))


class StreamParser:
    """Splits the text of an assistant turn into reasoning, content and tool calls."""

    def __init__(self, thinking_format: ThinkingFormat = "think_then_answer", stop: Sequence[str] = ()):
        """stop: strings that end the turn where they occur in the content; they are not part of it.

        thinking_format: with "think_answer_tags", all tags outside thinking are markup, and there are no calls. In
        other formats, a think block is thinking at the start of the turn only, and calls may follow the content.
        """
        is_tagged = thinking_format == "think_answer_tags"
        self._next, self._markers = (_NEXT_TAGGED, _MARKERS_TAGGED) if is_tagged else (_NEXT, _MARKERS)
        self._state = "content" if is_tagged else "start"
        self._buffer = ""
        """Text that may become a marker of the state."""
        self._held: list[str] = []
        """Blanks before the turn, which are content without a think block; later the text of calls, which is content if
        it is malformed."""
        self._stop, self._stop_markers, self._content = tuple(stop), Markers(stop), ""
        """_content: text that may become a stop string."""
        self._strippers: dict[Kind, Stripper] = {"reasoning": Stripper(), "content": Stripper()}
        self._has_content = False
        self._events: list[StreamEvent] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found; all further text is ignored."""
        return self._state == "stopped"

    def feed(self, text: str) -> list[StreamEvent]:
        """The events that are final after this text."""
        self._buffer += text
        if self._state == "start":
            self._start()
        while self._state not in ("start", "stopped"):
            markers = self._markers.get(self._state, _NONE)
            found = markers.find(self._buffer)
            end = found.start() if found else len(self._buffer) - markers.partial(self._buffer)
            state, ready = self._state, self._buffer[:end]
            self._take(ready)
            self._buffer = self._buffer[found.end() if found else end :]
            if found is None:
                break
            if self._state == state:
                self._state = self._next[state][found[0]]
                if self._state in ("calls", "after calls"):
                    self._held.append(found[0])
        events, self._events = self._events, []
        return events

    def finish(self, reason: FinishReason) -> list[StreamEvent]:
        """The last events. reason: why the turn ends, if not by a stop string."""
        held, calls = "".join(self._held), tuple[ToolCall, ...]()
        if self._state in ("calls", "after calls"):
            held, calls = parse_tool_calls(held + self._buffer)
            self._add_content(held)
        elif self._state == "start":
            self._add_content(held + self._buffer)
        elif not self.is_stopped:
            self._take(self._buffer)
        if not self.is_stopped:
            self._emit("content", self._content)
            self._events += [StreamEvent("tool_call", tool_call=call) for call in calls]
        self._events.append(StreamEvent("finish", finish_reason="stop" if self.is_stopped else reason))
        return self._events

    def _start(self) -> None:
        """Find a think block at the start of the turn."""
        head = self._buffer.lstrip()
        self._held.append(self._buffer[: len(self._buffer) - len(head)])
        self._buffer = head
        if any(tag != head and tag.startswith(head) for tag in (THINK_OPEN, THINK_CLOSE)):
            return  # undecided
        self._state = "thinking" if head.startswith(THINK_OPEN) else "content"
        if head.startswith((THINK_OPEN, THINK_CLOSE)):
            self._buffer = head[head.index(">") + 1 :]
        else:
            self._buffer = "".join(self._held) + head
        self._held.clear()

    def _take(self, text: str) -> None:
        """Add text of the current state."""
        if self._state == "thinking":
            self._emit("reasoning", text)
        elif self._state in ("calls", "after calls"):
            self._held.append(text)
            if self._state == "after calls" and text.strip():  # malformed: nothing may follow calls
                self._state = "plain"
                self._add_content("".join(self._held))
        else:
            self._add_content(text)

    def _add_content(self, text: str) -> None:
        text = self._content + (text if self._has_content else text.lstrip("\n"))
        self._has_content |= bool(text)
        end = find_stop(text, self._stop)
        if end is not None:
            self._state = "stopped"
        else:
            end = len(text) - self._stop_markers.partial(text)
        self._content = text[end:]
        self._emit("content", text[:end])

    def _emit(self, kind: Kind, text: str) -> None:
        text = self._strippers[kind].feed(text)
        if text:
            self._events.append(StreamEvent(kind, text))


class TurnStream:
    """An assistant turn from token ids to events: for a chat, a server, or anything else that reads while it is
    sampled."""

    def __init__(
        self,
        chat: ChatFormat,
        opening: str | None = None,
        thinking_format: ThinkingFormat = "think_then_answer",
        stop: Sequence[str] = (),
    ):
        """opening: the start of the turn that the prompt contains; None: chat.prefill. thinking_format, stop: see
        `StreamParser`."""
        self._decoder = TextDecoder(chat.tokenizer, chat.stop_token_ids)
        self._parser = StreamParser(thinking_format, stop)
        self._opening = chat.prefill if opening is None else opening

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found, so that the request can be aborted."""
        return self._parser.is_stopped

    def feed(self, token_ids: Iterable[int]) -> list[StreamEvent]:
        """The events that are final after these tokens."""
        text, self._opening = self._opening + self._decoder.feed(token_ids), ""
        return self._parser.feed(text)

    def finish(self, reason: FinishReason) -> list[StreamEvent]:
        """The last events."""
        text, self._opening = self._opening + self._decoder.finish(), ""
        return [*self._parser.feed(text), *self._parser.finish(reason)]


def stream_turn(
    chat: ChatFormat,
    token_ids: Iterable[int],
    opening: str | None = None,
    thinking_format: ThinkingFormat = "think_then_answer",
) -> Iterator[StreamEvent]:
    """Yield the events of a turn; arguments as in `TurnStream`."""
    turn, token = TurnStream(chat, opening, thinking_format), None
    for token in token_ids:
        yield from turn.feed([token])
    yield from turn.finish("stop" if token in chat.stop_token_ids else "length")


def stream_text(chat: ChatFormat, token_ids: Iterable[int], opening: str | None = None) -> Iterator[str]:
    """Yield the text of a turn as it becomes final; together the chunks equal `ChatFormat.text_of`."""
    decoder = TextDecoder(chat.tokenizer, chat.stop_token_ids)
    yield chat.prefill if opening is None else opening
    for token in token_ids:
        yield decoder.feed([token])
    yield decoder.finish()


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
