"""The critic of PPO: advantages from its predictions, its loss, and how much of the returns it explains."""

# Shapes in this file: R rows, T tokens a row, M trained tokens, D hidden size.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinkstack.models.value_head import ValueModel
from thinkstack.train.loss import Stats
from thinkstack.types import Batch


@dataclass(frozen=True, kw_only=True)
class ValueBatch(Batch):
    """A batch whose trained targets carry what a critic learns."""

    returns: Tensor
    """(R, T) fp32 return from each trained token on."""
    old_values: Tensor
    """(R, T) fp32 what the critic predicted before the step."""


@dataclass(frozen=True, kw_only=True)
class ValueTokens:
    """What a value loss sees of a micro-batch. All tensors are (M,) fp32."""

    values: Tensor
    """Predictions of the current weights; the one entry that carries a gradient."""
    weights: Tensor
    """Share of each token in the loss of the whole step."""
    share: float
    """1 / trained tokens of the whole step."""
    returns: Tensor
    old_values: Tensor


def valued_tokens(model: ValueModel, hidden: Tensor, batch: Batch, share: float) -> ValueTokens:
    """The trained tokens of `batch` with the critic's predictions. hidden: (R, T, D)."""
    assert isinstance(batch, ValueBatch) and batch.weights is not None
    index = batch.loss_mask.flatten().nonzero().squeeze(1)
    return ValueTokens(
        values=model.values(hidden.flatten(0, 1)[index]),
        weights=batch.weights.flatten()[index],
        share=share,
        returns=batch.returns.flatten()[index],
        old_values=batch.old_values.flatten()[index],
    )


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, gae_lambda: float) -> list[float]:
    """Generalised advantage estimates of one answer's tokens (arXiv:1506.02438, equation 16).

    rewards[t]: for drawing token t. values[t]: predicted before token t was drawn; after the last token, cut off or
    not, nothing more is earned. With delta_t = r_t + gamma V_t+1 - V_t the estimate is sum_l (gamma lam)^l delta_t+l.
    lam=1: the return minus the prediction, without bias. lam=0: one step ahead, whatever the critic believes.
    """
    advantages, later, following = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        later = rewards[t] + gamma * following - values[t] + gamma * gae_lambda * later
        advantages[t], following = later, values[t]
    return advantages


def value_loss(tokens: ValueTokens, clip: float) -> tuple[Tensor, Stats]:
    """Half the squared error to the returns, weighted per token.

    clip: a prediction that moved further than this from the old one counts as if it had moved so far, where that is
    worse (PPO's reference implementation, arXiv:2005.12729, section 3); 0 leaves it out.
    """
    error = (tokens.values - tokens.returns).square()
    stats: Stats = {}
    if clip:
        near = tokens.old_values + (tokens.values - tokens.old_values).clamp(-clip, clip)
        clipped = (near - tokens.returns).square()
        stats["critic/clipped"] = (clipped > error).float().sum() * tokens.share
        error = torch.maximum(error, clipped)
    loss = (tokens.weights * error).sum() / 2
    missed = tokens.returns - tokens.values.detach()
    stats |= {
        "critic/loss": loss.detach(),
        "critic/value_mean": tokens.values.detach().sum() * tokens.share,
        "critic/return_mean": tokens.returns.sum() * tokens.share,
        "critic/return_square_mean": tokens.returns.square().sum() * tokens.share,
        "critic/error_mean": missed.sum() * tokens.share,
        "critic/error_square_mean": missed.square().sum() * tokens.share,
    }
    return loss, stats


def explained_variance(metrics: Mapping[str, float]) -> float:
    """1 - Var(return - value) / Var(return) over the tokens of a step, from the moments that `value_loss` gives.

    1: the critic knows every return; 0: no more than their mean; below: worse. 0 where all returns are equal.
    """
    spread = metrics["critic/return_square_mean"] - metrics["critic/return_mean"] ** 2
    left = metrics["critic/error_square_mean"] - metrics["critic/error_mean"] ** 2
    return 1 - left / spread if spread > 1e-8 else 0.0
