"""The same tokens with cached prefixes, chunked prefill, preemption and shared prompts: fp32 on a CPU, exactly."""

from dataclasses import replace

import pytest
import torch

from tests.engine.requests import FUSED, LONG, SMALL, all_models, alone, how, prompt, sampled
from tests.tiny import GQA_TINY, tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.interface import Overloaded
from thinkstack.kernels.cpu import calls
from thinkstack.types import RequestError, SamplingParams

ALL_MODELS = all_models()


@ALL_MODELS
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunked_prefill_gives_the_tokens_of_unchunked_prefill(cfg, chunk, path):
    model, prompt_token_ids, samplings = tiny_model(cfg, **LONG), [prompt(n, n) for n in (130, 3, 64, 65)], how(4)
    found = Engine(model, replace(SMALL, max_prefill_tokens=chunk)).generate(prompt_token_ids, samplings)
    assert sampled(found) == alone(model, prompt_token_ids, samplings)


@ALL_MODELS
def test_cached_prefixes_give_the_tokens_of_computed_ones(cfg, path):
    """Prompts with common prefixes, submitted together and again: full blocks, a full prompt, one token more or
    less."""
    model, base = tiny_model(cfg, **LONG), prompt(200)
    prompt_token_ids = [base[:n] for n in (200, 128, 129, 127, 64, 65)] + [base[:70] + prompt(60, 1), base[:128]]
    samplings = how(8)
    engine, expected = Engine(model, SMALL), alone(model, prompt_token_ids, samplings)
    assert sampled(engine.generate(prompt_token_ids, samplings)) == expected
    assert sampled(engine.generate(prompt_token_ids, samplings)) == expected
    engine.scheduler.check_invariants()


@ALL_MODELS
def test_other_requests_change_no_bit_whatever_their_length_and_filters(cfg, path):
    """Log-probabilities depended on the longest context present, where torch's operators padded all to it, and on
    whether another request kept a top-k or top-p set, because then all were normalized twice."""
    model, prompt_token_ids = tiny_model(cfg, **LONG), [prompt(n, n) for n in (2, 250, 63, 5, 64, 129)]
    keeps: list[dict[str, float]] = [
        {},
        {},
        {"top_k": 5},
        {"top_p": 0.7, "min_p": 0.01},
        {"top_k": 30, "top_p": 0.9},
        {},
    ]
    samplings = [replace(one, **keep) for one, keep in zip(how(6, n=2, top_logprobs=2), keeps, strict=True)]
    engine = Engine(model, replace(SMALL, max_num_seqs=12, max_prefill_tokens=90))
    assert sampled(engine.generate(prompt_token_ids, samplings)) == alone(model, prompt_token_ids, samplings)


@ALL_MODELS
def test_preempted_requests_give_the_same_completions(cfg, path):
    """A cache of 6 blocks for 6 requests of up to 4 blocks: they preempt each other, and all complete as alone."""
    model, prompt_token_ids = tiny_model(cfg, **LONG), [prompt(n, n) for n in (100, 30, 64, 90, 63, 5)]
    samplings = how(6, max_tokens=120)
    engine = Engine(model, replace(SMALL, cache_tokens=6 * BLOCK_SIZE))
    assert sampled(engine.generate(prompt_token_ids, samplings)) == alone(model, prompt_token_ids, samplings)
    assert engine.scheduler.num_preemptions > 0
    engine.scheduler.check_invariants()


@ALL_MODELS
def test_groups_share_a_prompt_and_can_be_preempted(cfg, path):
    model, prompt_token_ids, samplings = (
        tiny_model(cfg, **LONG),
        [prompt(100), prompt(70, 1)],
        how(2, n=4, max_tokens=90),
    )
    expected = alone(model, prompt_token_ids, samplings)
    for tokens in (0, 5 * BLOCK_SIZE):
        engine = Engine(model, replace(SMALL, cache_tokens=tokens, max_prefill_tokens=64))
        assert sampled(engine.generate(prompt_token_ids, samplings)) == expected
        engine.scheduler.check_invariants()
    assert engine.scheduler.num_preemptions > 0


def test_preempted_requests_have_the_same_experts_alternatives_and_logprobs():
    """The other fields of a completion are correct after recomputation too."""
    model, prompt_token_ids = tiny_model(**LONG), [prompt(n, n) for n in (100, 30, 64)]
    samplings = how(3, max_tokens=100, top_logprobs=2)
    cfg = replace(SMALL, return_routed_experts=True)
    expected = Engine(model, cfg).generate(prompt_token_ids, samplings)
    engine = Engine(model, replace(cfg, cache_tokens=4 * BLOCK_SIZE))
    for mine, theirs in zip(engine.generate(prompt_token_ids, samplings), expected, strict=True):
        assert mine[0].logprobs == theirs[0].logprobs
        assert mine[0].top_logprobs == theirs[0].top_logprobs
        assert torch.equal(mine[0].experts, theirs[0].experts)
    assert engine.scheduler.num_preemptions > 0


