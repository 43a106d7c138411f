"""Processing of logits before sampling (bias, bans, penalties) and of sampled tokens; kernels/sampling.py samples."""

# Shapes in this file: B rows, V vocabulary size.

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from thinkstack.kernels.sampling import largest
from thinkstack.types import SamplingParams


def needs_no_processing(sampling: SamplingParams) -> bool:
    """Whether the request needs no logits processing besides temperature, top_k, top_p and min_p."""
    neutral = not (sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias)
    return neutral and sampling.repetition_penalty == 1 and not sampling.min_tokens


def adjust(logits: Tensor, sampling: SamplingParams, prompt: numpy.ndarray, output_token_ids: numpy.ndarray) -> None:
    """Apply logit bias, the ban of stop tokens before min_tokens, and penalties to one row of logits (V,), in place.

    prompt, output_token_ids: token ids so far. The repetition penalty follows arXiv:1909.05858; presence and frequency
    penalties follow the OpenAI API.
    """
    for token, value in sampling.logit_bias.items():
        logits[token] += value
    if len(output_token_ids) < sampling.min_tokens:
        logits[list(sampling.stop_token_ids)] = -torch.inf
    if sampling.repetition_penalty != 1:
        seen = torch.from_numpy(numpy.unique(numpy.concatenate((prompt, output_token_ids)))).to(logits.device)
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if sampling.presence_penalty or sampling.frequency_penalty:
        tokens, counts = (
            torch.from_numpy(part).to(logits.device) for part in numpy.unique(output_token_ids, return_counts=True)
        )
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts.float()


def top_logprobs(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` most likely tokens of each row of (B, V) as (id, log-probability), most likely first; fewer if fewer
    tokens have a nonzero probability."""
    values, index = largest(logprobs, min(count, logprobs.shape[1]))
    return [
        tuple((token, value) for token, value in zip(tokens, row, strict=True) if value != -numpy.inf)
        for tokens, row in zip(index.tolist(), values.tolist(), strict=True)
    ]


def ends_with(ids: numpy.ndarray, suffix: Sequence[int]) -> bool:
    """Whether `ids` end with `suffix`."""
    return len(ids) >= len(suffix) and (ids[len(ids) - len(suffix) :] == suffix).all()


def forced_think_end_token(sampling: SamplingParams, output_token_ids: numpy.ndarray) -> int | None:
    """The next token of think_end_token_ids if thinking has exceeded its budget, otherwise None. Must be called only
    before thinking has ended."""
    if sampling.thinking_budget is None or len(output_token_ids) < sampling.thinking_budget:
        return None
    end = sampling.think_end_token_ids
    return end[next(n for n in range(len(end) - 1, -1, -1) if ends_with(output_token_ids, end[:n]))]
