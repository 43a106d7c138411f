"""The critic of PPO beside the policy: what GRPO leaves out (docs/ppo.md)."""

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
from thinkstack.rl.groups import gather_tokens, normalized, spread_tokens, to_batch
from thinkstack.train.loss import token_weights
from thinkstack.train.passes import micro_batches, run_trunk
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.train.value_loss import ValueBatch, explained_variance, gae, value_loss
from thinkstack.types import Batch, ConfigError, Rollout

PREFIX = "critic."


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value model of PPO (arXiv:1707.06347) and how advantages are made from it."""

    learning_rate: Positive = 1e-3
    """Peak learning rate of the critic; everything else of its trainer is the policy's, but it never has adapters."""
    gamma: Share = 1.0
    """Discount a token; 1 values a right answer the same however long it is."""
    gae_lambda: Share = 1.0
    """Lambda of the advantage estimate; 1 is unbiased, below 1 the critic's belief replaces later rewards."""
    clip: Weight = 0.2
    """A prediction is held within this of the old one where that costs more; 0 leaves it out."""
    whiten: bool = True
    """Advantages of the step get mean 0 and deviation 1."""
    prefit_steps: CountOrZero = 0
    """Drawings on which the critic alone is trained before the policy's first step (arXiv:2503.01491, section 4.1)."""

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


class Target(NamedTuple):
    """What the critic learns from one answer, token by token."""

    returns: list[float]
    values: list[float]
    """Predicted before the step."""


CriticBatch = tuple[list[Rollout], list[Target]]


class Critic:
    """A value model and the trainer that fits it to returns."""

    def __init__(
        self, policy: Transformer, cfg: CriticConfig, trainer: TrainerConfig, steps: int, row_tokens: int, folder: Path
    ):
        """trainer: the policy's; steps: what the schedule spans; folder: where a batch without finite gradient goes."""
        self.cfg, self.row_tokens = cfg, row_tokens
        optim = replace(trainer.optim, learning_rate=cfg.learning_rate)
        settings = replace(trainer, optim=optim, lora=LoRAConfig())
        self.trainer = Trainer(ValueModel.from_policy(policy), settings, steps + cfg.prefit_steps, folder)

    def estimate_advantages(
        self, rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float]], gae_lambda: float | None = None
    ) -> tuple[list[list[float]], list[Target]]:
        """Advantages of each answer's tokens, and what to learn from it. rewards: by token. lam: if not cfg.lam."""
        batch = to_batch(rollouts, [0.0] * len(rollouts), self.row_tokens)
        values = gather_tokens(
            batch_values(self.trainer.workers.running, batch, self.trainer.cfg.micro_batch_tokens), batch
        )
        gae_lambda = self.cfg.gae_lambda if gae_lambda is None else gae_lambda
        raw = [gae(earned, known, self.cfg.gamma, gae_lambda) for earned, known in zip(rewards, values, strict=True)]
        targets = [
            Target([gain + value for gain, value in zip(gains, known, strict=True)], known)
            for gains, known in zip(raw, values, strict=True)
        ]
        return (normalized(raw) if self.cfg.whiten else raw), targets

    def update(self, batches: Sequence[CriticBatch]) -> dict[str, float]:
        """One optimizer step for each piece; the figures of the last one, under critic/."""
        metrics: dict[str, float] = {}
        for rollouts, targets in batches:
            batch = to_batch(rollouts, [0.0] * len(rollouts), self.row_tokens)
            returns, values = (
                spread_tokens([t.returns for t in targets], batch),
                spread_tokens([t.values for t in targets], batch),
            )
            given = vars(batch) | {"weights": token_weights(batch, "token")}
            found = self.trainer.step(
                ValueBatch(**given, returns=returns, old_values=values), partial(value_loss, clip=self.cfg.clip)
            )
            metrics = {name: value for name, value in found.items() if name.startswith(PREFIX[:-1] + "/")}
            metrics |= {
                "critic/explained_variance": explained_variance(found),
                "critic/grad_norm": found["train/grad_norm"],
            }
        return metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `restore` needs."""
        tensors, numbers = trainer_state(self.trainer)
        return {PREFIX + name: value for name, value in tensors.items()}, {"critic": numbers}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        mine = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        restore_trainer(self.trainer, mine, numbers["critic"])


@torch.no_grad()
def batch_values(model: Transformer, batch: Batch, micro_batch_tokens: int) -> Tensor:
    """Predicted returns (R, T) fp32 at every position; the same arithmetic as in `Trainer.step`."""
    assert isinstance(model, ValueModel)
    micros = micro_batches(batch.to(next(model.parameters()).device), micro_batch_tokens)
    rows = [model.values(run_trunk(model, micro).hidden) for micro in micros]
    return torch.cat(rows).to(batch.ids.device)
