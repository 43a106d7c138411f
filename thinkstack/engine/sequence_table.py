"""The state of all running sequences as columns: one row per sequence."""

# Shapes in this file: R rows, T maximum context length in tokens, M blocks for T tokens.

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
from torch import Tensor

from thinkstack.engine.block_pool import BLOCK_SIZE, NULL_BLOCK
from thinkstack.engine.grammar import GrammarState
from thinkstack.engine.logits_processor import LogitsProcessor
from thinkstack.engine.prompt_logprobs import PromptLogprobs
from thinkstack.kernels import ops
from thinkstack.kernels.sampling import splitmix64
from thinkstack.types import Completion, FinishReason, SamplingParams

MAX_STOP_TOKEN_IDS = 8
"""Maximum stop_token_ids per request."""
TopLogprobs = tuple[numpy.ndarray, numpy.ndarray]
"""Token ids (K,) int64 and their log-probabilities (K,) fp32, best first; -inf for tokens without probability."""


class Output(NamedTuple):
    """The sampled tokens of a completion so far."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """Most likely alternatives of each token, if requested."""


@dataclass(eq=False)
class Request:
    """One prompt and its completions."""

    id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    completions: list[Completion | None] = field(default_factory=list)
    """One entry per completion; None until it is finished."""
    priority: int = 0
    """Requests with lower values are scheduled first."""
    grammars: tuple[GrammarState, ...] = ()
    """The grammar of each completion; empty: no grammar."""
    cache_salt: str = ""
    """Only requests with the same salt share cached prefixes."""
    tenant: str = ""
    """Whom the request is for; tenants take turns."""
    turn: int = 0
    """Number of the round in which the request is scheduled: the first waiting request of a tenant is in the current
    round, the next one in the round after it."""
    is_started: bool = False
    """Whether the request was admitted, so that it has tokens in the cache."""
    weights_version: int = 0
    num_draft_tokens: int = 0
    """Number of draft tokens proposed for this request."""
    num_accepted_tokens: int = 0
    """Number of draft tokens that the model accepted."""
    num_cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache when the request was first admitted, in full blocks."""
    error: str | None = None
    """Error message for completions with finish_reason="error"."""
    prompt_logprobs: PromptLogprobs | None = None
    """Log-probabilities of the prompt's tokens, complete before the first token is sampled; None without
    SamplingParams.prompt_logprobs."""
    rows: dict[int, int] = field(default_factory=dict)
    """Row of each running completion, by index of the completion."""
    queue_entries: list["QueueEntry"] = field(default_factory=list)
    """Entries of this request in the scheduler's queue."""

    @property
    def is_finished(self) -> bool:
        return all(completion is not None for completion in self.completions)

    @property
    def finished(self) -> list[Completion]:
        """The finished completions."""
        return [completion for completion in self.completions if completion is not None]

    def completion(self, output: Output, reason: FinishReason, experts: Tensor | None = None) -> Completion:
        """A finished completion of this request."""
        return Completion(
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            finish_reason=reason,
            weights_version=self.weights_version,
            top_logprobs=tuple(map(pairs, output.top_logprobs)) if self.sampling.top_logprobs else None,
            experts=experts,
        )


def pairs(likely: TopLogprobs) -> tuple[tuple[int, float], ...]:
    """(id, log-probability) of tokens that have a probability."""
    pairs = zip(*(column.tolist() for column in likely), strict=True)
    return tuple((token, value) for token, value in pairs if value != -numpy.inf)


@dataclass(frozen=True, eq=False)
class QueueEntry:
    """Completions that wait for rows: all completions of a new request, or one preempted completion with its output."""

    request: Request
    indices: tuple[int, ...]
    output: Output = Output()

    @property
    def priority_key(self) -> tuple[int, ...]:
        """Sort key: entries with lower keys are scheduled first."""
        return self.request.priority, self.request.turn, self.request.id, self.indices[0]


