"""Validation of requests: numbers within bounds, token ids in any sequence; errors name the field."""

import math

import numpy
import pytest
import torch

from tests.engine.requests import SMALL
from tests.tiny import tiny_model
from thinkstack.engine.engine import Engine
from thinkstack.types import SAMPLING_RANGES, RequestError, SamplingParams


@pytest.mark.parametrize("name", SAMPLING_RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e40, "1", True, [1]])
def test_no_field_takes_what_is_not_a_number_of_its_range(name, value):
    """NaN as a temperature passed every comparison; the engine then reported invalid weights."""
    with pytest.raises(RequestError, match=f"^{name}="):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1e-40},
        {"temperature": -0.1},
        {"temperature": 101},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"max_tokens": 0},
        {"n": 0},
        {"min_tokens": 300},
        {"thinking_budget": -1, "think_end_token_ids": (3,)},
        {"thinking_budget": 4},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: -101.0}},
        {"logit_bias": {3: "1"}},
    ],
)
def test_values_beyond_their_bounds_are_refused_by_name(given):
    with pytest.raises(RequestError, match=next(iter(given))):
        SamplingParams(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0},
        {"temperature": 0.001},
        {"temperature": numpy.float32(0.5), "top_k": numpy.int64(4), "max_tokens": numpy.int32(3)},
        {"top_p": 1, "min_p": 1, "repetition_penalty": 1},
        {"logit_bias": {3: 100, 4: -100.0}},
        {"seed": -1},
    ],
)
def test_values_within_their_bounds_are_taken_whatever_their_type(given):
    Engine(tiny_model(), SMALL).generate([[1, 2]], [SamplingParams(**({"max_tokens": 3} | given))])


@pytest.mark.parametrize(
    "prompt",
    [
        (5, 6, 7),
        range(5, 8),
        numpy.array([5, 6, 7]),
        numpy.array([5, 6, 7], dtype=numpy.uint16),
        torch.tensor([5, 6, 7]),
        torch.tensor([5, 6, 7], dtype=torch.int32),
        [numpy.int64(5), 6, 7],
    ],
    ids=str,
)
def test_a_prompt_is_any_sequence_of_token_ids(prompt):
    """An array failed in numpy ("truth value is ambiguous") and a tensor became a list of tensors."""
    engine, sampling = Engine(tiny_model(), SMALL), SamplingParams(max_tokens=4, temperature=0.0)
    (found,), (expected,) = engine.generate([prompt, [5, 6, 7]], [sampling, sampling])
    assert found == expected
    assert engine.submit(prompt, sampling).prompt_token_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("hello", "the prompt is 'hello'"),
        (5, "the prompt is 5"),
        (None, "the prompt is None"),
        (torch.tensor(5), "the prompt is tensor"),
        ([1.0, 2.0], "the prompt contains 1.0"),
        (torch.tensor([1.5]), "the prompt contains 1.5"),
        ([[1, 2]], "the prompt contains"),
        (torch.tensor([[1, 2]]), "the prompt contains"),
        ([1, True], "the prompt contains True"),
        ([1, None], "the prompt contains None"),
        (numpy.array([], dtype=int), "the prompt is empty"),
        (torch.tensor([1, 48]), "the prompt contains token id 48"),
    ],
    ids=lambda one: str(one)[:20],
)
def test_a_prompt_of_anything_else_is_refused_with_our_message(prompt, said):
    with pytest.raises(RequestError, match=said):
        Engine(tiny_model(), SMALL).submit(prompt, SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": {"3": 1.0}},
        {"stop_token_ids": ("a",)},
        {"allowed_token_ids": (10**6,)},
        {"stop_token_ids": (1.5,)},
    ],
)
def test_token_ids_of_a_field_are_whole_numbers(given):
    with pytest.raises(RequestError, match=f"{next(iter(given))} contains"):
        Engine(tiny_model(), SMALL).submit([1], SamplingParams(max_tokens=2, **given))
