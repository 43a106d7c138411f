"""The critic of PPO (docs/algorithms/ppo.md); GRPO has no critic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinkstack.config import CountOrZero, Positive, Share, Weight
from thinkstack.models.lora import LoRAConfig
from thinkstack.models.transformer import Transformer
from thinkstack.models.value_head import ValueModel
from thinkstack.rl.groups import gather_tokens, scatter_tokens, to_batch, whiten
from thinkstack.train.loss import token_weights
from thinkstack.train.passes import run_trunk, split_micro_batches
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.train.value_loss import ValueBatch, explained_variance, gae, value_loss
from thinkstack.types import Batch, ConfigError, Rollout

PREFIX = "critic."


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """Settings of PPO's value model (arXiv:1707.06347) and of generalized advantage estimation."""

    learning_rate: Positive = 1e-3
    """Peak learning rate of the critic. Other trainer settings are shared with the policy; the critic has no
    adapters."""
    gamma: Share = 1.0
    """Discount per token; 1 makes the return independent of the length."""
    gae_lambda: Share = 1.0
    """Lambda of the advantage estimate; 1 is unbiased; below 1, predicted values partly replace later rewards."""
    clip: Weight = 0.2
    """Value clipping: the loss is the larger of two losses, of the prediction and of the prediction clipped to within
    this distance of the old value; 0 is off."""
    whiten: bool = True
    """Whiten the advantages of a step to mean 0 and standard deviation 1."""
    prefit_steps: CountOrZero = 0
    """Number of rollout steps that train only the critic, before the first step of the policy (arXiv:2503.01491,
    section 4.1)."""

    def __post_init__(self) -> None:
        if not (0 < self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ConfigError(
                f"critic.gamma={self.gamma} must lie in (0, 1] and critic.gae_lambda={self.gae_lambda} in [0, 1]"
            )
        if self.clip < 0 or self.prefit_steps < 0 or not self.learning_rate > 0:
            raise ConfigError(
                f"critic.clip={self.clip} and critic.prefit_steps={self.prefit_steps} cannot be negative, and "
                f"critic.learning_rate={self.learning_rate} must be positive"
            )


class ValueTarget(NamedTuple):
    """Per-token training target of the critic for one completion."""

    returns: list[float]
    values: list[float]
    """Values predicted before the step."""


CriticBatch = tuple[list[Rollout], list[ValueTarget]]


class Critic:
    """A value model and its trainer, which fits the model to returns."""

    def __init__(
        self, policy: Transformer, cfg: CriticConfig, trainer: TrainerConfig, steps: int, row_tokens: int, folder: Path
    ):
        """trainer: settings of the policy's trainer. steps: length of the learning-rate schedule, without prefit_steps.
        folder: folder for dumps of batches with non-finite gradients."""
        self.cfg, self.row_tokens = cfg, row_tokens
        optim = replace(trainer.optim, learning_rate=cfg.learning_rate)
        settings = replace(trainer, optim=optim, lora=LoRAConfig())
        self.trainer = Trainer(ValueModel.from_policy(policy), settings, steps + cfg.prefit_steps, folder)

    def estimate_advantages(
        self, rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float]], gae_lambda: float | None = None
    ) -> tuple[list[list[float]], list[ValueTarget]]:
        """Per-token advantages and value targets of each completion.

        rewards: one per token. gae_lambda: overrides cfg.gae_lambda.
        """
        batch = to_batch(rollouts, [0.0] * len(rollouts), self.row_tokens)
        values = gather_tokens(
            batch_values(self.trainer.workers.compute_model, batch, self.trainer.cfg.micro_batch_tokens), batch
        )
        gae_lambda = self.cfg.gae_lambda if gae_lambda is None else gae_lambda
        advantages = [gae(r, v, self.cfg.gamma, gae_lambda) for r, v in zip(rewards, values, strict=True)]
        value_targets = [
            ValueTarget([advantage + value for advantage, value in zip(a, v, strict=True)], v)
            for a, v in zip(advantages, values, strict=True)
        ]
        return (whiten(advantages) if self.cfg.whiten else advantages), value_targets

    def update(self, batches: Sequence[CriticBatch]) -> dict[str, float]:
        """One optimizer step per batch; returns the metrics of the last one, under critic/."""
        metrics: dict[str, float] = {}
        for rollouts, value_targets in batches:
            batch = to_batch(rollouts, [0.0] * len(rollouts), self.row_tokens)
            returns, values = (
                scatter_tokens([t.returns for t in value_targets], batch),
                scatter_tokens([t.values for t in value_targets], batch),
            )
            columns = vars(batch) | {"weights": token_weights(batch, "token")}
            step_metrics = self.trainer.step(
                ValueBatch(**columns, returns=returns, old_values=values), partial(value_loss, clip=self.cfg.clip)
            )
            metrics = {name: value for name, value in step_metrics.items() if name.startswith("critic/")}
            metrics |= {
                "critic/explained_variance": explained_variance(step_metrics),
                "critic/grad_norm": step_metrics["train/grad_norm"],
            }
        return metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers for `restore`."""
        tensors, numbers = trainer_state(self.trainer)
        return {PREFIX + name: value for name, value in tensors.items()}, {"critic": numbers}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore a state returned by `state`."""
        own = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        restore_trainer(self.trainer, own, numbers["critic"])


@torch.no_grad()
def batch_values(model: Transformer, batch: Batch, micro_batch_tokens: int) -> Tensor:
    """Predicted returns (R, T) fp32 at every position, with the same arithmetic as `Trainer.step`."""
    assert isinstance(model, ValueModel)
    on_device = batch.to(next(model.parameters()).device)
    rows = [
        model.values(run_trunk(model, micro_batch).hidden)
        for micro_batch in split_micro_batches(on_device, micro_batch_tokens)
    ]
    return torch.cat(rows).to(batch.ids.device)
