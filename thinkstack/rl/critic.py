"""The critic of PPO (docs/algorithms/ppo.md); GRPO has no critic."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinkstack.config import CountOrZero, Positive, Share, Weight
from thinkstack.models.lora import LoRAConfig
from thinkstack.models.transformer import Transformer
from thinkstack.models.value_head import ValueModel
from thinkstack.train.loss import token_weights
from thinkstack.train.passes import run_trunk, split_micro_batches
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.train.value_loss import explained_variance, value_loss
from thinkstack.types import Batch, ConfigError

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


class Critic:
    """A value model and its trainer, which fits the model to returns."""

    def __init__(self, policy: Transformer, cfg: CriticConfig, trainer: TrainerConfig, steps: int, folder: Path):
        """trainer: settings of the policy's trainer. steps: length of the learning-rate schedule, without prefit_steps.
        folder: folder for dumps of batches with non-finite gradients."""
        self.cfg = cfg
        optim = replace(trainer.optim, learning_rate=cfg.learning_rate)
        settings = replace(trainer, optim=optim, lora=LoRAConfig())
        self.trainer = Trainer(ValueModel.from_policy(policy), settings, steps + cfg.prefit_steps, folder)

    def values(self, batch: Batch) -> Tensor:
        """Predicted returns (R, T) fp32 at every position of a batch."""
        return batch_values(self.trainer.workers.compute_model, batch, self.trainer.cfg.micro_batch_tokens)

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step towards the returns of a batch; returns its metrics, under critic/."""
        loss = partial(value_loss, clip=self.cfg.clip)
        stats = self.trainer.step(batch.with_weights(token_weights(batch, "token")), loss)
        metrics = {name: value for name, value in stats.items() if name.startswith("critic/")}
        return metrics | {
            "critic/explained_variance": explained_variance(stats),
            "critic/grad_norm": stats["train/grad_norm"],
        }

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
