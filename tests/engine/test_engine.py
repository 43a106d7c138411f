"""The engine: batch invariance, the trainer's log-probabilities, ends and aborts of requests."""

from dataclasses import replace

import pytest
import torch

from tests.engine.requests import FUSED
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.data import Example, collate, collate_values, pack
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.kernels.cpu import calls
from thinkstack.models.config import named
from thinkstack.models.precision import cast_copy
from thinkstack.models.transformer import Transformer
from thinkstack.train.passes import batch_logprobs
from thinkstack.types import Completion, ConfigError, RequestError, SamplingParams

BOTH = pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
SMALL = EngineConfig(max_num_seqs=16)


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(48, (length,), generator=generator).tolist() for length in lengths]


def samplings(count: int, **given) -> list[SamplingParams]:
    return [SamplingParams(**({"max_tokens": 5 + index % 7 * 4, "seed": index} | given)) for index in range(count)]


def alone(model: Transformer, prompt: list[int], sampling: SamplingParams) -> list[Completion]:
    return Engine(model, SMALL).generate([prompt], [sampling])[0]


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_are_batch_invariant(cfg, temperature):
    """In fp32, exactly; 20 requests with max_num_seqs=16, so rows are also reused."""
    model, prompt_token_ids, how = tiny_model(cfg), prompts(20), samplings(20, temperature=temperature)
    together = Engine(model, SMALL).generate(prompt_token_ids, how)
    for prompt, sampling, found in zip(prompt_token_ids, how, together, strict=True):
        (expected,) = alone(model, prompt, sampling)
        assert found[0].token_ids == expected.token_ids
        assert found[0].logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_completions_of_v3_tiny_are_batch_invariant():
    """The shape of the demo; products of other widths use other kernels."""
    model = Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0))
    prompt_token_ids, how = prompts(12), samplings(12, max_tokens=12)
    together = Engine(model, SMALL).generate(prompt_token_ids, how)
    for prompt, sampling, found in zip(prompt_token_ids, how, together, strict=True):
        assert found[0].token_ids == alone(model, prompt, sampling)[0].token_ids


def test_a_completion_does_not_depend_on_finished_requests():
    model, prompt = tiny_model(), prompts(1)[0]
    sampling = SamplingParams(max_tokens=30, seed=5)
    engine = Engine(model, SMALL)
    engine.generate(prompts(10, seed=3), samplings(10))
    request = engine.submit(prompt, sampling)
    for index, other in enumerate(prompts(25, seed=4)):
        engine.step()
        engine.submit(other, SamplingParams(max_tokens=1 + index % 9, seed=index, temperature=2.0))
    while not request.is_finished:
        engine.step()
    assert request.completions[0].token_ids == alone(model, prompt, sampling)[0].token_ids


def test_completions_of_one_request_equal_those_of_separate_prefills():
    """n completions share the prefill; the k-th one does not depend on n."""
    model, prompt = tiny_model(), prompts(1)[0]
    completions = alone(model, prompt, SamplingParams(max_tokens=12, seed=3, n=6))
    for n in (1, 2, 6):
        assert [c.token_ids for c in alone(model, prompt, SamplingParams(max_tokens=12, seed=3, n=n))] == [
            c.token_ids for c in completions[:n]
        ]
    assert len({c.token_ids for c in completions}) == 6


def test_all_completions_of_a_group_start_from_the_prompts_distribution():
    """2,000 first tokens, from groups of 16, against the model's own softmax (chi-square, 0.1 % level)."""
    model, prompt = tiny_model(), [3, 1, 4, 1, 5]
    probs = model(torch.tensor([prompt]))[0, -1].softmax(-1).detach()
    how = [SamplingParams(max_tokens=1, seed=seed, n=16) for seed in range(125)]
    first = [c.token_ids[0] for group in Engine(model, SMALL).generate([prompt] * 125, how) for c in group]
    counts = torch.bincount(torch.tensor(first), minlength=48).double()
    expected = probs.double() * 2000
    common = expected >= 5
    seen, wanted = (torch.cat((x[common], x[~common].sum()[None])) for x in (counts, expected))
    chi_square = float(((seen - wanted).square() / wanted).sum())
    freedom = int(common.sum())
    assert chi_square < freedom + 3.3 * (2 * freedom) ** 0.5 + 8


