"""The policy loss against hand-worked numbers."""

import math
from dataclasses import replace

import pytest
import torch

from tests.train.policy_tokens import ON_POLICY, slope, tokens
from thinkstack.train.loss import TrainedTokens
from thinkstack.train.policy_loss import LOG_RATIO_LIMIT, PolicyLossConfig, kl_estimate, policy_loss
from thinkstack.types import ConfigError


def test_entropy_is_divided_once():
    """The statistic is the mean over the step's tokens; one trainer divided by their number twice."""
    trained = replace(tokens([-1.0, -1.0], [1.0, 1.0]), entropy=torch.tensor([2.0, 4.0]))
    assert float(policy_loss(trained, ON_POLICY)[1]["policy/entropy_nats"]) == pytest.approx(3.0)


def test_on_policy_the_loss_is_zero_and_its_gradient_is_reinforce():
    """Centered advantages give a loss of 0, which is right; the gradient is -A / N."""
    trained = tokens([-1.0, -2.0], [1.0, -1.0])
    loss, _ = policy_loss(trained, ON_POLICY)
    assert loss.item() == 0.0
    assert slope(trained, ON_POLICY) == pytest.approx([-0.5, 0.5])


def test_the_first_ratio_is_exactly_one():
    """At ratio 1 nothing is clipped and the importance weight is 1, to the last bit."""
    trained = tokens([-1.1, -2.3, -0.7], [1.0, 1.0, -1.0])
    loss, stats = policy_loss(trained, PolicyLossConfig())
    assert loss.item() == -float((trained.weights * trained.advantages).sum())
    assert stats["mismatch/ratio_mean"] == pytest.approx(1.0, abs=1e-7)
    assert stats["policy/clipped_low"] == stats["policy/clipped_high"] == 0


def test_old_logprobs_carry_no_gradient():
    """Were the detach forgotten, the ratio would be constant and nothing would be learned."""
    assert slope(tokens([-1.0], [2.0]), ON_POLICY) == pytest.approx([-2.0])


def far(ratio: float, advantage: float) -> TrainedTokens:
    return tokens([math.log(ratio) - 1.0], [advantage], old_logprobs=[-1.0], rollout_logprobs=[-1.0])


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
    """A > 0 is held by 1 + clip_high only, A < 0 by 1 - clip_low only."""
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
    """Old / rollout is capped and detached, new / old is clipped; merged into one ratio, 3 x 1.1 would be
    clipped to 1.28 here. Raw statistics are taken before the cap."""
    given = {"old_logprobs": [-1.0], "rollout_logprobs": [-1.0 - math.log(3)]}
    trained = tokens([-1.0 + math.log(1.1)], [1.0], **given)
    cfg = PolicyLossConfig(importance_cap=2.0)
    loss, stats = policy_loss(trained, cfg)
    assert loss.item() == pytest.approx(-1.1 * 2.0, rel=1e-5)
    assert slope(trained, cfg) == pytest.approx([-2.2], rel=1e-5)
    assert float(stats["mismatch/ratio_mean"]) == pytest.approx(3.0, rel=1e-5)
    assert float(stats["mismatch/abs_nats_max"]) == pytest.approx(math.log(3), rel=1e-5)
    assert float(stats["mismatch/k3_nats"]) == pytest.approx(2 - math.log(3), rel=1e-5)


def test_a_huge_ratio_is_bounded_and_reported():
    """Exp(100) would be infinite; the clamp is counted, never silent."""
    trained = tokens([-1.0], [-1.0], old_logprobs=[-101.0], rollout_logprobs=[-101.0])
    loss, stats = policy_loss(trained, ON_POLICY)
    assert loss.item() == pytest.approx(math.exp(LOG_RATIO_LIMIT), rel=1e-5)
    assert float(stats["policy/ratio_clamped"]) == 1.0
    assert slope(trained, ON_POLICY) == [0.0]


def test_kl_estimates_of_a_worked_pair():
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert float(kl_estimate(policy, reference, "k3")) == pytest.approx(0.5 + math.log(2) - 1)
    assert float(kl_estimate(policy, reference, "k2")) == pytest.approx(math.log(2) ** 2 / 2)


