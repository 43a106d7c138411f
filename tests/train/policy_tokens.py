"""Trained tokens written by hand, for tests of the policy loss."""

import torch

from thinkstack.train.loss import TrainedTokens
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss

ON_POLICY = PolicyLossConfig(importance_cap=0.0)


def tokens(log_probs: list[float], advantages: list[float], **given: list[float]) -> TrainedTokens:
    """Trained tokens of equal weight; what is not given equals the current log-probabilities."""
    current = torch.tensor(log_probs, requires_grad=True)
    count = len(log_probs)
    fields = {"rollout_log_probs": log_probs} | given
    return TrainedTokens(
        log_probs=current,
        weights=torch.full((count,), 1 / count),
        share=1 / count,
        advantages=torch.tensor(advantages),
        **{name: torch.tensor(value) for name, value in fields.items()},
    )


def slope(trained: TrainedTokens, cfg: PolicyLossConfig) -> list[float]:
    """d loss / d log-probability of each token."""
    loss, _ = policy_loss(trained, cfg)
    (gradient,) = torch.autograd.grad(loss, trained.log_probs)
    return gradient.tolist()
