"""Losses against hand-worked numbers. E2.n names an entry of the list of known traps in RL trainers."""

import math
from dataclasses import replace

import pytest
import torch

from tests.tiny import drawn_batch
from thinkstack.data import Sample, lay_out
from thinkstack.train import loss as losses
from thinkstack.train.loss import (
    LOG_RATIO_LIMIT,
    PolicyLossConfig,
    TrainedTokens,
    kl_estimate,
    next_token_loss,
    policy_loss,
    token_log_probs,
    token_weights,
)
from thinkstack.types import Completion, ConfigError

ON_POLICY = PolicyLossConfig(importance_cap=0.0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


# three answers of 3, 1 and 2 trained tokens, and a document without any
LENGTHS = [(2, 3), (1, 1), (1, 2), (4, 0)]


def uneven_batch():
    samples = [Sample(tuple(range(p + n)), (0,) * p + (1,) * n) for p, n in LENGTHS]
    return lay_out(samples, [[0, 1], [2, 3]], 8)


def weights_by_answer(reduction: str, fixed_length: int = 0) -> list[set[float]]:
    batch = uneven_batch()
    weights = token_weights(batch, reduction, fixed_length)
    assert torch.equal(weights > 0, batch.loss_mask > 0)
    return [set(weights[(batch.document_ids == d) & (batch.loss_mask > 0)].tolist()) for d in (1, 2, 3)]


def test_token_weights_share_one_over_all_trained_tokens():
    """E2.1: the divisor is the number of trained tokens of the whole step."""
    assert [weight for (weight,) in weights_by_answer("token")] == pytest.approx([1 / 6] * 3)


def test_sequence_weights_share_one_over_sequences_and_length():
    """E2.4: mean over answers of the mean over tokens; the document without trained tokens is no answer."""
    thirds = weights_by_answer("sequence")
    assert [weight for (weight,) in thirds] == pytest.approx([1 / 9, 1 / 3, 1 / 6])


def test_sequence_weights_of_a_step_without_trained_tokens_are_zero():
    """E2.4: an empty answer must not divide by zero."""
    batch = replace(uneven_batch(), loss_mask=torch.zeros(2, 8))
    assert torch.equal(token_weights(batch, "sequence"), torch.zeros(2, 8))
    assert torch.equal(token_weights(batch, "token"), torch.zeros(2, 8))


def test_fixed_weights_depend_on_no_length():
    """E2.5: Dr. GRPO divides by a constant, not by the longest answer that happens to be in the batch."""
    for (weight,) in weights_by_answer("fixed", fixed_length=10):
        assert weight == pytest.approx(1 / 30)


def test_fixed_weights_need_the_constant():
    """E2.5: without it the batch's own maximum would creep back in."""
    with pytest.raises(ConfigError, match="longest possible answer"):
        token_weights(uneven_batch(), "fixed")


def test_masks_come_from_lengths_not_from_pad_ids():
    """E2.31: token 0 pads, and also stands in the text, first, last and in between: it is trained there."""
    batch = lay_out([Sample((0, 0, 5, 0), (0, 1, 1, 1)), Sample((7, 0), (0, 1))], [[0, 1]], 6)
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [[0, 5, 0, 0, 0, 0]]


def test_the_end_token_is_trained_and_counted():
    """E2.30: EOS is an action; leaving it out teaches a model never to stop."""
    eos = 1
    batch = lay_out([Sample((9, 5, 6, eos), (0, 1, 1, 1))], [[0]], 4)
    assert batch.loss_mask.sum() == 3
    assert float(token_weights(batch, "token")[batch.targets == eos].sum()) == pytest.approx(1 / 3)


def test_log_probs_are_those_of_log_softmax():
    hidden, head = drawn(6, 5), drawn(7, 5, seed=1)
    index, targets = torch.tensor([4, 0, 3]), torch.tensor([6, 2, 2])
    found, entropy = token_log_probs(hidden, index, head, targets, with_entropy=True)
    table = (hidden[index] @ head.T).log_softmax(-1)
    torch.testing.assert_close(found, table[torch.arange(3), targets])
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1))


