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
from thinkstack.engine.sampler import Kept, adjust, alternatives, closing, distribution, ends_with, sample, uniforms
from thinkstack.engine.sequence_table import Alternatives, SequenceTable


class Drawn(NamedTuple):
    """Tokens, none of them noted in the table yet."""

    tokens: numpy.ndarray
    """(B,) int64."""
    logprobs: numpy.ndarray
    """(B,) fp32; NaN where the logits were not finite."""
    alternatives: dict[int, Alternatives]
    """By place in the batch, where they are asked for."""


def draw(table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor) -> Drawn:
    """Draw a token from each row of logits (B, V): that of rows[b], `offsets[b]` tokens after its known ones."""
    special = numpy.flatnonzero(table.is_special[rows]).tolist() if table.is_special.any() else []
    if not special:
        return Drawn(*draw_plainly(table, rows, offsets, logits), {})
    shaped = logits.to(torch.float32, copy=True)
    for place in special:
        _shape(table, int(rows[place]), int(offsets[place]), shaped[place])
    drawn = Drawn(*draw_plainly(table, rows, offsets, shaped), {})
    for place in special:
        _report(table, int(rows[place]), int(offsets[place]), place, drawn, logits[place], shaped[place])
    return drawn


def draw_plainly(
    table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """`draw` by temperature and kept sets alone; returns tokens and log-probabilities as `Drawn` has them."""
    if kernels.takes(logits, "sample"):
        return table.draws.draw(logits, rows, offsets, bool(table.keeps_all[rows].all()))
    counters = (table.known[rows] - table.prompt[rows] + offsets).astype(numpy.uint64)
    uniform = torch.from_numpy(uniforms(table.seed[rows], counters)).to(logits.device)
    temperature, kept = _asked(table, rows, logits.device)
    tokens, logprobs = sample(logits, temperature, uniform, kept)
    return tokens.cpu().numpy(), logprobs.cpu().numpy()


def _asked(table: SequenceTable, rows: numpy.ndarray, device: torch.device) -> tuple[Tensor, Kept | None]:
    """Temperatures of rows, and which of their tokens may be drawn."""

    def there(values: numpy.ndarray) -> Tensor:
        return torch.from_numpy(values[rows]).to(device)

    temperature = there(table.temperature)
    if table.keeps_all[rows].all():
        return temperature, None
    return temperature, (there(table.top_k), there(table.top_p), there(table.min_p))


def note(
    table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, drawn: Drawn, counts: numpy.ndarray | None
) -> None:
    """Make those of the drawn tokens known that count, (B,) bool: of each row the first ones; None: all of them."""
    tokens, logprobs = drawn.tokens, drawn.logprobs
    if counts is not None:
        rows, offsets, tokens, logprobs = rows[counts], offsets[counts], tokens[counts], logprobs[counts]
    table.append(rows, offsets, tokens, logprobs)
    if not table.is_special.any():
        return
    special = numpy.flatnonzero(table.is_special[rows])
    places = special if counts is None else numpy.flatnonzero(counts)[special]
    for row, place in zip(rows[special].tolist(), places.tolist(), strict=True):
        if place in drawn.alternatives:
            table.alternatives[row].append(drawn.alternatives[place])
    for row, fresh in Counter(rows[special].tolist()).items():
        table.is_closed[row] |= _is_closed(table, row, -fresh, 0)


def _is_closed(table: SequenceTable, row: int, start: int, end: int) -> bool:
    """Whether thinking is closed by one of the tokens start..end after the known ones."""
    close, prompt, known = table.held(row)[0].sampling.think_end_token_ids, table.prompt[row], table.known[row]
    return any(ends_with(table.ids[row, prompt:to], close) for to in range(known + start + 1, known + end + 1))


def _shape(table: SequenceTable, row: int, offset: int, logits: Tensor) -> None:
    """Bias, bans, penalties and the grammar of one row, in place on (V,)."""
    request, answer = table.held(row)
    prompt, known = table.prompt[row], table.known[row] + offset
    adjust(logits, request.sampling, table.ids[row, :prompt], table.ids[row, prompt:known])
    if request.constraint is not None:
        allowed = request.constraint.allowed(answer, table.ids[row, prompt:known].tolist())
        logits[~allowed.to(logits.device)] = -torch.inf


def _report(table: SequenceTable, row: int, offset: int, place: int, drawn: Drawn, raw: Tensor, shaped: Tensor) -> None:
    """What a special row's token and its log-probability become; raw, shaped: logits (V,) of the model itself and those
    drawn from."""
    sampling = table.held(row)[0].sampling
    is_closed = table.is_closed[row] or _is_closed(table, row, 0, offset)
    forced = reported = None
    if not is_closed:
        forced = closing(sampling, table.ids[row, table.prompt[row] : table.known[row] + offset])
    if sampling.raw_logprobs:
        reported = torch.log_softmax(raw.float(), -1)
    elif sampling.top_logprobs:
        reported = distribution(shaped.unsqueeze(0), *_asked(table, numpy.array([row]), shaped.device))[0]
    if forced is not None:
        drawn.tokens[place], drawn.logprobs[place] = forced, 0.0
    elif sampling.raw_logprobs and reported is not None:
        drawn.logprobs[place] = float(reported[drawn.tokens[place]])
    if sampling.top_logprobs and reported is not None:
        drawn.alternatives[place] = alternatives(reported.unsqueeze(0), sampling.top_logprobs)[0]
