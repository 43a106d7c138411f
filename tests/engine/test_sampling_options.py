"""Sampling options of all rows in one call against one row at a time, and grammars."""

from collections.abc import Sequence
from dataclasses import replace

import numpy
import pytest
import torch

from tests.engine.reference import sample_one
from thinkstack.engine.grammar import GrammarState
from thinkstack.engine.sampler import append_sampled, sample_rows
from thinkstack.engine.scheduler import RowsToSample
from thinkstack.engine.sequence_table import QueueEntry, Request, SequenceTable
from thinkstack.types import RequestError, SamplingParams

V = 40


class Recurring:
    """A grammar: token t may be followed by tokens whose distance from t is no multiple of 5, by the last digit."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def allowed(self) -> numpy.ndarray:
        last = self.tokens[-1] if self.tokens else 3
        return (numpy.arange(V) - last) % 5 != 0

    def advance(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if not self.allowed()[token]:
                raise RequestError(f"token {token} is not allowed")
            self.tokens.append(token)

    def rollback(self, num_tokens: int) -> None:
        del self.tokens[len(self.tokens) - num_tokens :]

    def fill_bitmask(self, bitmask: numpy.ndarray, index: int) -> None:
        fill(bitmask, index, self.allowed())


def fill(bitmask: numpy.ndarray, index: int, allowed: numpy.ndarray) -> None:
    """Write a mask (V,) bool to a row of a bitmask."""
    bits = numpy.zeros(bitmask.shape[1] * 32, dtype=bool)
    bits[: len(allowed)] = allowed
    bitmask[index] = numpy.packbits(bits, bitorder="little").view(numpy.int32)


def random_sampling(rng: numpy.random.Generator) -> tuple[SamplingParams, bool]:
    """Options, each with a probability of about one half, and whether there is a grammar."""
    options = {
        "presence_penalty": float(rng.uniform(-2, 2)),
        "frequency_penalty": float(rng.uniform(-2, 2)),
        "repetition_penalty": float(rng.uniform(0.5, 2)),
        "logit_bias": {int(token): float(rng.normal() * 3) for token in rng.integers(0, V, rng.integers(1, 9))},
        "allowed_token_ids": tuple(rng.permutation(V)[:20].tolist()),
        "min_tokens": int(rng.integers(1, 12)),
        "thinking_budget": int(rng.integers(0, 9)),
        "top_logprobs": int(rng.choice([1, 3, V])),
        "raw_logprobs": True,
        "top_k": int(rng.integers(1, 12)),
        "top_p": float(rng.uniform(0.3, 1)),
        "min_p": float(rng.uniform(0, 0.1)),
        "temperature": float(rng.choice([0.0, 0.7, 1.5])),
    }
    chosen = {name: value for name, value in options.items() if rng.random() < rng.choice([0.0, 0.3, 0.8])}
    if "thinking_budget" in chosen:
        chosen["think_end_token_ids"] = tuple(rng.integers(0, 3, rng.integers(1, 4)).tolist())
    stops = tuple(rng.integers(0, V, rng.integers(0, 4)).tolist())
    has_grammar = "thinking_budget" not in chosen and rng.random() < 0.3
    return SamplingParams(seed=int(rng.integers(0, 99)), stop_token_ids=stops, max_tokens=60, **chosen), has_grammar


class Rows:
    """A table with one completion of each request, whose tokens are also kept in plain lists."""

    def __init__(self, rng: numpy.random.Generator, count: int):
        self.rng, self.table = rng, SequenceTable(count + 3, 120, V)
        self.outputs: dict[Request, list[int]] = {}
        for number in range(count):
            sampling, has_grammar = random_sampling(rng)
            sampling = replace(sampling, n=2)
            grammars = tuple(GrammarState(Recurring()) for _ in range(2)) if has_grammar else ()
            request = Request(number, tuple(rng.integers(0, V, rng.integers(1, 30)).tolist()), sampling, [None, None])
            request.grammars = grammars
            self.outputs[request] = []
            self.table.assign_row(QueueEntry(request, (0, 1)), int(rng.integers(0, 2)), b"")

    def preempt_one(self) -> None:
        request = list(self.outputs)[self.rng.integers(len(self.outputs))]
        ((index, row),) = request.rows.items()
        output = self.table.output_of(row)
        self.table.clear(row)
        if self.rng.random() < 0.5:  # another request may take the row
            self.table.free_rows.append(self.table.free_rows.pop(0))
        self.table.assign_row(QueueEntry(request, (index,), output), index, b"")

    def expected(self, logits: torch.Tensor, request: Request, index: int, drafts: list[int]):
        grammar = Recurring()
        output = [*self.outputs[request], *drafts]
        allowed = torch.ones(V, dtype=torch.bool)
        if request.grammars:
            grammar.advance(output)
            allowed = torch.from_numpy(grammar.allowed())
        return sample_one(logits, request.sampling, index, request.prompt_token_ids, output, allowed)

    def step(self) -> int:
        """Sample with draft tokens, compare, and append what is accepted; returns the number of accepted drafts."""
        entries, found, accepted = [], [], []
        for request in self.outputs:
            ((index, row),) = request.rows.items()
            num_drafts, drafts, is_open = int(self.rng.integers(0, 4)), list[int](), True
            for offset in range(num_drafts + 1):
                logits = torch.from_numpy(self.rng.normal(size=V).astype(numpy.float32) * 3)
                result = None
                if is_open or not request.grammars:  # a grammar has no state after a draft that it does not allow
                    result = self.expected(logits, request, index, drafts)
                entries.append((row, offset, logits))
                found.append(result)
                accepted.append(is_open)
                draft = result[0] if result is not None and self.rng.random() < 0.7 else int(self.rng.integers(0, V))
                is_open &= result is not None and draft == result[0] and draft not in request.sampling.stop_token_ids
                self.table.ids[row, self.table.num_tokens[row] + offset] = draft
                drafts.append(draft)
            self.table.num_draft_tokens[row] = num_drafts
        rows, offsets = (numpy.array([entry[part] for entry in entries]) for part in (0, 1))
        to_sample = RowsToSample(rows, offsets, None)
        sampled = sample_rows(self.table, to_sample, torch.stack([logits for *_, logits in entries]))
        for place, result in enumerate(found):
            if result is None:
                continue
            token, logprob, likely = result
            assert (sampled.token_ids[place], sampled.logprobs[place]) == (token, numpy.float32(logprob))
            ids, values = sampled.top_logprobs.get(place, ((), ()))
            assert tuple(pair for pair in zip(ids, values, strict=True) if pair[1] != -numpy.inf) == likely
        appended = append_sampled(self.table, to_sample, sampled, numpy.array(accepted))
        by_row = {row: request for request in self.outputs for row in request.rows.values()}
        for row, token in zip(appended[0].tolist(), appended[1].tolist(), strict=True):
            self.outputs[by_row[row]].append(token)
        return sum(accepted) - len(self.outputs)


@pytest.mark.parametrize("seed", range(12))
def test_options_in_a_batch_equal_those_of_one_row_at_a_time(seed, path):
    """Bit for bit: several options, draft tokens, accepted or not, and rows that are preempted."""
    rng = numpy.random.default_rng(seed)
    rows, num_accepted = Rows(rng, 12), 0
    for _ in range(15):
        num_accepted += rows.step()
        if rng.random() < 0.5:
            rows.preempt_one()
    assert num_accepted > 50
