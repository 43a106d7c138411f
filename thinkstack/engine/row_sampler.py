"""Sample the next tokens of all rows in one call. Logits of rows with penalties, thinking budgets or grammars are
processed one row at a time before.

A row can sample several tokens at once: one after each draft token, as if all draft tokens were accepted.
"""

# Shapes in this file: B tokens to sample, V vocabulary size.

from collections import Counter
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from thinkstack.engine.sampler import adjust, ends_with, forced_think_end_token, top_logprobs
from thinkstack.engine.sequence_table import SequenceTable, TopLogprobs
from thinkstack.kernels.sampling import SamplingFilters, distribution


class SampledTokens(NamedTuple):
    """Sampled tokens that have not been appended to the table."""

    tokens: numpy.ndarray
    """Token ids, (B,) int64."""
    logprobs: numpy.ndarray
    """Log-probabilities, (B,) fp32; NaN if the logits were not finite."""
    top_logprobs: dict[int, TopLogprobs]
    """Most likely alternatives by index in the batch, for rows that request them."""


def sample_rows(table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor) -> SampledTokens:
    """Sample a token from each row b of logits (B, V), for table row rows[b], offsets[b] positions after num_tokens."""
    processed_rows = (
        numpy.flatnonzero(table.needs_logits_processing[rows]).tolist() if table.needs_logits_processing.any() else []
    )
    if not processed_rows:
        return SampledTokens(*sample_plain_rows(table, rows, offsets, logits), {})
    processed = logits.to(torch.float32, copy=True)
    for place in processed_rows:
        _process_logits(table, int(rows[place]), int(offsets[place]), processed[place])
    sampled = SampledTokens(*sample_plain_rows(table, rows, offsets, processed), {})
    for place in processed_rows:
        _finish_token(table, int(rows[place]), int(offsets[place]), place, sampled, logits[place], processed[place])
    return sampled


def sample_plain_rows(
    table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """`sample_rows` without logits processing; returns tokens and log-probabilities as in `SampledTokens`."""
    return table.row_sampler.sample(logits, rows, offsets, bool(table.is_unfiltered[rows].all()))


def _sampling_columns(
    table: SequenceTable, rows: numpy.ndarray, device: torch.device
) -> tuple[Tensor, SamplingFilters | None]:
    """The temperatures of `rows`, and the filters top_k, top_p and min_p, or None if all filters are neutral."""

    def on_device(values: numpy.ndarray) -> Tensor:
        return torch.from_numpy(values[rows]).to(device)

    temperature = on_device(table.temperature)
    if table.is_unfiltered[rows].all():
        return temperature, None
    return temperature, (on_device(table.top_k), on_device(table.top_p), on_device(table.min_p))


def append_sampled(
    table: SequenceTable,
    rows: numpy.ndarray,
    offsets: numpy.ndarray,
    sampled: SampledTokens,
    accepted: numpy.ndarray | None,
) -> None:
    """Append sampled tokens to the table. accepted: (B,) bool, true for a prefix of each row's tokens; None: all."""
    tokens, logprobs = sampled.tokens, sampled.logprobs
    if accepted is not None:
        rows, offsets, tokens, logprobs = rows[accepted], offsets[accepted], tokens[accepted], logprobs[accepted]
    table.append(rows, offsets, tokens, logprobs)
    if not table.needs_logits_processing.any():
        return
    processed_rows = numpy.flatnonzero(table.needs_logits_processing[rows])
    places = processed_rows if accepted is None else numpy.flatnonzero(accepted)[processed_rows]
    for row, place in zip(rows[processed_rows].tolist(), places.tolist(), strict=True):
        if place in sampled.top_logprobs:
            table.top_logprobs[row].append(sampled.top_logprobs[place])
    for row, num_new in Counter(rows[processed_rows].tolist()).items():
        table.is_thinking_closed[row] |= _closes_thinking(table, row, -num_new, 0)


def _closes_thinking(table: SequenceTable, row: int, start: int, end: int) -> bool:
    """Whether one of the tokens start..end, relative to num_tokens, ends thinking."""
    think_end, prompt, num_tokens = (
        table.request_at(row)[0].sampling.think_end_token_ids,
        table.num_prompt_tokens[row],
        table.num_tokens[row],
    )
    return any(
        ends_with(table.ids[row, prompt:to], think_end) for to in range(num_tokens + start + 1, num_tokens + end + 1)
    )


def _process_logits(table: SequenceTable, row: int, offset: int, logits: Tensor) -> None:
    """Apply bias, bans, penalties and the grammar of one row to logits (V,), in place."""
    request, index = table.request_at(row)
    prompt, num_tokens = table.num_prompt_tokens[row], table.num_tokens[row] + offset
    adjust(logits, request.sampling, table.ids[row, :prompt], table.ids[row, prompt:num_tokens])
    if request.constraint is not None:
        allowed = request.constraint.allowed(index, table.ids[row, prompt:num_tokens].tolist())
        logits[~allowed.to(logits.device)] = -torch.inf


def _finish_token(
    table: SequenceTable, row: int, offset: int, place: int, sampled: SampledTokens, raw: Tensor, processed: Tensor
) -> None:
    """Force the tokens that end thinking, and set the requested log-probabilities. raw, processed:
    logits (V,) of the model, and after `_process_logits`."""
    sampling = table.request_at(row)[0].sampling
    is_closed = table.is_thinking_closed[row] or _closes_thinking(table, row, 0, offset)
    forced = reported = None
    if not is_closed:
        forced = forced_think_end_token(
            sampling, table.ids[row, table.num_prompt_tokens[row] : table.num_tokens[row] + offset]
        )
    if sampling.raw_logprobs:
        reported = torch.log_softmax(raw.float(), -1)
    elif sampling.top_logprobs:
        reported = distribution(
            processed.unsqueeze(0), *_sampling_columns(table, numpy.array([row]), processed.device)
        )[0]
    if forced is not None:
        sampled.tokens[place], sampled.logprobs[place] = forced, 0.0
    elif sampling.raw_logprobs and reported is not None:
        sampled.logprobs[place] = float(reported[sampled.tokens[place]])
    if sampling.top_logprobs and reported is not None:
        sampled.top_logprobs[place] = top_logprobs(reported.unsqueeze(0), sampling.top_logprobs)[0]
