"""The state of a grammar in an assistant's turn: thinking and free text pass, the content follows the grammar.

`TurnGrammar` has the interface of `Grammar` in engine/grammar.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import split_thinking
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN, Tokenizer
from thinkstack.types import RequestError

Phase = Literal["start", "thinking", "gap", "free", "grammar"]
"""The part of the turn after a token: no part yet; thinking; line breaks after it; free content before the trigger;
text that follows the grammar."""
MAX_BREAKS = 2
"""Maximum number of tokens of line breaks before the content."""


@dataclass(frozen=True)
class TurnTokens:
    """The tokens of a vocabulary that structure a turn."""

    tokenizer: Tokenizer
    vocab_size: int
    stop: tuple[int, ...]
    breaks: tuple[int, ...]
    """Tokens of one and of two line breaks; before the content they are not part of it."""
    think_open: int | None
    think_close: int | None
    """None: the vocabulary has no think tags, and their spelling counts."""
    may_think: bool
    """Whether the model may begin thinking itself; False for V3."""

    @classmethod
    def of(cls, chat: ChatFormat, vocab_size: int) -> TurnTokens:
        """The tokens of a chat format. vocab_size: that of llguidance's tokenizer."""
        tokenizer = chat.tokenizer
        breaks = [ids[0] for ids in map(tokenizer.encode, ("\n", "\n\n")) if len(ids) == 1]
        tags = (tokenizer.control.get(THINK_OPEN), tokenizer.control.get(THINK_CLOSE))
        return cls(tokenizer, vocab_size, chat.stop_token_ids, tuple(breaks), *tags, may_think=chat.name != "v3")


class TurnGrammar:
    """The grammar of one turn.

    Thinking that the prompt or the model begins passes freely up to its closing tag, whether the model writes the tag
    or a thinking budget injects it; it cannot end the turn. If the vocabulary has no think tags, only thinking that
    the prompt begins passes.
    """

    def __init__(self, matcher: LLMatcher, tokens: TurnTokens, trigger: int | None = None):
        """trigger: the token with which the grammar starts in the content; None: it starts with the content."""
        self._matcher, self._tokens, self._trigger = matcher, tokens, trigger
        self._phases: list[Phase] = ["start"]
        """The phase at the start and after each token."""
        self._ids: list[int] = []
        self._bitmask = allocate_token_bitmask(1, tokens.vocab_size)

    @property
    def phase(self) -> Phase:
        """The phase after the last token."""
        return self._phases[-1]

    def begin(self, opening_ids: Sequence[int]) -> None:
        """Start after the part of the turn that the prompt contains. Raises RequestError like `advance`."""
        if self._tokens.think_close is not None:
            self.advance(opening_ids)
            return
        opening = self._tokens.tokenizer.decode(opening_ids)
        thinking, rest = split_thinking(opening)
        self._phases = ["thinking" if thinking is not None and THINK_CLOSE not in opening else "gap"]
        self.advance(self._tokens.tokenizer.encode(rest.lstrip("\n")))

    def advance(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            phase = self._next_phase(self._phases[-1], token)
            if phase == "grammar" and self._matcher.try_consume_tokens([token]) != 1:
                text = self._tokens.tokenizer.decode([token])
                raise RequestError(f"token {token} ({text!r}) is not allowed after {len(self._ids)} tokens")
            self._phases.append(phase)
            self._ids.append(token)

    def rollback(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        num_constrained = self._phases[-num_tokens:].count("grammar")
        if num_constrained and not self._matcher.rollback(num_constrained):
            raise RequestError(f"{num_constrained} tokens cannot be taken back: {self._matcher.get_error()}")
        del self._phases[-num_tokens:], self._ids[-num_tokens:]

    def fill_bitmask(self, bitmask: numpy.ndarray, index: int) -> None:
        row, phase = bitmask[index].view(numpy.uint32), self._phases[-1]
        if phase in ("thinking", "free") or (self._trigger is not None and phase != "grammar"):
            row[:] = 0xFFFFFFFF
            if phase == "thinking" and self._trigger is None:
                _set(row, self._tokens.stop, False)
            return
        fill_next_token_bitmask(self._matcher, self._bitmask, 0)
        if self._matcher.is_error():
            raise RequestError(self._matcher.get_error().partition("\n<state>")[0])
        num_words = min(len(row), self._bitmask.shape[1])
        row[:] = 0
        row[:num_words] = self._bitmask.view(numpy.uint32)[0, :num_words]
        if phase == "grammar":
            return
        if self._phases[-MAX_BREAKS - 1 :].count(phase) <= MAX_BREAKS:
            _set(row, self._tokens.breaks, True)
        if phase == "start" and self._tokens.may_think and self._tokens.think_open is not None:
            _set(row, (self._tokens.think_open,), True)

    def _next_phase(self, phase: Phase, token: int) -> Phase:
        tokens = self._tokens
        if phase == "grammar":
            return phase
        if phase == "start" and token == tokens.think_open:
            return "thinking"
        if phase == "start" and token == tokens.think_close:
            return "gap"
        if phase == "thinking" and self._closes_thinking(token):
            return "gap"
        if phase == "thinking" or (phase in ("start", "gap") and token in tokens.breaks):
            return phase
        return "grammar" if self._trigger in (None, token) else "free"

    def _closes_thinking(self, token: int) -> bool:
        if self._tokens.think_close is not None:
            return token == self._tokens.think_close
        recent = self._tokens.tokenizer.decode([*self._ids[-len(THINK_CLOSE) :], token])
        _, closed, rest = recent.partition(THINK_CLOSE)
        if rest.strip("\n"):
            raise RequestError(f"a token contains the end of the thinking and {rest!r}")
        return bool(closed)


def _set(row: numpy.ndarray, tokens: Sequence[int], is_allowed: bool) -> None:
    """Allow or forbid tokens in a row of a bitmask, uint32 words."""
    for token in tokens:
        if token < 32 * len(row):
            bit = numpy.uint32(1 << token % 32)
            row[token // 32] = row[token // 32] | bit if is_allowed else row[token // 32] & ~bit
