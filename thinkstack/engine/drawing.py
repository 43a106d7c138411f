"""The next token of each row that has logits: plain rows together, those with penalties, budgets or grammars first
brought into their shape one by one.
"""

# Shapes in this file: B rows that draw, V vocabulary size.

import numpy
import torch
from torch import Tensor

from thinkstack.engine.sampler import adjust, alternatives, closing, ends_with, sample, uniforms
from thinkstack.engine.table import SequenceTable


def draw(table: SequenceTable, rows: list[int], logits: Tensor) -> list[int]:
    """Draw a token for each of `rows` from logits (B, V) fp32 and note it. Returns rows whose logits are not finite."""
    index = numpy.array(rows, dtype=numpy.int64)
    special = [place for place, row in enumerate(rows) if table.is_special[row]]
    raw = torch.log_softmax(logits[special], -1) if special else logits
    if special:
        logits = logits.clone()
        for place in special:
            _shape(table, rows[place], logits[place])
    drawn = (table.known[index] - table.prompt[index]).astype(numpy.uint64)

    def there(values: numpy.ndarray) -> Tensor:
        return torch.from_numpy(values).to(logits.device)

    kept = None
    if not table.keeps_all[index].all():
        kept = (there(table.top_k[index]), there(table.top_p[index]), there(table.min_p[index]))
    temperature = there(table.temperature[index])
    found, values, everything = sample(logits, temperature, there(uniforms(table.seed[index], drawn)), kept)
    tokens, log_probs = found.cpu().numpy(), values.cpu().numpy()
    failed = [row for row, value in zip(rows, log_probs.tolist(), strict=True) if value != value]
    if special:
        if everything is None:
            everything = torch.log_softmax(logits / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1), -1)
        for place, own in zip(special, raw, strict=True):
            _report(table, rows[place], place, tokens, log_probs, own, everything[place])
    table.append(index, tokens, log_probs)
    for place in special:
        row = rows[place]
        close = table.held(row)[0].sampling.close_ids
        if not table.is_closed[row] and ends_with(table.ids[row, table.prompt[row] : table.known[row]], close):
            table.is_closed[row] = True
    return failed


def _shape(table: SequenceTable, row: int, logits: Tensor) -> None:
    """Bias, bans, penalties and the grammar of one row, in place on (V,)."""
    request, answer = table.held(row)
    prompt, known = table.prompt[row], table.known[row]
    adjust(logits, request.sampling, table.ids[row, :prompt], table.ids[row, prompt:known])
    if request.constraint is not None:
        allowed = request.constraint.allowed(answer, table.ids[row, prompt:known].tolist())
        logits[~allowed.to(logits.device)] = -torch.inf


def _report(
    table: SequenceTable,
    row: int,
    place: int,
    tokens: numpy.ndarray,
    log_probs: numpy.ndarray,
    raw: Tensor,
    drawn: Tensor,
) -> None:
    """What a special row's token and its log-probability become; raw, drawn: log-probabilities (V,) of the model itself
    and of the distribution drawn from."""
    sampling = table.held(row)[0].sampling
    forced = None if table.is_closed[row] else closing(sampling, table.ids[row, table.prompt[row] : table.known[row]])
    if forced is not None:
        tokens[place], log_probs[place] = forced, 0.0
    elif sampling.raw_log_probs:
        log_probs[place] = float(raw[tokens[place]])
    if sampling.top_log_probs:
        source = raw if sampling.raw_log_probs else drawn
        table.alternatives[row].append(alternatives(source.unsqueeze(0), sampling.top_log_probs)[0])
