"""Trained tokens written by hand, for tests of the policy loss."""

import torch

from thinkstack.train.loss import TrainedTokens
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss

ON_POLICY = PolicyLossConfig(importance_cap=0.0)


def tokens(logprobs: list[float], advantages: list[float], **given: list[float]) -> TrainedTokens:
    """Trained tokens of equal weight; what is not given equals the current log-probabilities."""
    current = torch.tensor(logprobs, requires_grad=True)
    count = len(logprobs)
    fields = {"rollout_logprobs": logprobs} | given
    return TrainedTokens(
        logprobs=current,
        weights=torch.full((count,), 1 / count),
        share=1 / count,
        advantages=torch.tensor(advantages),
        **{name: torch.tensor(value) for name, value in fields.items()},
    )


def slope(trained: TrainedTokens, cfg: PolicyLossConfig) -> list[float]:
    """d loss / d log-probability of each token."""
    loss, _ = policy_loss(trained, cfg)
    (gradient,) = torch.autograd.grad(loss, trained.logprobs)
    return gradient.tolist()
