"""POST /completions and /beta/completions over real sockets: plain text, fill in the middle, streams, usage, errors."""

import httpx
import openai
import pytest

from tests import HANG_SECONDS
from tests.server.live import TOKENIZER, live
from thinkstack.text.tokenizer import FIM_HOLE

STORY = "  once <think> 你好 🙂 Paris\n\nthe sum"


def answer(prompt: str, index: int) -> str:
    """By the prompt: the middle for a prompt with a hole, else a story."""
    return "return a + b" if "hole" in prompt else STORY


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


@pytest.fixture(params=["", "/beta", "/v1"])
def client(request, server):
    return openai.OpenAI(base_url=server.url + request.param, api_key=server.key, max_retries=0)


def test_a_prompt_is_continued_to_the_letter(client):
    reply = client.completions.create(model="deepseek-chat", prompt="Tell me")
    assert (reply.object, reply.choices[0].text, reply.choices[0].finish_reason) == ("text_completion", STORY, "stop")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_hole_is_filled_in(server, client):
    reply = client.completions.create(model="deepseek-chat", prompt="def add(a, b):", suffix="# end", max_tokens=50)
    assert reply.choices[0].text == "return a + b"


@pytest.mark.parametrize(
    "fields", [{}, {"echo": True}, {"stop": ["Paris"]}, {"n": 2}, {"max_tokens": 9}, {"logprobs": 2}, {"stop": "<th"}]
)
def test_a_stream_is_the_whole_reply(client, fields):
    body = {"model": "deepseek-reasoner", "prompt": "Tell me"} | fields
    whole = client.completions.create(**body)
    *chunks, last = client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks)
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(each.text for each in own) == choice.text
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        if "logprobs" in fields:
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                parts = [part for each in own for part in getattr(each.logprobs, name)]
                assert parts == getattr(choice.logprobs, name)


def test_stop_echo_and_length(client):
    ask = {"model": "deepseek-chat", "prompt": "Tell me"}
    assert client.completions.create(**ask, stop="Paris").choices[0].text == STORY.partition("Paris")[0]
    assert client.completions.create(**ask, echo=True).choices[0].text == "Tell me" + STORY
    assert client.completions.create(**ask, max_tokens=3).choices[0].finish_reason == "length"


def test_logprobs_line_up_with_the_text(client):
    choice = client.completions.create(model="deepseek-chat", prompt="Tell me", logprobs=1).choices[0]
    given = choice.logprobs
    assert len(given.tokens) == len(given.token_logprobs) == len(given.top_logprobs) == len(given.text_offset)
    for token, offset in zip(given.tokens, given.text_offset, strict=True):
        assert "\ufffd" in token or choice.text[offset:].startswith(token)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": 3}, 422, "prompt"),
        ({"logprobs": 21}, 422, "logprobs"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"best_of": 3}, 400, "best_of"),
        ({"stream_options": {}}, 400, "stream_options"),
    ],
)
def test_a_bad_request_names_its_field(server, fields, status, param):
    body = {"model": "deepseek-chat", "prompt": "x"} | fields
    response = httpx.post(f"{server.url}/completions", json=body, headers=server.headers, timeout=HANG_SECONDS)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_suffix_needs_a_vocabulary_with_holes(server, monkeypatch):
    monkeypatch.delitem(TOKENIZER.control, FIM_HOLE)
    body = {"model": "deepseek-chat", "prompt": "x", "suffix": "y"}
    response = httpx.post(f"{server.url}/completions", json=body, headers=server.headers, timeout=HANG_SECONDS)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")
