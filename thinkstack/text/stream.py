"""Streaming: an assistant turn from token ids to events, with constant work per token."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

from thinkstack.text.chat import ChatFormat
from thinkstack.text.decode import Markers, TextDecoder
from thinkstack.text.parse import ThinkingFormat, find_stop
from thinkstack.text.stream_parser import State, StreamEvent, StreamParser
from thinkstack.types import FinishReason

TokenKind = Literal["reasoning", "content", "tool_call", "markup"]
"""The part of the turn that a token belongs to; "markup": think and answer tags, the end token, a stop string."""
_TOKEN_KINDS: dict[str, TokenKind] = {"thinking": "reasoning", "content": "content", "plain": "content"}
"""Kinds of the tokens of a state; of those of calls: "tool_call"."""


class TurnStream:
    """An assistant turn from token ids to events: for a chat, a server, or anything else that reads while it is
    sampled."""

    def __init__(
        self,
        chat: ChatFormat,
        opening: str | Sequence[str] | None = None,
        thinking_format: ThinkingFormat = "think_then_answer",
        stop: Sequence[str] = (),
    ):
        """opening: the start of the turn that the prompt contains: `ChatFormat.opening`, in which tags are control
        tokens, or `ChatFormat.opening_pieces`; None: chat.prefill. thinking_format, stop: see `StreamParser`."""
        opening = chat.prefill if opening is None else opening
        self._opening = chat.tokenizer.split_controls(opening) if isinstance(opening, str) else list(opening)
        self._decoder, self._stop_token_ids = TextDecoder(chat.tokenizer), frozenset(chat.stop_token_ids)
        self._special_ids = self._stop_token_ids.union(chat.tokenizer.control_of_id)
        self._parse = partial(StreamParser, thinking_format, stop, chat.tokenizer.control)
        self._parser = self._parse()
        self._events: list[StreamEvent] = []
        """Events of the opening that are not reported yet."""
        self._events += [event for piece in self._opening for event in self._parser.feed(piece)]
        self._held_stop: int | None = None
        """A stop token, which is text if other tokens follow."""
        self._num_undecided = 0
        self.token_kinds: list[TokenKind] = []
        """The part of the turn of each token. The last tokens are missing while it is not known, until `finish`. Line
        breaks around a part belong to it. If tags are spelled, the tokens of a tag belong to the part before it, except
        for the last one."""
        self.num_reasoning_tokens = 0
        """Number of tokens of the thinking so far, with its tags."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found, so that the request can be aborted."""
        return self._parser.is_stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._parser.stop_string

    @property
    def state(self) -> State:
        """The part of the turn that the next token belongs to; "start" if the prompt leaves it to the model, which may
        begin with thinking or with content."""
        return self._parser.state

    def skip_opening(self) -> None:
        """Leave the opening out of the events, before the first token: a server responds with what was sampled. Stop
        strings in the opening do not count."""
        self._parser, self._events = self._parse(), []
        self._parser.skip(self._opening)

    def feed(self, token_ids: Iterable[int]) -> list[StreamEvent]:
        """The events that are final after these tokens."""
        events, self._events = self._events, []
        plain: list[int] = []
        for token in token_ids:
            if token not in self._special_ids and self._held_stop is None and self._parser.plain_kind is not None:
                plain.append(token)
                continue
            events += self._take_plain(plain)
            plain = []
            if self._held_stop is not None:
                events += self._take(self._held_stop)
            self._held_stop = token if token in self._stop_token_ids else None
            if self._held_stop is None:
                events += self._take(token)
        return events + self._take_plain(plain)

    def finish(self, reason: FinishReason) -> list[StreamEvent]:
        """The last events."""
        events = [*self._events, *self._parser.feed(self._decoder.finish()), *self._parser.finish(reason)]
        self._decide(events)
        self.token_kinds += ["markup"] * (self._held_stop is not None)
        return events

    def _take_plain(self, token_ids: Sequence[int]) -> list[StreamEvent]:
        """`_take` for a run of tokens of one kind."""
        kind = self._parser.plain_kind
        if not token_ids or kind is None:
            return []
        self.token_kinds += [kind] * len(token_ids)
        if kind == "reasoning":
            self.num_reasoning_tokens += len(token_ids)
        return self._parser.feed_plain(self._decoder.feed_plain(token_ids))

    def _take(self, token: int) -> list[StreamEvent]:
        before, num_tags = self._parser.state, self._parser.num_tags
        events = [event for piece in self._decoder.feed_token(token) for event in self._parser.feed(piece)]
        state = self._parser.state
        if state == "thinking" or before == "thinking":
            self.num_reasoning_tokens += 1 + (self._num_undecided if before == "start" else 0)
        if self._parser.num_tags > num_tags and not events:
            self._decide(events, "markup" if before == "start" else None)
            self.token_kinds.append("markup")
        else:
            self._num_undecided += 1
            if events or not self._parser.is_undecided:
                self._decide(events)
        return events

    def _decide(self, events: Sequence[StreamEvent], kind: TokenKind | None = None) -> None:
        """Set the kind of the undecided tokens. events: those that these tokens have led to."""
        if any(event.kind == "content" for event in events):
            kind = "content"
        elif self._parser.is_stopped:
            kind = "markup"
        self.token_kinds += [kind or _TOKEN_KINDS.get(self._parser.state, "tool_call")] * self._num_undecided
        self._num_undecided = 0


class TextStream:
    """A completion of plain text from token ids to events of kind "content": `TurnStream` without parts of a turn."""

    num_reasoning_tokens = 0

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()):
        """stop: strings that end the text and are not part of it."""
        self._decoder = TextDecoder(chat.tokenizer, chat.stop_token_ids)
        self._stop, self._markers, self._held = tuple(stop), Markers(stop), ""
        self._num_undecided = 0
        self.is_stopped = False
        """Whether a stop string was found."""
        self.token_kinds: list[TokenKind] = []
        """"content" or "markup" (a stop string) of each token whose text is decided."""

    def feed(self, token_ids: Iterable[int]) -> list[StreamEvent]:
        """The events that are final after these tokens."""
        events = []
        for token in token_ids:
            self._num_undecided += 1
            events += self._take(self._decoder.feed([token]))
        return events

    def finish(self, reason: FinishReason) -> list[StreamEvent]:
        """The last events."""
        events = self._take(self._decoder.finish())
        events += [] if self.is_stopped else self._emit(self._held)
        self._decide("markup")
        return [*events, StreamEvent("finish", finish_reason="stop" if self.is_stopped else reason)]

    def _take(self, text: str) -> list[StreamEvent]:
        if self.is_stopped:
            return []
        text = self._held + text
        end = find_stop(text, self._stop)
        self.is_stopped = end is not None
        if end is None:
            end = len(text) - self._markers.partial(text)
        self._held = text[end:]
        return self._emit(text[:end])

    def _emit(self, text: str) -> list[StreamEvent]:
        if text:
            self._decide("content")
        return [StreamEvent("content", text)] if text else []

    def _decide(self, kind: TokenKind) -> None:
        self.token_kinds += [kind] * self._num_undecided
        self._num_undecided = 0


def stream_turn(
    chat: ChatFormat,
    token_ids: Iterable[int],
    opening: str | Sequence[str] | None = None,
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
