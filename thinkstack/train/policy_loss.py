"""The objective of policy-gradient training as one pure function with orthogonal choices (docs/grpo.md).

What a ratio belongs to (token or sequence), how it is bounded (PPO's clip or CISPO's cap), how KL is estimated and
where it goes, how the engine's probabilities are corrected for. The named algorithms are values of the configuration.
"""

# Shapes in this file: all tensors are (M,), one entry per trained token.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinkstack.config import Positive, Share, Weight
from thinkstack.train.loss import Reduction, Stats, TrainedTokens
from thinkstack.types import ConfigError

Estimator = Literal["k1", "k2", "k3"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-this before exp; how often is reported as policy/ratio_clamped, for KL as
correction/kl_clamped."""
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The clipped policy gradient of GRPO and its relatives (arXiv:2402.03300, section 4.1)."""

    clip_low: Share = CLIP_LOW
    """A ratio below 1 - clip_low earns nothing more from lowering it."""
    clip_high: Positive = CLIP_HIGH
    """A ratio above 1 + clip_high earns nothing more from raising it (DAPO's clip-higher, arXiv:2503.14476)."""
    clip_kind: Literal["clip", "cap"] = "clip"
    """"clip": PPO's minimum of plain and clipped gain. "cap": CISPO, the detached ratio, at most cispo_cap, weighs
    log-probabilities, so that no token loses its gradient (arXiv:2506.13585)."""
    cispo_cap: Weight = 0.0
    """Largest ratio with clip_kind="cap": the cap itself, not 1 + it; there is none below. 0 where "clip" is used."""
    dual_clip: Weight = 0.0
    """With a negative advantage A the loss is at most dual_clip * |A| (arXiv:1912.09729); 0 leaves it out."""
    ratio_level: Literal["token", "sequence"] = "token"
    """"sequence": one ratio an answer, exp of the mean log-ratio of its tokens (GSPO, arXiv:2507.18071)."""
    reduction: Reduction = "token"
    """How tokens are weighted: see token_weights."""
    kl: Weight = 0.0
    """Weight of the KL term against the reference model (beta), per token; 0 loads no reference."""
    kl_estimator: Estimator = "k3"
    """k3 has the right value and a biased gradient (GRPO's choice); k2 has the right gradient on policy; k1 belongs in
    the reward."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """"reward": kl * estimate of the drawing policy is taken off each token's reward before advantages are made."""
    kl_ratio: bool = False
    """Multiply k3 by the ratio, which makes its gradient unbiased also off policy (V3.2, arXiv:2512.02556)."""
    importance_cap: Weight = 2.0
    """Largest weight that corrects for the engine's probabilities differing from the trainer's; 0 leaves it out."""
    importance_kind: Literal["truncate", "mask"] = "truncate"
    """What happens above the cap: the weight becomes the cap, or 0, which takes the token (or answer) out."""
    importance_level: Literal["token", "sequence"] = "token"
    """"sequence": one weight an answer, the product of its tokens' ratios."""
    temperature: Positive = 1.0
    """Divides the logits of policy, old policy and reference alike; equal to the rollouts' temperature."""

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ConfigError(f"clip_low={self.clip_low} must lie in (0, 1) and clip_high={self.clip_high} be positive")
        if self.kl < 0 or self.importance_cap < 0:
            raise ConfigError(f"kl={self.kl} and importance_cap={self.importance_cap} cannot be negative")
        if not self.temperature > 0:
            raise ConfigError(f"loss.temperature={self.temperature} must be positive; rollouts are drawn at it")
        _refuse_contradictions(self)


def _refuse_contradictions(cfg: PolicyLossConfig) -> None:
    """Raise ConfigError for settings that undo each other or do nothing beside each other."""
    if cfg.clip_kind == "cap":
        if not cfg.cispo_cap > 0:
            raise ConfigError(
                f"loss.cispo_cap={cfg.cispo_cap} with clip_kind='cap' bounds nothing; state it, such as 4"
            )
        if (cfg.clip_low, cfg.clip_high) != (CLIP_LOW, CLIP_HIGH) or cfg.dual_clip:
            raise ConfigError(
                f"loss.clip_kind='cap' reads no clip_low={cfg.clip_low}, clip_high={cfg.clip_high} or "
                f"dual_clip={cfg.dual_clip}; leave them out and set cispo_cap"
            )
    elif cfg.cispo_cap:
        raise ConfigError(f"loss.cispo_cap={cfg.cispo_cap} does nothing with clip_kind='clip'; use clip_kind='cap'")
    if cfg.dual_clip and not cfg.dual_clip > 1:
        raise ConfigError(
            f"loss.dual_clip={cfg.dual_clip} would bound the loss on policy too; use more than 1 (3), or 0"
        )
    if cfg.ratio_level == "sequence" and cfg.reduction != "sequence":
        raise ConfigError(
            f"loss.reduction={cfg.reduction!r} sums a sequence's one ratio over its tokens, so that long answers count "
            "more; ratio_level='sequence' (GSPO) needs reduction='sequence'"
        )
    if cfg.kl_placement == "loss" and cfg.kl_estimator == "k1":
        raise ConfigError(
            "loss.kl_estimator='k1' in the loss has a gradient that does not know the reference; use kl_placement="
            "'reward', or kl_estimator='k2' or 'k3'"
        )
    if cfg.kl_placement == "reward" and not cfg.kl:
        raise ConfigError(f"loss.kl={cfg.kl} puts nothing into the reward; set kl, or leave kl_placement='loss'")
    if cfg.kl_ratio and (cfg.kl_placement, cfg.kl_estimator) != ("loss", "k3"):
        raise ConfigError(
            f"loss.kl_ratio multiplies k3 in the loss, not {cfg.kl_estimator} in the {cfg.kl_placement}; use "
            "kl_estimator='k3' and kl_placement='loss', or kl_ratio=false"
        )
    if not cfg.importance_cap and (cfg.importance_kind, cfg.importance_level) != ("truncate", "token"):
        raise ConfigError(
            f"loss.importance_cap=0 leaves the correction out, so importance_kind={cfg.importance_kind!r} and "
            f"importance_level={cfg.importance_level!r} do nothing; state a cap, such as 2"
        )


def policy_loss(tokens: TrainedTokens, cfg: PolicyLossConfig) -> tuple[Tensor, Stats]:
    """-min(r A, clip(r) A), plus kl times the KL estimate, weighted per token; other objectives by cfg.

    r is the ratio to the old policy (1 on the first pass, where the loss is about 0 and its gradient is not). The
    engine's probabilities are corrected for by a second, capped and detached weight; the two are never merged.
    """
    assert tokens.advantages is not None and tokens.rollout_logprobs is not None
    assert not tokens.advantages.requires_grad and tokens.advantages.dtype == torch.float32
    old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = tokens.logprobs - old
    if cfg.ratio_level == "sequence":
        log_ratio = over_sequences(log_ratio, tokens.sequences, "mean")
    ratio, clamped = bounded_exp(log_ratio)
    gain, stats = bounded_gain(ratio, tokens, cfg)
    stats["policy/ratio_clamped"] = clamped.float().sum() * tokens.share
    stats |= mismatch_stats(old, tokens.rollout_logprobs, tokens.share)
    if cfg.importance_cap:
        weight = engine_weight(old, tokens, cfg)
        gain = gain * weight
        if cfg.importance_kind == "mask":
            stats["correction/masked"] = (weight == 0).float().sum() * tokens.share
    loss = -(tokens.weights * gain).sum()
    if tokens.entropy is not None:
        stats["policy/entropy_nats"] = tokens.entropy.sum() * tokens.share
    if cfg.kl and cfg.kl_placement == "loss":
        assert tokens.reference_logprobs is not None, "a KL term needs reference log-probabilities"
        kl = kl_estimate(tokens.logprobs, tokens.reference_logprobs, cfg.kl_estimator)
        stats["policy/kl_nats"] = kl.detach().sum() * tokens.share
        far = (tokens.logprobs - tokens.reference_logprobs).abs() > LOG_RATIO_LIMIT
        stats["correction/kl_clamped"] = far.float().sum() * tokens.share
        if cfg.kl_ratio:
            kl = kl * bounded_exp(tokens.logprobs - old)[0]
        loss = loss + cfg.kl * (tokens.weights * kl).sum()
    stats["loss/policy"] = loss.detach()
    return loss, {name: value.detach() for name, value in stats.items()}


def bounded_gain(ratio: Tensor, tokens: TrainedTokens, cfg: PolicyLossConfig) -> tuple[Tensor, Stats]:
    """What is maximised, per token, and the shares of tokens at each bound.

    "clip": min(r A, clip(r) A), for A < 0 not below dual_clip * A. "cap": min(r, cispo_cap) A log pi; its first factor
    carries no gradient; on policy its value is the mean of A log pi, not of A.
    """
    advantages = tokens.advantages
    assert advantages is not None
    if cfg.clip_kind == "cap":
        gain = ratio.detach().clamp(max=cfg.cispo_cap) * advantages * tokens.logprobs
        return gain, {"policy/clipped_high": (ratio > cfg.cispo_cap).float().sum() * tokens.share}
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantages)
    stats = {
        "policy/clipped_low": ((ratio < 1 - cfg.clip_low) & (advantages < 0)).float().sum() * tokens.share,
        "policy/clipped_high": ((ratio > 1 + cfg.clip_high) & (advantages > 0)).float().sum() * tokens.share,
    }
    if cfg.dual_clip:
        bound = cfg.dual_clip * advantages
        is_bound = (advantages < 0) & (gain < bound)
        gain = torch.where(is_bound, bound, gain)
        stats["correction/dual_clipped"] = is_bound.float().sum() * tokens.share
    return gain, stats


