"""Log-probabilities of prompts, as vLLM and OpenAI's /completions answer, and servers that do not score prompts."""

import httpx2
import pytest

from tests.endpoint.fake import FakeServer, connect, error
from thinkstack.types import ConfigError, RequestError


def scored(body, times=0):
    """Scores the letters of a text, or token ids: -1, -2, ...; each second one is the most likely one. One token may
    follow."""
    prompt = body["prompt"]
    names = [str(token) for token in prompt] + ["next"] * body["max_tokens"]
    logprobs = [None, *(-float(place) for place in range(1, len(names)))]
    rows = zip(names[1:], logprobs[1:], strict=True)
    top = [None, *({name: value, "other": value + 0.5 - value % 2} for name, value in rows)]
    return completion(names, logprobs, top, len(prompt))


def completion(names, logprobs, top, prompt_tokens=None):
    found = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": [0] * len(names)}
    choice = {"index": 0, "text": "".join(names), "finish_reason": "length", "logprobs": found}
    counts = {} if prompt_tokens is None else {"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1}}
    return httpx2.Response(200, json={"model": "small", "choices": [choice], **counts})


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", ["abcd", [7, 8, 9, 10]])
def test_tokens_of_a_prompt_have_their_logprobs_without_the_token_that_follows(prompt, max_tokens):
    server = FakeServer(scored)
    with connect(server) as endpoint:
        (found,) = endpoint.prompt_logprobs([prompt], max_tokens=max_tokens)
    assert found.tokens == tuple(str(token) for token in prompt)
    assert found.logprobs == (None, -1.0, -2.0, -3.0)
    assert found.is_greedy == (None, True, False, True)
    assert server.bodies == [
        {"model": "small", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 1}
    ]


def test_without_usage_the_last_token_of_a_text_is_the_sampled_one():
    reply = completion(["a", "b", "next"], [None, -1.0, -2.0], [None, {"b": -1.0}, {"next": -2.0}])
    with connect(FakeServer(lambda body, times: reply)) as endpoint:
        assert endpoint.prompt_logprobs(["ab"])[0].tokens == ("a", "b")


def test_prompts_are_retried_cached_and_reported_like_other_requests(tmp_path):
    server, found = FakeServer(lambda body, times: scored(body) if times else error(500)), {}
    prompts = ["abcd", [1, 2, 3], "ab"]
    with connect(server, cache=str(tmp_path)) as endpoint:
        first = endpoint.prompt_logprobs(prompts, on_finish=lambda place, one: found.update({place: one}))
    with connect(server, cache=str(tmp_path)) as endpoint:
        second = endpoint.prompt_logprobs(prompts)
    assert first == [found[place] for place in range(3)] and len(server.bodies) == 6
    assert [one.logprobs for one in first] == [one.logprobs for one in second] and second[0].from_cache


LLAMA = {"content": [{"token": "x", "logprob": -1.0, "top_logprobs": []}]}
WRONG = {
    "the sampled token alone": completion(["next"], [-0.5], [{"next": -0.5}], 4),
    "no logprobs": completion([], [], [], 4),
    "the first token has a value": completion(list("abcd"), [-1.0] * 4, [{"a": -1.0}] * 4, 4),
    "no most likely tokens": completion(list("abcd"), [None, -1.0, -1.0, -1.0], [], 4),
    "null for the most likely": completion(list("abcd"), [None, -1.0, -1.0, -1.0], [None] * 4, 4),
    "llama.cpp": httpx2.Response(200, json={"choices": [{"text": "x", "finish_reason": "length", "logprobs": LLAMA}]}),
    "null": httpx2.Response(200, json={"choices": [{"text": "x", "finish_reason": "length", "logprobs": None}]}),
}


@pytest.mark.parametrize("reply", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("prompt", ["abcd", [7, 8, 9, 10]])
def test_a_server_that_does_not_score_prompts_is_an_error(reply, prompt):
    """llama.cpp's issue 27174: the sampled token's log-probability came for that of the prompt."""
    is_wrong = pytest.raises(ConfigError, match="does not score prompts by echo=true with logprobs")
    with connect(FakeServer(lambda body, times: reply)) as endpoint, is_wrong:
        endpoint.prompt_logprobs([prompt])


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_an_error(prompt):
    with connect(FakeServer()) as endpoint, pytest.raises(RequestError, match="without tokens has no log-prob"):
        endpoint.prompt_logprobs([prompt])


def test_more_tokens_are_an_error():
    with connect(FakeServer()) as endpoint, pytest.raises(RequestError, match="max_tokens=2 must be 0 or 1"):
        endpoint.prompt_logprobs(["ab"], max_tokens=2)
