"""Sample the next tokens of all rows in one call.

A row can sample several tokens at once: one after each draft token, as if all draft tokens were accepted.
"""

# Shapes in this file: B tokens to sample, V vocabulary size.

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from thinkstack.engine.scheduler import RowsToSample
from thinkstack.engine.sequence_table import SequenceTable, TopLogprobs
from thinkstack.kernels import ops
from thinkstack.kernels.sampling import SamplingFilters

NOT_FINITE = "the model's logits are not finite; check the weights"
ALL_BANNED = "no token is left to sample: min_tokens, allowed_token_ids and the grammar exclude all of them"


class SampledTokens(NamedTuple):
    """Sampled tokens that have not been appended to the table."""

    token_ids: numpy.ndarray
    """(B,) int64."""
    logprobs: numpy.ndarray
    """Log-probabilities, (B,) fp32; NaN for an error."""
    top_logprobs: dict[int, TopLogprobs]
    """Most likely alternatives by index in the batch, for rows that request them."""
    errors: dict[int, str]
    """Why no token could be sampled, by index in the batch."""


NO_TOKENS = SampledTokens(numpy.zeros(0, numpy.int64), numpy.zeros(0, numpy.float32), {}, {})


def sample_rows(table: SequenceTable, to_sample: RowsToSample, logits: Tensor) -> SampledTokens:
    """Sample a token for each entry from logits (B, V)."""
    rows, offsets, _ = to_sample
    options = table.options
    if not options.is_needed[rows].any():
        tokens, logprobs = sample_plain_rows(table, rows, offsets, logits)
        return SampledTokens(tokens, logprobs, {}, _errors(logprobs, logits))
    processed, errors = logits.float(), dict[int, str]()
    if options.changes_logits[rows].any():
        processed, errors = options.apply(logits, rows, offsets)
    tokens, logprobs = sample_plain_rows(table, rows, offsets, processed)
    forced, forced_tokens = options.forced_tokens(rows, offsets)
    tokens[forced], logprobs[forced] = forced_tokens, 0.0
    errors = _errors(logprobs, logits) | errors
    for place in forced.tolist():
        errors.pop(place, None)
    is_raw, num_top = options.raw_logprobs[rows], options.top_logprobs[rows]
    own = numpy.setdiff1d(numpy.flatnonzero(is_raw), forced)
    if len(own):
        targets = torch.from_numpy(tokens[own]).to(logits.device)
        logprobs[own] = (
            ops.logprobs(_rows_of(logits, own).to(torch.float32, copy=True), targets, 1.0, None)[0].cpu().numpy()
        )
    top_logprobs = _top_logprobs(table, rows, num_top, is_raw, logits, processed) if num_top.any() else {}
    return SampledTokens(tokens, logprobs, top_logprobs, errors)


def _errors(logprobs: numpy.ndarray, logits: Tensor) -> dict[int, str]:
    """Why entries have no log-probability, by index in the batch. logits: (B, V) of the model."""
    failed = numpy.isnan(logprobs).nonzero()[0].tolist()
    return {place: ALL_BANNED if logits[place].isfinite().all() else NOT_FINITE for place in failed}


def _rows_of(values: Tensor, chosen: numpy.ndarray) -> Tensor:
    return values if len(chosen) == len(values) else values[torch.from_numpy(chosen).to(values.device)]


def _top_logprobs(
    table: SequenceTable,
    rows: numpy.ndarray,
    num_top: numpy.ndarray,
    is_raw: numpy.ndarray,
    logits: Tensor,
    processed: Tensor,
) -> dict[int, TopLogprobs]:
    """The num_top (B,) most likely tokens by index in the batch: of the model where is_raw (B,), else of the sampling
    distribution. logits: of the model; processed: with the options of the rows; (B, V)."""
    found: dict[int, TopLogprobs] = {}
    kinds = num_top * 4 + table.is_unfiltered[rows] * 2 + is_raw  # one call for each: equal in every batch
    for kind in set(kinds[num_top > 0].tolist()):
        chosen, count = numpy.flatnonzero(kinds == kind), min(kind // 4, logits.shape[1])
        if kind & 1:
            given, temperature, filters = logits, torch.ones(len(chosen), device=logits.device), None
        else:
            given, (temperature, filters) = processed, _sampling_columns(table, rows[chosen], logits.device)
        ids, logprobs = ops.top_logprobs(_rows_of(given, chosen), temperature, filters, count)
        found |= zip(chosen.tolist(), zip(ids.cpu().numpy(), logprobs.cpu().numpy(), strict=True), strict=True)
    return found


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
    table: SequenceTable, to_sample: RowsToSample, sampled: SampledTokens, accepted: numpy.ndarray | None
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, dict[int, TopLogprobs], dict[int, str]]:
    """Append sampled tokens to the table, up to the first error of a row. accepted: (B,) bool, true for a prefix of
    each row's tokens; None: all.

    Returns (row, token id and log-probability of each appended token, alternatives by number of the appended token,
    errors by row)."""
    rows, offsets, tokens, logprobs = to_sample.rows, to_sample.offsets, sampled.token_ids, sampled.logprobs
    errors: dict[int, str] = {}
    for place, error in sorted(sampled.errors.items()):
        accepted = numpy.ones(len(rows), dtype=bool) if accepted is None else accepted
        if accepted[place]:
            errors[int(rows[place])] = error
            accepted = accepted & ((rows != rows[place]) | (offsets < offsets[place]))
    top_logprobs = sampled.top_logprobs
    if accepted is not None:
        rows, offsets, tokens, logprobs = rows[accepted], offsets[accepted], tokens[accepted], logprobs[accepted]
        numbers = accepted.cumsum() - 1
        top_logprobs = {int(numbers[place]): likely for place, likely in top_logprobs.items() if accepted[place]}
    for number, likely in top_logprobs.items():
        table.top_logprobs[rows[number]].append(likely)
    table.append(rows, offsets, tokens, logprobs)
    return rows, tokens, logprobs, top_logprobs, errors
