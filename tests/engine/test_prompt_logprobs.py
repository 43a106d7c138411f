"""Log-probabilities of prompts: those of one plain forward pass, in chunks, after preemption and beside others."""

from dataclasses import replace

import numpy
import pytest
import torch
from numpy.testing import assert_array_equal

from tests.engine.requests import LONG, SMALL, all_models, how, prompt, sampled
from tests.tiny import tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine
from thinkstack.evals.loglikelihood import loglikelihoods
from thinkstack.types import RequestError, SamplingParams

ALL_MODELS = all_models()
PROMPTS = [prompt(n, n) for n in (130, 3, 64, 65, 1)]


def scored(engine, prompts, num_top=0, **changes):
    """Run requests for prompts together; returns them."""
    samplings = [replace(one, prompt_logprobs=num_top, **changes) for one in how(len(prompts), max_tokens=3)]
    requests = [engine.submit(ids, one) for ids, one in zip(prompts, samplings, strict=True)]
    while not all(request.is_finished for request in requests):
        engine.step()
    engine.scheduler.check_invariants()
    return requests


@torch.no_grad()
def plain(model, ids):
    """Log-probabilities (N - 1, V) after each token but the last, by one pass."""
    return model(torch.tensor([ids]))[0, :-1].float().log_softmax(-1)


@ALL_MODELS
@pytest.mark.parametrize("chunk", [7, 2048])
def test_a_prompt_has_the_log_probabilities_of_a_plain_pass(cfg, chunk, path):
    model = tiny_model(cfg, **LONG)
    requests = scored(Engine(model, replace(SMALL, max_prefill_tokens=chunk)), PROMPTS, num_top=3)
    for request, ids in zip(requests, PROMPTS, strict=True):
        found = request.prompt_logprobs
        assert found.is_complete and numpy.isnan(found.logprobs[0]) and numpy.isnan(found.top_logprobs[0]).all()
        if len(ids) == 1:
            continue
        expected = plain(model, ids)
        own = expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert found.logprobs[1:] == pytest.approx(own.numpy(), abs=1e-5)
        assert found.top_logprobs[1:] == pytest.approx(expected.topk(3, -1).values.numpy(), abs=1e-5)
        chosen = torch.from_numpy(found.top_token_ids[1:])
        assert found.top_logprobs[1:] == pytest.approx(expected.gather(-1, chosen).numpy(), abs=1e-5)
        (likelihood,) = loglikelihoods(model, [(ids[:1], ids[1:])])
        assert float(found.logprobs[1:].sum()) == pytest.approx(likelihood.logprob, abs=1e-5 * len(ids))


@ALL_MODELS
def test_neighbors_preemption_siblings_and_cached_prefixes_change_no_bit(cfg, path):
    model = tiny_model(cfg, **LONG)
    alone = [scored(Engine(model, SMALL), [ids], 2)[0].prompt_logprobs for ids in PROMPTS]
    tight = Engine(model, replace(SMALL, cache_tokens=6 * BLOCK_SIZE, max_prefill_tokens=40))
    warm = Engine(model, SMALL)
    scored(warm, PROMPTS)
    for engine, changes in ((tight, {"max_tokens": 100}), (warm, {"n": 3})):
        for request, expected in zip(scored(engine, PROMPTS, 2, **changes), alone, strict=True):
            for name in ("logprobs", "top_token_ids", "top_logprobs"):
                assert_array_equal(getattr(request.prompt_logprobs, name), getattr(expected, name))
    assert tight.scheduler.num_preemptions > 0


@ALL_MODELS
def test_a_scored_prompt_gives_the_completions_of_any_other(cfg, path):
    model, samplings = tiny_model(cfg, **LONG), how(len(PROMPTS), n=2)
    expected = sampled(Engine(model, SMALL).generate(PROMPTS, samplings))
    engine = Engine(model, SMALL)
    for _ in range(2):  # the second time over a warm cache
        found = engine.generate(PROMPTS, [replace(one, prompt_logprobs=0) for one in samplings])
        assert sampled(found) == expected


def test_the_log_probability_of_a_token_is_that_among_the_best():
    """Clients find by equality whether greedy decoding gives a text."""
    model = tiny_model(**LONG)
    greedy = SamplingParams(temperature=0, max_tokens=40)
    ids = prompt(20)
    ids += Engine(model, SMALL).generate([ids], [greedy])[0][0].token_ids
    (request,) = scored(Engine(model, SMALL), [ids], 1)
    found = request.prompt_logprobs
    assert found.logprobs[20:].tolist() == found.top_logprobs[20:, 0].tolist()
    assert found.top_token_ids[20:, 0].tolist() == list(ids[20:])
    assert found.pairs(20) == ((ids[20], found.logprobs[20]),)


def test_scored_prompts_are_not_counted_as_cached_and_fill_the_cache_for_others():
    model, ids = tiny_model(**LONG), prompt(200)
    engine = Engine(model, SMALL)
    assert scored(engine, [ids])[0].num_cached_tokens == 0
    assert scored(engine, [ids])[0].num_cached_tokens == 0
    (_,) = engine.generate([ids], [SamplingParams(max_tokens=1)])
    request = engine.submit(ids, SamplingParams(max_tokens=1))
    engine.step()
    assert request.num_cached_tokens == 3 * BLOCK_SIZE and request.prompt_logprobs is None


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_bad_number_of_alternatives_is_refused(value):
    with pytest.raises(RequestError, match=f"prompt_logprobs={value}"):
        SamplingParams(prompt_logprobs=value)
