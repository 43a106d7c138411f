"""Who is decoded when: a queue of prompts, and the table of sequences in the cache's slots."""

from collections import deque
from dataclasses import dataclass, field

import numpy
import torch

from thinkstack.types import Completion, FinishReason, Sampling

MAX_STOP_IDS = 8
"""Stop tokens a request may name."""


@dataclass
class Request:
    """One prompt and the answers drawn for it so far."""

    id: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    completions: list[Completion | None] = field(default_factory=list)
    """One place per answer; None until it is finished."""
    weights_version: int = 0

    @property
    def is_finished(self) -> bool:
        return all(completion is not None for completion in self.completions)


class SlotTable:
    """What is known of the sequence in each slot, as columns. Rows 0..count-1 are being decoded; the rest is free."""

    def __init__(self, num_slots: int, max_tokens: int, experts: tuple[int, int, str] | None = None):
        """experts: layers that have some, experts per token and their integer type, if choices are kept."""
        self.count = 0
        self.owner: list[tuple[Request, int]] = []
        """Request and index of the answer, per row."""
        self.tokens = numpy.zeros((num_slots, max_tokens), dtype=numpy.int64)
        """Tokens drawn."""
        self.log_probs = numpy.zeros((num_slots, max_tokens), dtype=numpy.float32)
        self.drawn = numpy.zeros(num_slots, dtype=numpy.int64)
        """Number of tokens drawn."""
        self.length = numpy.zeros(num_slots, dtype=numpy.int64)
        """Tokens in the cache: the prompt and all drawn tokens but the last."""
        self.limit = numpy.zeros(num_slots, dtype=numpy.int64)
        self.seed = numpy.zeros(num_slots, dtype=numpy.uint64)
        self.temperature = numpy.zeros(num_slots, dtype=numpy.float32)
        self.top_p = numpy.ones(num_slots, dtype=numpy.float32)
        self.stop_ids = numpy.full((num_slots, MAX_STOP_IDS), -1, dtype=numpy.int64)
        self.experts: numpy.ndarray | None = None
        """Experts of the tokens in the cache, (slots, tokens, L, K); None where nobody asked for them."""
        if experts is not None:
            self.experts = numpy.zeros((num_slots, max_tokens, *experts[:2]), dtype=experts[2])

    def open(self, request: Request, answer: int) -> int:
        """Give the next free row to one answer of `request`; returns the row."""
        row, sampling = self.count, request.sampling
        self.owner.append((request, answer))
        self.drawn[row] = 0
        self.length[row] = len(request.prompt_ids)
        self.limit[row] = sampling.max_tokens
        self.seed[row] = answer_seed(sampling.seed, answer)
        self.temperature[row] = sampling.temperature
        self.top_p[row] = sampling.top_p
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(sampling.stop_ids)] = sampling.stop_ids
        self.count += 1
        return row

    def append(self, rows: slice, tokens: numpy.ndarray, log_probs: numpy.ndarray) -> None:
        """Note the token just drawn in each row of `rows`."""
        index = numpy.arange(rows.start, rows.stop)
        self.tokens[index, self.drawn[rows]] = tokens
        self.log_probs[index, self.drawn[rows]] = log_probs
        self.drawn[rows] += 1

    def finished(self) -> dict[int, FinishReason]:
        """Rows whose last token ended them, with the reason; a stop token on the last place is still a stop."""
        rows = numpy.arange(self.count)
        last = self.tokens[rows, self.drawn[: self.count] - 1]
        stopped = (last[:, None] == self.stop_ids[: self.count]).any(1)
        full = self.drawn[: self.count] >= self.limit[: self.count]
        return {int(row): "stop" if stopped[row] else "length" for row in numpy.flatnonzero(stopped | full)}

    def close(self, row: int, reason: FinishReason) -> int:
        """Hand the row's answer to its request and move the last row into the gap; returns the row that moved."""
        request, answer = self.owner[row]
        drawn = int(self.drawn[row])
        request.completions[answer] = Completion(
            token_ids=tuple(self.tokens[row, :drawn].tolist()),
            log_probs=tuple(self.log_probs[row, :drawn].tolist()),
            finish_reason=reason,
            weights_version=request.weights_version,
            experts=None if self.experts is None else torch.from_numpy(self.experts[row, : self.length[row]].copy()),
        )
        self.count -= 1
        last = self.count
        columns: tuple[numpy.ndarray, ...] = (self.tokens, self.log_probs, self.drawn, self.length, self.limit)
        kept = () if self.experts is None else (self.experts,)
        for column in (*columns, *kept, self.seed, self.temperature, self.top_p, self.stop_ids):
            column[row] = column[last]
        self.owner[row] = self.owner[last]
        self.owner.pop()
        return last


class Scheduler:
    """First come, first served. A request's answers start together, so that its prompt is prefilled once."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.waiting: deque[Request] = deque()

    def admit(self, running: int, max_prefill_tokens: int) -> list[Request]:
        """Take requests from the queue's head while their answers fit the free slots and their prompts one prefill."""
        admitted: list[Request] = []
        tokens = 0
        while self.waiting and running + self.waiting[0].sampling.n <= self.num_slots:
            tokens += len(self.waiting[0].prompt_ids)
            if admitted and tokens > max_prefill_tokens:
                break
            admitted.append(self.waiting.popleft())
            running += admitted[-1].sampling.n
        return admitted


def answer_seed(seed: int, answer: int) -> int:
    """Seed of one of a request's answers, as an unsigned 64-bit number."""
    return (seed * 0x2545F4914F6CDD1D + answer * 0x9E3779B97F4A7C15 + 1) % 2**64
