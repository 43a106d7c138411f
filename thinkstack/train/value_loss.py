"""The critic of PPO: generalized advantage estimation, value loss, explained variance."""

# Shapes in this file: R rows, T tokens per row, M trained tokens, D hidden size.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinkstack.models.value_head import ValueModel
from thinkstack.train.loss import Stats
from thinkstack.types import Batch


@dataclass(frozen=True, kw_only=True)
class ValueTokens:
    """Inputs of a value loss for one micro-batch. All tensors are (M,) fp32."""

    values: Tensor
    """Values predicted with the current weights; the only field with a gradient."""
    weights: Tensor
    """Weight of each token in the loss of the entire step."""
    share: float
    """1 / number of trained tokens of the entire step."""
    returns: Tensor
    old_values: Tensor


def value_tokens(model: ValueModel, hidden: Tensor, batch: Batch, share: float) -> ValueTokens:
    """The trained tokens of `batch` with the predictions of the critic. hidden: (R, T, D)."""
    assert batch.weights is not None and batch.returns is not None and batch.values is not None
    index = batch.loss_mask.flatten().nonzero().squeeze(1)
    return ValueTokens(
        values=model.values(hidden.flatten(0, 1)[index]),
        weights=batch.weights.flatten()[index],
        share=share,
        returns=batch.returns.flatten()[index],
        old_values=batch.values.flatten()[index],
    )


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, gae_lambda: float) -> list[float]:
    """Generalized advantage estimates of the tokens of one completion (arXiv:1506.02438, equation 16).

    rewards[t]: reward for token t. values[t]: value predicted before token t was sampled; the value after the last
    token is 0, for truncated completions as well. With delta_t = r_t + gamma V_t+1 - V_t the estimate is sum_l (gamma
    lambda)^l delta_t+l. gae_lambda=1: the return minus the prediction, unbiased. gae_lambda=0: the one-step estimate
    delta_t."""
    advantages, advantage, next_value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        advantage = rewards[t] + gamma * next_value - values[t] + gamma * gae_lambda * advantage
        advantages[t], next_value = advantage, values[t]
    return advantages


def value_loss(tokens: ValueTokens, clip: float) -> tuple[Tensor, Stats]:
    """Half the squared error to the returns, weighted per token.

    clip: the error is the larger of two errors, of the prediction and of the prediction clipped to within this distance
    of the old value (PPO's reference implementation, arXiv:2005.12729, section 3); 0 is off.
    """
    error = (tokens.values - tokens.returns).square()
    stats: Stats = {}
    if clip:
        clipped_values = tokens.old_values + (tokens.values - tokens.old_values).clamp(-clip, clip)
        clipped = (clipped_values - tokens.returns).square()
        stats["critic/clipped"] = (clipped > error).float().sum() * tokens.share
        error = torch.maximum(error, clipped)
    loss = (tokens.weights * error).sum() / 2
    residual = tokens.returns - tokens.values.detach()
    stats |= {
        "critic/loss": loss.detach(),
        "critic/value_mean": tokens.values.detach().sum() * tokens.share,
        "critic/return_mean": tokens.returns.sum() * tokens.share,
        "critic/return_square_mean": tokens.returns.square().sum() * tokens.share,
        "critic/error_mean": residual.sum() * tokens.share,
        "critic/error_square_mean": residual.square().sum() * tokens.share,
    }
    return loss, stats


def explained_variance(metrics: Mapping[str, float]) -> float:
    """1 - Var(return - value) / Var(return) over the tokens of a step, from the statistics of `value_loss`.

    1: all returns are predicted exactly; 0: no better than predicting the mean; below 0: worse. 0 if all returns are
    equal."""
    variance = metrics["critic/return_square_mean"] - metrics["critic/return_mean"] ** 2
    residual = metrics["critic/error_square_mean"] - metrics["critic/error_mean"] ** 2
    return 1 - residual / variance if variance > 1e-8 else 0.0
