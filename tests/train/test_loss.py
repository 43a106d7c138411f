"""Losses against hand-worked numbers."""

import math
from dataclasses import replace

import pytest
import torch

from tests.tiny import random_batch
from tests.train.policy_tokens import tokens
from thinkstack.data import Example, collate
from thinkstack.train import loss as losses
from thinkstack.train.loss import next_token_loss, token_logprobs, token_weights
from thinkstack.types import Completion, ConfigError


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# three answers of 3, 1 and 2 trained tokens, and a document without any
LENGTHS = [(2, 3), (1, 1), (1, 2), (4, 0)]


def uneven_batch():
    samples = [Example(tuple(range(p + n)), (0,) * p + (1,) * n) for p, n in LENGTHS]
    return collate(samples, [[0, 1], [2, 3]], 8)


def weights_by_answer(reduction: str, fixed_length: int = 0) -> list[set[float]]:
    batch = uneven_batch()
    weights = token_weights(batch, reduction, fixed_length)
    assert torch.equal(weights > 0, batch.loss_mask > 0)
    return [set(weights[(batch.document_ids == d) & (batch.loss_mask > 0)].tolist()) for d in (1, 2, 3)]


def test_token_weights_share_one_over_all_trained_tokens():
    """The divisor is the number of trained tokens of the whole step."""
    assert [weight for (weight,) in weights_by_answer("token")] == pytest.approx([1 / 6] * 3)


def test_sequence_weights_share_one_over_sequences_and_length():
    """Mean over answers of the mean over tokens; the document without trained tokens is no answer."""
    thirds = weights_by_answer("sequence")
    assert [weight for (weight,) in thirds] == pytest.approx([1 / 9, 1 / 3, 1 / 6])


def test_sequence_weights_of_a_step_without_trained_tokens_are_zero():
    """An empty answer must not divide by zero."""
    batch = replace(uneven_batch(), loss_mask=torch.zeros(2, 8))
    assert torch.equal(token_weights(batch, "sequence"), torch.zeros(2, 8))
    assert torch.equal(token_weights(batch, "token"), torch.zeros(2, 8))


def test_fixed_weights_depend_on_no_length():
    """Dr. GRPO divides by a constant, not by the longest answer that happens to be in the batch."""
    for (weight,) in weights_by_answer("fixed", fixed_length=10):
        assert weight == pytest.approx(1 / 30)


def test_fixed_weights_need_the_constant():
    """Without it the batch's own maximum would creep back in."""
    with pytest.raises(ConfigError, match="needs fixed_length >= 1"):
        token_weights(uneven_batch(), "fixed")


def test_masks_come_from_lengths_not_from_pad_ids():
    """Token 0 pads, and also stands in the text, first, last and in between: it is trained there."""
    batch = collate([Example((0, 0, 5, 0), (0, 1, 1, 1)), Example((7, 0), (0, 1))], [[0, 1]], 6)
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [[0, 5, 0, 0, 0, 0]]


def test_the_end_token_is_trained_and_counted():
    """EOS is an action; leaving it out teaches a model never to stop."""
    eos = 1
    batch = collate([Example((9, 5, 6, eos), (0, 1, 1, 1))], [[0]], 4)
    assert batch.loss_mask.sum() == 3
    assert float(token_weights(batch, "token")[batch.targets == eos].sum()) == pytest.approx(1 / 3)


def test_logprobs_are_those_of_log_softmax():
    hidden, head = random_tensor(6, 5), random_tensor(7, 5, seed=1)
    index, targets = torch.tensor([4, 0, 3]), torch.tensor([6, 2, 2])
    found, entropy = token_logprobs(hidden, index, head, targets, with_entropy=True)
    table = (hidden[index] @ head.T).log_softmax(-1)
    torch.testing.assert_close(found, table[torch.arange(3), targets])
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1))


