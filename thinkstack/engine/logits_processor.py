"""Sampling options beyond temperature, top_k, top_p and min_p, applied to all rows in one call.

The options are columns, one entry per row of the sequence table. A row can sample several tokens at once, one after
each draft token; the options of an entry at offset k count the k draft tokens before it as sampled. All operations are
elementwise per entry, so that the result of a row does not depend on other rows.
"""

# Shapes in this file: R rows of the table, B entries to sample, n chosen entries, V vocabulary size, W width of the
# longest list among the chosen rows.

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from thinkstack.engine.grammar import GrammarState
from thinkstack.kernels import ops
from thinkstack.kernels.sampling import PenalizedTokens
from thinkstack.types import RequestError, SamplingParams


class Lists:
    """A list of numbers per row, padded with its last number; the width grows as needed."""

    def __init__(self, num_rows: int, dtype: type):
        self.padded: numpy.ndarray = numpy.zeros((num_rows, 1), dtype=dtype)
        self.sizes = numpy.zeros(num_rows, dtype=numpy.int64)

    def set(self, row: int, values: Sequence[float]) -> None:
        """Replace the list of a row."""
        if missing := max(len(values) - self.padded.shape[1], 0):
            self.padded = numpy.pad(self.padded, ((0, 0), (0, missing)), mode="edge")
        self.padded[row] = values[-1] if len(values) else 0
        self.padded[row, : len(values)] = values
        self.sizes[row] = len(values)

    def of(self, rows: numpy.ndarray) -> numpy.ndarray:
        """The lists of these rows, (n, W)."""
        return self.padded[rows, : self.sizes[rows].max()]


class TokenCounts:
    """The distinct tokens of each row that penalties apply to: those of the output and, with a repetition penalty, of
    the prompt."""

    def __init__(self, num_rows: int, max_tokens: int, vocab_size: int):
        shape = (num_rows, min(max_tokens, vocab_size))
        self.tokens = numpy.zeros(shape, dtype=numpy.int64)
        self.num_outputs = numpy.zeros(shape, dtype=numpy.float32)
        """How often each of `tokens` was sampled."""
        self.sizes = numpy.zeros(num_rows, dtype=numpy.int64)
        """Number of distinct tokens."""
        self.number = numpy.zeros((num_rows, vocab_size), dtype=numpy.int32)
        """Place of each token in `tokens`, from 1; 0 for other tokens. Memory that is not written is not used."""

    def reset(self, row: int, prompt: numpy.ndarray, output: numpy.ndarray) -> None:
        """Count the tokens of a new sequence."""
        self.number[row, self.tokens[row, : self.sizes[row]]] = 0
        sampled, counts = numpy.unique(output, return_counts=True)
        tokens = numpy.union1d(prompt, sampled)
        size = self.sizes[row] = len(tokens)
        self.tokens[row, :size], self.num_outputs[row, :size] = tokens, 0
        self.num_outputs[row, numpy.searchsorted(tokens, sampled)] = counts
        self.number[row, tokens] = numpy.arange(1, size + 1)

    def add(self, rows: numpy.ndarray, tokens: numpy.ndarray) -> None:
        """Count a sampled token of each row; no row is there twice."""
        places = self.number[rows, tokens] - 1
        if (is_new := places < 0).any():
            new_rows, new_tokens = rows[is_new], tokens[is_new]
            places[is_new] = new_places = self.sizes[new_rows]
            self.tokens[new_rows, new_places], self.num_outputs[new_rows, new_places] = new_tokens, 0
            self.sizes[new_rows] += 1
            self.number[new_rows, new_tokens] = new_places + 1
        self.num_outputs[rows, places] += 1

    def of(self, rows: numpy.ndarray, drafts: numpy.ndarray, is_before: numpy.ndarray) -> tuple[numpy.ndarray, ...]:
        """The distinct tokens of each of `rows` (n,) and of the draft tokens before it, their counts in the output, and
        which of these are valid, (n, W) each. drafts, is_before: (n, K) draft tokens; whether they are before it."""
        sizes = self.sizes[rows]
        width = int(sizes.max())
        tokens, num_outputs = self.tokens[rows, :width], self.num_outputs[rows, :width]
        is_valid = numpy.arange(width) < sizes[:, None]
        if drafts.shape[1]:
            is_new = is_before & (self.number[rows[:, None], drafts] == 0)
            tokens, is_valid = numpy.append(tokens, drafts, axis=1), numpy.append(is_valid, is_new, axis=1)
            num_outputs = numpy.append(num_outputs, numpy.zeros(drafts.shape, dtype=numpy.float32), axis=1)
            for draft, before in zip(drafts.T, is_before.T, strict=True):
                num_outputs += (tokens == draft[:, None]) & before[:, None]
        return tokens, num_outputs, is_valid


