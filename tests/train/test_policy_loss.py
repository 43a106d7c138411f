"""The policy loss against hand-worked numbers. E2.n names an entry of the list of known traps in RL trainers."""

import math
from dataclasses import replace

import pytest
import torch

from tests.train.policy_tokens import ON_POLICY, slope, tokens
from thinkstack.train.loss import TrainedTokens
from thinkstack.train.policy_loss import LOG_RATIO_LIMIT, PolicyLossConfig, kl_estimate, policy_loss
from thinkstack.types import ConfigError


def test_entropy_is_divided_once():
    """E2.43: the statistic is the mean over the step's tokens; one trainer divided by their number twice."""
    trained = replace(tokens([-1.0, -1.0], [1.0, 1.0]), entropy=torch.tensor([2.0, 4.0]))
    assert float(policy_loss(trained, ON_POLICY)[1]["policy/entropy_nats"]) == pytest.approx(3.0)


def test_on_policy_the_loss_is_zero_and_its_gradient_is_reinforce():
    """E2.10: centred advantages give a loss of 0, which is right; the gradient is -A / N."""
    trained = tokens([-1.0, -2.0], [1.0, -1.0])
    loss, _ = policy_loss(trained, ON_POLICY)
    assert loss.item() == 0.0
    assert slope(trained, ON_POLICY) == pytest.approx([-0.5, 0.5])


def test_the_first_ratio_is_exactly_one():
    """E2.20: at ratio 1 nothing is clipped and the importance weight is 1, to the last bit."""
    trained = tokens([-1.1, -2.3, -0.7], [1.0, 1.0, -1.0])
    loss, stats = policy_loss(trained, PolicyLossConfig())
    assert loss.item() == -float((trained.weights * trained.advantages).sum())
    assert stats["mismatch/ratio_mean"] == pytest.approx(1.0, abs=1e-7)
    assert stats["policy/clipped_low"] == stats["policy/clipped_high"] == 0


def test_old_log_probs_carry_no_gradient():
    """E2.21: were the detach forgotten, the ratio would be constant and nothing would be learnt."""
    assert slope(tokens([-1.0], [2.0]), ON_POLICY) == pytest.approx([-2.0])


def far(ratio: float, advantage: float) -> TrainedTokens:
    return tokens([math.log(ratio) - 1.0], [advantage], old_log_probs=[-1.0], rollout_log_probs=[-1.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "moves"),
    [
        (1.25, 1.0, 1.25, True),
        (1.40, 1.0, 1.28, False),
        (0.50, 1.0, 0.50, True),
        (0.85, -1.0, -0.85, True),
        (0.70, -1.0, -0.80, False),
        (1.40, -1.0, -1.40, True),
    ],
    ids=["up, inside", "up, clipped high", "up, never low", "down, inside", "down, clipped low", "down, never high"],
)
def test_the_upper_bound_binds_gains_and_the_lower_bound_losses(ratio, advantage, gain, moves):
    """E2.8: A > 0 is held by 1 + clip_high only, A < 0 by 1 - clip_low only."""
    cfg = replace(ON_POLICY, clip_low=0.2, clip_high=0.28)
    trained = far(ratio, advantage)
    loss, _ = policy_loss(trained, cfg)
    assert loss.item() == pytest.approx(-gain, rel=1e-5)
    assert slope(trained, cfg) == pytest.approx([-ratio * advantage if moves else 0.0], rel=1e-5)


def test_clipped_shares_count_the_side_that_binds():
    low, high = far(0.5, -1.0), far(2.0, 1.0)
    assert float(policy_loss(low, ON_POLICY)[1]["policy/clipped_low"]) == 1.0
    assert float(policy_loss(high, ON_POLICY)[1]["policy/clipped_high"]) == 1.0
    assert float(policy_loss(far(0.5, 1.0), ON_POLICY)[1]["policy/clipped_low"]) == 0.0


def test_engine_mismatch_and_policy_ratio_are_two_corrections():
    """E2.22: old / rollout is capped and detached, new / old is clipped; merged into one ratio, 3 x 1.1 would be
    clipped to 1.28 here. Raw statistics are taken before the cap."""
    given = {"old_log_probs": [-1.0], "rollout_log_probs": [-1.0 - math.log(3)]}
    trained = tokens([-1.0 + math.log(1.1)], [1.0], **given)
    cfg = PolicyLossConfig(importance_cap=2.0)
    loss, stats = policy_loss(trained, cfg)
    assert loss.item() == pytest.approx(-1.1 * 2.0, rel=1e-5)
    assert slope(trained, cfg) == pytest.approx([-2.2], rel=1e-5)
    assert float(stats["mismatch/ratio_mean"]) == pytest.approx(3.0, rel=1e-5)
    assert float(stats["mismatch/abs_nats_max"]) == pytest.approx(math.log(3), rel=1e-5)
    assert float(stats["mismatch/k3_nats"]) == pytest.approx(2 - math.log(3), rel=1e-5)


