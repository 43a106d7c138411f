"""The optimizer: AdamW or Muon, with warm-up by optimizer step, a schedule by share of the run, and clipping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from thinkstack.config import CountOrZero, Positive, Share, Weight
from thinkstack.models.precision import DTYPES, AskedPrecision, resolve_precision
from thinkstack.train.low_moments import LowMomentAdamW
from thinkstack.train.muon import Muon, hidden_matrices
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) as in the V3 report, section 4.2, unless said otherwise."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """What takes the step; muon trains the hidden matrices and leaves the rest to AdamW (train/muon.py)."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine", "v3"] = "constant"
    """How the rate falls over the last decay_share of the run; "v3" has the phases of DeepSeek-V3 instead."""
    phases: tuple[float, float, float, float] = (10.0, 4.3, 0.333, 0.167)
    """Schedule "v3": how long the rate is constant (warm-up included), falls as a cosine to final_share, stays there,
    and stays at last_share, relative to each other; published in trillions of tokens (V3 report, section 4.2)."""
    last_share: Share = 7.3 / 220
    """Schedule "v3": rate of its last phase, relative to the peak (7.3e-6 of 2.2e-4)."""
    decay_share: Share = 1.0
    """Share of the run, at its end, in which the rate falls."""
    final_share: Share = 0.1
    """Rate at the end, relative to the peak."""
    beta1: Share = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: Share = 0.95
    """Decay of AdamW's mean of squared gradients."""
    eps: Positive = 1e-8
    """Added to the root of the latter."""
    weight_decay: Weight = 0.1
    """Decoupled decay of matrices; vectors and biases do not decay."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What AdamW keeps its two moments in; V3 was trained with bf16 (train/low_moments.py)."""
    momentum: Share = 0.95
    """Of Muon, with Nesterov's look ahead."""
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Size of Muon's update: 0.2 sqrt(max(rows, columns)) as in Moonlight, which AdamW's rate and decay fit, or
    sqrt(max(1, rows / columns)) as in the first version."""
    muon_dtype: AskedPrecision = "auto"
    """Precision of Muon's products; fp32 where the processor has none in bf16."""
    clip_norm: Positive = 1.0
    """Largest gradient norm of a step; larger ones are scaled down."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} trains nothing; use a positive number")
        if not 0 <= self.decay_share <= 1:
            raise ConfigError(f"decay_share={self.decay_share} must lie in 0..1")
        if min(self.phases) < 0 or not sum(self.phases) > 0:
            raise ConfigError(f"phases={self.phases} are lengths; use numbers from 0 on, not all of them 0")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must lie in 0..1, below 1; 0.95 is usual")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm={self.clip_norm} would undo every step; use a positive number (1.0 is usual)")


def learning_rate(cfg: OptimConfig, step: int, progress: float) -> float:
    """Learning rate of optimizer step `step` (from 0).

    progress: share of the run's tokens seen before this step, from 0; past 1 the rate stays where it ended.
    """
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    start, length = 1 - cfg.decay_share, cfg.decay_share
    if cfg.schedule == "v3":
        start, length, low, _ = (phase / sum(cfg.phases) for phase in cfg.phases)
        if progress >= start + length + low:
            return cfg.learning_rate * cfg.last_share
    if cfg.schedule == "constant" or progress < start:
        return cfg.learning_rate
    fallen = min((progress - start) / length, 1.0) if length else 1.0
    left = 1 - fallen if cfg.schedule == "linear" else (1 + math.cos(math.pi * fallen)) / 2
    return cfg.learning_rate * (cfg.final_share + (1 - cfg.final_share) * left)


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of cfg over the model's parameters; only matrices decay."""
    if cfg.optimizer == "adamw":
        return _adamw(list(model.parameters()), cfg)
    stacks = hidden_matrices(model)
    mine = {id(stack.parameter) for stack in stacks}
    others = _adamw([parameter for parameter in model.parameters() if id(parameter) not in mine], cfg)
    dtype = DTYPES[resolve_precision(cfg.muon_dtype, others.param_groups[0]["params"][0].device)]
    return Muon(stacks, others, cfg.weight_decay, cfg.momentum, cfg.muon_scale, dtype)


def _adamw(parameters: list[nn.Parameter], cfg: OptimConfig) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if cfg.moments == "bf16":
        return LowMomentAdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