def test_k3_has_the_right_value_and_k2_the_right_gradient():
    """Expectations over a categorical with 3 outcomes, taken exactly instead of by sampling."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (right,) = torch.autograd.grad(exact, logits, retain_graph=True)
    sampled_from = logprobs.exp().detach()
    assert (sampled_from * kl_estimate(logprobs, reference, "k3")).sum().item() == pytest.approx(exact.item())
    grads = {}
    for kind in ("k2", "k3"):
        (grads[kind],) = torch.autograd.grad(
            (sampled_from * kl_estimate(logprobs, reference, kind)).sum(), logits, retain_graph=True
        )
    torch.testing.assert_close(grads["k2"], right)
    assert not torch.allclose(grads["k3"], right, atol=1e-3)


def test_kl_shares_the_weights_of_the_policy_term():
    """A KL term averaged over sequences beside a policy term averaged over tokens changes beta with length."""
    trained = tokens([math.log(0.5)] * 2, [0.0, 0.0], reference_logprobs=[math.log(0.25), math.log(0.5)])
    trained = replace(trained, weights=torch.tensor([0.75, 0.25]))
    loss, stats = policy_loss(trained, replace(ON_POLICY, kl=0.1))
    k3 = 0.5 + math.log(2) - 1
    assert loss.item() == pytest.approx(0.1 * 0.75 * k3, rel=1e-5)
    assert float(stats["policy/kl_nats"]) == pytest.approx(k3 / 2, rel=1e-5)


EVERY = [
    ("clip_low", 0.5, far(0.6, -1.0)),
    ("clip_high", 0.9, far(1.5, 1.0)),
    ("kl", 0.3, tokens([-1.0], [1.0], reference_logprobs=[-2.0])),
    ("kl_estimator", "k2", tokens([-1.0], [1.0], reference_logprobs=[-2.0])),
    ("importance_cap", 5.0, tokens([-1.0], [1.0], rollout_logprobs=[-2.5])),
    ("importance_cap", 0.0, tokens([-1.0], [1.0], rollout_logprobs=[-1.5])),
]


@pytest.mark.parametrize(("name", "value", "trained"), EVERY, ids=[f"{name}={value}" for name, value, _ in EVERY])
def test_every_coefficient_of_the_loss_changes_it(name, value, trained):
    """Coefficients that are parsed, logged and never used (slime#397). reduction and temperature act in
    token_weights and token_logprobs, where they are tested above."""
    base = PolicyLossConfig(kl=0.1 if name == "kl_estimator" else 0.0)
    assert policy_loss(trained, replace(base, **{name: value}))[0].item() != policy_loss(trained, base)[0].item()


@pytest.mark.parametrize(
    "changes", [{"clip_low": 1.0}, {"clip_high": 0.0}, {"kl": -1.0}, {"importance_cap": -1.0}, {"temperature": 0.0}]
)
def test_meaningless_coefficients_are_refused(changes):
    with pytest.raises(ConfigError):
        PolicyLossConfig(**changes)


def answers(logprobs: list[list[float]], advantages: list[float], **given: list[list[float]]) -> TrainedTokens:
    """Tokens of several answers, weighted by sequence: 1 / (answers * tokens of the answer)."""
    lengths = [len(answer) for answer in logprobs]
    flat = {name: [value for answer in values for value in answer] for name, values in given.items()}
    spread = [value for value, length in zip(advantages, lengths, strict=True) for _ in range(length)]
    trained = tokens([value for answer in logprobs for value in answer], spread, **flat)
    weights = [1 / (len(lengths) * length) for length in lengths for _ in range(length)]
    return replace(
        trained,
        weights=torch.tensor(weights),
        sequences=torch.repeat_interleave(torch.arange(1, 1 + len(lengths)), torch.tensor(lengths)),
    )


GSPO = PolicyLossConfig(ratio_level="sequence", reduction="sequence", clip_low=0.05, clip_high=0.05, importance_cap=0.0)


def test_a_sequence_has_one_ratio_the_exponential_of_its_mean_log_ratio():
    """A peer took the product of the token ratios, which grows with length, and another averaged over padding too.

    Answer 1: log-ratios 0.06 and -0.02, mean 0.02: r = e^0.02 = 1.0202, inside the clip, A = 1: gain 1.0202.
    Answer 2: log-ratio 0.1: r = 1.1052, clipped to 1.05, A = 2: gain 2.1, no gradient.
    Loss -(1.0202 + 2.1) / 2. Each token of answer 1 gets -(1/2) * r * A * (1/2), as 1/|o| is both weight and mean.
    """
    now, old = [[-1.0, -2.0], [-0.5]], [[-1.06, -1.98], [-0.6]]
    trained = answers(now, [1.0, 2.0], old_logprobs=old, rollout_logprobs=old)
    loss, stats = policy_loss(trained, GSPO)
    assert loss.item() == pytest.approx(-(math.exp(0.02) + 2.1) / 2, rel=1e-5)
    assert slope(trained, GSPO) == pytest.approx([-math.exp(0.02) / 4] * 2 + [0.0], rel=1e-5)
    assert float(stats["policy/clipped_high"]) == pytest.approx(1 / 3)


def test_the_cispo_cap_is_the_cap_itself_and_no_token_loses_its_gradient():
    """Two conventions are about: the cap, and 1 + it. Here 4.0 means weights up to 4.0.

    Ratios 6, 0.5 and 1.5 with A = 1, -1, 1: weights min(r, 4) = 4, 0.5, 1.5; d loss / d log pi = -w A / 3. PPO's clip
    would leave the first token and the second without a gradient. Value: -(4 * -1 - 0.5 * -2 + 1.5 * -3) / 3.
    """
    cfg = PolicyLossConfig(clip_kind="cap", cispo_cap=4.0, importance_cap=0.0)
    now, ratios = [-1.0, -2.0, -3.0], [6.0, 0.5, 1.5]
    old = [logprob - math.log(ratio) for logprob, ratio in zip(now, ratios, strict=True)]
    trained = tokens(now, [1.0, -1.0, 1.0], old_logprobs=old, rollout_logprobs=old)
    loss, stats = policy_loss(trained, cfg)
    assert loss.item() == pytest.approx(-(-4 + 1 - 4.5) / 3, rel=1e-5)
    assert slope(trained, cfg) == pytest.approx([-4 / 3, 0.5 / 3, -1.5 / 3], rel=1e-5)
    assert float(stats["policy/clipped_high"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("ratio", "loss", "moves"), [(2.0, 2.0, True), (5.0, 3.0, False)])
def test_dual_clip_bounds_the_loss_of_a_bad_answer(ratio, loss, moves):
    """For A = -1 PPO's minimum is r A without bound: one token grown 100 times as likely gives a step 100 times as
    long. With dual_clip=3 the loss is at most 3 |A|; below that nothing changes."""
    cfg = replace(ON_POLICY, dual_clip=3.0)
    trained = far(ratio, -1.0)
    value, stats = policy_loss(trained, cfg)
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert slope(trained, cfg) == pytest.approx([ratio if moves else 0.0], rel=1e-5)
    assert float(stats["correction/dual_clipped"]) == float(not moves)
    assert policy_loss(far(5.0, 1.0), cfg)[0].item() == pytest.approx(-1.28, rel=1e-5), "gains are PPO's"


def test_advantages_that_carry_a_gradient_are_a_bug():
    """A critic's graph left in the advantages sends the policy's loss into the critic."""
    trained = tokens([-1.0], [1.0])
    with pytest.raises(AssertionError):
        policy_loss(replace(trained, advantages=torch.tensor([1.0], requires_grad=True)), ON_POLICY)
    with pytest.raises(AssertionError):
        policy_loss(replace(trained, advantages=torch.tensor([1.0], dtype=torch.bfloat16)), ON_POLICY)


CORRECTIONS = {
    ("truncate", "token"): [2.0, 0.5, 1.2],
    ("mask", "token"): [0.0, 0.5, 1.2],
    ("truncate", "sequence"): [1.5, 1.5, 1.2],
    ("mask", "sequence"): [1.5, 1.5, 1.2],
}


@pytest.mark.parametrize(("kind", "level"), CORRECTIONS)
def test_the_engines_probabilities_are_corrected_up_to_a_stated_cap(kind, level):
    """pi_old / pi_engine is 3 and 0.5 in answer 1, 1.2 in answer 2; the cap is 2. By token 3 becomes 2, or 0 where it
    is masked. By sequence answer 1 has 3 * 0.5 = 1.5, below the cap. The weight carries no gradient."""
    now = [[-1.0, -2.0], [-0.5]]
    engine = [[-1.0 - math.log(3), -2.0 - math.log(0.5)], [-0.5 - math.log(1.2)]]
    trained = answers(now, [1.0, 1.0], rollout_logprobs=engine)
    cfg = PolicyLossConfig(importance_kind=kind, importance_level=level, importance_cap=2.0)
    weights = CORRECTIONS[kind, level]
    shares = [0.25, 0.25, 0.5]
    assert slope(trained, cfg) == pytest.approx([-w * s for w, s in zip(weights, shares, strict=True)], rel=1e-5)
    stats = policy_loss(trained, cfg)[1]
    assert float(stats.get("correction/masked", torch.zeros(()))) == pytest.approx(weights.count(0.0) / 3)
    assert float(stats["correction/ratio_max"]) == pytest.approx(3.0, rel=1e-5), "before the cap"
    assert float(stats["correction/mean_nats"]) == pytest.approx(math.log(3 * 0.5 * 1.2) / 3, rel=1e-5)


def test_a_sequence_beyond_the_cap_is_masked_whole():
    """3 * 1.5 = 4.5 is above 2: both tokens leave the loss, the other answer stays."""
    engine = [[-1.0 - math.log(3), -2.0 - math.log(1.5)], [-0.5]]
    trained = answers([[-1.0, -2.0], [-0.5]], [1.0, 1.0], rollout_logprobs=engine)
    cfg = PolicyLossConfig(importance_kind="mask", importance_level="sequence", importance_cap=2.0)
    assert slope(trained, cfg) == pytest.approx([0.0, 0.0, -0.5])


def test_a_clamp_inside_the_kl_estimate_is_counted():
    """A peer clamped k3 at 10 inside the graph: tokens beyond had no gradient, and no number said so."""
    cfg = replace(ON_POLICY, kl=0.1)
    trained = tokens([-1.0, -1.0], [0.0, 0.0], reference_logprobs=[-30.0, -2.0])
    stats = policy_loss(trained, cfg)[1]
    assert float(stats["correction/kl_clamped"]) == 0.5
    assert slope(trained, cfg)[0] == 0.0


def categorical():
    """(log-probabilities of a policy with 3 outcomes, their logits, a reference, the exact gradient of their KL)."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    return logprobs, logits, reference, torch.autograd.grad(exact, logits, retain_graph=True)[0]


def test_k1_in_the_loss_does_not_depend_on_the_reference():
    """Its expected gradient is that of sum p log p's score, 0 on policy, whatever the reference: it was added, logged
    as "kl" and held nothing back. Hence it is refused (tests/rl/test_presets.py)."""
    logprobs, logits, reference, _ = categorical()
    sampled_from = logprobs.exp().detach()
    for other in (reference, reference.flip(0)):
        loss = (sampled_from * kl_estimate(logprobs, other, "k1")).sum()
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("estimator", "is_unbiased"), [("k1", True), ("k2", False), ("k3", False)])
def test_in_the_reward_k1_is_unbiased_and_the_others_are_not(estimator, is_unbiased):
    """As a reward the estimate is a number: the gradient is E[k grad log pi], which is that of the KL for k1 only."""
    logprobs, logits, reference, right = categorical()
    reward = kl_estimate(logprobs, reference, estimator).detach()
    (gradient,) = torch.autograd.grad((logprobs.exp().detach() * reward * logprobs).sum(), logits)
    assert torch.allclose(gradient, right, atol=1e-9) == is_unbiased