@BOTH
def test_greedy_completions_are_the_models_own(cfg):
    """Against the plain forward pass without any cache, one token at a time."""
    model, prompt = tiny_model(cfg), prompts(1)[0]
    ids = list(prompt)
    for _ in range(10):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    (found,) = alone(model, prompt, SamplingParams(temperature=0.0, max_tokens=10))
    assert list(found.token_ids) == ids[len(prompt) :]


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_logprobs_are_the_trainers(cfg, temperature):
    """Absorbed and cached decoding against the packed training pass: within 1e-5 in fp32, at logits of standard
    deviation 1, for a bound on log-probabilities grows with the logits."""
    model, prompt_token_ids = tiny_model(cfg), prompts(10)
    with torch.no_grad():
        model.head.weight /= model(torch.tensor([prompt_token_ids[0]])).std()
    found = Engine(model, SMALL).generate(prompt_token_ids, samplings(10, temperature=temperature, n=2, max_tokens=20))
    samples, logprobs = [], []
    for prompt, group in zip(prompt_token_ids, found, strict=True):
        for completion in group:
            samples.append(Example((*prompt, *completion.token_ids), (0,) * len(prompt) + (1,) * 20))
            logprobs.append([0.0] * (len(prompt) - 1) + list(completion.logprobs))
    rows = pack(samples, 64)
    trainer = batch_logprobs(model, collate(samples, rows, 64), temperature, micro_batch_tokens=128)
    assert float((trainer - collate_values(logprobs, samples, rows, 64)).abs().max()) < 1e-5


def first_greedy(model: Transformer, prompt: list[int]) -> int:
    return alone(model, prompt, SamplingParams(temperature=0.0, max_tokens=1))[0].token_ids[0]


def test_the_end_token_is_returned_with_its_logprob():
    """EOS is an action that is trained, so the engine must not strip it."""
    model, prompt = tiny_model(), prompts(1)[0]
    end = first_greedy(model, prompt)
    (found,) = alone(model, prompt, SamplingParams(temperature=0.0, stop_token_ids=(end,), max_tokens=9))
    assert found.token_ids == (end,)
    assert found.finish_reason == "stop"
    assert len(found.logprobs) == 1


def test_an_end_token_in_the_last_place_is_a_stop_not_a_cut():
    """Truncation is the engine's finish reason, not "no EOS found", and EOS may be the last token allowed."""
    model, prompt = tiny_model(), prompts(1)[0]
    end = first_greedy(model, prompt)
    (found,) = alone(model, prompt, SamplingParams(temperature=0.0, stop_token_ids=(end,), max_tokens=1))
    assert found.finish_reason == "stop"
    (found,) = alone(model, prompt, SamplingParams(temperature=0.0, max_tokens=1))
    assert found.finish_reason == "length"


def test_a_completion_has_at_most_max_tokens():
    for max_tokens in (1, 2, 9):
        (found,) = alone(tiny_model(), [1, 2, 3], SamplingParams(max_tokens=max_tokens))
        assert len(found.token_ids) == len(found.logprobs) == max_tokens
        assert found.finish_reason == "length"


def test_the_context_can_be_filled_to_the_last_token():
    """A prompt is padded to whole tiles, which may exceed the context; it must be served nevertheless."""
    model = tiny_model(max_positions=50)
    (found,) = alone(model, [1] * 49, SamplingParams(max_tokens=1))
    assert len(found.token_ids) == 1
    (found,) = alone(model, [1] * 3, SamplingParams(max_tokens=47))
    assert len(found.token_ids) == 47


def test_seeds_determine_the_samples():
    model, prompt = tiny_model(), [1, 2, 3]
    logprobs = [alone(model, prompt, SamplingParams(max_tokens=20, seed=seed))[0].token_ids for seed in (1, 1, 2)]
    assert logprobs[0] == logprobs[1] != logprobs[2]


def test_the_context_counts_from_the_model_or_the_setting():
    assert Engine(tiny_model(), SMALL).max_model_len == 96
    assert Engine(tiny_model(), EngineConfig(max_model_len=40)).max_model_len == 40
    assert Engine(tiny_model(), EngineConfig(max_model_len=400)).max_model_len == 96


