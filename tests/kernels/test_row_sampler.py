"""The sampling kernel against torch's operators, and in cases where rounding matters."""

import numpy
import pytest
import torch

from tests.kernels.test_kernels import random_tensor
from thinkstack.kernels import ops
from thinkstack.kernels.cpu import calls, inference
from thinkstack.kernels.ops import sample
from thinkstack.kernels.sampling import PenalizedTokens, uniforms

pytestmark = pytest.mark.skipif(not calls.available(), reason="no C++ compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.3, 3, 12])
@pytest.mark.parametrize("vocabulary", [1, 53, 5000])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_sampling_inverts_the_same_distribution(vocabulary, spread, is_filtered, dtype, on_torch):
    rows = 400 if vocabulary < 1000 else 60
    logits = (random_tensor(rows, vocabulary) * spread).to(dtype)
    logits[::5, : vocabulary // 2] = -torch.inf
    generator = torch.Generator().manual_seed(0)
    temperature, uniform = torch.full((rows,), 0.8), torch.rand(rows, dtype=torch.float64, generator=generator)
    temperature[::7] = 0
    limits = None
    if is_filtered:
        limits = (torch.tensor([0, 1, 2, 40, 10_000]), torch.tensor([1.0, 0.9, 0.3, 0.999]), torch.tensor([0, 0.02, 1]))
        limits = tuple(limit.repeat(rows)[:rows] for limit in limits)
    settings = logits, temperature, uniform, limits
    (mine, my_logprobs), (theirs, logprobs) = sample(*settings), on_torch(sample, *settings)
    same = mine == theirs
    assert same.float().mean() > 0.98  # a random number at the edge between two tokens may give either
    torch.testing.assert_close(my_logprobs[same], logprobs[same], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("is_unfiltered", [False, True])
def test_rows_of_columns_use_their_own_settings_and_random_numbers(is_unfiltered):
    """4,000 equally likely tokens, so that a token determines its random number."""
    random = numpy.random.default_rng(0)
    columns = dict(seed=random.integers(0, 2**64, 50, dtype=numpy.uint64), num_tokens=random.integers(20, 30, 50))
    columns |= dict(num_prompt_tokens=random.integers(0, 20, 50), top_k=random.integers(0, 3000, 50))
    columns |= {name: random.uniform(0.3, 1, 50).astype(numpy.float32) for name in ("temperature", "top_p", "min_p")}
    rows, offsets = random.permutation(50)[:40], random.integers(0, 4, 40)
    logits = torch.zeros(40, 4000)
    numbers = uniforms(
        columns["seed"][rows],
        (columns["num_tokens"] - columns["num_prompt_tokens"])[rows].astype("u8") + offsets.astype("u8"),
    )
    temperature, *filters = (
        torch.from_numpy(columns[name][rows]) for name in ("temperature", "top_k", "top_p", "min_p")
    )
    expected = inference.sample(
        logits, temperature, torch.from_numpy(numbers), None if is_unfiltered else tuple(filters)
    )
    found = ops.RowSampler(**columns).sample(logits, rows, offsets, is_unfiltered)
    assert len(set(found[0].tolist())) > 30
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine == theirs.numpy()).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_reports_nan_and_leaves_the_others_unchanged(broken):
    logits = random_tensor(3, 200)
    logits[1, 77] = broken
    _, logprobs = sample(logits, torch.ones(3), torch.full((3,), 0.5, dtype=torch.float64))
    assert logprobs.isnan().tolist() == [False, True, False]


def test_the_largest_random_number_samples_the_last_token_with_mass():
    """Rounding makes the target equal to the total mass; the last vectors have no mass."""
    logits = random_tensor(300, 2000)
    logits[:, 700:] = -torch.inf
    uniform = torch.full((300,), 1 - 2**-53, dtype=torch.float64)
    tokens, logprobs = sample(logits, torch.ones(300), uniform)
    assert (tokens == 699).all() and logprobs.isfinite().all()


def test_of_equally_likely_tokens_the_lower_ids_stay(on_torch):
    """Thousands of equal masses in one bin, which the kernel sorts."""
    logits, uniform = torch.zeros(50, 3000), torch.linspace(0, 0.999, 50, dtype=torch.float64)
    top_k, ones = torch.full((50,), 1234), torch.ones(50)
    for filters in ((top_k, ones, 0 * ones), (0 * top_k, ones * 0.5, 0 * ones), (top_k, ones * 0.5, ones)):
        tokens, _ = sample(logits, ones, uniform, filters)
        assert torch.equal(tokens, on_torch(sample, logits, ones, uniform, filters)[0])


def test_penalties_are_those_of_torch_bit_for_bit(on_torch):
    """With tokens that occur twice, places that are not valid, and banned tokens."""
    random = numpy.random.default_rng(0)
    tokens = random.integers(0, 50, (30, 40))
    factors = (random.uniform(low, high, 30).astype(numpy.float32) for low, high in ((0.5, 2), (-2, 2), (-2, 2)))
    num_outputs = random.integers(0, 4, (30, 50)).astype(numpy.float32)
    penalized = PenalizedTokens(
        random.permutation(40)[:30],
        tokens,
        numpy.take_along_axis(num_outputs, tokens, 1),
        random.random(tokens.shape) < 0.5,
        *factors,
    )
    mine = random_tensor(40, 50).float()
    mine[:, 7] = -torch.inf
    theirs = mine.clone()
    ops.penalize_(mine, penalized)
    on_torch(ops.penalize_, theirs, penalized)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary, count", [(1, 1), (53, 5), (53, 53), (5000, 20)])
def test_the_most_likely_tokens_are_those_of_torch(vocabulary, count, dtype, on_torch):
    """In rows with banned tokens, at temperature 0, and with the numbers that `sample` gives the same tokens."""
    logits = (random_tensor(30, vocabulary) * 3).to(dtype)
    logits[::5, vocabulary // 2 :] = -torch.inf
    logits[::5, 0] = 1.0
    temperature = torch.linspace(0, 1.5, 30)
    ids, logprobs = ops.top_logprobs(logits, temperature, None, count)
    full = torch.log_softmax(logits.float() / temperature.clamp(min=1e-9).where(temperature > 0, 1.0)[:, None], -1)
    expected, order = full.sort(dim=-1, descending=True, stable=True)  # among equals the lower id first
    if dtype == torch.float32 or vocabulary < 100:
        assert torch.equal(ids, order[:, :count])
    torch.testing.assert_close(logprobs, expected[:, :count], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(on_torch(ops.top_logprobs, logits, temperature, None, count)[1], logprobs)
    greedy = torch.zeros(30)
    tokens, own = sample(logits, greedy, torch.zeros(30, dtype=torch.float64))
    ids, logprobs = ops.top_logprobs(logits, greedy, None, 1)
    assert torch.equal(ids[:, 0], tokens) and torch.equal(logprobs[:, 0], own)


@pytest.mark.parametrize("vocabulary", [1, 32, 50, 640])
def test_a_token_bitmask_bans_the_tokens_that_it_does_not_contain(vocabulary, on_torch):
    random = numpy.random.default_rng(0)
    bitmask = random.integers(-(2**31), 2**31, (5, -(-vocabulary // 32)), dtype=numpy.int32)
    entries = random.permutation(8)[:5]
    mine = random_tensor(8, vocabulary).float()
    theirs, expected = mine.clone(), mine.clone()
    for row, words in zip(entries.tolist(), bitmask.tolist(), strict=True):
        for token in range(vocabulary):
            if not words[token // 32] >> token % 32 & 1:
                expected[row, token] = -torch.inf
    ops.apply_token_bitmask_(mine, entries, bitmask)
    on_torch(ops.apply_token_bitmask_, theirs, entries, bitmask)
    assert torch.equal(mine, expected) and torch.equal(theirs, expected)