def test_one_token_completions_carry_their_experts():
    """Three completions of one token: each has the prompt's experts."""
    engine = Engine(tiny_model(**LONG), replace(SMALL, return_routed_experts=True))
    (found,) = engine.generate([prompt(70)], [SamplingParams(n=3, max_tokens=1)])
    assert torch.equal(found[0].experts, found[1].experts) and torch.equal(found[0].experts, found[2].experts)


def computed_tokens(engine: Engine, prompt_token_ids: list[list[int]], samplings: list[SamplingParams]) -> int:
    """The number of tokens that the model computed."""
    counts, run = [], engine.runner.run
    engine.runner.run = lambda plan, table: (counts.append(int(plan.counts.sum())), run(plan, table))[1]
    engine.generate(prompt_token_ids, samplings)
    engine.runner.run = run
    return sum(counts)


@pytest.mark.parametrize("chunk", [64, 1000])
def test_requests_over_one_prompt_compute_it_once(chunk):
    """8 requests at once over the same 300 tokens: 300 and the last one again for 7 others; then 9 each are sampled."""
    engine = Engine(tiny_model(**LONG), replace(SMALL, max_prefill_tokens=chunk))
    computed = computed_tokens(engine, [prompt(300)] * 8, how(8, max_tokens=10))
    last_part = 300 - 300 // BLOCK_SIZE * BLOCK_SIZE  # a partially filled block is not shared
    assert computed <= 300 + 7 * last_part + 8 * 9
    computed = computed_tokens(Engine(tiny_model(**LONG), SMALL), [prompt(256)] * 8, how(8, max_tokens=10))
    assert computed == 256 + 7 + 8 * 9


def test_hits_are_counted_in_whole_blocks():
    engine, base = Engine(tiny_model(**LONG), SMALL), prompt(200)
    engine.generate([base], how(1))
    for length, hit in ((200, 192), (192, 128), (130, 128), (63, 0)):
        request = engine.submit(base[:length], SamplingParams(max_tokens=1))
        engine.step()
        assert request.num_cached_tokens == hit, length


def test_versions_and_salts_share_no_blocks():
    """A prefix computed with old weights, or with another salt, is never reused."""
    model, other = tiny_model(**LONG), tiny_model(seed=1, **LONG)
    engine, prompt_token_ids = Engine(model, SMALL), [prompt(150)]
    greedy = how(1, temperature=0.0)
    engine.generate(prompt_token_ids, greedy)
    tenant = engine.submit(prompt_token_ids[0], greedy[0], cache_salt="other")
    engine.step()
    assert tenant.num_cached_tokens == 0
    engine.abort(tenant)
    engine.load_weights(other, version=1)
    assert sampled(engine.generate(prompt_token_ids, greedy)) == alone(other, prompt_token_ids, greedy)


def test_block_hashes_are_compared_token_by_token(monkeypatch):
    """Even if two prefixes have the same hash; here all have."""
    monkeypatch.setattr("thinkstack.engine.block_pool.BlockTokens.block_hash", b"the same for all")
    model, prompt_token_ids, samplings = tiny_model(**LONG), [prompt(150, seed) for seed in range(4)], how(4)
    assert sampled(Engine(model, SMALL).generate(prompt_token_ids, samplings)) == alone(
        model, prompt_token_ids, samplings
    )


@pytest.mark.parametrize("running", ["drain", "abort", "keep"])
def test_weights_change_under_running_requests_as_requested(running):
    old, new = tiny_model(**LONG), tiny_model(seed=1, **LONG)
    prompt_token_ids, samplings = [prompt(80), prompt(30, 1)], how(2, max_tokens=40, temperature=0.0)
    engine = Engine(old, SMALL)
    requests = [engine.submit(one, sampling) for one, sampling in zip(prompt_token_ids, samplings, strict=True)]
    for _ in range(10):
        engine.step()
    begun = [engine.output_token_ids(request) for request in requests]
    assert [len(tokens) for tokens in begun] == [10, 10]
    engine.load_weights(new, version=1, running=running)
    while not all(request.is_finished for request in requests):
        engine.step()
    found = [request.completions[0] for request in requests]
    if running == "drain":
        assert sampled([[c] for c in found]) == alone(old, prompt_token_ids, samplings)
    elif running == "abort":
        assert [(c.token_ids, c.finish_reason) for c in found] == [(tokens, "abort") for tokens in begun]
    else:
        rest = [one + list(tokens) for one, tokens in zip(prompt_token_ids, begun, strict=True)]
        expected = alone(new, rest, [replace(s, max_tokens=30) for s in samplings])
        assert [c.token_ids[10:] for c in found] == [group[0].token_ids for group in expected]
    assert {c.weights_version for c in found} == {0}
    engine.scheduler.check_invariants()


