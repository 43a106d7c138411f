"""The optimizer: AdamW or Muon, with warm-up by optimizer step, a schedule by share of the run, and clipping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from thinkstack.config import CountOrZero, Positive, Share, Weight
from thinkstack.kernels.precision import DTYPES, RequestedPrecision, resolve_precision
from thinkstack.train.low_moments import LowMomentAdamW
from thinkstack.train.muon import Muon, hidden_matrices
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) as in the V3 report, section 4.2, unless stated otherwise."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" trains hidden matrices with Muon and other parameters with AdamW (train/muon.py)."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    warmup_steps: CountOrZero = 0
    """Number of steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine", "v3"] = "constant"
    """Decay of the learning rate over the last decay_share of the run; "v3" uses the phases of DeepSeek-V3 instead."""
    phases: tuple[float, float, float, float] = (10.0, 4.3, 0.333, 0.167)
    """With schedule="v3", relative lengths of the phases: constant rate (warm-up included), cosine decay to
    final_share, constant, constant at last_share. The defaults are trillions of tokens (V3 report, section 4.2)."""
    last_share: Share = 7.3 / 220
    """With schedule="v3", learning rate of the last phase, relative to the peak (7.3e-6 of 2.2e-4)."""
    decay_share: Share = 1.0
    """Last share of the run, over which the learning rate decays."""
    final_share: Share = 0.1
    """Learning rate at the end, relative to the peak."""
    beta1: Share = 0.9
    """Decay of AdamW's first moment."""
    beta2: Share = 0.95
    """Decay of AdamW's second moment."""
    eps: Positive = 1e-8
    """Epsilon added to the root of the second moment."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay of matrices; vectors and biases have none."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Precision of AdamW's two moments; V3 was trained with bf16 (train/low_moments.py)."""
    momentum: Share = 0.95
    """Nesterov momentum of Muon."""
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Scale of Muon's update. "match_rms_adamw": 0.2 sqrt(max(rows, columns)) as in Moonlight, for use with AdamW's
    learning rate and weight decay. "original": sqrt(max(1, rows / columns))."""
    muon_dtype: RequestedPrecision = "auto"
    """Precision of Muon's matmuls; "auto": fp32 on processors without bf16 matmuls."""
    clip_norm: Positive = 1.0
    """Maximum gradient norm of a step; larger gradients are scaled down."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive")
        if not 0 <= self.decay_share <= 1:
            raise ConfigError(f"decay_share={self.decay_share} must lie in 0..1")
        if min(self.phases) < 0 or not sum(self.phases) > 0:
            raise ConfigError(f"phases={self.phases} are relative lengths; use non-negative numbers that are not all 0")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must be at least 0 and below 1 (usually 0.95)")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm={self.clip_norm} must be positive (usually 1.0)")


def learning_rate(cfg: OptimConfig, step: int, progress: float) -> float:
    """Learning rate of optimizer step `step` (from 0).

    progress: share of the run's tokens seen before this step, from 0; beyond 1 the rate stays constant.
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
    decayed = min((progress - start) / length, 1.0) if length else 1.0
    left = 1 - decayed if cfg.schedule == "linear" else (1 + math.cos(math.pi * decayed)) / 2
    return cfg.learning_rate * (cfg.final_share + (1 - cfg.final_share) * left)


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Create the optimizer for the parameters of the model; weight decay applies to matrices only."""
    if cfg.optimizer == "adamw":
        return _adamw(list(model.parameters()), cfg)
    stacks = hidden_matrices(model)
    muon_ids = {id(stack.parameter) for stack in stacks}
    adamw = _adamw([parameter for parameter in model.parameters() if id(parameter) not in muon_ids], cfg)
    dtype = DTYPES[resolve_precision(cfg.muon_dtype, adamw.param_groups[0]["params"][0].device)]
    return Muon(stacks, adamw, cfg.weight_decay, cfg.momentum, cfg.muon_scale, dtype)


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
