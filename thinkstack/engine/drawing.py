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

from thinkstack.engine.sampler import adjust, alternatives, closing, ends_with, sample, uniforms
from thinkstack.engine.table import Alternatives, SequenceTable


class Drawn(NamedTuple):
    """Tokens, none of them noted in the table yet."""

    tokens: numpy.ndarray
    """(B,) int64."""
    log_probs: numpy.ndarray
    """(B,) fp32; NaN where the logits were not finite."""
    alternatives: dict[int, Alternatives]
    """By place in the batch, where they are asked for."""


def draw(table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor) -> Drawn:
    """Draw a token from each row of logits (B, V) fp32: that of rows[b], `offsets[b]` tokens after its known ones."""
    special = numpy.flatnonzero(table.is_special[rows]).tolist()
    if not special:
        tokens, log_probs, _ = draw_plainly(table, rows, offsets, logits)
        return Drawn(tokens.cpu().numpy(), log_probs.cpu().numpy(), {})
    raw = torch.log_softmax(logits[special], -1)
    logits = logits.clone()
    for place in special:
        _shape(table, int(rows[place]), int(offsets[place]), logits[place])
    found, values, everything = draw_plainly(table, rows, offsets, logits)
    if everything is None:
        temperature = torch.from_numpy(table.temperature[rows]).to(logits.device)
        everything = torch.log_softmax(logits / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1), -1)
    drawn = Drawn(found.cpu().numpy(), values.cpu().numpy(), {})
    for place, own in zip(special, raw, strict=True):
        _report(table, int(rows[place]), int(offsets[place]), place, drawn, own, everything[place])
    return drawn


def draw_plainly(
    table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`draw` by temperature and kept sets alone; returns what `sample` does."""

    def there(values: numpy.ndarray) -> Tensor:
        return torch.from_numpy(values).to(logits.device)

    kept = None
    if not table.keeps_all[rows].all():
        kept = (there(table.top_k[rows]), there(table.top_p[rows]), there(table.min_p[rows]))
    counters = (table.known[rows] - table.prompt[rows] + offsets).astype(numpy.uint64)
    return sample(logits, there(table.temperature[rows]), there(uniforms(table.seed[rows], counters)), kept)


def note(
    table: SequenceTable, rows: numpy.ndarray, offsets: numpy.ndarray, drawn: Drawn, counts: numpy.ndarray
) -> None:
    """Make those of the drawn tokens known that count, (B,) bool: of each row the first ones."""
    table.append(rows[counts], offsets[counts], drawn.tokens[counts], drawn.log_probs[counts])
    special = numpy.flatnonzero(counts & table.is_special[rows]).tolist()
    for place in special:
        if place in drawn.alternatives:
            table.alternatives[int(rows[place])].append(drawn.alternatives[place])
    for row, fresh in Counter(rows[special].tolist()).items():
        table.is_closed[row] |= _is_closed(table, row, -fresh, 0)


def _is_closed(table: SequenceTable, row: int, start: int, end: int) -> bool:
    """Whether thinking is closed by one of the tokens start..end after the known ones."""
    close, prompt, known = table.held(row)[0].sampling.close_ids, table.prompt[row], table.known[row]
    return any(ends_with(table.ids[row, prompt:to], close) for to in range(known + start + 1, known + end + 1))


def _shape(table: SequenceTable, row: int, offset: int, logits: Tensor) -> None:
    """Bias, bans, penalties and the grammar of one row, in place on (V,)."""
    request, answer = table.held(row)
    prompt, known = table.prompt[row], table.known[row] + offset
    adjust(logits, request.sampling, table.ids[row, :prompt], table.ids[row, prompt:known])
    if request.constraint is not None:
        allowed = request.constraint.allowed(answer, table.ids[row, prompt:known].tolist())
        logits[~allowed.to(logits.device)] = -torch.inf


def _report(
    table: SequenceTable, row: int, offset: int, place: int, drawn: Drawn, raw: Tensor, everything: Tensor
) -> None:
    """What a special row's token and its log-probability become; raw, everything: log-probabilities (V,) of the model
    itself and of the distribution drawn from."""
    sampling = table.held(row)[0].sampling
    is_closed = table.is_closed[row] or _is_closed(table, row, 0, offset)
    forced = None
    if not is_closed:
        forced = closing(sampling, table.ids[row, table.prompt[row] : table.known[row] + offset])
    if forced is not None:
        drawn.tokens[place], drawn.log_probs[place] = forced, 0.0
    elif sampling.raw_log_probs:
        drawn.log_probs[place] = float(raw[drawn.tokens[place]])
    if sampling.top_log_probs:
        source = raw if sampling.raw_log_probs else everything
        drawn.alternatives[place] = alternatives(source.unsqueeze(0), sampling.top_log_probs)[0]
