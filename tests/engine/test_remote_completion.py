"""The streams of one completion on a server: budgets, tags of several tokens, grammars."""

import asyncio
import json
from dataclasses import dataclass, field, replace

import httpx2
import pytest

from tests.engine.vllm_wire import FILE, STREAMED
from thinkstack.engine.remote_completion import RemoteCompletion
from thinkstack.engine.sequence_table import Request
from thinkstack.engine.vllm import AsyncServer, StreamPart
from thinkstack.types import RequestError, SamplingParams

STOP, OPEN, TRIGGER, CLOSE = 9, 8, 7, (5, 6)


@dataclass
class Grammar:
    """A grammar that is only sent."""

    phase: str = "start"
    trigger: int | None = None
    think_open: int | None = OPEN
    params: dict = field(default_factory=lambda: {"json": {}})

    def __call__(self):
        raise AssertionError("the server compiles it")


def completion(grammar=None, **sampling):
    sampling = {"max_tokens": 10, "stop_token_ids": (STOP,), "think_end_token_ids": CLOSE} | sampling
    return RemoteCompletion(Request(0, (1, 2), SamplingParams(**sampling)), 0, grammar)


def next_body(found):
    """The parameters of the next stream and its prompt."""
    body, _ = found.next_body("model", "salt", "id")
    return body["sampling_params"], body["token_ids"]


def test_without_budget_and_grammar_one_stream_has_everything():
    found = completion()
    params, prompt = next_body(found)
    assert (params["max_tokens"], params["stop_token_ids"], prompt) == (10, [STOP], [1, 2])
    assert found.take([3, *CLOSE, 4, STOP]) == 5
    assert not found.must_restart and found.close_thinking() == ()


def test_a_budget_that_is_used_up_closes_the_thinking_and_the_output_is_sent_again():
    found = completion(thinking_budget=3)
    assert next_body(found)[0]["max_tokens"] == 3
    assert found.take([3, 3, 3]) == 3
    assert found.close_thinking() == CLOSE
    params, prompt = next_body(found)
    assert (params["max_tokens"], prompt) == (5, [1, 2, 3, 3, 3, *CLOSE])
    assert found.close_thinking() == ()


@pytest.mark.parametrize(("reason", "end"), [("length", None), ("stop", "stop"), ("abort", "abort")])
def test_a_stream_that_the_budget_cuts_is_not_the_end(reason, end):
    found = completion(thinking_budget=3)
    next_body(found)
    found.take([3, 3, 3])
    assert found.finish_reason(reason) == end
    found.close_thinking()
    next_body(found)
    found.take([3] * 5)
    assert found.finish_reason(reason) == reason


def test_a_tag_that_has_begun_is_completed():
    found = completion(thinking_budget=3)
    found.take([3, 3, CLOSE[0]])
    assert found.close_thinking() == CLOSE[1:]


def test_thinking_that_ends_in_time_is_not_closed():
    found = completion(thinking_budget=3)
    found.take([3, *CLOSE])
    assert found.close_thinking() == ()
    assert next_body(found)[0]["max_tokens"] == 7


def test_injected_tokens_do_not_exceed_max_tokens():
    found = completion(thinking_budget=3, max_tokens=4)
    found.take([3, 3, 3])
    assert found.close_thinking() == CLOSE[:1]
    assert found.num_left == 0


def test_a_budget_of_zero_during_a_stream_cuts_it():
    found = completion()
    found.take([3, 3])
    found.request.sampling = replace(found.request.sampling, thinking_budget=0)
    assert (found.take([3, 4]), found.must_restart) == (0, True)
    assert found.close_thinking() == CLOSE


def test_a_grammar_begins_after_the_thinking_which_cannot_end_the_turn():
    found = completion(Grammar("thinking"))
    params, _ = next_body(found)
    assert params["logit_bias"] == {str(STOP): -100} and "structured_outputs" not in params
    assert (found.take([3, *CLOSE, 4]), found.must_restart) == (3, True)
    params, prompt = next_body(found)
    assert (params["structured_outputs"], params["logit_bias"], prompt) == ({"json": {}}, None, [1, 2, 3, *CLOSE])
    assert (found.take([4, STOP]), found.must_restart) == (2, False)


def test_a_model_that_may_think_is_asked_for_its_first_token():
    found = completion(Grammar())
    assert "structured_outputs" not in next_body(found)[0]
    assert (found.take([OPEN, 3]), found.must_restart) == (2, False)
    found = completion(Grammar())
    assert (found.take([3, 4]), found.must_restart) == (0, True)
    params, prompt = next_body(found)
    assert ("structured_outputs" in params, prompt) == (True, [1, 2])


def test_a_trigger_is_sampled_again_with_the_grammar():
    found = completion(Grammar("thinking", trigger=TRIGGER))
    found.take([3, TRIGGER, *CLOSE, 4])
    params, _ = next_body(found)
    assert params["stop_token_ids"] == [STOP, TRIGGER]
    assert (found.take([4, TRIGGER]), found.must_restart) == (1, True)
    params, prompt = next_body(found)
    assert ("structured_outputs" in params, prompt[2:]) == (True, [3, TRIGGER, *CLOSE, 4, 4])


def test_a_grammar_in_the_middle_of_a_content_is_refused():
    with pytest.raises(RequestError, match="prefix"):
        completion(Grammar("grammar"))


def test_streams_and_completions_have_different_seeds():
    found = completion(seed=3)
    other = RemoteCompletion(found.request, 1, None)
    assert len({next_body(each)[0]["seed"] for each in (found, found, other, other)}) == 4


def test_a_recorded_stream_of_vllm_is_read():
    (record,) = [each for each in json.loads(FILE.read_text())["processed"] if (each["body"] or {}).get("stream")]
    text = record["reply"] + 'data: {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}\n\n'
    server = AsyncServer("http://server:1", silence_seconds=1.0)
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text=text))
    server._client = httpx2.AsyncClient(base_url="http://server:1", transport=transport)

    async def read():
        return [part async for part in server.stream({}, STREAMED)]

    accepted, *parts = asyncio.run(read())
    assert accepted == StreamPart()
    assert [part.token_ids for part in parts] == [(16,), (17,), (46,), (153,), (121,), (275,)]
    assert parts[0].logprobs == (-1.831434965133667,)
    assert [part.finish_reason for part in parts] == [None] * 5 + ["length"]
    assert (parts[-1].num_cached_tokens, parts[-1].weights) == (2, "NAME")
