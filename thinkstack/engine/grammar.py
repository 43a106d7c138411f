"""Grammars: which tokens may follow the output of a completion, as a mask that advances with the output.

A grammar has one state per completion and is given each token once; it is advanced over draft tokens and rolled back.
The protocol is that of llguidance and xgrammar: `LLMatcher.try_consume_tokens`, `rollback` and
`fill_next_token_bitmask` of llguidance, `GrammarMatcher.accept_token`, `rollback` and `fill_next_token_bitmask` of
xgrammar.
"""

# Shapes in this file: B entries to sample, V vocabulary size.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy


class Grammar(Protocol):
    """The state of a grammar after the output of one completion."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Continue after these tokens. Raises RequestError if the grammar does not allow them."""

    def rollback(self, num_tokens: int) -> None:
        """Return to the state before the last `num_tokens` tokens."""

    def fill_bitmask(self, bitmask: numpy.ndarray, index: int) -> None:
        """Write the tokens that may follow to row `index` of bitmask (B, ceil(V / 32)) int32: bit i of word w is token
        32 * w + i. Includes a stop token if the completion may end."""


GrammarFactory = Callable[[], Grammar]
"""Function that returns a grammar in its first state; called once per completion."""


class StructuredOutputs(Protocol):
    """A `GrammarFactory` whose grammar can also be sent to a vLLM server, which compiles it."""

    def __call__(self) -> Grammar:
        """A grammar in its first state."""

    @property
    def params(self) -> Mapping[str, Any]:
        """vLLM's sampling parameter structured_outputs."""

    @property
    def trigger(self) -> int | None:
        """The grammar starts with this token, after free content; None: at the first token of the content."""

    @property
    def think_open(self) -> int | None:
        """The token with which the model may begin thinking itself; None: it cannot."""

    @property
    def phase(self) -> Literal["start", "thinking", "gap", "free", "grammar"]:
        """The part of the turn that the prompt ends with: nothing, thinking, the end of the thinking, free content, or
        content that follows the grammar."""


@dataclass
class GrammarState:
    """The grammar of a completion; it is kept if the completion is preempted."""

    grammar: Grammar
    num_tokens: int = 0
    """Number of output tokens that the grammar was advanced over."""

    def fill(self, bitmask: numpy.ndarray, index: int, output: Sequence[int], drafts: Sequence[int]) -> None:
        """Fill row `index` of a bitmask for the token after `output`, and the rows after it for the tokens after each
        of `drafts` up to the first that is not allowed: the other rows are not used.

        output: the output tokens that the grammar was not advanced over. drafts: without stop tokens."""
        self.grammar.advance(output)
        self.num_tokens += len(output)
        self.grammar.fill_bitmask(bitmask, index)
        num_advanced = 0
        for token in drafts:
            if not bitmask[index + num_advanced, token // 32] >> token % 32 & 1:
                break
            self.grammar.advance([token])
            num_advanced += 1
            self.grammar.fill_bitmask(bitmask, index + num_advanced)
        if num_advanced:
            self.grammar.rollback(num_advanced)
