"""Scripted models in the real scheduler, and the cost of scheduling."""

import time

import pytest

from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.scripted import ScriptedEngine
from thinkstack.types import SamplingParams

END = 9


def echo(prompt: tuple[int, ...], answer: int) -> list[int]:
    """The prompt, each token one higher."""
    return [token + 1 for token in prompt]


def test_completions_follow_the_script():
    engine = ScriptedEngine(echo, vocab_size=12, end_id=END, max_prefill_tokens=3, max_num_seqs=2)
    prompt_token_ids = [[1, 2, 3, 4, 5], [7], [2, 2]]
    found = engine.generate(
        prompt_token_ids, [SamplingParams(max_tokens=20, stop_token_ids=(END,), seed=s) for s in range(3)]
    )
    assert [group[0].token_ids for group in found] == [(2, 3, 4, 5, 6, END), (8, END), (3, 3, END)]
    assert all(group[0].finish_reason == "stop" and set(group[0].logprobs) == {0.0} for group in found)


def test_a_script_continues_after_preemption():
    engine = ScriptedEngine(echo, vocab_size=12, end_id=END, max_num_seqs=4, cache_tokens=5 * BLOCK_SIZE)
    prompt_token_ids = [[1 + n % 5] * 90 for n in range(4)]
    found = engine.generate(prompt_token_ids, [SamplingParams(max_tokens=100)] * 4)
    assert engine.scheduler.num_preemptions > 0
    assert [group[0].token_ids[:90] for group in found] == [tuple(t + 1 for t in one) for one in prompt_token_ids]


@pytest.mark.slow
def test_ten_thousand_waiting_requests_cost_less_than_a_millisecond_a_step():
    engine = ScriptedEngine(echo, vocab_size=12, end_id=END, max_num_seqs=64)
    requests = [engine.submit([1 + n % 5] * 100, SamplingParams(max_tokens=50), priority=n % 3) for n in range(10_000)]
    for request in requests[5::7]:
        engine.abort(request)
    engine.step()
    seconds = []
    for _ in range(120):
        began = time.perf_counter()
        plan = engine.scheduler.schedule()
        seconds.append(time.perf_counter() - began)
        engine.scheduler.schedule = lambda planned=plan: planned
        engine.step()
        del engine.scheduler.schedule
    assert engine.scheduler.num_waiting > 8_000
    assert sorted(seconds)[len(seconds) // 2] < 1e-3
