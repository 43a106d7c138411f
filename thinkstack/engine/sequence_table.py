"""What is known of the sequence in each row of the engine, as columns."""

# Shapes in this file: R rows, T tokens of the longest context, M blocks of it.

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy
from torch import Tensor

from thinkstack import kernels
from thinkstack.engine.block_pool import BLOCK, NULL_BLOCK
from thinkstack.engine.sampler import is_plain, mix
from thinkstack.types import Completion, FinishReason, SamplingParams

MAX_STOP_TOKEN_IDS = 8
"""Stop tokens a request may name."""
TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids and their log-probabilities, best first."""


class Constraint(Protocol):
    """A grammar, or anything else that says which tokens an answer may go on with."""

    def allowed(self, index: int, output_token_ids: Sequence[int]) -> Tensor:
        """Which tokens may follow `output_token_ids`, (V,) bool; the end token must be among them where the answer may
        end."""


@dataclass(eq=False)
class Request:
    """One prompt and the answers drawn for it so far."""

    id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    completions: list[Completion | None] = field(default_factory=list)
    """One place per answer; None until it is finished."""
    priority: int = 0
    """Lower ones go first."""
    constraint: Constraint | None = None
    """What the answers must keep to."""
    cache_salt: str = ""
    """Only requests of the same salt share cached prefixes."""
    weights_version: int = 0
    num_draft_tokens: int = 0
    """Tokens that were guessed for it before the model decided."""
    num_accepted_tokens: int = 0
    """Of these, those that the model drew."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the cache when it was first admitted, in whole blocks."""
    error: str | None = None
    """What went wrong, for answers that end with "error"."""
    rows: dict[int, int] = field(default_factory=dict)
    """Row of each answer that has one."""
    queue_entries: list["Waiting"] = field(default_factory=list)
    """Its entries in the queue."""

    @property
    def is_finished(self) -> bool:
        return all(completion is not None for completion in self.completions)

    @property
    def finished(self) -> list[Completion]:
        """Those that are finished."""
        return [completion for completion in self.completions if completion is not None]


@dataclass(frozen=True, eq=False)
class Waiting:
    """Answers that wait for rows: those of a new request together, a preempted one alone with what it has drawn."""

    request: Request
    indices: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @property
    def key(self) -> tuple[int, int, int]:
        """Who comes first."""
        return self.request.priority, self.request.id, self.indices[0]


