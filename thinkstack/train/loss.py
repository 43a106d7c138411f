"""Losses as pure functions of flat vectors: one entry per trained token, whatever rows the tokens came from.

Every loss is a weighted sum. The weights are made once for the whole optimizer step (`token_weights`) from global
counts, so micro-batches and ranks only ever add up: there is no other denominator anywhere. Statistics add up the same
way; names that end in "_max" are combined by maximum instead.
"""

# Shapes in this file: R rows, T tokens a row, N = R*T, M trained tokens, D hidden size, V vocabulary size.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkstack.types import Batch, ConfigError

Reduction = Literal["token", "sequence", "fixed"]
Stats = dict[str, Tensor]

HEAD_CHUNK = 1024
"""Tokens whose logits exist at once: bounds memory at HEAD_CHUNK * V * 4 bytes; keeps small vocabularies in cache."""
LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-this before exp; how often is reported as policy/ratio_clamped."""


@dataclass(frozen=True, kw_only=True)
class TrainedTokens:
    """What a loss sees of a micro-batch. All tensors are (M,) fp32 unless said otherwise."""

    log_probs: Tensor
    """Log-probabilities of the targets under the current weights; the one entry that carries a gradient."""
    weights: Tensor
    """Share of each token in the loss of the whole step."""
    share: float
    """1 / trained tokens of the whole step: the weight of a token in a mean statistic."""
    entropy: Tensor | None = None
    """Entropy of the prediction in nats, where it was asked for."""
    advantages: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None


def token_weights(batch: Batch, reduction: Reduction, fixed_length: int = 0) -> Tensor:
    """Weight of each target in the loss of one optimizer step, (R, T) fp32, 0 where nothing is trained.

    "token": every trained token counts the same, 1 / all trained tokens. "sequence": every sequence counts the same and
    its tokens share that, 1 / (sequences * its trained tokens); a sequence without trained tokens does not count.
    "fixed": 1 / (sequences * fixed_length), so that the weight of a token depends on no length (Dr. GRPO,
    arXiv:2503.20783). batch: the whole step on this rank; counts are summed over ranks.
    """
    mask = batch.loss_mask
    lengths = mask.new_zeros(int(batch.document_ids.max()) + 1)
    lengths.index_add_(0, batch.document_ids.flatten(), mask.flatten())
    num_tokens, num_sequences = sum_over_ranks(torch.stack((mask.sum(), (lengths > 0).sum().float()))).clamp(min=1)
    if reduction == "token":
        return mask / num_tokens
    if reduction == "sequence":
        return mask / (lengths.clamp(min=1)[batch.document_ids] * num_sequences)
    if fixed_length < 1:
        raise ConfigError(f"reduction='fixed' needs the longest possible answer, not fixed_length={fixed_length}")
    return mask / (fixed_length * num_sequences)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum over the ranks of a distributed run; the same tensor without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


def token_log_probs(
    hidden: Tensor, index: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets` under the head, without ever holding all logits.

    hidden: (N, D). index: (M,) int64, distinct rows of hidden to predict from. weight: (V, D) head. targets: (M,).
    temperature divides the logits. Returns (log_probs (M,) fp32, entropy (M,) fp32 without gradient, or None).
    """
    log_probs, entropy = _TokenLogProbs.apply(hidden, index, weight, targets, temperature, with_entropy)
    return log_probs, entropy if with_entropy else None


class _TokenLogProbs(torch.autograd.Function):
    """Logits are computed in chunks and again in the backward pass; fp32 from the logits on."""

    @staticmethod
    def forward(ctx, hidden, index, weight, targets, temperature, with_entropy):  # type: ignore[no-untyped-def,override]
        log_probs = hidden.new_empty(index.numel(), dtype=torch.float32)
        normaliser, entropy = torch.empty_like(log_probs), torch.empty_like(log_probs)
        for part in _chunks(index.numel()):
            logits = F.linear(hidden[index[part]], weight).float().div_(temperature)  # (m, V)
            normaliser[part] = logits.logsumexp(-1)
            log_probs[part] = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1) - normaliser[part]
            if with_entropy:
                logits.sub_(normaliser[part].unsqueeze(1))
                entropy[part] = -torch.linalg.vecdot(logits.exp(), logits)
        ctx.save_for_backward(hidden, index, weight, targets, normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def,override]
        hidden, index, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in _chunks(index.numel()):
            rows = hidden[index[part]]
            scale = (grad[part] / ctx.temperature).unsqueeze(1)
            probs = F.linear(rows, weight).float().div_(ctx.temperature).sub_(normaliser[part].unsqueeze(1)).exp_()
            grad_logits = probs.mul_(-scale).scatter_add_(1, targets[part].unsqueeze(1), scale).to(hidden.dtype)
            grad_hidden.index_copy_(0, index[part], grad_logits @ weight)
            if grad_weight is not None:
                grad_weight += grad_logits.T @ rows
        return grad_hidden, None, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + HEAD_CHUNK) for start in range(0, count, HEAD_CHUNK))


