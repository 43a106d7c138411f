"""The thread that owns an engine: tokens handed out once, commands between steps, turns, limits, failures."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import HANG_SECONDS
from tests.engine.requests import LONG, SMALL, alone, how, prompt
from tests.tiny import tiny_model
from thinkstack.engine.engine import Engine
from thinkstack.engine.interface import Overloaded
from thinkstack.engine.scripted import ScriptedEngine
from thinkstack.engine.service import EngineService, EngineStopped, Generation
from thinkstack.types import RequestError, SamplingParams

END = 9
FOREVER = SamplingParams(max_tokens=4000)


def endless(prompt: tuple[int, ...], index: int) -> list[int]:
    """Token 1 to 8 by the prompt's first token, for ever."""
    return [prompt[0]] * 5000


def scripted(**settings: Any) -> ScriptedEngine:
    return ScriptedEngine(endless, vocab_size=12, end_id=END, max_model_len=5000, **settings)


def serve(engine: Engine, client: Callable[[EngineService], Coroutine[Any, Any, Any]]) -> Any:
    """Run a client in an event loop against a service, and close the service."""

    async def main() -> Any:
        service = EngineService(engine)
        try:
            return await asyncio.wait_for(client(service), HANG_SECONDS)
        finally:
            await service.close()

    return asyncio.run(main())


async def read(generation: Generation) -> dict[int, tuple[list[int], list[float], str]]:
    """Tokens, log-probabilities and finish reason of each completion."""
    tokens, logprobs, reasons = defaultdict(list), defaultdict(list), {}
    async for updates in generation:
        for update in updates:
            assert update.index not in reasons, "nothing after the end"
            tokens[update.index] += update.token_ids
            logprobs[update.index] += update.logprobs
            if update.finish_reason is not None:
                reasons[update.index] = update.finish_reason
    return {index: (tokens[index], logprobs[index], reason) for index, reason in reasons.items()}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("settings", [{}, {"num_speculative_tokens": 2}], ids=["plain", "drafts"])
def test_the_tokens_are_those_of_the_engine_alone(settings):
    model, prompts, samplings = tiny_model(**LONG), [prompt(n, n) for n in (70, 5, 130, 33)], how(4)
    expected = alone(model, prompts, samplings)

    async def client(service: EngineService) -> list[Any]:
        generations = [await service.submit(*each) for each in zip(prompts, samplings, strict=True)]
        return await asyncio.gather(*map(read, generations))

    found = serve(Engine(model, replace(SMALL, **settings)), client)
    assert [[(tuple(ids), tuple(values))] for ((ids, values, _),) in map(dict.values, found)] == [
        [(each.token_ids, each.logprobs) for each in group] for group in expected
    ]


def test_alternatives_and_counts_arrive_with_the_tokens():
    model, sampling = tiny_model(**LONG), SamplingParams(max_tokens=8, n=2, top_logprobs=3, seed=5)
    [expected] = Engine(model, SMALL).generate([prompt(130)], [sampling])

    async def client(service: EngineService) -> None:
        for cached in (0, 128):
            generation, likely = await service.submit(prompt(130), sampling), defaultdict(list)
            async for updates in generation:
                for update in updates:
                    likely[update.index] += update.top_logprobs
            assert [tuple(likely[index]) for index in range(2)] == [each.top_logprobs for each in expected]
            assert generation.request.num_cached_tokens == cached

    serve(Engine(model, SMALL), client)


def test_an_aborted_request_frees_its_blocks_within_a_step():
    """In every state: queued, in the prompt, decoding, several completions, already finished."""
    engine = scripted(max_num_seqs=4, max_prefill_tokens=64)

    async def client(service: EngineService) -> None:
        blocks = service.status.num_blocks
        for n in (1, 3):
            generations = [await service.submit([1] * 700, replace(FOREVER, n=n)) for _ in range(4)]
            await until(lambda: service.status.num_sampled > 20)
            for generation in generations:
                generation.abort()
            ends = await asyncio.gather(*map(read, generations))
            assert all(reason == "abort" for each in ends for _, _, reason in each.values())
            assert all(len(each) == n for each in ends)
            status = service.status
            assert (status.running, status.waiting, status.free_blocks) == (0, 0, blocks)
        done = await service.submit([1], SamplingParams(max_tokens=3))
        assert (await read(done))[0][2] == "length"
        done.abort()

    serve(engine, client)
    engine.scheduler.check_invariants()