def test_a_huge_ratio_is_bounded_and_reported():
    """E2.42: exp(100) would be infinite; the clamp is counted, never silent."""
    trained = tokens([-1.0], [-1.0], old_log_probs=[-101.0], rollout_log_probs=[-101.0])
    loss, stats = policy_loss(trained, ON_POLICY)
    assert loss.item() == pytest.approx(math.exp(LOG_RATIO_LIMIT), rel=1e-5)
    assert float(stats["policy/ratio_clamped"]) == 1.0
    assert slope(trained, ON_POLICY) == [0.0]


def test_kl_estimates_of_a_worked_pair():
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert float(kl_estimate(policy, reference, "k3")) == pytest.approx(0.5 + math.log(2) - 1)
    assert float(kl_estimate(policy, reference, "k2")) == pytest.approx(math.log(2) ** 2 / 2)


def test_k3_has_the_right_value_and_k2_the_right_gradient():
    """E2.46: expectations over a categorical with 3 outcomes, taken exactly instead of by sampling."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    log_probs = logits.log_softmax(-1)
    exact = (log_probs.exp() * (log_probs - reference)).sum()
    (right,) = torch.autograd.grad(exact, logits, retain_graph=True)
    drawn_from = log_probs.exp().detach()
    assert (drawn_from * kl_estimate(log_probs, reference, "k3")).sum().item() == pytest.approx(exact.item())
    grads = {}
    for kind in ("k2", "k3"):
        (grads[kind],) = torch.autograd.grad(
            (drawn_from * kl_estimate(log_probs, reference, kind)).sum(), logits, retain_graph=True
        )
    torch.testing.assert_close(grads["k2"], right)
    assert not torch.allclose(grads["k3"], right, atol=1e-3)


def test_kl_shares_the_weights_of_the_policy_term():
    """E2.47: a KL term averaged over sequences beside a policy term averaged over tokens changes beta with length."""
    trained = tokens([math.log(0.5)] * 2, [0.0, 0.0], reference_log_probs=[math.log(0.25), math.log(0.5)])
    trained = replace(trained, weights=torch.tensor([0.75, 0.25]))
    loss, stats = policy_loss(trained, replace(ON_POLICY, kl=0.1))
    k3 = 0.5 + math.log(2) - 1
    assert loss.item() == pytest.approx(0.1 * 0.75 * k3, rel=1e-5)
    assert float(stats["policy/kl_nats"]) == pytest.approx(k3 / 2, rel=1e-5)


EVERY = [
    ("clip_low", 0.5, far(0.6, -1.0)),
    ("clip_high", 0.9, far(1.5, 1.0)),
    ("kl", 0.3, tokens([-1.0], [1.0], reference_log_probs=[-2.0])),
    ("kl_estimator", "k2", tokens([-1.0], [1.0], reference_log_probs=[-2.0])),
    ("importance_cap", 5.0, tokens([-1.0], [1.0], rollout_log_probs=[-2.5])),
    ("importance_cap", 0.0, tokens([-1.0], [1.0], rollout_log_probs=[-1.5])),
]


@pytest.mark.parametrize(("name", "value", "trained"), EVERY, ids=[f"{name}={value}" for name, value, _ in EVERY])
def test_every_coefficient_of_the_loss_changes_it(name, value, trained):
    """E2.49: coefficients that are parsed, logged and never used (slime#397). reduction and temperature act in
    token_weights and token_log_probs, where they are tested above."""
    base = PolicyLossConfig(kl=0.1 if name == "kl_estimator" else 0.0)
    assert policy_loss(trained, replace(base, **{name: value}))[0].item() != policy_loss(trained, base)[0].item()


@pytest.mark.parametrize(
    "changes", [{"clip_low": 1.0}, {"clip_high": 0.0}, {"kl": -1.0}, {"importance_cap": -1.0}, {"temperature": 0.0}]
)
def test_meaningless_coefficients_are_refused(changes):
    with pytest.raises(ConfigError):
        PolicyLossConfig(**changes)
