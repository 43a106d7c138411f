"""The incremental parser of an assistant turn: reasoning, content and tool calls, with constant work per character.

Its events equal the parse of the whole text (`parse_message` in text/parse.py), however the text is cut. Think
tags and the markup of tool calls count by token id: where the vocabulary has a control token for a tag, the spelling of
the tag in ordinary tokens is text. Where it has none, the spelling counts.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from thinkstack.text.decode import Markers, Stripper
from thinkstack.text.parse import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    FENCE,
    MAX_NAME,
    OLD_NAME,
    ThinkingFormat,
    find_stop,
    may_become_fenced,
    stop_at,
)
from thinkstack.text.tokenizer import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    THINK_CLOSE,
    THINK_OPEN,
    Control,
)
from thinkstack.types import FinishReason, ToolCall

Kind = Literal["reasoning", "content", "tool_call_start", "tool_call_delta", "tool_call", "finish"]
State = Literal["start", "thinking", "content", "calls", "name", "arguments", "after calls", "plain", "stopped"]
"""A part of a turn; "plain": content after malformed calls."""


@dataclass(slots=True)
class StreamEvent:
    """A part of an assistant turn."""

    kind: Kind
    text: str = ""
    """New text. With kind="reasoning" or "content", the texts of one kind add up to those of `parse_message`; with
    kind="tool_call_delta", to the arguments of the call."""
    tool_call: ToolCall | None = None
    """With kind="tool_call_start", a call with its name and without arguments; with kind="tool_call", the complete
    call."""
    index: int = 0
    """Number of the call in the turn, with the kinds of calls."""
    finish_reason: FinishReason | None = None
    """With kind="finish", the last event."""
    is_call_cut_off: bool = False
    """With kind="finish": a call has started and is not complete."""


_NEXT: dict[str, dict[str, State]] = {
    "thinking": {THINK_CLOSE: "content"},
    "content": {CALLS_BEGIN: "calls"},
    "calls": {CALL_BEGIN: "name", CALLS_END: "after calls"},
    "name": {CALL_SEP: "arguments"},
    "arguments": {CALL_END: "calls"},
}
"""By state: the tags that end it, and the state after each. There are also the states "start", "plain" (content after
malformed calls) and "stopped"."""
_NEXT_TAGGED: dict[str, dict[str, State]] = {
    "thinking": {THINK_CLOSE: "content"},
    "content": {THINK_OPEN: "thinking", THINK_CLOSE: "content", ANSWER_OPEN: "content", ANSWER_CLOSE: "content"},
}
_TAGS = frozenset((THINK_OPEN, THINK_CLOSE, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEP))
_NONE = Markers(())
_CLOSING_FENCE = Markers((f"{FENCE}\0",))


@cache
def _spelled(is_tagged: bool, token_tags: frozenset[str]) -> dict[str, Markers]:
    """The tags of each state that count by their spelling."""
    table = _NEXT_TAGGED if is_tagged else _NEXT
    return {state: Markers(tag for tag in ends if tag not in token_tags) for state, ends in table.items()}


class StreamParser:
    """Splits an assistant turn into reasoning, content and tool calls."""

    def __init__(
        self,
        thinking_format: ThinkingFormat = "think_then_answer",
        stop: Sequence[str] = (),
        token_tags: Collection[str] = (),
    ):
        """stop: strings that end the turn where they occur in the content; they are not part of it.

        thinking_format: with "think_answer_tags", all tags outside thinking are markup, and there are no calls. In
        other formats, a think block is thinking at the start of the turn only, and calls may follow the content.
        token_tags: control tokens of the vocabulary: of these tags, only a `Control` counts.
        """
        is_tagged = thinking_format == "think_answer_tags"
        self._token_tags = frozenset(tag for tag in _TAGS if tag in token_tags)
        self._next, self._markers = _NEXT_TAGGED if is_tagged else _NEXT, _spelled(is_tagged, self._token_tags)
        self.state: State = "content" if is_tagged else "start"
        """The part of the turn that the next text belongs to; "start": nothing but blanks so far."""
        self.num_tags = 0
        """Number of think and answer tags so far."""
        self._buffer = ""
        """Text that may become a tag of the state."""
        self._held: list[str] = []
        """Blanks before the turn, which are content without a think block; later the text of calls before the first
        name is known, and blanks between calls: content if it is malformed."""
        self._stop, self._stop_markers, self._content = tuple(stop), Markers(stop), ""
        """_content: text that may become a stop string."""
        self.stop_string: str | None = None
        """The stop string that was found."""
        self._strippers: dict[Kind, Stripper] = {"reasoning": Stripper(), "content": Stripper()}
        self._has_content = False
        self._num_calls = 0
        self._name, self._arguments, self._tail = "", list[str](), ""
        """The call that is parsed; _tail: end of the arguments that may be the closing fence."""
        self._is_fenced: bool | None = False
        """Whether the arguments are in a fenced block; None: not known yet."""
        self._events: list[StreamEvent] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found; all further text is ignored."""
        return self.state == "stopped"

    @property
    def is_undecided(self) -> bool:
        """Whether it is not known yet which part of the turn the last text belongs to."""
        is_call = self.state in ("calls", "name", "arguments", "after calls")
        return self.state == "start" or bool(self._content) or (is_call and bool(self._held))

    @property
    def plain_kind(self) -> Literal["reasoning", "content"] | None:
        """The kind of all further text up to the next control token, where no spelled tag or stop string can end it."""
        if self._markers.get(self.state, _NONE):
            return None
        if self.state == "thinking":
            return "reasoning"
        return "content" if self.state in ("content", "plain") and not self._stop else None

    def feed_plain(self, text: str) -> list[StreamEvent]:
        """`feed` for text while there is a `plain_kind`."""
        self._take(text)
        events, self._events = self._events, []
        return events

    def feed(self, text: str) -> list[StreamEvent]:
        """The events that are final after this text, or after this control token (a `Control`)."""
        if isinstance(text, Control) and text in self._token_tags:
            self._feed_tag(text)
        else:
            self._feed_text(text)
        events, self._events = self._events, []
        return events

    def skip(self, opening: Iterable[str]) -> None:
        """Continue after these texts and control tokens without events; stop strings in them, and tags that they only
        begin, do not count."""
        stop, self._stop, self._stop_markers = self._stop, (), _NONE
        for piece in opening:
            self.feed(piece)
        if self.state == "start" and self._buffer:
            self.state = "content"
        self._take(self._buffer)
        self._buffer, self._events = "", []
        self._held.clear()
        self._stop, self._stop_markers = stop, Markers(stop)
        for stripper in self._strippers.values():
            stripper.skip()

    def finish(self, reason: FinishReason) -> list[StreamEvent]:
        """The last events. reason: why the turn ends, if not by a stop string."""
        if self.state != "start":
            self._take(self._buffer)
        held = "".join(self._held) + (self._buffer if self.state == "start" else "")
        is_call_cut_off = self.state == "arguments" and self._is_fenced is not None
        if not self.is_stopped and not is_call_cut_off and (held.strip() or not self._num_calls):
            self._add_content(held)
        if not self.is_stopped:
            self._emit("content", self._content)
        reason = "stop" if self.is_stopped else reason
        self._events.append(StreamEvent("finish", finish_reason=reason, is_call_cut_off=is_call_cut_off))
        return self._events

    def _feed_text(self, text: str) -> None:
        self._buffer += text
        if self.state == "start":
            self._start()
        while self.state not in ("start", "stopped"):
            state, markers = self.state, self._markers.get(self.state, _NONE)
            found = markers.find(self._buffer)
            end = found.start() if found else len(self._buffer) - markers.partial(self._buffer)
            ready, self._buffer = self._buffer[:end], self._buffer[found.end() if found else end :]
            self._take(ready)
            if found is None:
                break
            if self.state == state:
                self._enter(found[0])
            else:
                self._buffer = found[0] + self._buffer

    def _feed_tag(self, tag: Control) -> None:
        text, self._buffer = self._buffer, ""
        if self.state == "start" and tag in (THINK_OPEN, THINK_CLOSE) and not text.strip():
            self._held.clear()
            self.num_tags += 1
            self.state = "thinking" if tag == THINK_OPEN else "content"
            return
        if self.state == "start":
            self.state, text = "content", "".join(self._held) + text
            self._held.clear()
        self._take(text)
        if tag in self._next.get(self.state, ()):
            self._enter(tag)
        else:
            self._take(str(tag))

    def _start(self) -> None:
        """Find a think block at the start of the turn."""
        head = self._buffer.lstrip()
        self._held.append(self._buffer[: len(self._buffer) - len(head)])
        self._buffer = head
        tags = [tag for tag in (THINK_OPEN, THINK_CLOSE) if tag not in self._token_tags]
        if not head or any(tag != head and tag.startswith(head) for tag in tags):
            return  # undecided
        tag = next((tag for tag in tags if head.startswith(tag)), "")
        self.state = "thinking" if tag == THINK_OPEN else "content"
        self.num_tags += bool(tag)
        self._buffer = head.removeprefix(tag) if tag else "".join(self._held) + head
        self._held.clear()

    def _enter(self, tag: str) -> None:
        """Continue with the state after a tag."""
        before, self.state = self.state, self._next[self.state][tag]
        if before in ("thinking", "content") and self.state != "calls":
            self.num_tags += 1
        elif before == "arguments":
            self._end_call()
        else:
            self._held.append(tag)
        if self.state == "name":
            self._name, self._arguments, self._tail = "", [], ""
        elif self.state == "arguments" and not self._name.strip():
            self._add_malformed()
        elif self.state == "arguments":
            self._is_fenced = None if self._name == "function" else False
            if self._is_fenced is False:
                self._start_call()
        elif self.state == "after calls" and self._num_calls:
            self._held.clear()

    def _take(self, text: str) -> None:
        """Add text of the current state."""
        if self.state == "thinking":
            self._emit("reasoning", text)
        elif self.state == "arguments":
            self._add_arguments(text)
        elif self.state in ("calls", "name", "after calls"):
            self._held.append(text)
            self._name += text if self.state == "name" else ""
            is_name = "\n" not in text and len(self._name) <= MAX_NAME
            if not is_name if self.state == "name" else text.strip():
                self._add_malformed()
        elif not self.is_stopped:
            self._add_content(text)

    def _add_malformed(self) -> None:
        """Add the text of malformed calls, and all further text, to the content."""
        self.state, text = "plain", "".join(self._held)
        self._held.clear()
        self._add_content(text)

    def _start_call(self) -> None:
        self._emit("content", self._content)
        self._content = ""
        self._held.clear()
        call = ToolCall(name=self._name, arguments="")
        self._events.append(StreamEvent("tool_call_start", tool_call=call, index=self._num_calls))

    def _add_arguments(self, text: str) -> None:
        if self._is_fenced is None:
            self._held.append(text)
            self._tail += text
            if may_become_fenced(self._tail):
                return
            self._decide_fence()
            return
        text = self._tail + text
        end = len(text) - (_CLOSING_FENCE.partial(text) if self._is_fenced else 0)
        self._tail = text[end:]
        self._add_delta(text[:end])

    def _decide_fence(self) -> None:
        """Start a call of R1's syntax, or of a function that is called "function"."""
        found = re.match(OLD_NAME, self._tail)
        self._is_fenced, text, self._tail = found is not None, self._tail, ""
        if found:
            self._name, text = found[1], text[found.end() :]
        self._start_call()
        self._add_arguments(text)

    def _add_delta(self, text: str) -> None:
        if text:
            self._arguments.append(text)
            self._events.append(StreamEvent("tool_call_delta", text, index=self._num_calls))

    def _end_call(self) -> None:
        if self._is_fenced is None:
            self._decide_fence()
        if not self._is_fenced or self._tail != FENCE:
            self._add_delta(self._tail)
        call = ToolCall(name=self._name, arguments="".join(self._arguments))
        self._events.append(StreamEvent("tool_call", tool_call=call, index=self._num_calls))
        self._num_calls += 1

    def _add_content(self, text: str) -> None:
        text = self._content + (text if self._has_content else text.lstrip("\n"))
        self._has_content |= bool(text)
        end = find_stop(text, self._stop)
        if end is not None:
            self.state = "stopped"
            self.stop_string = stop_at(text, end, self._stop)
        else:
            end = len(text) - self._stop_markers.partial(text)
        self._content = text[end:]
        self._emit("content", text[:end])

    def _emit(self, kind: Kind, text: str) -> None:
        text = self._strippers[kind].feed(text)
        if text:
            self._events.append(StreamEvent(kind, text))