def test_a_sleeping_engine_resumes():
    model, prompt_token_ids, samplings = tiny_model(**LONG), [prompt(80)], how(1)
    engine = Engine(model, SMALL)
    request = engine.submit(prompt_token_ids[0], samplings[0])
    engine.step()
    engine.sleep()
    while not request.is_finished:
        engine.step()
    assert sampled([request.completions]) == alone(model, prompt_token_ids, samplings)


def test_a_pass_that_fails_leaves_nothing_half_computed(monkeypatch):
    """Blocks are registered before they are computed; after a failure no request may find them."""
    model, prompt_token_ids, samplings = tiny_model(**LONG), [prompt(150)] * 3, how(3)
    engine = Engine(model, SMALL)
    requests = [engine.submit(one, sampling) for one, sampling in zip(prompt_token_ids, samplings, strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.scheduler.check_invariants()
    while not all(request.is_finished for request in requests):
        engine.step()
    assert sampled([request.completions for request in requests]) == alone(model, prompt_token_ids, samplings)


def test_completions_whose_logits_are_not_finite_end_with_an_error():
    """Other requests continue, the caller gets an error, and health() reports it."""
    model = tiny_model(**LONG)
    with torch.no_grad():
        model.embed.weight[7] = torch.nan
    engine = Engine(model, SMALL)
    bad, good = engine.submit([1, 7], SamplingParams(max_tokens=5)), engine.submit([1, 2], SamplingParams(max_tokens=5))
    engine.step()
    assert bad.completions[0].finish_reason == "error"
    health = engine.health()
    assert "not finite" in bad.error and health.last_error == bad.error
    assert (health.alive, health.running, health.failed) == (True, 1, 1)
    assert not good.is_finished
    with pytest.raises(RequestError, match="not finite"):
        engine.generate([[7]], [SamplingParams(max_tokens=2)])
    engine.scheduler.check_invariants()


def test_first_come_first_served_but_for_priority():
    engine = Engine(tiny_model(**LONG), replace(SMALL, max_num_seqs=1))
    requests = [engine.submit([1, n], SamplingParams(max_tokens=2), priority=p) for n, p in ((1, 0), (2, 0), (3, -1))]
    order: list[int] = []
    while len(order) < 3:
        engine.step()
        order += [r.id for r in requests if r.is_finished and r.id not in order]
    assert order == [2, 0, 1]


def test_a_full_queue_and_a_small_cache_refuse_by_number():
    engine = Engine(tiny_model(**LONG), replace(SMALL, max_waiting=2, cache_tokens=2 * BLOCK_SIZE))
    for _ in range(2):
        engine.submit([1], SamplingParams(max_tokens=1))
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        engine.submit([1], SamplingParams(max_tokens=1))
    with pytest.raises(RequestError, match="the KV cache has 128"):
        engine.submit([1] * 100, SamplingParams(max_tokens=29))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_contexts_of_several_segments_are_batch_invariant(dtype):
    """Few sequences are computed segment by segment, many by one thread each; completions cross the edge of a
    segment."""
    if dtype == "bf16" and not calls.available():
        pytest.skip("torch's own products in bf16 depend on their rows")
    model = tiny_model(FUSED, max_positions=1200)
    prompt_token_ids = [prompt(n, n) for n in (1100, 1020, 1023, *[5] * 9)]
    samplings, settings = how(12, max_tokens=10), EngineConfig(max_num_seqs=12, dtype=dtype)
    together = Engine(model, settings).generate(prompt_token_ids, samplings)
    for one, sampling, found in zip(prompt_token_ids[:3], samplings, together, strict=False):
        [[expected]] = Engine(model, replace(settings, max_prefill_tokens=300)).generate([one], [sampling])
        assert (expected.token_ids, expected.logprobs) == (found[0].token_ids, found[0].logprobs)


@pytest.mark.skipif(not calls.available(), reason="no C++ compiler")
@pytest.mark.parametrize("cfg", [FUSED, GQA_TINY], ids=["whole", "gqa"])
def test_the_number_of_threads_changes_no_bit(cfg):
    """If this holds, an engine may use fewer threads while other work uses the cores."""
    model, prompt_token_ids, samplings = tiny_model(cfg, **LONG), [prompt(n, n) for n in (150, 3, 64, 200)], how(4)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            engine = Engine(model, SMALL)
            assert engine.runner.ignores_threads
            completions = engine.generate(prompt_token_ids, samplings)
            found.append([(one.token_ids, one.logprobs) for group in completions for one in group])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_torchs_own_products_may_depend_on_threads_so_the_engine_leaves_them(monkeypatch):
    monkeypatch.setattr(calls, "available", lambda: False)
    assert not Engine(tiny_model(FUSED, **LONG), SMALL).runner.ignores_threads
