"""Draft tokens change the number of steps of a completion and nothing else."""

from dataclasses import replace

import pytest
import torch

from tests.engine.drafts import draft_from
from tests.engine.requests import FUSED, LONG, SMALL, all_models, alone, how, prompt, sampled
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine
from thinkstack.types import ConfigError, SamplingParams

GQA_AHEAD = replace(GQA_TINY, mtp_layers=1)
BOTH = pytest.mark.parametrize("cfg", [MLA_TINY, GQA_AHEAD, FUSED], ids=["mla", "gqa", "whole"])
DRAFTING = replace(SMALL, num_speculative_tokens=3)


@all_models(GQA_AHEAD)
@pytest.mark.parametrize("drafts", [1, 3])
def test_draft_tokens_of_the_module_change_no_token(cfg, drafts, path):
    """Many kinds: long and short prompts, groups, chunks, full blocks, high temperature and greedy."""
    model, prompt_token_ids = tiny_model(cfg, **LONG), [prompt(n, n) for n in (150, 3, 64, 65, 128)]
    samplings = how(4) + how(1, temperature=0.0, max_tokens=70)
    samplings[1], samplings[2] = replace(samplings[1], n=3), replace(samplings[2], n=2)
    engine = Engine(model, replace(DRAFTING, num_speculative_tokens=drafts, max_prefill_tokens=50))
    for _ in range(2):  # the second time from cached prefixes
        assert sampled(engine.generate(prompt_token_ids, samplings)) == alone(model, prompt_token_ids, samplings)
        engine.scheduler.check_invariants()
    assert (engine.speculator.num_drafted > 0).all()


@BOTH
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_accepted_and_rejected_draft_tokens_change_no_token(cfg, wrong, monkeypatch):
    model, prompt_token_ids = tiny_model(cfg, **LONG), [prompt(n, n) for n in (60, 3, 64, 65, 128)]
    samplings = how(5, max_tokens=100)
    expected = alone(model, prompt_token_ids, samplings)
    draft_from(
        monkeypatch,
        {tuple(one): group[0].token_ids for one, group in zip(prompt_token_ids, expected, strict=True)},
        wrong,
    )
    engine = Engine(model, DRAFTING)
    assert sampled(engine.generate(prompt_token_ids, samplings)) == expected
    longer = [one + [*group[0].token_ids][:40] for one, group in zip(prompt_token_ids, expected, strict=True)]
    assert sampled(engine.generate(longer, how(5))) == alone(model, longer, how(5))  # from the cached prefix
    engine.scheduler.check_invariants()


def test_accepted_draft_tokens_save_steps_and_are_counted(monkeypatch):
    """41 tokens with 4 per step, the first with the prompt: 11 steps instead of 41."""
    model, prompt_token_ids = tiny_model(**LONG), prompt(30)
    (((expected, _),),) = alone(model, [prompt_token_ids], how(1, max_tokens=41))
    draft_from(monkeypatch, {tuple(prompt_token_ids): expected}, wrong=0.0)
    engine = Engine(model, DRAFTING)
    request = engine.submit(prompt_token_ids, how(1, max_tokens=41)[0])
    steps = 0
    while not request.is_finished:
        engine.step()
        steps += 1
    assert steps == 11
    assert request.num_draft_tokens == request.num_accepted_tokens == 30
    assert engine.speculator.num_drafted.tolist() == engine.speculator.num_accepted.tolist() == [10, 10, 10]


def test_tokens_after_a_stop_token_are_discarded(monkeypatch):
    model, prompt_token_ids = tiny_model(**LONG), prompt(30)
    (((expected, _),),) = alone(model, [prompt_token_ids], how(1, max_tokens=41))
    draft_from(monkeypatch, {tuple(prompt_token_ids): expected}, wrong=0.0)
    stopping = how(1, max_tokens=41, stop_token_ids=(expected[17],))
    engine = Engine(model, DRAFTING)
    found = engine.generate([prompt_token_ids], stopping)[0][0]
    place = expected.index(expected[17])
    assert found.token_ids == expected[: place + 1] and found.finish_reason == "stop"
    assert not engine.table.num_draft_tokens.any(), "draft tokens for a finished row"


