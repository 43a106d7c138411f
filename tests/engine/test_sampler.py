"""Worked examples of sampling: temperature, top-p, greedy, and random numbers per request."""

import math

import numpy
import pytest
import torch

from thinkstack.engine.sequence_table import completion_seed
from thinkstack.kernels.ops import sample
from thinkstack.kernels.sampling import filter_logprobs, uniforms
from thinkstack.types import RequestError, SamplingParams

LOGITS = torch.tensor([[0.5, 0.3, 0.2]]).log()


def sample_token(
    uniform: float, temperature: float = 1.0, top_p: float = 1.0, logits: torch.Tensor = LOGITS
) -> tuple[int, float]:
    filters = None if top_p == 1 else (torch.tensor([0]), torch.tensor([top_p]), torch.tensor([0.0]))
    tokens, logprobs = sample(
        logits, torch.tensor([temperature]), torch.tensor([uniform], dtype=torch.float64), filters
    )
    return int(tokens[0]), float(logprobs[0])


def filter_top_p(logprobs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    rows = len(top_p)
    return filter_logprobs(logprobs, torch.zeros(rows, dtype=torch.int64), top_p, torch.zeros(rows))


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (0.999999, 2)])
def test_sampling_inverts_the_cumulative_distribution(uniform, token):
    assert sample_token(uniform)[0] == token


def test_the_logprob_is_that_of_the_sampled_token():
    assert sample_token(0.6)[1] == pytest.approx(math.log(0.3), abs=1e-6)


def test_temperature_divides_the_logits():
    """At T = 0.5 the probabilities are squared: 0.25, 0.09, 0.04 of 0.38."""
    token, logprob = sample_token(0.7, temperature=0.5)
    assert (token, logprob) == (1, pytest.approx(math.log(0.09 / 0.38), abs=1e-5))


def test_temperature_zero_takes_the_most_likely_at_any_random_number():
    for uniform in (0.0, 0.9, 0.999):
        assert sample_token(uniform, temperature=0.0) == (0, pytest.approx(math.log(0.5), abs=1e-6))


def test_greedy_and_sampled_rows_share_a_batch():
    tokens, _ = sample(LOGITS.expand(2, 3), torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.9], dtype=torch.float64))
    assert tokens.tolist() == [0, 2]


def test_a_token_without_probability_is_never_sampled():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert {sample_token(u, logits=logits)[0] for u in (0.0, 0.25, 0.4999, 0.5, 0.75, 1 - 2**-53)} == {1, 3}


@pytest.mark.parametrize(("top_p", "num_tokens"), [(1.0, 3), (0.81, 3), (0.79, 2), (0.51, 2), (0.49, 1), (1e-6, 1)])
def test_the_nucleus_is_the_smallest_set_with_the_mass(top_p, num_tokens):
    out = filter_top_p(LOGITS, torch.tensor([top_p]))
    assert int(out.isfinite().sum()) == num_tokens
    assert float(out.exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_a_set_with_exactly_the_mass_is_enough():
    assert filter_top_p(torch.zeros(1, 2).log_softmax(-1), torch.tensor([0.5])).isfinite().sum() == 1


def test_the_nucleus_does_not_depend_on_the_order_of_tokens():
    shuffled = LOGITS[:, [2, 0, 1]]
    out = filter_top_p(shuffled, torch.tensor([0.6]))
    assert out[0].exp().tolist() == pytest.approx([0.0, 0.625, 0.375], abs=1e-6)


def test_top_p_binds_its_own_row_only():
    out = filter_top_p(LOGITS.expand(2, 3), torch.tensor([0.4, 1.0]))
    assert out.isfinite().sum(-1).tolist() == [1, 3]


def test_the_logprob_of_a_nucleus_is_renormalized():
    """It is the probability under the filtered distribution, not under the full softmax."""
    assert sample_token(0.7, top_p=0.6) == (1, pytest.approx(math.log(0.375), abs=1e-5))


def test_random_numbers_are_uniform_and_depend_on_seed_and_counter():
    seeds = numpy.array([completion_seed(s, a) for s in range(100) for a in range(4)], dtype=numpy.uint64)
    numbers = numpy.stack([uniforms(seeds, numpy.full(400, c, dtype=numpy.uint64)) for c in range(50)])
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    assert len(numpy.unique(numbers)) == numbers.size
    counts, _ = numpy.histogram(numbers, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 4.5 * 1000**0.5
    assert abs(numpy.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03


def test_random_numbers_stay_the_same():
    """Published runs state their seeds; another generator would change their results."""
    one = uniforms(numpy.array([completion_seed(0, 0)], dtype=numpy.uint64), numpy.array([0], dtype=numpy.uint64))
    assert one.tolist() == [0.7497482413580301]


@pytest.mark.parametrize("given", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": 0}, {"n": 0}])
def test_meaningless_sampling_is_refused(given):
    with pytest.raises(RequestError):
        SamplingParams(**given)


def test_seeds_of_any_size_are_taken():
    for seed in (-1, 0, 2**63, 2**70):
        assert 0 <= completion_seed(seed, 3) < 2**64