def needs_no_processing(sampling: SamplingParams) -> bool:
    """Whether the request needs no logits processing besides temperature, top_k, top_p and min_p."""
    neutral = not (sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias)
    return neutral and sampling.repetition_penalty == 1 and not sampling.min_tokens and not sampling.allowed_token_ids


class LogitsProcessor:
    """The options of all rows."""

    def __init__(
        self, vocab_size: int, ids: numpy.ndarray, num_tokens: numpy.ndarray, num_prompt_tokens: numpy.ndarray
    ):
        """ids, num_tokens, num_prompt_tokens: columns of the sequence table, with draft tokens after num_tokens."""
        num_rows = len(ids)
        self.vocab_size = vocab_size
        self._ids, self._num_tokens, self._num_prompt_tokens = ids, num_tokens, num_prompt_tokens
        self.is_needed = numpy.zeros(num_rows, dtype=bool)
        """Whether the row has any of these options."""
        self.changes_logits = numpy.zeros(num_rows, dtype=bool)
        """Whether `apply` changes the row's logits."""
        self.has_bias, self.has_penalty, self.has_budget = numpy.zeros((3, num_rows), dtype=bool)
        self.raw_logprobs, self.has_grammar = numpy.zeros((2, num_rows), dtype=bool)
        self.top_logprobs, self.min_tokens, self.thinking_budget = numpy.zeros((3, num_rows), dtype=numpy.int64)
        self.repetition, self.presence, self.frequency = numpy.zeros((3, num_rows), dtype=numpy.float32)
        self.bias_token_ids, self.bias = Lists(num_rows, numpy.int64), Lists(num_rows, numpy.float32)
        self.stop_token_ids, self.think_end = Lists(num_rows, numpy.int64), Lists(num_rows, numpy.int64)
        self.allowed_token_ids = Lists(num_rows, numpy.int64)
        self.is_thinking_closed = numpy.zeros(num_rows, dtype=bool)
        """Whether the output contains think_end_token_ids, for rows with a budget."""
        self._grammars: list[GrammarState | None] = [None] * num_rows
        self._counts: TokenCounts | None = None

    def assign(self, row: int, sampling: SamplingParams, grammar: GrammarState | None) -> None:
        """Set the options of a row, whose prompt and output are in the table."""
        self._grammars[row], self.has_grammar[row] = grammar, grammar is not None
        self.changes_logits[row] = not needs_no_processing(sampling) or grammar is not None
        self.is_needed[row] = self.changes_logits[row] or sampling.thinking_budget is not None
        self.is_needed[row] |= sampling.raw_logprobs or bool(sampling.top_logprobs)
        penalty = (sampling.presence_penalty, sampling.frequency_penalty)
        self.has_bias[row], self.has_budget[row] = bool(sampling.logit_bias), sampling.thinking_budget is not None
        self.has_penalty[row] = penalty != (0, 0) or sampling.repetition_penalty != 1
        self.raw_logprobs[row], self.top_logprobs[row] = sampling.raw_logprobs, sampling.top_logprobs
        self.min_tokens[row] = sampling.min_tokens
        self.allowed_token_ids.set(row, sampling.allowed_token_ids)
        start, end = self._num_prompt_tokens[row], self._num_tokens[row]
        if self.has_bias[row]:
            self.bias_token_ids.set(row, list(sampling.logit_bias))
            self.bias.set(row, list(sampling.logit_bias.values()))
        if sampling.min_tokens or grammar is not None:
            self.stop_token_ids.set(row, sampling.stop_token_ids)
        if self.has_penalty[row]:
            self.repetition[row], (self.presence[row], self.frequency[row]) = sampling.repetition_penalty, penalty
            prompt = self._ids[row, : start if sampling.repetition_penalty != 1 else 0]
            self.counts.reset(row, prompt, self._ids[row, start:end])
        if sampling.thinking_budget is not None:
            self.thinking_budget[row] = sampling.thinking_budget
            self.think_end.set(row, sampling.think_end_token_ids)
            ends = numpy.arange(start + 1, end + 1)
            self.is_thinking_closed[row] = self._think_end(numpy.full(len(ends), row), ends)[1].any()

    @property
    def counts(self) -> TokenCounts:
        """Token counts for penalties, allocated at first use."""
        if self._counts is None:
            self._counts = TokenCounts(len(self._ids), self._ids.shape[1], self.vocab_size)
        return self._counts

    def apply(self, logits: Tensor, rows: numpy.ndarray, offsets: numpy.ndarray) -> tuple[Tensor, dict[int, str]]:
        """Apply logit bias, the ban of stop tokens before min_tokens and of tokens outside allowed_token_ids, penalties
        and grammars to logits (B, V).

        Returns (logits (B, V) fp32, errors of grammars by entry).
        """
        processed = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat = processed.view(-1)
        if len(chosen := numpy.flatnonzero(self.has_bias[rows])):
            place = self._places(chosen, self.bias_token_ids.of(rows[chosen]), flat)
            flat.put_(place, flat.take(place) + torch.from_numpy(self.bias.of(rows[chosen])).to(flat.device))
        num_outputs = self._num_tokens[rows] - self._num_prompt_tokens[rows] + offsets
        if len(chosen := numpy.flatnonzero(num_outputs < self.min_tokens[rows])):
            chosen = chosen[self.stop_token_ids.sizes[rows[chosen]] > 0]
            if len(chosen):
                flat[self._places(chosen, self.stop_token_ids.of(rows[chosen]), flat)] = -torch.inf
        if len(chosen := numpy.flatnonzero(self.allowed_token_ids.sizes[rows])):
            place = self._places(chosen, self.allowed_token_ids.of(rows[chosen]), flat)
            allowed = flat.take(place)
            processed[torch.from_numpy(chosen).to(flat.device)] = -torch.inf
            flat.put_(place, allowed)
        if len(chosen := numpy.flatnonzero(self.has_penalty[rows])):
            self._apply_penalty(processed, chosen, rows[chosen], offsets[chosen])
        if len(chosen := numpy.flatnonzero(self.has_grammar[rows])):
            return processed, self._apply_grammars(processed, chosen, rows[chosen], offsets[chosen])
        return processed, {}

    def _places(self, chosen: numpy.ndarray, tokens: numpy.ndarray, flat: Tensor) -> Tensor:
        """Indices (n, W) of `tokens` (n, W) in flat logits (B * V)."""
        return torch.from_numpy(chosen[:, None] * self.vocab_size + tokens).to(flat.device)

    def _apply_penalty(
        self, logits: Tensor, chosen: numpy.ndarray, rows: numpy.ndarray, offsets: numpy.ndarray
    ) -> None:
        """Apply the penalties of the entries `chosen`, which are of `rows` (n,) at `offsets` (n,)."""
        ahead = numpy.arange(offsets.max())
        drafts = self._ids[rows[:, None], self._num_tokens[rows, None] + ahead]
        tokens, num_outputs, is_valid = self.counts.of(rows, drafts, offsets[:, None] > ahead)
        if tokens.shape[1]:
            columns = (column[rows] for column in (self.repetition, self.presence, self.frequency))
            ops.penalize_(logits, PenalizedTokens(chosen, tokens, num_outputs, is_valid, *columns))

    def _apply_grammars(
        self, logits: Tensor, chosen: numpy.ndarray, rows: numpy.ndarray, offsets: numpy.ndarray
    ) -> dict[int, str]:
        """Apply the grammars of the entries `chosen`, which are of `rows` (n,) at `offsets` (n,)."""
        bitmask = numpy.full((len(chosen), -(-self.vocab_size // 32)), -1, dtype=numpy.int32)
        errors: dict[int, str] = {}
        starts = numpy.flatnonzero(offsets == 0)
        firsts, sizes = rows[starts], numpy.diff(starts, append=len(rows))
        prompts, ends = self._num_prompt_tokens[firsts], self._num_tokens[firsts]
        columns = (starts, sizes, firsts, prompts, ends, self._ids[firsts, ends - 1])
        for start, size, row, prompt, end, last in zip(*(column.tolist() for column in columns), strict=True):
            state = self._grammars[row]
            assert state is not None
            output, drafts = [last], list[int]()
            if prompt + state.num_tokens != end - 1:
                output = self._ids[row, prompt + state.num_tokens : end].tolist()
            if size > 1:
                drafts = self._ids[row, end : end + size - 1].tolist()
                stops = self.stop_token_ids.of(numpy.array([row]))
                drafts = drafts[: next((place for place, token in enumerate(drafts) if token in stops), size)]
            try:
                state.fill(bitmask, start, output, drafts)
            except RequestError as error:
                errors[int(chosen[start])] = f"the grammar failed: {error}"
        if rest := self.vocab_size % 32:
            bitmask[:, -1] &= (1 << rest) - 1
        for place in numpy.flatnonzero(~bitmask.any(1)).tolist():
            num_sampled = self._num_tokens[rows[place]] - self._num_prompt_tokens[rows[place]] + offsets[place]
            errors[int(chosen[place])] = f"the grammar allows no token after {num_sampled} tokens"
        ops.apply_token_bitmask_(logits, chosen, bitmask)
        return errors

    def forced_tokens(self, rows: numpy.ndarray, offsets: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Entries whose thinking exceeds its budget, and the token of think_end_token_ids that is injected there."""
        chosen = numpy.flatnonzero(self.has_budget[rows])
        if not len(chosen):
            return chosen, chosen
        rows, offsets = rows[chosen], offsets[chosen]
        ends = self._num_tokens[rows] + offsets
        is_over = ends - self._num_prompt_tokens[rows] >= self.thinking_budget[rows]
        if not is_over.any():
            return chosen[:0], chosen[:0]
        progress, is_end = self._think_end(rows, ends)
        is_closed = self.is_thinking_closed[rows] | (is_end & (offsets > 0))
        for place in numpy.flatnonzero(offsets).tolist():  # thinking ended by a draft token stays ended
            is_closed[place] |= is_closed[place - 1]
        is_forced = is_over & ~is_closed
        return chosen[is_forced], self.think_end.padded[rows, progress][is_forced]

    def _think_end(self, rows: numpy.ndarray, ends: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """For output up to position `ends` (n,): how many first tokens of think_end_token_ids, but not all, it ends
        with, and whether it ends with all of them."""
        progress, is_end = numpy.zeros(len(rows), dtype=numpy.int64), numpy.zeros(len(rows), dtype=bool)
        if not len(rows):
            return progress, is_end
        think_end, sizes = self.think_end.of(rows), self.think_end.sizes[rows]
        places = ends[:, None] + numpy.arange(-think_end.shape[1], 0)
        tail = numpy.where(places < self._num_prompt_tokens[rows, None], -1, self._ids[rows[:, None], places.clip(0)])
        for size in range(1, think_end.shape[1] + 1):
            matches = (tail[:, tail.shape[1] - size :] == think_end[:, :size]).all(1)
            progress[matches & (size < sizes)] = size
            is_end |= matches & (size == sizes)
        return progress, is_end

    def append(self, rows: numpy.ndarray, offsets: numpy.ndarray, tokens: numpy.ndarray, places: numpy.ndarray) -> None:
        """Count tokens that were appended to the table at `places`. offsets: 0 for the first new token of a row."""
        for offset in range(int(offsets.max(initial=0)) + 1):
            chosen = numpy.flatnonzero(self.has_penalty[rows] & (offsets == offset))
            if len(chosen):
                self.counts.add(rows[chosen], tokens[chosen])
        chosen = numpy.flatnonzero(self.has_budget[rows] & ~self.is_thinking_closed[rows])
        if len(chosen):
            is_end = self._think_end(rows[chosen], places[chosen] + 1)[1]
            self.is_thinking_closed[rows[chosen][is_end]] = True
