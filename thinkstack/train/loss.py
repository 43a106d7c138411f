"""Losses as pure functions of flat vectors with one entry per trained token.

Every loss is a weighted sum. The weights are computed once per optimizer step (`token_weights`) from global counts, so
that the losses of micro-batches and ranks add up; there is no other denominator. Statistics add up in the same way,
except that statistics with names ending in "_max" are combined by maximum.
"""

# Shapes in this file: R rows, T tokens per row, N = R*T, M trained tokens, D hidden size, V vocabulary size.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinkstack.kernels import ops
from thinkstack.train.memory import head_chunk
from thinkstack.types import Batch, ConfigError

Reduction = Literal["token", "sequence", "fixed"]
Stats = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainedTokens:
    """Inputs of a loss for one micro-batch. All tensors are (M,) fp32 unless stated otherwise."""

    logprobs: Tensor
    """Log-probabilities of the targets under the current weights; the only field with a gradient."""
    weights: Tensor
    """Weight of each token in the loss of the entire step."""
    share: float
    """1 / number of trained tokens of the entire step: the weight of a token in a mean statistic."""
    entropy: Tensor | None = None
    """Entropy of the prediction in nats; None if not computed."""
    advantages: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    sequences: Tensor | None = None
    """int64, equal for the tokens of one sequence; required by sequence-level objectives."""


def token_weights(batch: Batch, reduction: Reduction, fixed_length: int = 0) -> Tensor:
    """Weight of each target in the loss of one optimizer step, (R, T) fp32, 0 for untrained targets.

    reduction="token": equal weight per trained token, 1 / (number of trained tokens). reduction="sequence": equal
    weight per sequence, 1 / (number of sequences * trained tokens of the sequence); sequences without trained tokens
    are not counted. reduction="fixed": 1 / (number of sequences * fixed_length), independent of the lengths (Dr. GRPO,
    arXiv:2503.20783). batch: all rows of the step on this rank; counts are summed over ranks."""
    mask, sequences = batch.loss_mask, batch.sequence_ids
    lengths = mask.new_zeros(int(sequences.max()) + 1)
    lengths.index_add_(0, sequences.flatten(), mask.flatten())
    num_tokens, num_sequences = sum_over_ranks(torch.stack((mask.sum(), (lengths > 0).sum().float()))).clamp(min=1)
    if reduction == "token":
        return mask / num_tokens
    if reduction == "sequence":
        return mask / (lengths.clamp(min=1)[sequences] * num_sequences)
    if fixed_length < 1:
        raise ConfigError(f"reduction='fixed' needs fixed_length >= 1, not {fixed_length}; use max_tokens")
    return mask / (fixed_length * num_sequences)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum over all ranks of a distributed run; the same tensor without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


def token_logprobs(
    hidden: Tensor, index: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets` under the head, without storing all logits at once.

    hidden: (N, D). index: (M,) int64, distinct rows of hidden to predict from. weight: (V, D) head. targets: (M,).
    temperature divides the logits. Returns (logprobs (M,) fp32, entropy (M,) fp32 without gradient, or None).
    """
    logprobs, entropy = _TokenLogProbs.apply(hidden, index, weight, targets, temperature, with_entropy)
    return logprobs, entropy if with_entropy else None


class _TokenLogProbs(torch.autograd.Function):
    """Computes logits in chunks and recomputes them in the backward pass; arithmetic after the matmul is in fp32."""

    @staticmethod
    def forward(ctx, hidden, index, weight, targets, temperature, with_entropy):  # type: ignore[no-untyped-def,override]
        logprobs = hidden.new_empty(index.numel(), dtype=torch.float32)
        normalizer, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for part in _chunks(index.numel(), weight.shape[0]):
            logits = ops.linear_forward(hidden[index[part]], weight)  # (m, V)
            out = entropy[part] if with_entropy else None
            logprobs[part], normalizer[part] = ops.logprobs(logits, targets[part], temperature, out)
        ctx.save_for_backward(hidden, index, weight, targets, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def,override]
        hidden, index, weight, targets, normalizer = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in _chunks(index.numel(), weight.shape[0]):
            rows = hidden[index[part]]
            logits = ops.linear_forward(rows, weight)
            given = targets[part], normalizer[part], grad[part]
            grad_logits = ops.logprobs_backward(logits, *given, ctx.temperature)
            grad_hidden.index_copy_(0, index[part], ops.linear_grad_x(grad_logits, weight))
            if grad_weight is not None:
                grad_weight += ops.linear_grad_weight(grad_logits, rows)
        return grad_hidden, None, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(count: int, vocab_size: int) -> Iterator[slice]:
    size = head_chunk(vocab_size)
    return (slice(start, start + size) for start in range(0, count, size))


def next_token_loss(tokens: TrainedTokens) -> tuple[Tensor, Stats]:
    """Cross-entropy of the targets in nats."""
    loss = -(tokens.weights * tokens.logprobs).sum()
    return loss, {"loss/next_token_nats": loss.detach()}