@pytest.mark.parametrize(
    ("prompt", "sampling", "part"),
    [
        ([], SamplingParams(max_tokens=1), "empty"),
        ([1, 48], SamplingParams(max_tokens=1), "prompt contains token id 48"),
        ([1] * 90, SamplingParams(max_tokens=10), "by 4"),
        ([1, -1], SamplingParams(max_tokens=1), "prompt contains token id -1"),
        ([1], SamplingParams(max_tokens=1, logit_bias={48: 1.0}), "logit_bias contains token id 48"),
        ([1], SamplingParams(max_tokens=1, stop_token_ids=(3, 50)), "stop_token_ids contains token id 50"),
        ([1], SamplingParams(max_tokens=1, n=17), "max_num_seqs=16"),
        ([1], SamplingParams(max_tokens=1, stop_token_ids=tuple(range(9))), "at most 8"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(prompt, sampling, part):
    with pytest.raises(RequestError, match=part):
        Engine(tiny_model(), SMALL).submit(prompt, sampling)


def test_a_refused_request_leaves_nothing_behind():
    """The valid prompts of a refused call once stayed queued and blocked the next change of weights."""
    engine = Engine(tiny_model(), SMALL)
    with pytest.raises(RequestError):
        engine.generate([[1, 2], []], samplings(2))
    engine.load_weights(tiny_model(seed=1), version=1)


def test_an_interrupted_call_leaves_nothing_behind():
    engine = Engine(tiny_model(), SMALL)

    def interrupt(place: int, completions: list[Completion]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts(5), [SamplingParams(max_tokens=1 + index) for index in range(5)], interrupt)
    assert not engine.scheduler.running and not engine.scheduler.num_waiting


def test_completions_carry_the_version_that_sampled_them():
    """Whether a completion is stale follows from the completion alone."""
    model = tiny_model()
    engine = Engine(model, SMALL, version=3)
    assert engine.generate([[1]], samplings(1))[0][0].weights_version == 3
    engine.load_weights(model, version=4)
    assert engine.generate([[1]], samplings(1))[0][0].weights_version == 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [MLA_TINY, FUSED], ids=["by operators", "whole"])
def test_new_weights_are_used_at_once(shape, dtype):
    """Copies that are derived from the weights must be rebuilt, or completions would use old weights."""
    model, other = tiny_model(shape), tiny_model(shape, seed=1)
    cfg = replace(SMALL, dtype=dtype)
    how = samplings(1, temperature=0.0, max_tokens=15)
    expected = Engine(other, cfg).generate([[1, 2]], how)
    engine = Engine(model, cfg)
    assert engine.generate([[1, 2]], how) != expected
    model.load_state_dict(other.state_dict())
    engine.load_weights(model, version=0)
    assert engine.generate([[1, 2]], how) == expected


def test_weights_cannot_change_while_a_request_runs():
    engine = Engine(tiny_model(), SMALL)
    engine.submit([1], SamplingParams(max_tokens=5))
    with pytest.raises(RequestError, match="finish or abort"):
        engine.load_weights(tiny_model(), version=1)


def test_aborting_frees_the_slots_and_leaves_the_others_alone():
    model, prompt_token_ids = tiny_model(), prompts(3)
    engine = Engine(model, SMALL)
    how = SamplingParams(max_tokens=20, seed=1)
    first, doomed, last = (
        engine.submit(prompt, replace(how, n=n)) for prompt, n in zip(prompt_token_ids, (1, 14, 1), strict=True)
    )
    for _ in range(3):
        engine.step()
    engine.abort(doomed)
    assert doomed.is_finished
    assert {c.finish_reason for c in doomed.completions} == {"abort"}
    assert {len(c.token_ids) for c in doomed.completions} == {3}
    assert len(engine.scheduler.running) == 2
    while not (first.is_finished and last.is_finished):
        engine.step()
    for request, prompt in ((first, prompt_token_ids[0]), (last, prompt_token_ids[2])):
        assert request.completions[0].token_ids == alone(model, prompt, how)[0].token_ids
    assert not engine.scheduler.running


def test_a_waiting_request_can_be_aborted():
    engine = Engine(tiny_model(), EngineConfig(max_num_seqs=1))
    running, waiting = (engine.submit([1], SamplingParams(max_tokens=5)) for _ in range(2))
    engine.step()
    engine.abort(waiting)
    assert waiting.completions[0].finish_reason == "abort"
    assert waiting.completions[0].token_ids == ()
    assert not running.is_finished and not engine.scheduler.num_waiting


def test_aborting_returns_finished_completions():
    model, prompt = tiny_model(), [1, 2]
    firsts = [c.token_ids[0] for c in alone(model, prompt, SamplingParams(max_tokens=1, n=4))]
    engine = Engine(model, SMALL)
    request = engine.submit(prompt, SamplingParams(max_tokens=30, n=4, stop_token_ids=(firsts[1],)))
    engine.step()
    engine.abort(request)
    reasons = [c.finish_reason for c in request.completions]
    assert reasons[1] == "stop"
    assert "abort" in reasons


def test_a_stream_yields_the_tokens_of_the_completion():
    model, sampling = tiny_model(), SamplingParams(max_tokens=12, seed=4)
    engine = Engine(model, SMALL)
    assert tuple(engine.stream([1, 2], sampling)) == alone(model, [1, 2], sampling)[0].token_ids
    with pytest.raises(RequestError, match="streaming supports one completion"):
        next(engine.stream([1], replace(sampling, n=2)))


def test_leaving_a_stream_frees_its_slot():
    engine = Engine(tiny_model(), SMALL)
    stream = engine.stream([1, 2], SamplingParams(max_tokens=50))
    next(stream)
    assert len(engine.scheduler.running) == 1
    stream.close()
    assert not engine.scheduler.running


def test_long_and_short_prompts_prefill_in_any_grouping():
    model, prompt_token_ids, how = tiny_model(), prompts(8), samplings(8, max_tokens=4)
    expected = Engine(model, SMALL).generate(prompt_token_ids, how)
    for limit in (1, 40):
        found = Engine(model, replace(SMALL, max_prefill_tokens=limit)).generate(prompt_token_ids, how)
        assert [c[0].token_ids for c in found] == [c[0].token_ids for c in expected]


def test_every_prompt_is_reported_once_with_its_completions():
    told: dict[int, list[Completion]] = {}
    found = Engine(tiny_model(), SMALL).generate(prompts(9), samplings(9), told.__setitem__)
    assert [told.pop(place) for place in range(9)] == found and not told


def test_bf16_engine_stays_near_the_fp32_trainer():
    """The bound of a trained model is 2e-3 nats on average; random weights are far less smooth."""
    model, prompt_token_ids = tiny_model(init_std=0.05), prompts(6)
    cfg = replace(SMALL, dtype="bf16")
    found = Engine(model, cfg).generate(prompt_token_ids, samplings(6, max_tokens=10))
    gaps = []
    for prompt, (completion,) in zip(prompt_token_ids, found, strict=True):
        sample = Example((*prompt, *completion.token_ids), (0,) * len(prompt) + (1,) * 10)
        trainer = batch_logprobs(model, collate([sample], [[0]], 64), 1.0, 64)[0, len(prompt) - 1 : sample.width]
        gaps.append((trainer - torch.tensor(completion.logprobs)).abs().mean())
    assert 0 < float(torch.stack(gaps).mean()) < 0.02


@pytest.mark.skipif(not calls.available(), reason="no C++ compiler")
def test_a_small_model_in_bf16_computes_in_fp32_with_rounded_weights_and_context():
    """Its completions are batch-invariant as in fp32, and close to those of a model with these weights."""
    model, how = tiny_model(FUSED), samplings(9)
    engine = Engine(model, replace(SMALL, dtype="bf16"))
    together = engine.generate(prompts(9), how)
    assert (engine.runner.dtype, engine.runner.cache.data.dtype) == (torch.float32, torch.bfloat16)
    rounded = Engine(cast_copy(model, torch.bfloat16).float(), SMALL).generate(prompts(9), how)
    first, expected = ([group[0].logprobs[0] for group in completions] for completions in (together, rounded))
    assert first == pytest.approx(expected, abs=0.02) and first != expected
    assert together == [engine.generate([prompt], [one])[0] for prompt, one in zip(prompts(9), how, strict=True)]
    assert Engine(tiny_model(GQA_TINY), replace(SMALL, dtype="bf16")).runner.dtype == torch.bfloat16


def test_an_engine_without_sequences_is_refused():
    with pytest.raises(ConfigError, match="is too small"):
        EngineConfig(max_num_seqs=0)