def test_one_completion_ends_while_its_siblings_go_on():
    async def client(service: EngineService) -> None:
        generation = await service.submit([3], SamplingParams(max_tokens=400, n=3))
        first = await anext(generation)
        assert {update.index for update in first} == {0, 1, 2}
        generation.end(1)
        rest = await read(generation)
        assert [rest[index][2] for index in range(3)] == ["length", "stop", "length"]
        assert len(rest[1][0]) < 390 and generation.request.completions[1].finish_reason == "stop"

    serve(scripted(), client)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_a_completion_can_end_while_its_prompt_is_computed(index, num_steps):
    """The others waited for a prompt that nobody computed any more."""
    engine = scripted(max_prefill_tokens=64)
    request = engine.submit([3] * 300, SamplingParams(max_tokens=5, n=3))
    for _ in range(num_steps):
        engine.step()
    engine.end(request, index)
    for _ in range(20):
        engine.step()
    reasons = [completion and completion.finish_reason for completion in request.completions]
    assert reasons == ["stop" if each == index else "length" for each in range(3)]
    engine.scheduler.check_invariants()
    assert engine.scheduler.pool.num_free_blocks == engine.scheduler.pool.num_blocks


def test_a_waiting_completion_can_end_too():
    """Preempted by a request of higher priority."""

    async def client(service: EngineService) -> None:
        generation = await service.submit([3], replace(FOREVER, max_tokens=600))
        await anext(generation)
        urgent = await service.submit([4], replace(FOREVER, max_tokens=600), priority=-1)
        await until(lambda: service.status.waiting == 1)
        generation.end(0)
        assert (await read(generation))[0][2] == "stop"
        assert (await read(urgent))[0][2] == "length"

    serve(scripted(cache_tokens=640), client)


def test_thinking_closes_on_demand():
    sampling = SamplingParams(max_tokens=1000, think_end_token_ids=(5, 6), stop_token_ids=(END,))

    async def client(service: EngineService) -> None:
        generation = await service.submit([3], sampling)
        await anext(generation)
        await generation.end_thinking()
        tokens = (await read(generation))[0][0]
        at = tokens.index(5)
        assert tokens[at : at + 3] == [5, 6, 3] and at < 900 and tokens.count(5) == 1
        with pytest.raises(RequestError, match="think_end_token_ids"):
            await (await service.submit([3], FOREVER)).end_thinking()

    serve(scripted(), client)


def test_tenants_take_turns():
    """Ten requests of one tenant do not delay the only one of another by more than one turn."""

    async def client(service: EngineService) -> list[str]:
        order = []

        async def ask(tenant: str) -> None:
            generation = await service.submit([1], SamplingParams(max_tokens=30), tenant=tenant)
            await read(generation)
            order.append(tenant)

        await asyncio.gather(*(ask("many") for _ in range(10)), ask("one"), ask("one"))
        return order

    order = serve(scripted(max_num_seqs=1), client)
    assert order.index("one") <= 2 and [each for each in order[:5]].count("one") == 2


def test_a_full_queue_and_a_long_wait_are_overload_not_errors_of_the_request():
    async def client(service: EngineService) -> None:
        running = await service.submit([1], FOREVER)
        await anext(running)
        waiting = await service.submit([1], FOREVER, max_wait=0.05)
        with pytest.raises(Overloaded, match="1 requests are waiting"):
            await service.submit([1], FOREVER)
        with pytest.raises(Overloaded, match="waited too long"):
            await read(waiting)
        assert service.status.waiting == 0
        running.abort()

    serve(scripted(max_num_seqs=1, max_waiting=1), client)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (([], FOREVER), "prompt"),
        (([1] * 6000, FOREVER), "prompt"),
        (([1], SamplingParams(max_tokens=6000)), "max_tokens"),
        (([99], FOREVER), "prompt"),
        (([1], SamplingParams(n=99)), "n"),
        (([1], SamplingParams(stop_token_ids=(55,))), "stop_token_ids"),
    ],
)
def test_a_refused_request_names_its_field(given, field):
    async def client(service: EngineService) -> None:
        with pytest.raises(RequestError) as caught:
            await service.submit(*given)
        assert caught.value.field == field

    serve(scripted(), client)


def test_idle_costs_no_processor_time():
    async def client(service: EngineService) -> float:
        await read(await service.submit([1], SamplingParams(max_tokens=3)))
        began = time.process_time()
        await asyncio.sleep(0.5)
        assert service.status.seconds_since_heartbeat == 0
        return time.process_time() - began

    assert serve(scripted(), client) < 0.05


def test_a_failed_step_ends_the_requests_it_ran_and_no_others(caplog):
    engine = scripted(max_num_seqs=1)
    run = engine.runner.run

    def fails(scheduled: Any, table: Any) -> Any:
        if any(table.request_at(row)[0].prompt_token_ids == (7,) for row in scheduled.rows.tolist()):
            raise ValueError("seven")
        return run(scheduled, table)

    engine.runner.run = fails  # type: ignore[method-assign]

    async def client(service: EngineService) -> None:
        bad = await service.submit([7], SamplingParams(max_tokens=3))
        good = await service.submit([1], SamplingParams(max_tokens=3))
        assert (await read(bad))[0][2] == "error" and "ValueError: seven" in bad.request.error
        assert (await read(good))[0][0] == [1, 1, 1]
        for _ in range(2):
            await read(await service.submit([7], SamplingParams(max_tokens=3)))
        last = await service.submit([7], SamplingParams(max_tokens=3))
        with pytest.raises(EngineStopped, match="seven"):
            await read(last)
        assert "seven" in service.status.failure
        with pytest.raises(EngineStopped, match="seven"):
            await service.submit([1], FOREVER)

    serve(engine, client)
    assert caplog.text.count("ValueError: seven") >= 4


