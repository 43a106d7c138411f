"""Sampling from logits, in this order: temperature, min-p, top-k, top-p, sampling.

The random number of a token depends only on the seed of the request and the position of the token, never on the batch.
"""

# Shapes in this file: B rows, V vocabulary size, n penalized rows, W width of their lists of tokens.

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

CANDIDATES = 256
"""Number of most likely tokens to sort first; the full vocabulary is sorted only if these do not contain the filtered
set."""


def uniforms(seeds: numpy.ndarray, counters: numpy.ndarray) -> numpy.ndarray:
    """Uniform random numbers in [0, 1), (B,) float64, from a counter-based generator: SplitMix64 of seed and counter.

    seeds: (B,) uint64, one per sequence. counters: (B,) uint64, number of tokens sampled so far. Source:
    doi:10.1145/2660193.2660195.
    """
    mixed = splitmix64(seeds + (counters + numpy.uint64(1)) * numpy.uint64(0x9E3779B97F4A7C15))  # modulo 2^64
    return (mixed >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53


def splitmix64(value: numpy.ndarray) -> numpy.ndarray:
    """The SplitMix64 finalizer of each uint64 (doi:10.1145/2660193.2660195)."""
    value = (value ^ (value >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return value ^ (value >> numpy.uint64(31))


SamplingFilters = tuple[Tensor, Tensor, Tensor]
"""Filters of each row: top_k (B,) int64, 0: off; top_p (B,) and min_p (B,) fp32."""


def sample(
    logits: Tensor, temperature: Tensor, uniform: Tensor, filters: SamplingFilters | None = None
) -> tuple[Tensor, Tensor]:
    """As in ops.py, by inverting the cumulative distribution."""
    logprobs = distribution(logits, temperature, filters)
    greedy = temperature == 0
    if bool(greedy.all()):
        tokens = logits.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        target = uniform.unsqueeze(1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
        if bool(greedy.any()):
            tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def distribution(logits: Tensor, temperature: Tensor, filters: SamplingFilters | None = None) -> Tensor:
    """The sampling distribution: log-probabilities (B, V) fp32."""
    logprobs = torch.log_softmax(logits.float() / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1), -1)
    return logprobs if filters is None else filter_logprobs(logprobs, *filters)


def top_logprobs(
    logits: Tensor, temperature: Tensor, filters: SamplingFilters | None, count: int
) -> tuple[Tensor, Tensor]:
    """As in ops.py."""
    logprobs, ids = largest(distribution(logits, temperature, filters), count)
    return ids, logprobs


def filter_logprobs(logprobs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Renormalized log-probabilities (B, V) after filtering, -inf for removed tokens. The filters are applied in this
    order: min-p (arXiv:2407.01082), top-k, top-p (the smallest set of the remaining tokens with mass >= top_p,
    arXiv:1904.09751).

    top_k: (B,) int64, 0: off. top_p, min_p: (B,). The most likely token always remains; ties prefer the lower id.
    Batch-invariant: a row without filters is returned unchanged, and no sum depends on the filters of other rows.
    """
    V, given = logprobs.shape[1], logprobs
    floor = logprobs.amax(-1, keepdim=True) + min_p.clamp(min=1e-38).log().unsqueeze(1)
    logprobs = torch.where((logprobs < floor) & (min_p > 0).unsqueeze(1), -torch.inf, logprobs)
    limit = torch.where(top_k > 0, top_k, V).clamp(max=V).unsqueeze(1)
    is_unfiltered = (limit.squeeze(1) == V) & (top_p == 1) & (min_p == 0)
    count = min(CANDIDATES, V)
    while True:
        ordered, order = largest(logprobs, count)
        places = torch.arange(count, device=logprobs.device)
        mass = torch.where(places < limit, ordered.exp(), 0.0)
        upto = mass.cumsum(-1)
        # the mass after top-k; the order of summation depends neither on the `count` of other rows nor on their number
        remaining = torch.where(limit.squeeze(1) < V, upto[:, -1], logprobs.exp().cumsum(-1)[:, -1])
        before = upto - mass
        outside = (places >= limit) | (before >= (top_p * remaining).unsqueeze(1)) & (top_p < 1).unsqueeze(1)
        complete = (ordered == -torch.inf).any(-1) | (limit.squeeze(1) <= count)
        ended = complete | is_unfiltered | (outside.any(-1) & (limit.squeeze(1) == V))
        if count == V or bool(ended.all()):
            break
        count = V
    filtered = torch.full_like(logprobs, -torch.inf).scatter(1, order, ordered.masked_fill(outside, -torch.inf))
    return torch.where(is_unfiltered.unsqueeze(1), given, torch.log_softmax(filtered, -1))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row and their indices, sorted; among equal values the lower index first."""
    if count == values.shape[1]:
        found, index = values.sort(dim=-1, descending=True, stable=True)
        return found, index
    found, index = values.topk(count, dim=-1)
    by_index = index.argsort(-1)  # topk guarantees no order among equal values
    found, index = found.gather(1, by_index), index.gather(1, by_index)
    found, order = found.sort(dim=-1, descending=True, stable=True)
    return found, index.gather(1, order)


class PenalizedTokens(NamedTuple):
    """The tokens that penalties apply to, and the penalties of their rows."""

    entries: numpy.ndarray
    """Index of each row in the logits, (n,) int64."""
    tokens: numpy.ndarray
    """(n, W) int64; a token that occurs twice in a row has the same count there."""
    num_outputs: numpy.ndarray
    """How often each token was sampled, (n, W) fp32."""
    is_valid: numpy.ndarray
    """Which of the tokens count, (n, W) bool."""
    repetition: numpy.ndarray
    """(n,) fp32, as the next two."""
    presence: numpy.ndarray
    frequency: numpy.ndarray


def penalize_(logits: Tensor, penalized: PenalizedTokens) -> None:
    """As in ops.py."""
    entries, tokens, num_outputs, is_valid, *columns = (torch.from_numpy(x).to(logits.device) for x in penalized)
    repetition, presence, frequency = (column.double().unsqueeze(1) for column in columns)
    values = logits[entries].gather(1, tokens).double()
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * num_outputs + presence * (num_outputs > 0)
    place = (entries.unsqueeze(1) * logits.shape[1] + tokens)[is_valid]
    logits.view(-1).put_(place, values.float()[is_valid])


def apply_token_bitmask_(logits: Tensor, entries: numpy.ndarray, bitmask: numpy.ndarray) -> None:
    """As in ops.py."""
    bits = numpy.unpackbits(bitmask.astype("<i4", copy=False).view(numpy.uint8), axis=1, bitorder="little")
    is_banned = torch.from_numpy(bits[:, : logits.shape[1]] == 0).to(logits.device)
    rows = torch.from_numpy(entries).to(logits.device)
    logits[rows] = logits[rows].masked_fill_(is_banned, -torch.inf)


def sample_rows(
    columns: dict[str, numpy.ndarray],
    logits: Tensor,
    rows: numpy.ndarray,
    offsets: numpy.ndarray,
    is_unfiltered: bool,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """As `ops.RowSampler.sample` for a table with these columns."""

    def on_device(name: str) -> Tensor:
        return torch.from_numpy(columns[name][rows]).to(logits.device)

    counters = (columns["num_tokens"][rows] - columns["num_prompt_tokens"][rows] + offsets).astype(numpy.uint64)
    uniform = torch.from_numpy(uniforms(columns["seed"][rows], counters)).to(logits.device)
    filters = None if is_unfiltered else (on_device("top_k"), on_device("top_p"), on_device("min_p"))
    tokens, logprobs = sample(logits, on_device("temperature"), uniform, filters)
    return tokens.cpu().numpy(), logprobs.cpu().numpy()