class SequenceTable:
    """Rows 0..num_rows-1 hold sequences; one more stands for padding and has spare blocks only."""

    def __init__(self, num_rows: int, max_tokens: int):
        self.free_rows = list(range(num_rows))  # a heap: low rows first
        self.requests: list[tuple[Request, int] | None] = [None] * num_rows
        """Request and index of the answer, per row."""
        self.blocks: list[list[int]] = [[] for _ in range(num_rows)]
        """Blocks held, in order."""
        self.block_hashes: list[list[bytes]] = [[] for _ in range(num_rows)]
        """Names of the first blocks, as far as they are full and computed, after the root."""
        self.sibling_rows: list[list[int]] = [[] for _ in range(num_rows)]
        """Rows that start from this row's prompt once it is computed."""
        width = -(-max_tokens // BLOCK)
        self.block_tables = numpy.full((num_rows + 1, width), NULL_BLOCK, dtype=numpy.int32)
        """`blocks` as the kernels read them, (R + 1, M)."""
        self.ids = numpy.zeros((num_rows + 1, max_tokens + 1), dtype=numpy.int64)
        """Prompt and drawn tokens, (R + 1, T + 1)."""
        self.logprobs = numpy.zeros((num_rows, max_tokens + 1), dtype=numpy.float32)
        """Of the drawn tokens, at the places of `ids`."""
        self.num_prompt_tokens, self.num_tokens, self.num_computed_tokens, self.max_num_tokens = numpy.zeros(
            (4, num_rows + 1), dtype=numpy.int64
        )
        """Tokens of the prompt; of prompt and answer; in the cache; most tokens of both."""
        self.num_draft_tokens = numpy.zeros(num_rows + 1, dtype=numpy.int64)
        """Tokens in `ids` after the known ones that are only guessed."""
        self.awaits_prompt = numpy.zeros(num_rows + 1, dtype=bool)
        """Whether the row waits for another one's prompt."""
        self.seed = numpy.zeros(num_rows, dtype=numpy.uint64)
        self.temperature, self.top_p, self.min_p = numpy.zeros((3, num_rows), dtype=numpy.float32)
        self.top_k = numpy.zeros(num_rows, dtype=numpy.int64)
        self.is_unfiltered = numpy.ones(num_rows, dtype=bool)
        """Whether top_k, top_p and min_p keep every token."""
        columns = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        self.row_sampler = kernels.RowSampler(
            **columns, seed=self.seed, num_tokens=self.num_tokens, num_prompt_tokens=self.num_prompt_tokens
        )
        self.needs_logits_processing = numpy.zeros(num_rows, dtype=bool)
        """Whether the row needs more than temperature and a kept set: penalties, a thinking budget, a grammar, ..."""
        self.is_thinking_closed = numpy.zeros(num_rows, dtype=bool)
        """Whether `think_end_token_ids` have been drawn."""
        self.top_logprobs: list[list[TopLogprobs]] = [[] for _ in range(num_rows)]
        """Most likely alternatives of each drawn token, where they are reported."""
        self.stop_token_ids = numpy.full((MAX_STOP_TOKEN_IDS, num_rows), -1, dtype=numpy.int64)

    def assign_row(self, waiting: Waiting, index: int, root: bytes) -> int:
        """Give a free row to one of the waiting answers."""
        request, sampling = waiting.request, waiting.request.sampling
        row = heapq.heappop(self.free_rows)
        self.requests[row] = request, index
        request.rows[index] = row
        self.block_hashes[row] = [root]
        prompt, num_tokens = (
            len(request.prompt_token_ids),
            len(request.prompt_token_ids) + len(waiting.output_token_ids),
        )
        self.ids[row, :prompt] = request.prompt_token_ids
        self.ids[row, prompt:num_tokens] = waiting.output_token_ids
        self.logprobs[row, prompt:num_tokens] = waiting.logprobs
        self.num_prompt_tokens[row], self.num_tokens[row], self.num_computed_tokens[row] = prompt, num_tokens, 0
        self.max_num_tokens[row], self.seed[row] = prompt + sampling.max_tokens, completion_seed(sampling.seed, index)
        self.temperature[row], self.top_p[row] = sampling.temperature, sampling.top_p
        self.top_k[row], self.min_p[row] = sampling.top_k, sampling.min_p
        self.is_unfiltered[row] = not sampling.top_k and sampling.top_p == 1 and not sampling.min_p
        has_budget = sampling.thinking_budget is not None
        self.needs_logits_processing[row] = not is_plain(sampling) or has_budget or request.constraint is not None
        self.needs_logits_processing[row] |= sampling.raw_logprobs or bool(sampling.top_logprobs)
        close = sampling.think_end_token_ids
        self.is_thinking_closed[row] = not has_budget or any(
            waiting.output_token_ids[at : at + len(close)] == close
            for at in range(len(waiting.output_token_ids) - len(close) + 1)
        )
        self.top_logprobs[row] = list(waiting.top_logprobs)
        self.stop_token_ids[:, row] = -1
        self.stop_token_ids[: len(sampling.stop_token_ids), row] = sampling.stop_token_ids
        return row

    def key(self, row: int) -> tuple[int, int, int]:
        """Who comes first, as `Waiting.key`."""
        request, index = self.request_at(row)
        return request.priority, request.id, index

    def request_at(self, row: int) -> tuple[Request, int]:
        """Request and answer of a row in use."""
        seq_index = self.requests[row]
        assert seq_index is not None, f"row {row} is free"
        return seq_index

    def output_of(self, row: int) -> tuple[tuple[int, ...], tuple[float, ...], tuple[TopLogprobs, ...]]:
        """Tokens drawn so far, their log-probabilities and, where reported, alternatives."""
        place = slice(self.num_prompt_tokens[row], self.num_tokens[row])
        return (
            tuple(self.ids[row, place].tolist()),
            tuple(self.logprobs[row, place].tolist()),
            tuple(self.top_logprobs[row]),
        )

    def is_stop(self, rows: numpy.ndarray, tokens: numpy.ndarray) -> numpy.ndarray:
        """Whether a token of each row ends its answer, (N,) bool."""
        return (tokens == self.stop_token_ids.take(rows, axis=1)).any(0)

    def append_blocks(self, row: int, blocks: Sequence[int]) -> None:
        """Add blocks to a row's."""
        start = len(self.blocks[row])
        self.blocks[row] += blocks
        self.block_tables[row, start : start + len(blocks)] = blocks

    def append(
        self, rows: numpy.ndarray, offsets: numpy.ndarray, tokens: numpy.ndarray, logprobs: numpy.ndarray
    ) -> None:
        """Note tokens just drawn: `offsets` counts a row's from 0, in order. Whatever was only guessed is forgotten."""
        places = self.num_tokens[rows] + offsets
        self.ids[rows, places] = tokens
        self.logprobs[rows, places] = logprobs
        self.num_tokens[rows] = places + 1  # of a row's several the last one stands
        self.num_draft_tokens[rows] = 0

    def finished(self, rows: numpy.ndarray) -> list[tuple[int, FinishReason]]:
        """Of `rows` those that their last token ended, with the reason; a stop token in the last place is a stop."""
        num_tokens = self.num_tokens[rows]
        stopped = self.is_stop(rows, self.ids[rows, num_tokens - 1])
        ended = (stopped | (num_tokens >= self.max_num_tokens[rows])).nonzero()[0]
        return [(int(rows[place]), "stop" if stopped[place] else "length") for place in ended.tolist()]

    def clear(self, row: int) -> None:
        """Free a row; its blocks are let go of elsewhere."""
        request, index = self.request_at(row)
        del request.rows[index]
        self.requests[row], self.blocks[row], self.block_hashes[row], self.sibling_rows[row] = None, [], [], []
        self.block_tables[row] = NULL_BLOCK
        self.awaits_prompt[row] = self.needs_logits_processing[row] = False
        self.num_draft_tokens[row] = 0
        heapq.heappush(self.free_rows, row)


def completion_seed(seed: int, index: int) -> int:
    """Seed of one of a request's answers, an unsigned 64-bit number, for `uniforms`."""
    start = (seed * 0x2545F4914F6CDD1D + index * 0x9E3779B97F4A7C15 + 1) % 2**64
    return int(mix(numpy.array([start], dtype=numpy.uint64))[0])
