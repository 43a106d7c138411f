"""The policy-gradient objective as one pure function with independent choices (docs/algorithms/grpo.md).

The choices are token or sequence ratios, PPO's clip or CISPO's cap, KL estimator and placement, and importance weights
for the engine's probabilities. A named algorithm is a combination of settings.
"""

# Shapes in this file: all tensors are (M,), one entry per trained token.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinkstack.config import Positive, Share, Weight
from thinkstack.train.loss import Reduction, Stats, TrainedTokens
from thinkstack.types import ConfigError

KLEstimator = Literal["k1", "k2", "k3"]

LOG_RATIO_LIMIT = 20.0
"""Maximum absolute log-ratio; log-ratios are clamped to it before exp. policy/ratio_clamped and correction/kl_clamped
report the share of clamped tokens."""
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Settings of the clipped policy gradient of GRPO and its variants (arXiv:2402.03300, section 4.1)."""

    clip_low: Share = CLIP_LOW
    """Lower clip: below a ratio of 1 - clip_low a negative advantage has no gradient."""
    clip_high: Positive = CLIP_HIGH
    """Upper clip: above a ratio of 1 + clip_high a positive advantage has no gradient (DAPO's clip-higher,
    arXiv:2503.14476)."""
    clip_kind: Literal["clip", "cap"] = "clip"
    """"clip": PPO's minimum of the unclipped and the clipped objective. "cap": CISPO; the detached ratio, capped at
    cispo_cap, weights the log-probabilities, so that every token has a gradient (arXiv:2506.13585)."""
    cispo_cap: Weight = 0.0
    """Maximum ratio with clip_kind="cap" (the cap itself, not 1 + cap; no lower bound). Must be 0 with
    clip_kind="clip"."""
    dual_clip: Weight = 0.0
    """With a negative advantage A the loss is at most dual_clip * |A| (arXiv:1912.09729); 0 is off."""
    ratio_level: Literal["token", "sequence"] = "token"
    """"token": one ratio per token. "sequence": one ratio per completion, exp of the mean log-ratio of the tokens
    (GSPO, arXiv:2507.18071)."""
    reduction: Reduction = "token"
    """Weights of the tokens in the loss; see train/loss.token_weights."""
    kl: Weight = 0.0
    """Weight (beta) of the per-token KL term against the reference model; 0: no KL term and no reference model."""
    kl_estimator: KLEstimator = "k3"
    """"k3": unbiased value, biased gradient (used by GRPO); "k2": correct gradient on policy; "k1": only for
    kl_placement="reward"."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """"loss": the KL term is part of the loss. "reward": kl * estimate under the sampling policy is subtracted from the
    reward of each token before advantages are computed."""
    kl_ratio: bool = False
    """Multiply k3 by the ratio, which makes its gradient unbiased off policy too (V3.2, arXiv:2512.02556)."""
    importance_cap: Weight = 2.0
    """Maximum importance weight pi_old / pi_engine, which corrects for the engine's probabilities; 0: no importance
    weights."""
    importance_kind: Literal["truncate", "mask"] = "truncate"
    """Weights above importance_cap: "truncate" sets them to the cap, "mask" to 0, which removes the token or
    completion."""
    importance_level: Literal["token", "sequence"] = "token"
    """"token": one weight per token. "sequence": one weight per completion, the product of the ratios of its tokens."""
    temperature: Positive = 1.0
    """Sampling temperature of the rollouts, also applied to the logits of policy, old policy and reference model."""

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ConfigError(f"clip_low={self.clip_low} must lie in (0, 1) and clip_high={self.clip_high} be positive")
        if self.kl < 0 or self.importance_cap < 0:
            raise ConfigError(f"kl={self.kl} and importance_cap={self.importance_cap} cannot be negative")
        if not self.temperature > 0:
            raise ConfigError(
                f"loss.temperature={self.temperature} must be positive; it is the temperature of the rollouts"
            )
        _check_contradictions(self)