def test_entropy_is_exact():
    """A uniform prediction over 4 tokens has ln 4 nats, however many tokens are masked."""
    _, entropy = token_logprobs(torch.zeros(3, 2), torch.tensor([1]), torch.ones(4, 2), torch.tensor([0]), 1.0, True)
    assert entropy.tolist() == pytest.approx([math.log(4)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_gradients_are_autograds(temperature):
    hidden, head = random_tensor(6, 5).requires_grad_(), random_tensor(7, 5, seed=1).requires_grad_()
    index, targets = torch.tensor([4, 0, 3]), torch.tensor([6, 2, 2])
    fast, _ = token_logprobs(hidden, index, head, targets, temperature)
    plain = (hidden[index] @ head.T / temperature).log_softmax(-1)[torch.arange(3), targets]
    grad = random_tensor(3, seed=2)
    pairs = zip(*(torch.autograd.grad(out, (hidden, head), grad) for out in (fast, plain)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_temperature_divides_the_logits():
    """Dividing log-probabilities instead gives numbers that do not sum to 1."""
    hidden, head = random_tensor(1, 5), random_tensor(7, 5, seed=1)
    index = torch.zeros(7, dtype=torch.int64)
    found = [token_logprobs(hidden, index[:1], head, torch.tensor([t]), 0.7)[0] for t in range(7)]
    assert float(torch.cat(found).exp().sum()) == pytest.approx(1.0, abs=1e-6)
    expected = (hidden @ head.T / 0.7).log_softmax(-1)[0]
    torch.testing.assert_close(torch.cat(found), expected)


def test_chunks_of_the_head_change_nothing(monkeypatch):
    """Logits of a few tokens at a time bound the memory; the numbers are those of all at once."""
    hidden, head = random_tensor(20, 5).requires_grad_(), random_tensor(7, 5, seed=1).requires_grad_()
    index, targets = torch.arange(20).flip(0), torch.randint(7, (20,), generator=torch.Generator().manual_seed(3))
    found = []
    for chunk in (1000, 3):
        monkeypatch.setattr(losses, "head_chunk", lambda vocab_size, chunk=chunk: chunk)
        logprobs, entropy = token_logprobs(hidden, index, head, targets, 0.8, True)
        found.append((logprobs, entropy, *torch.autograd.grad(logprobs.square().sum(), (hidden, head))))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_bf16_logits_are_normalized_in_fp32():
    """A log-softmax in bf16 is off by up to 0.03 nats; from fp32 on only the logits' own rounding is left."""
    hidden, head = random_tensor(64, 32).bfloat16(), random_tensor(500, 32, seed=1).bfloat16()
    index, targets = torch.arange(64), torch.arange(64)
    found, _ = token_logprobs(hidden, index, head, targets)
    exact = (hidden @ head.T).double().log_softmax(-1)[index, targets]
    assert found.dtype == torch.float32
    assert float((found.double() - exact).abs().max()) < 1e-5


class Bigrams(torch.nn.Module):
    """A model that knows one table: log-probability of the next token given this one."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.head = torch.nn.Linear(*table.shape, bias=False)
        self.head.weight = torch.nn.Parameter(table.T.contiguous())

    def trunk(self, ids, positions, document_ids, experts=None, branches=None):
        class Out:
            hidden = torch.nn.functional.one_hot(ids, self.head.in_features).float()

        return Out


def test_the_logprob_of_a_token_is_read_off_the_position_before_it():
    """With a bigram table every log-probability is known; a shift by one gives other numbers."""
    from thinkstack.train.passes import batch_logprobs

    table = random_tensor(5, 5).log_softmax(-1)
    ids = (3, 1, 4, 1, 0)
    batch = collate([Example(ids, (0, 0, 1, 1, 1))], [[0]], 6)
    found = batch_logprobs(Bigrams(table), batch, 1.0, 64)
    expected = [0.0, float(table[1, 4]), float(table[4, 1]), float(table[1, 0]), 0.0, 0.0]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_completions_carry_one_logprob_a_token():
    """One number too few shifts all that follow."""
    with pytest.raises(AssertionError, match="one log-probability per token"):
        Completion(token_ids=(1, 2), logprobs=(-0.1,), finish_reason="stop", weights_version=0)


def test_cross_entropy_is_the_weighted_sum():
    trained = tokens([-1.0, -3.0], [0.0, 0.0])
    loss, stats = next_token_loss(trained)
    assert loss.item() == pytest.approx(2.0)
    assert float(stats["loss/next_token_nats"]) == pytest.approx(2.0)


def test_packing_gives_every_reduction_the_same_weights():
    """How documents share rows must not show in the loss."""
    wide, narrow = random_batch([9, 5, 12, 3], 32), random_batch([9, 5, 12, 3], 12)
    for reduction in ("token", "sequence", "fixed"):
        sums = []
        for batch in (wide, narrow):
            weights = token_weights(batch, reduction, 16)
            sums.append([float(weights[batch.document_ids == d].sum()) for d in range(1, 5)])
        assert sums[0] == pytest.approx(sums[1])