def engine_weight(old: Tensor, tokens: TrainedTokens, cfg: PolicyLossConfig) -> Tensor:
    """pi_old / pi_engine of each token (or its answer), truncated at the cap or 0 above it; without gradient.

    Source: truncated importance sampling, fengyao.notion.site/off-policy-rl; the masked form as in arXiv:2510.18855
    (there with a second bound below, which is left out here).
    """
    assert tokens.rollout_logprobs is not None
    log_ratio = (old - tokens.rollout_logprobs).detach()
    if cfg.importance_level == "sequence":
        log_ratio = over_sequences(log_ratio, tokens.sequences, "sum")
    ratio, _ = bounded_exp(log_ratio)
    return (
        ratio.clamp(max=cfg.importance_cap)
        if cfg.importance_kind == "truncate"
        else ratio * (ratio <= cfg.importance_cap)
    )


def over_sequences(values: Tensor, sequences: Tensor | None, how: Literal["sum", "mean"]) -> Tensor:
    """Sum or mean of `values` over the trained tokens of each sequence, handed back to each of these tokens."""
    assert sequences is not None, "weights of whole answers need to know which tokens belong together"
    if not values.numel():
        return values
    count = int(sequences.max()) + 1
    sums = values.new_zeros(count).index_add(0, sequences, values)
    if how == "mean":
        sums = sums / values.new_zeros(count).index_add(0, sequences, torch.ones_like(values)).clamp(min=1)
    return sums[sequences]


def bounded_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp of a log-ratio clamped to +-LOG_RATIO_LIMIT, and which entries were clamped (they carry no gradient)."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), log_ratio.abs() > LOG_RATIO_LIMIT


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (joschu.net/blog/kl-approx.html).

    With d = log reference - log policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
    """
    difference = (reference - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -difference
    return difference.square() / 2 if estimator == "k2" else difference.exp() - difference - 1


def mismatch_stats(trainer: Tensor, engine: Tensor, share: float) -> Stats:
    """How far the trainer's log-probabilities lie from the engine's, before any correction is capped.

    exp of correction/mean_nats is the engine's perplexity over the trainer's.
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