def next_token_loss(tokens: TrainedTokens) -> tuple[Tensor, Stats]:
    """Cross-entropy in nats."""
    loss = -(tokens.weights * tokens.log_probs).sum()
    return loss, {"loss/next_token_nats": loss.detach()}


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The clipped policy gradient of GRPO and its relatives (arXiv:2402.03300, section 4.1)."""

    clip_low: float = 0.2
    """A ratio below 1 - clip_low earns nothing more from lowering it."""
    clip_high: float = 0.28
    """A ratio above 1 + clip_high earns nothing more from raising it (DAPO's clip-higher, arXiv:2503.14476)."""
    reduction: Reduction = "token"
    """How tokens are weighted: see token_weights."""
    kl: float = 0.0
    """Weight of the KL term against the reference model (beta), per token; 0 loads no reference."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """k3 has the right value and a biased gradient (GRPO's choice); k2 has the right gradient on policy."""
    importance_cap: float = 2.0
    """Largest weight that corrects for the engine's probabilities differing from the trainer's; 0 leaves it out."""
    temperature: float = 1.0
    """Divides the logits of policy, old policy and reference alike; equal to the rollouts' temperature."""

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ConfigError(f"clip_low={self.clip_low} must lie in (0, 1) and clip_high={self.clip_high} be positive")
        if self.kl < 0 or self.importance_cap < 0:
            raise ConfigError(f"kl={self.kl} and importance_cap={self.importance_cap} cannot be negative")
        if not self.temperature > 0:
            raise ConfigError(f"loss.temperature={self.temperature} must be positive; rollouts are drawn at it")


def policy_loss(tokens: TrainedTokens, cfg: PolicyLossConfig) -> tuple[Tensor, Stats]:
    """-min(r A, clip(r) A), plus kl times the KL estimate, weighted per token.

    r is the ratio to the old policy (1 on the first pass, where the loss is about 0 and its gradient is not). The
    engine's probabilities are corrected for by a second, capped and detached weight; the two are never merged.
    """
    assert tokens.advantages is not None and tokens.rollout_log_probs is not None
    old = tokens.log_probs.detach() if tokens.old_log_probs is None else tokens.old_log_probs
    ratio, clamped = bounded_exp(tokens.log_probs - old)
    gain = torch.minimum(
        ratio * tokens.advantages, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * tokens.advantages
    )
    mismatch, _ = bounded_exp(old - tokens.rollout_log_probs)
    if cfg.importance_cap:
        gain = gain * mismatch.clamp(max=cfg.importance_cap)
    loss = -(tokens.weights * gain).sum()
    stats = {
        "policy/ratio_clamped": clamped.float().sum() * tokens.share,
        "policy/clipped_low": ((ratio < 1 - cfg.clip_low) & (tokens.advantages < 0)).float().sum() * tokens.share,
        "policy/clipped_high": ((ratio > 1 + cfg.clip_high) & (tokens.advantages > 0)).float().sum() * tokens.share,
    }
    stats |= mismatch_stats(old, tokens.rollout_log_probs, tokens.share)
    if tokens.entropy is not None:
        stats["policy/entropy_nats"] = tokens.entropy.sum() * tokens.share
    if cfg.kl:
        assert tokens.reference_log_probs is not None, "a KL term needs reference log-probabilities"
        kl = kl_estimate(tokens.log_probs, tokens.reference_log_probs, cfg.kl_estimator)
        loss = loss + cfg.kl * (tokens.weights * kl).sum()
        stats["policy/kl_nats"] = kl.detach().sum() * tokens.share
    stats["loss/policy"] = loss.detach()
    return loss, {name: value.detach() for name, value in stats.items()}


def bounded_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """exp of a log-ratio clamped to +-LOG_RATIO_LIMIT, and which entries were clamped (they carry no gradient)."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), log_ratio.abs() > LOG_RATIO_LIMIT


def kl_estimate(log_probs: Tensor, reference: Tensor, estimator: Literal["k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (joschu.net/blog/kl-approx.html)."""
    difference = (reference - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return difference.square() / 2 if estimator == "k2" else difference.exp() - difference - 1


def mismatch_stats(trainer: Tensor, engine: Tensor, share: float) -> Stats:
    """How far the trainer's log-probabilities lie from the engine's, before any correction is capped."""
    difference = (trainer - engine).detach()
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return {
        "mismatch/mean_abs_nats": difference.abs().sum() * share,
        "mismatch/abs_nats_max": difference.abs().max() if difference.numel() else difference.new_zeros(()),
        "mismatch/k3_nats": (ratio - 1 - difference).sum() * share,
        "mismatch/ratio_mean": ratio.sum() * share,
        "mismatch/ratio_square_mean": ratio.square().sum() * share,
    }