def test_weights_change_between_requests_or_after_them():
    models = [tiny_model(**LONG).initialize(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    sampling = SamplingParams(max_tokens=40, seed=1)
    by_version = [Engine(model, SMALL).generate([prompt(9)], [sampling])[0][0].token_ids for model in models]

    async def client(service: EngineService) -> None:
        first = await service.submit(prompt(9), sampling)
        loading = asyncio.create_task(service.load_weights(models[1], 1))
        await asyncio.sleep(0)
        second = await service.submit(prompt(9), sampling)
        found = [tuple((await read(each))[0][0]) for each in (first, second)]
        await loading
        assert found[0] == by_version[0] and found[1] in by_version
        assert tuple((await read(await service.submit(prompt(9), sampling)))[0][0]) == by_version[1]
        running = await service.submit(prompt(9), replace(sampling, max_tokens=300))
        await anext(running)
        await service.load_weights(models[0], 2, "abort")
        assert (await read(running))[0][2] == "abort"

    serve(Engine(models[0], SMALL), client)


def test_closing_finishes_what_runs_and_refuses_the_rest():
    async def main() -> None:
        service = EngineService(scripted(max_num_seqs=1))
        short = await service.submit([1], SamplingParams(max_tokens=200))
        closing = asyncio.create_task(service.close(max_wait=HANG_SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped, match="shutting down"):
            await service.submit([1], FOREVER)
        assert (await read(short))[0][2] == "length"
        await closing
        assert not any(thread.name == "engine" for thread in threading.enumerate())
        service = EngineService(scripted())
        long = await service.submit([1], FOREVER)
        await service.close()
        with pytest.raises(EngineStopped):
            await read(long)

    asyncio.run(asyncio.wait_for(main(), HANG_SECONDS))


def test_a_slow_reader_gets_all_tokens_and_delays_nobody():
    async def client(service: EngineService) -> None:
        slow = await service.submit([2], SamplingParams(max_tokens=500))
        assert (await read(await service.submit([1], SamplingParams(max_tokens=600))))[0][0] == [1] * 600
        updates = await anext(slow)
        assert sum(len(update.token_ids) for update in updates) == 500 and updates[-1].finish_reason == "length"

    serve(scripted(), client)


def test_random_commands_leave_no_block_behind():
    engine = scripted(max_num_seqs=6, cache_tokens=1600, max_prefill_tokens=100)

    async def client(service: EngineService) -> None:
        generator = torch.Generator().manual_seed(0)

        def pick(top: int) -> int:
            return int(torch.randint(top, (1,), generator=generator))

        async def one() -> None:
            sampling = SamplingParams(max_tokens=1 + pick(120), n=1 + pick(3), think_end_token_ids=(5,))
            generation = await service.submit([1 + pick(4)] * (1 + pick(300)), sampling, priority=pick(3))
            for _ in range(pick(4)):
                await anext(generation, None)
            if (action := pick(4)) == 0:
                generation.abort()
            elif action == 1:
                generation.end(pick(sampling.n))
            elif action == 2:
                await generation.end_thinking()
            assert len(generation.request.completions) == sampling.n
            async for _ in generation:
                pass
            assert generation.request.is_finished

        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(20)))
        assert service.status.free_blocks == service.status.num_blocks

    serve(engine, client)
    engine.scheduler.check_invariants()


def test_a_reader_in_no_hurry_wakes_for_the_first_token_and_for_the_end():
    async def client(service: EngineService) -> list[int]:
        generation = await service.submit([1], SamplingParams(max_tokens=100))
        generation.min_seconds = 100.0
        return [sum(len(update.token_ids) for update in updates) async for updates in generation]

    sizes = serve(scripted(), client)
    assert sum(sizes) == 100 and len(sizes) <= 2


def test_the_engine_computes_with_the_threads_of_the_thread_that_starts_it():
    """Loading a model leaves torch's default for new threads at 1."""
    found = []

    class Watching(ScriptedEngine):
        def step(self):
            found.append(torch.get_num_threads())
            return super().step()

    def set_to_one():
        torch.set_num_threads(1)

    own = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        other = threading.Thread(target=set_to_one)
        other.start()
        other.join()
        engine = Watching(endless, vocab_size=12, end_id=END)

        async def client(service: EngineService) -> None:
            async for _ in await service.submit([1], SamplingParams(max_tokens=2)):
                pass

        serve(engine, client)
    finally:
        torch.set_num_threads(own)
    assert set(found) == {3}