def test_entropy_is_exact_and_divided_once():
    """E2.43: a uniform prediction over 4 tokens has ln 4 nats, however many tokens are masked."""
    _, entropy = token_log_probs(torch.zeros(3, 2), torch.tensor([1]), torch.ones(4, 2), torch.tensor([0]), 1.0, True)
    assert entropy.tolist() == pytest.approx([math.log(4)])
    trained = replace(tokens([-1.0, -1.0], [1.0, 1.0]), entropy=torch.tensor([2.0, 4.0]))
    assert float(policy_loss(trained, ON_POLICY)[1]["policy/entropy_nats"]) == pytest.approx(3.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_prob_gradients_are_autograds(temperature):
    hidden, head = drawn(6, 5).requires_grad_(), drawn(7, 5, seed=1).requires_grad_()
    index, targets = torch.tensor([4, 0, 3]), torch.tensor([6, 2, 2])
    fast, _ = token_log_probs(hidden, index, head, targets, temperature)
    plain = (hidden[index] @ head.T / temperature).log_softmax(-1)[torch.arange(3), targets]
    grad = drawn(3, seed=2)
    pairs = zip(*(torch.autograd.grad(out, (hidden, head), grad) for out in (fast, plain)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_temperature_divides_the_logits():
    """E2.27: dividing log-probabilities instead gives numbers that do not sum to 1."""
    hidden, head = drawn(1, 5), drawn(7, 5, seed=1)
    index = torch.zeros(7, dtype=torch.int64)
    found = [token_log_probs(hidden, index[:1], head, torch.tensor([t]), 0.7)[0] for t in range(7)]
    assert float(torch.cat(found).exp().sum()) == pytest.approx(1.0, abs=1e-6)
    expected = (hidden @ head.T / 0.7).log_softmax(-1)[0]
    torch.testing.assert_close(torch.cat(found), expected)


def test_chunks_of_the_head_change_nothing(monkeypatch):
    """E2.41: logits of a few tokens at a time bound the memory; the numbers are those of all at once."""
    hidden, head = drawn(20, 5).requires_grad_(), drawn(7, 5, seed=1).requires_grad_()
    index, targets = torch.arange(20).flip(0), torch.randint(7, (20,), generator=torch.Generator().manual_seed(3))
    found = []
    for chunk in (1000, 3):
        monkeypatch.setattr(losses, "HEAD_CHUNK", chunk)
        log_probs, entropy = token_log_probs(hidden, index, head, targets, 0.8, True)
        found.append((log_probs, entropy, *torch.autograd.grad(log_probs.square().sum(), (hidden, head))))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_bf16_logits_are_normalised_in_fp32():
    """E2.41: a log-softmax in bf16 is off by up to 0.03 nats; from fp32 on only the logits' own rounding is left."""
    hidden, head = drawn(64, 32).bfloat16(), drawn(500, 32, seed=1).bfloat16()
    index, targets = torch.arange(64), torch.arange(64)
    found, _ = token_log_probs(hidden, index, head, targets)
    exact = (hidden @ head.T).double().log_softmax(-1)[index, targets]
    assert found.dtype == torch.float32
    assert float((found.double() - exact).abs().max()) < 1e-5


class Bigrams(torch.nn.Module):
    """A model that knows one table: log-probability of the next token given this one."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.head = torch.nn.Linear(*table.shape, bias=False)
        self.head.weight = torch.nn.Parameter(table.T.contiguous())

    def trunk(self, ids, positions, document_ids):
        class Out:
            hidden = torch.nn.functional.one_hot(ids, self.head.in_features).float()

        return Out


def test_the_log_prob_of_a_token_is_read_off_the_position_before_it():
    """E2.24: with a bigram table every log-probability is known; a shift by one gives other numbers."""
    from thinkstack.train.trainer import batch_log_probs

    table = drawn(5, 5).log_softmax(-1)
    ids = (3, 1, 4, 1, 0)
    batch = lay_out([Sample(ids, (0, 0, 1, 1, 1))], [[0]], 6)
    found = batch_log_probs(Bigrams(table), batch, 1.0, 64)
    expected = [0.0, float(table[1, 4]), float(table[4, 1]), float(table[1, 0]), 0.0, 0.0]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_completions_carry_one_log_prob_a_token():
    """E2.23: one number too few shifts all that follow."""
    with pytest.raises(AssertionError, match="every token carries"):
        Completion(token_ids=(1, 2), log_probs=(-0.1,), finish_reason="stop", weights_version=0)


def test_cross_entropy_is_the_weighted_sum():
    trained = tokens([-1.0, -3.0], [0.0, 0.0])
    loss, stats = next_token_loss(trained)
    assert loss.item() == pytest.approx(2.0)
    assert float(stats["loss/next_token_nats"]) == pytest.approx(2.0)


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


def test_packing_gives_every_reduction_the_same_weights():
    """How documents share rows must not show in the loss."""
    wide, narrow = drawn_batch([9, 5, 12, 3], 32), drawn_batch([9, 5, 12, 3], 12)
    for reduction in ("token", "sequence", "fixed"):
        sums = []
        for batch in (wide, narrow):
            weights = token_weights(batch, reduction, 16)
            sums.append([float(weights[batch.document_ids == d].sum()) for d in range(1, 5)])
        assert sums[0] == pytest.approx(sums[1])
