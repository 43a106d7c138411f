"""What a step reports: together the steps give the completions, and reading them costs no more for a long one."""

from collections import defaultdict
from dataclasses import replace

import numpy
import pytest
import torch

from tests.engine.requests import LONG, SMALL, alone, how, prompt, sampled
from tests.tiny import tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.outputs import NO_OUTPUT
from thinkstack.engine.sequence_table import SequenceTable
from thinkstack.types import SamplingParams


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_speculative_tokens": 2}, {"cache_tokens": 6 * BLOCK_SIZE, "max_prefill_tokens": 40}],
    ids=["plain", "drafts", "preemption"],
)
def test_the_updates_of_all_steps_are_the_completions(settings):
    model, samplings = tiny_model(**LONG), how(5, stop_token_ids=(3, 4))
    samplings[2] = replace(samplings[2], n=3)
    engine = Engine(model, replace(SMALL, **settings))
    requests = [
        engine.submit(prompt(length, length), sampling)
        for length, sampling in zip((100, 30, 64, 90, 5), samplings, strict=True)
    ]
    found, logprobs, reasons = defaultdict(list), defaultdict(list), {}
    while not all(request.is_finished for request in requests):
        for update in engine.step().updates():
            place = (update.request, update.index)
            assert update.token_ids and place not in reasons
            found[place] += update.token_ids
            logprobs[place] += update.logprobs
            if update.finish_reason is not None:
                reasons[place] = update.finish_reason
    for request in requests:
        for index, completion in enumerate(request.completions):
            place = (request, index)
            assert tuple(found[place]) == completion.token_ids
            assert tuple(logprobs[place]) == completion.logprobs
            assert reasons[place] == completion.finish_reason
    assert set(reasons.values()) == {"stop", "length"}
    assert engine.step() is NO_OUTPUT


def test_a_failed_completion_is_reported_without_a_token():
    model = tiny_model(**LONG)
    with torch.no_grad():
        model.embed.weight[7] = torch.nan
    engine = Engine(model, SMALL)
    bad, good = engine.submit([1, 7], SamplingParams(max_tokens=5)), engine.submit([1, 2], SamplingParams(max_tokens=5))
    updates = {update.request: update for update in engine.step().updates()}
    assert (updates[bad].token_ids, updates[bad].finish_reason) == ((), "error")
    assert (len(updates[good].token_ids), updates[good].finish_reason) == (1, None)
    assert bad.completions[0].token_ids == ()


def test_a_stream_reads_each_token_once(monkeypatch):
    """The whole row was copied at every token."""
    read = []

    def output_ids(self, row):
        class Row(numpy.ndarray):
            def tolist(self):
                read.append(self.size)
                return super().tolist()

        return self.ids[row, self.num_prompt_tokens[row] : self.num_tokens[row]].view(Row)

    monkeypatch.setattr(SequenceTable, "output_ids", output_ids)
    engine = Engine(tiny_model(max_positions=400), SMALL)
    found = list(engine.stream([1, 2], SamplingParams(max_tokens=300)))
    assert len(found) == 300
    assert sum(read) <= 2 * 300, "once by the stream, and once for the completion"


def test_two_streams_of_one_engine_interleave():
    model, samplings = tiny_model(**LONG), how(2, max_tokens=20)
    engine = Engine(model, SMALL)
    streams = [engine.stream(prompt(9, seed), sampling) for seed, sampling in enumerate(samplings)]
    found = list(zip(*streams, strict=True))
    expected = alone(model, [prompt(9, seed) for seed in range(2)], samplings)
    assert list(zip(*found, strict=True)) == [group[0].token_ids for group in expected]


def test_a_step_that_fails_while_sampling_is_repeated(monkeypatch):
    """The tokens were counted as computed and nothing was sampled, so that the sequence never went on."""
    model, samplings = tiny_model(**LONG), how(2, n=2)
    prompts = [prompt(100), prompt(30, 1)]
    engine = Engine(model, EngineConfig(max_num_seqs=8))
    requests = [engine.submit(one, sampling) for one, sampling in zip(prompts, samplings, strict=True)]
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "logits", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        engine.scheduler.check_invariants()
        engine.step()
    while not all(request.is_finished for request in requests):
        engine.step()
    assert sampled([request.completions for request in requests]) == alone(model, prompts, samplings)
