"""The sampling options of one row at a time, in plain code: the reference for the batched ones."""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from thinkstack.engine.sequence_table import completion_seed
from thinkstack.kernels.ops import logprobs as logprobs_of
from thinkstack.kernels.ops import sample, top_logprobs
from thinkstack.kernels.sampling import SamplingFilters, uniforms
from thinkstack.types import SamplingParams


def adjust(logits: Tensor, sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Apply bias, bans and penalties to logits (V,), in place."""
    for token, value in sampling.logit_bias.items():
        logits[token] += value
    if len(output) < sampling.min_tokens:
        logits[list(sampling.stop_token_ids)] = -torch.inf
    if sampling.allowed_token_ids:
        logits[[token for token in range(len(logits)) if token not in sampling.allowed_token_ids]] = -torch.inf
    repetition, presence, frequency = (
        float(numpy.float32(value))
        for value in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    )
    for token in {*output, *(prompt if repetition != 1 else ())}:
        value, count = float(logits[token]), list(output).count(token)
        value = value / repetition if value > 0 else value * repetition
        logits[token] = value - (frequency * count + (presence if count else 0))


def filters_of(sampling: SamplingParams) -> SamplingFilters | None:
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return None
    return tuple(torch.tensor([value]) for value in (sampling.top_k, sampling.top_p, sampling.min_p))  # type: ignore[return-value]


def contains(output: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(output[at : at + len(part)]) == tuple(part) for at in range(len(output) - len(part) + 1))


def forced_token(sampling: SamplingParams, output: Sequence[int]) -> int | None:
    """The token that the thinking budget injects after `output`, if any."""
    end = sampling.think_end_token_ids
    if sampling.thinking_budget is None or len(output) < sampling.thinking_budget or contains(output, end):
        return None
    sizes = [size for size in range(len(end)) if tuple(output[len(output) - size :]) == end[:size]]
    return end[max(sizes)]


def sample_one(
    logits: Tensor, sampling: SamplingParams, index: int, prompt: Sequence[int], output: Sequence[int], allowed: Tensor
) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    """Token, log-probability and alternatives after `output`. logits, allowed: (V,)."""
    processed = logits.clone()
    adjust(processed, sampling, prompt, output)
    processed[~allowed] = -torch.inf
    seed = numpy.array([completion_seed(sampling.seed, index)], dtype=numpy.uint64)
    uniform = torch.from_numpy(uniforms(seed, numpy.array([len(output)], dtype=numpy.uint64)))
    temperature, filters = torch.tensor([sampling.temperature]), filters_of(sampling)
    tokens, logprobs = sample(processed[None], temperature, uniform, filters)
    token, logprob = int(tokens), float(logprobs)
    given = processed, temperature, filters
    if sampling.raw_logprobs:
        given = logits, torch.ones(1), None
        logprob = float(logprobs_of(logits[None].clone(), tokens, 1.0, None)[0])
    forced = forced_token(sampling, output)
    if forced is not None:
        token, logprob = forced, 0.0
    likely: list[tuple[int, float]] = []
    if sampling.top_logprobs:
        values, *rest = given
        ids, found = top_logprobs(values[None], *rest, min(sampling.top_logprobs, len(logits)))
        likely = list(zip(ids[0].tolist(), found[0].tolist(), strict=True))
    return token, logprob, tuple(pair for pair in likely if pair[1] != -numpy.inf)