@pytest.mark.parametrize(
    "given",
    [
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.4, "top_k": 7},
        {"top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
        {"thinking_budget": 9, "think_end_token_ids": (5, 6, 7)},
        {"thinking_budget": 0, "think_end_token_ids": (5,)},
        {"logit_bias": {3: 2.0}, "min_tokens": 20, "stop_token_ids": (3,)},
        {"top_logprobs": 3, "raw_logprobs": True},
    ],
    ids=lambda given: "+".join(given),
)
def test_draft_tokens_work_with_every_sampling_parameter(given, monkeypatch):
    model, prompt_token_ids, samplings = tiny_model(**LONG), [prompt(30), prompt(64, 1)], how(2, max_tokens=40, **given)
    plain = Engine(model, SMALL).generate(prompt_token_ids, samplings)
    expected = {tuple(one): group[0].token_ids for one, group in zip(prompt_token_ids, plain, strict=True)}
    draft_from(monkeypatch, expected, wrong=0.2)
    engine = Engine(model, DRAFTING)
    for mine, theirs in zip(engine.generate(prompt_token_ids, samplings), plain, strict=True):
        assert mine[0].token_ids == theirs[0].token_ids
        assert mine[0].logprobs == theirs[0].logprobs
        assert mine[0].top_logprobs == theirs[0].top_logprobs
    assert engine.speculator.num_accepted.sum() > 10


@BOTH
def test_a_small_cache_drops_draft_tokens_before_it_preempts(cfg, monkeypatch):
    model, prompt_token_ids = tiny_model(cfg, **LONG), [prompt(n, n) for n in (100, 30, 64, 90, 63, 5)]
    samplings = how(6, max_tokens=120)
    expected = alone(model, prompt_token_ids, samplings)
    draft_from(
        monkeypatch,
        {tuple(one): group[0].token_ids for one, group in zip(prompt_token_ids, expected, strict=True)},
        wrong=0.3,
    )
    engine = Engine(model, replace(DRAFTING, cache_tokens=6 * BLOCK_SIZE))
    assert sampled(engine.generate(prompt_token_ids, samplings)) == expected
    assert engine.scheduler.num_preemptions > 0
    engine.scheduler.check_invariants()


@BOTH
def test_cached_states_are_those_of_a_whole_sequence(cfg):
    """The module drafts the same over the cache, by tokens or chunks, as over the whole text."""
    model, prompt_token_ids = tiny_model(cfg, **LONG), prompt(70)
    engine = Engine(model, replace(DRAFTING, num_speculative_tokens=1, max_prefill_tokens=40))
    request = engine.submit(prompt_token_ids, SamplingParams(max_tokens=30, temperature=0.0))
    drafts = {}
    while not request.is_finished:
        engine.step()
        for row in request.rows.values():
            if engine.table.num_draft_tokens[row]:
                num_tokens = int(engine.table.num_tokens[row])
                drafts[num_tokens] = int(engine.table.ids[row, num_tokens])
    ids = torch.tensor([[*prompt_token_ids, *request.completions[0].token_ids]])
    with torch.no_grad():
        (states, *_), _ = model.mtp_hidden_states(model.trunk(ids), ids)
        expected = model.head(states)[0].argmax(-1)  # at i: of token i + 2
    assert len(drafts) > 20
    assert drafts == {num_tokens: int(expected[num_tokens - 2]) for num_tokens in drafts}


def test_a_model_without_a_module_cannot_draft():
    with pytest.raises(ConfigError, match="num_speculative_tokens needs a multi-token-prediction module"):
        Engine(tiny_model(GQA_TINY), replace(SMALL, num_speculative_tokens=1))
    with pytest.raises(ConfigError, match="num_speculative_tokens=-1"):
        replace(SMALL, num_speculative_tokens=-1)