def _check_contradictions(cfg: PolicyLossConfig) -> None:
    """Raise ConfigError for settings that cancel each other or have no effect together."""
    if cfg.clip_kind == "cap":
        if not cfg.cispo_cap > 0:
            raise ConfigError(
                f"loss.clip_kind='cap' has no cap with loss.cispo_cap={cfg.cispo_cap}; "
                "set loss.cispo_cap, for example to 4"
            )
        if (cfg.clip_low, cfg.clip_high) != (CLIP_LOW, CLIP_HIGH) or cfg.dual_clip:
            raise ConfigError(
                f"loss.clip_kind='cap' does not use clip_low={cfg.clip_low}, clip_high={cfg.clip_high} "
                f"or dual_clip={cfg.dual_clip}; leave these three settings out"
            )
    elif cfg.cispo_cap:
        raise ConfigError(f"loss.cispo_cap={cfg.cispo_cap} has no effect with loss.clip_kind='clip'; use 'cap'")
    if cfg.dual_clip and not cfg.dual_clip > 1:
        raise ConfigError(
            f"loss.dual_clip={cfg.dual_clip} would also bound the loss on policy; use a value above 1, such as 3, or 0"
        )
    if cfg.ratio_level == "sequence" and cfg.reduction != "sequence":
        raise ConfigError(
            f"loss.reduction={cfg.reduction!r} gives long completions more weight, because all tokens of a completion "
            "share one ratio; use loss.reduction='sequence' with loss.ratio_level='sequence' (GSPO)"
        )
    if cfg.kl_placement == "loss" and cfg.kl_estimator == "k1":
        raise ConfigError(
            "the gradient of loss.kl_estimator='k1' in the loss does not depend on the reference model; use "
            "loss.kl_placement='reward', or loss.kl_estimator='k2' or 'k3'"
        )
    if cfg.kl_placement == "reward" and not cfg.kl:
        raise ConfigError(
            "loss.kl_placement='reward' has no effect with loss.kl=0; set loss.kl, or use kl_placement='loss'"
        )
    if cfg.kl_ratio and (cfg.kl_placement, cfg.kl_estimator) != ("loss", "k3"):
        raise ConfigError(
            "loss.kl_ratio=true needs loss.kl_estimator='k3' and loss.kl_placement='loss', not "
            f"{cfg.kl_estimator!r} and {cfg.kl_placement!r}; use these values, or loss.kl_ratio=false"
        )
    if not cfg.importance_cap and (cfg.importance_kind, cfg.importance_level) != ("truncate", "token"):
        raise ConfigError(
            f"loss.importance_cap=0 disables importance weights, so importance_kind={cfg.importance_kind!r} and "
            f"importance_level={cfg.importance_level!r} have no effect; set loss.importance_cap, for example to 2"
        )


def policy_loss(tokens: TrainedTokens, cfg: PolicyLossConfig) -> tuple[Tensor, Stats]:
    """-min(r A, clip(r) A) plus kl times the KL estimate, weighted per token; cfg selects other objectives.

    r is the ratio to the old policy (1 on the first pass, where the loss is about 0 and its gradient is not). A
    separate, capped and detached weight corrects for the engine's probabilities; the two are never merged.
    """
    assert tokens.advantages is not None and tokens.rollout_logprobs is not None
    assert not tokens.advantages.requires_grad and tokens.advantages.dtype == torch.float32
    old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = tokens.logprobs - old
    if cfg.ratio_level == "sequence":
        log_ratio = reduce_over_sequences(log_ratio, tokens.sequences, "mean")
    ratio, clamped = clamped_exp(log_ratio)
    surrogate, stats = clipped_surrogate(ratio, tokens, cfg)
    stats["policy/ratio_clamped"] = clamped.float().sum() * tokens.share
    stats |= mismatch_stats(old, tokens.rollout_logprobs, tokens.share)
    if cfg.importance_cap:
        weight = importance_weight(old, tokens, cfg)
        surrogate = surrogate * weight
        if cfg.importance_kind == "mask":
            stats["correction/masked"] = (weight == 0).float().sum() * tokens.share
    loss = -(tokens.weights * surrogate).sum()
    if tokens.entropy is not None:
        stats["policy/entropy_nats"] = tokens.entropy.sum() * tokens.share
    if cfg.kl and cfg.kl_placement == "loss":
        assert tokens.reference_logprobs is not None, "a KL term needs reference log-probabilities"
        kl = kl_estimate(tokens.logprobs, tokens.reference_logprobs, cfg.kl_estimator)
        stats["policy/kl_nats"] = kl.detach().sum() * tokens.share
        is_clamped = (tokens.logprobs - tokens.reference_logprobs).abs() > LOG_RATIO_LIMIT
        stats["correction/kl_clamped"] = is_clamped.float().sum() * tokens.share
        if cfg.kl_ratio:
            kl = kl * clamped_exp(tokens.logprobs - old)[0]
        loss = loss + cfg.kl * (tokens.weights * kl).sum()
    stats["loss/policy"] = loss.detach()
    return loss, {name: value.detach() for name, value in stats.items()}