class SequenceTable:
    """Rows 0..num_rows-1 are for sequences; an additional row is for padding and refers to NULL_BLOCK only."""

    def __init__(self, num_rows: int, max_tokens: int, vocab_size: int):
        self.free_rows = list(range(num_rows))  # a heap: low rows first
        self.requests: list[tuple[Request, int] | None] = [None] * num_rows
        """Request and completion index of each row; None for a free row."""
        self.blocks: list[list[int]] = [[] for _ in range(num_rows)]
        """Allocated blocks of each row, in order."""
        self.block_hashes: list[list[bytes]] = [[] for _ in range(num_rows)]
        """root_hash, then the hashes of the row's full computed blocks."""
        self.sibling_rows: list[list[int]] = [[] for _ in range(num_rows)]
        """Rows of the same request that start after this row has computed the common prompt."""
        width = -(-max_tokens // BLOCK_SIZE)
        self.block_tables = numpy.full((num_rows + 1, width), NULL_BLOCK, dtype=numpy.int32)
        """`blocks` in the format of the kernels, (R + 1, M)."""
        self.ids = numpy.zeros((num_rows + 1, max_tokens + 1), dtype=numpy.int64)
        """Prompt and output tokens, (R + 1, T + 1)."""
        self.logprobs = numpy.zeros((num_rows, max_tokens + 1), dtype=numpy.float32)
        """Log-probabilities of the output tokens, indexed like `ids`."""
        self.num_prompt_tokens, self.num_tokens, self.num_computed_tokens, self.max_num_tokens = numpy.zeros(
            (4, num_rows + 1), dtype=numpy.int64
        )
        """Per row, the number of prompt tokens; of prompt and output tokens; of tokens in the cache; and the maximum
        number of prompt and output tokens."""
        self.num_draft_tokens = numpy.zeros(num_rows + 1, dtype=numpy.int64)
        """Per row: number of draft tokens, stored in `ids` after the first num_tokens."""
        self.awaits_prompt = numpy.zeros(num_rows + 1, dtype=bool)
        """Whether the row waits for a sibling row to compute the common prompt."""
        self.scores_prompt = numpy.zeros(num_rows + 1, dtype=bool)
        """Whether log-probabilities of the row's prompt are still to be computed, so that it takes no cached blocks."""
        self.seed = numpy.zeros(num_rows, dtype=numpy.uint64)
        self.temperature, self.top_p, self.min_p = numpy.zeros((3, num_rows), dtype=numpy.float32)
        self.top_k = numpy.zeros(num_rows, dtype=numpy.int64)
        self.is_unfiltered = numpy.ones(num_rows, dtype=bool)
        """Whether top_k, top_p and min_p are all neutral."""
        columns = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        self.row_sampler = ops.RowSampler(
            **columns, seed=self.seed, num_tokens=self.num_tokens, num_prompt_tokens=self.num_prompt_tokens
        )
        self.options = LogitsProcessor(vocab_size, self.ids, self.num_tokens, self.num_prompt_tokens)
        """The other sampling options."""
        self.top_logprobs: list[list[TopLogprobs]] = [[] for _ in range(num_rows)]
        """Most likely alternatives of each output token, if requested."""
        self.stop_token_ids = numpy.full((MAX_STOP_TOKEN_IDS, num_rows), -1, dtype=numpy.int64)

    def assign_row(self, waiting: QueueEntry, index: int, root: bytes) -> int:
        """Assign a free row to completion `index` of a queue entry; returns the row."""
        request, sampling, output = waiting.request, waiting.request.sampling, waiting.output
        row = heapq.heappop(self.free_rows)
        self.requests[row] = request, index
        request.rows[index] = row
        self.block_hashes[row] = [root]
        prompt = len(request.prompt_token_ids)
        num_tokens = prompt + len(output.token_ids)
        self.ids[row, :prompt] = request.prompt_token_ids
        self.ids[row, prompt:num_tokens] = output.token_ids
        self.logprobs[row, prompt:num_tokens] = output.logprobs
        self.num_prompt_tokens[row], self.num_tokens[row], self.num_computed_tokens[row] = prompt, num_tokens, 0
        self.max_num_tokens[row], self.seed[row] = prompt + sampling.max_tokens, completion_seed(sampling.seed, index)
        self.temperature[row], self.top_p[row] = sampling.temperature, sampling.top_p
        self.top_k[row], self.min_p[row] = sampling.top_k, sampling.min_p
        self.is_unfiltered[row] = not sampling.top_k and sampling.top_p == 1 and not sampling.min_p
        self.scores_prompt[row] = request.prompt_logprobs is not None and not request.prompt_logprobs.is_complete
        self.assign_options(row)
        self.top_logprobs[row] = list(output.top_logprobs)
        self.stop_token_ids[:, row] = -1
        self.stop_token_ids[: len(sampling.stop_token_ids), row] = sampling.stop_token_ids
        return row

    def assign_options(self, row: int) -> None:
        """Set the other sampling options of a row from those of its request."""
        request, index = self.request_at(row)
        self.options.assign(row, request.sampling, request.grammars[index] if request.grammars else None)

    def priority_key(self, row: int) -> tuple[int, ...]:
        """Sort key of a running row, as `QueueEntry.priority_key`."""
        request, index = self.request_at(row)
        return request.priority, request.turn, request.id, index

    def request_at(self, row: int) -> tuple[Request, int]:
        """Request and completion index of a row in use."""
        found = self.requests[row]
        assert found is not None, f"row {row} is free"
        return found

    def output_ids(self, row: int) -> numpy.ndarray:
        """Output tokens so far, a view."""
        return self.ids[row, self.num_prompt_tokens[row] : self.num_tokens[row]]

    def output_of(self, row: int) -> Output:
        """Output so far."""
        logprobs = self.logprobs[row, self.num_prompt_tokens[row] : self.num_tokens[row]]
        return Output(tuple(self.output_ids(row).tolist()), tuple(logprobs.tolist()), tuple(self.top_logprobs[row]))

    def is_stop(self, rows: numpy.ndarray, tokens: numpy.ndarray) -> numpy.ndarray:
        """Whether each row's token is one of its stop tokens, (N,) bool."""
        return (tokens == self.stop_token_ids.take(rows, axis=1)).any(0)

    def append_blocks(self, row: int, blocks: Sequence[int]) -> None:
        """Append allocated blocks to a row."""
        start = len(self.blocks[row])
        self.blocks[row] += blocks
        self.block_tables[row, start : start + len(blocks)] = blocks

    def append(
        self, rows: numpy.ndarray, offsets: numpy.ndarray, tokens: numpy.ndarray, logprobs: numpy.ndarray
    ) -> None:
        """Append sampled tokens at `offsets` after num_tokens (from 0, in order); discards draft tokens."""
        places = self.num_tokens[rows] + offsets
        self.ids[rows, places] = tokens
        self.logprobs[rows, places] = logprobs
        if self.options.is_needed[rows].any():
            self.options.append(rows, offsets, tokens, places)
        self.num_tokens[rows] = places + 1  # for several tokens of one row, the last assignment is the final value
        self.num_draft_tokens[rows] = 0

    def finished(self, rows: numpy.ndarray) -> list[tuple[int, FinishReason]]:
        """The finished rows among `rows`, each with its finish reason; a stop token at the length limit counts as
        "stop"."""
        num_tokens = self.num_tokens[rows]
        stopped = self.is_stop(rows, self.ids[rows, num_tokens - 1])
        ended = (stopped | (num_tokens >= self.max_num_tokens[rows])).nonzero()[0]
        return [(int(rows[place]), "stop" if stopped[place] else "length") for place in ended.tolist()]

    def clear(self, row: int) -> None:
        """Free a row; the scheduler frees its blocks."""
        request, index = self.request_at(row)
        del request.rows[index]
        self.requests[row], self.blocks[row], self.block_hashes[row], self.sibling_rows[row] = None, [], [], []
        self.block_tables[row] = NULL_BLOCK
        self.awaits_prompt[row] = False
        self.num_draft_tokens[row] = 0
        self.scores_prompt[row] = False
        heapq.heappush(self.free_rows, row)


def completion_seed(seed: int, index: int) -> int:
    """Seed for `uniforms` of completion `index` of a request, an unsigned 64-bit integer."""
    start = (seed * 0x2545F4914F6CDD1D + index * 0x9E3779B97F4A7C15 + 1) % 2**64
    return int(splitmix64(numpy.array([start], dtype=numpy.uint64))[0])
