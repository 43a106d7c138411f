"""The next tokens of the rows that have logits: plain rows together, those with penalties, budgets or grammars first
brought into their shape one by one.

A row may draw several tokens at once: behind tokens that are only guessed, as if they were known.
"""

# Shapes in this file: B tokens to draw, V vocabulary size.

from collections import Counter
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from thinkstack import kernels
from thinkstack.engine.sampler import Kept, adjust, closing, distribution, ends_with, sample, top_logprobs, uniforms
from thinkstack.engine.sequence_table import SequenceTable, TopLogprobs


class SampledTokens(NamedTuple):
    """Tokens, none of them noted in the table yet."""

    tokens: numpy.ndarray
    """(B,) int64."""
    logprobs: numpy.ndarray
    """(B,) fp32; NaN where the logits were not finite."""
    top_logprobs: dict[int, TopLogprobs]
    """By place in the batch, where they are asked for."""


def sample_rows(table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor) -> SampledTokens:
    """Draw a token from each row of logits (B, V): that of rows[b], `offsets[b]` tokens after its known ones."""
    special = (
        numpy.flatnonzero(table.needs_logits_processing[rows]).tolist() if table.needs_logits_processing.any() else []
    )
    if not special:
        return SampledTokens(*sample_plain_rows(table, rows, offsets, logits), {})
    shaped = logits.to(torch.float32, copy=True)
    for place in special:
        _shape(table, int(rows[place]), int(offsets[place]), shaped[place])
    sampled = SampledTokens(*sample_plain_rows(table, rows, offsets, shaped), {})
    for place in special:
        _report(table, int(rows[place]), int(offsets[place]), place, sampled, logits[place], shaped[place])
    return sampled


def sample_plain_rows(
    table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """`draw` by temperature and kept sets alone; returns tokens and log-probabilities as `SampledTokens` has them."""
    if kernels.takes(logits, "sample"):
        return table.row_sampler.draw(logits, rows, offsets, bool(table.is_unfiltered[rows].all()))
    counters = (table.num_tokens[rows] - table.num_prompt_tokens[rows] + offsets).astype(numpy.uint64)
    uniform = torch.from_numpy(uniforms(table.seed[rows], counters)).to(logits.device)
    temperature, kept = _asked(table, rows, logits.device)
    tokens, logprobs = sample(logits, temperature, uniform, kept)
    return tokens.cpu().numpy(), logprobs.cpu().numpy()


def _asked(table: SequenceTable, rows: numpy.ndarray, device: torch.device) -> tuple[Tensor, Kept | None]:
    """Temperatures of rows, and which of their tokens may be drawn."""

    def there(values: numpy.ndarray) -> Tensor:
        return torch.from_numpy(values[rows]).to(device)

    temperature = there(table.temperature)
    if table.is_unfiltered[rows].all():
        return temperature, None
    return temperature, (there(table.top_k), there(table.top_p), there(table.min_p))


def append_sampled(
    table: SequenceTable,
    rows: numpy.ndarray,
    offsets: numpy.ndarray,
    sampled: SampledTokens,
    counts: numpy.ndarray | None,
) -> None:
    """Make those of the drawn tokens known that count, (B,) bool: of each row the first ones; None: all of them."""
    tokens, logprobs = sampled.tokens, sampled.logprobs
    if counts is not None:
        rows, offsets, tokens, logprobs = rows[counts], offsets[counts], tokens[counts], logprobs[counts]
    table.append(rows, offsets, tokens, logprobs)
    if not table.needs_logits_processing.any():
        return
    special = numpy.flatnonzero(table.needs_logits_processing[rows])
    places = special if counts is None else numpy.flatnonzero(counts)[special]
    for row, place in zip(rows[special].tolist(), places.tolist(), strict=True):
        if place in sampled.top_logprobs:
            table.top_logprobs[row].append(sampled.top_logprobs[place])
    for row, fresh in Counter(rows[special].tolist()).items():
        table.is_thinking_closed[row] |= _is_closed(table, row, -fresh, 0)


def _is_closed(table: SequenceTable, row: int, start: int, end: int) -> bool:
    """Whether thinking is closed by one of the tokens start..end after the known ones."""
    close, prompt, num_tokens = (
        table.request_at(row)[0].sampling.think_end_token_ids,
        table.num_prompt_tokens[row],
        table.num_tokens[row],
    )
    return any(
        ends_with(table.ids[row, prompt:to], close) for to in range(num_tokens + start + 1, num_tokens + end + 1)
    )


def _shape(table: SequenceTable, row: int, offset: int, logits: Tensor) -> None:
    """Bias, bans, penalties and the grammar of one row, in place on (V,)."""
    request, index = table.request_at(row)
    prompt, num_tokens = table.num_prompt_tokens[row], table.num_tokens[row] + offset
    adjust(logits, request.sampling, table.ids[row, :prompt], table.ids[row, prompt:num_tokens])
    if request.constraint is not None:
        allowed = request.constraint.allowed(index, table.ids[row, prompt:num_tokens].tolist())
        logits[~allowed.to(logits.device)] = -torch.inf


def _report(
    table: SequenceTable, row: int, offset: int, place: int, sampled: SampledTokens, raw: Tensor, shaped: Tensor
) -> None:
    """What a special row's token and its log-probability become; raw, shaped: logits (V,) of the model itself and those
    drawn from."""
    sampling = table.request_at(row)[0].sampling
    is_closed = table.is_thinking_closed[row] or _is_closed(table, row, 0, offset)
    forced = reported = None
    if not is_closed:
        forced = closing(sampling, table.ids[row, table.num_prompt_tokens[row] : table.num_tokens[row] + offset])
    if sampling.raw_logprobs:
        reported = torch.log_softmax(raw.float(), -1)
    elif sampling.top_logprobs:
        reported = distribution(shaped.unsqueeze(0), *_asked(table, numpy.array([row]), shaped.device))[0]
    if forced is not None:
        sampled.tokens[place], sampled.logprobs[place] = forced, 0.0
    elif sampling.raw_logprobs and reported is not None:
        sampled.logprobs[place] = float(reported[sampled.tokens[place]])
    if sampling.top_logprobs and reported is not None:
        sampled.top_logprobs[place] = top_logprobs(reported.unsqueeze(0), sampling.top_logprobs)[0]