def test_off_policy_k3_needs_the_ratio():
    """Drawn from an old policy, plain k3 estimates nothing; times the ratio it has the value and the gradient of the
    KL, exactly (V3.2)."""
    logprobs, logits, reference, right = categorical()
    old = torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64).log()
    k3 = kl_estimate(logprobs, reference, "k3")
    value = (old.exp() * (logprobs - old).exp() * k3).sum()
    assert value.item() == pytest.approx((logprobs.exp() * (logprobs - reference)).sum().item())
    (weighted,) = torch.autograd.grad(value, logits, retain_graph=True)
    (plain,) = torch.autograd.grad((old.exp() * k3).sum(), logits)
    torch.testing.assert_close(weighted, right)
    assert not torch.allclose(plain, right, atol=1e-2)


def test_the_ratio_multiplies_the_kl_term():
    """Ratio 1.1, k3 of (0.5 against 0.25) = 0.5 + ln 2 - 1: the term, 0.1 * 1.1 * k3; its derivative has both factors,
    0.1 * 1.1 * (k3 + 1 - 0.5); with a detached ratio the gradient would be biased again."""
    given = {"old_logprobs": [math.log(0.5 / 1.1)], "reference_logprobs": [math.log(0.25)]}
    trained = tokens([math.log(0.5)], [0.0], **given)
    cfg, k3 = replace(ON_POLICY, kl=0.1, kl_ratio=True), 0.5 + math.log(2) - 1
    assert policy_loss(trained, cfg)[0].item() == pytest.approx(0.11 * k3, rel=1e-5)
    assert slope(trained, cfg) == pytest.approx([0.11 * (k3 + 0.5)], rel=1e-5)