def clipped_surrogate(ratio: Tensor, tokens: TrainedTokens, cfg: PolicyLossConfig) -> tuple[Tensor, Stats]:
    """The surrogate objective per token, and the share of tokens at each bound.

    clip_kind="clip": min(r A, clip(r) A), for A < 0 not below dual_clip * A. clip_kind="cap": min(r, cispo_cap) A log
    pi, where the first factor has no gradient; on policy the value is the mean of A log pi, not of A."""
    advantages = tokens.advantages
    assert advantages is not None
    if cfg.clip_kind == "cap":
        surrogate = ratio.detach().clamp(max=cfg.cispo_cap) * advantages * tokens.logprobs
        return surrogate, {"policy/clipped_high": (ratio > cfg.cispo_cap).float().sum() * tokens.share}
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantages)
    stats = {
        "policy/clipped_low": ((ratio < 1 - cfg.clip_low) & (advantages < 0)).float().sum() * tokens.share,
        "policy/clipped_high": ((ratio > 1 + cfg.clip_high) & (advantages > 0)).float().sum() * tokens.share,
    }
    if cfg.dual_clip:
        bound = cfg.dual_clip * advantages
        is_bound = (advantages < 0) & (surrogate < bound)
        surrogate = torch.where(is_bound, bound, surrogate)
        stats["correction/dual_clipped"] = is_bound.float().sum() * tokens.share
    return surrogate, stats


def importance_weight(old: Tensor, tokens: TrainedTokens, cfg: PolicyLossConfig) -> Tensor:
    """pi_old / pi_engine of each token or completion, detached; above the cap, truncated to the cap or set to 0.

    Source: truncated importance sampling, fengyao.notion.site/off-policy-rl; the masked form follows
    arXiv:2510.18855 without its lower bound.
    """
    assert tokens.rollout_logprobs is not None
    log_ratio = (old - tokens.rollout_logprobs).detach()
    if cfg.importance_level == "sequence":
        log_ratio = reduce_over_sequences(log_ratio, tokens.sequences, "sum")
    ratio, _ = clamped_exp(log_ratio)
    return (
        ratio.clamp(max=cfg.importance_cap)
        if cfg.importance_kind == "truncate"
        else ratio * (ratio <= cfg.importance_cap)
    )


def reduce_over_sequences(values: Tensor, sequences: Tensor | None, reduction: Literal["sum", "mean"]) -> Tensor:
    """Sum or mean of `values` over the trained tokens of each sequence, broadcast to the tokens."""
    assert sequences is not None, "sequence-level ratios need sequence ids"
    if not values.numel():
        return values
    count = int(sequences.max()) + 1
    sums = values.new_zeros(count).index_add(0, sequences, values)
    if reduction == "mean":
        sums = sums / values.new_zeros(count).index_add(0, sequences, torch.ones_like(values)).clamp(min=1)
    return sums[sequences]


def clamped_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp of a log-ratio clamped to +-LOG_RATIO_LIMIT, and which entries were clamped (they have no gradient)."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), log_ratio.abs() > LOG_RATIO_LIMIT


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (joschu.net/blog/kl-approx.html).

    With d = log reference - log policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
    """
    difference = (reference - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -difference
    return difference.square() / 2 if estimator == "k2" else difference.exp() - difference - 1


def mismatch_stats(trainer: Tensor, engine: Tensor, share: float) -> Stats:
    """Statistics of the differences between log-probabilities of trainer and engine, before any cap.

    exp(correction/mean_nats) is the engine's perplexity divided by the trainer's.
    """
    difference = (trainer - engine).detach()
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return {
        "mismatch/mean_abs_nats": difference.abs().sum() * share,
        "mismatch/abs_nats_max": difference.abs().max() if difference.numel() else difference.new_zeros(()),
        "mismatch/k3_nats": (ratio - 1 - difference).sum() * share,
        "mismatch/ratio_mean": ratio.sum() * share,
        "mismatch/ratio_square_mean": ratio.square().sum() * share,
        "correction/mean_nats": difference.sum() * share,
        "correction/ratio_max": ratio.max() if ratio.numel() else ratio.new_zeros(()),
    }
