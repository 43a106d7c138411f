"""From logits to tokens: temperature, top-p, and draws that belong to a request, not to a batch."""

# Shapes in this file: B rows, V vocabulary size.

import numpy
import torch
from torch import Tensor

from thinkstack.models import kernels


def uniforms(seeds: numpy.ndarray, counters: numpy.ndarray) -> numpy.ndarray:
    """Numbers in [0, 1), (B,) float64, that depend on (seed, counter) alone: the splitmix64 finaliser of both.

    seeds: (B,) uint64, one a sequence. counters: (B,) uint64, tokens drawn so far. Source: doi:10.1145/2660193.2660195.
    """
    with numpy.errstate(over="ignore"):
        mixed = _mix(_mix(seeds) + (counters + numpy.uint64(1)) * numpy.uint64(0x9E3779B97F4A7C15))
    return (mixed >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53


def _mix(value: numpy.ndarray) -> numpy.ndarray:
    value = (value ^ (value >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return value ^ (value >> numpy.uint64(31))


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    logits: (B, V) fp32. temperature, top_p: (B,) fp32. uniform: (B,) float64 in [0, 1). Returns (tokens (B,) int64,
    log-probabilities (B,) fp32 under the distribution drawn from). Temperature 0 takes the most likely token and
    reports its log-probability at temperature 1.
    """
    nucleus = bool((top_p < 1).any())
    if not nucleus and kernels.takes_steps(logits, 0):
        return kernels.draw(logits.contiguous(), temperature.float(), uniform.double())
    greedy = temperature == 0
    log_probs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature).unsqueeze(1), -1)
    if nucleus:
        log_probs = keep_nucleus(log_probs, top_p)
    if bool(greedy.all()):
        tokens = logits.argmax(-1)
    else:
        cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
        target = uniform.unsqueeze(1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
        if bool(greedy.any()):
            tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def keep_nucleus(log_probs: Tensor, top_p: Tensor) -> Tensor:
    """Renormalised log-probabilities of the smallest set with mass >= top_p (arXiv:1904.09751); -inf outside.

    The most likely token is always kept. log_probs: (B, V). top_p: (B,).
    """
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = (before >= top_p.unsqueeze(1)).scatter(1, order, before >= top_p.unsqueeze(1))
    return torch.log_softmax(log_probs.masked_fill(outside, -torch.inf), -1)
