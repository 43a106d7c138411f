"""Public reports about other servers and gateways, replayed here."""

import json

import httpx
import openai
import pytest

from tests.server.live import live
from thinkstack.server.sse import parse_arguments

TOOL = {"type": "function", "function": {"name": "get_sum", "parameters": {"type": "object"}}}
CALL = '<｜tool▁call▁begin｜>get_sum<｜tool▁sep｜>{"a": %d}<｜tool▁call▁end｜>'
CALLS = "".join(CALL % number for number in range(4))


def answer(prompt: str, index: int) -> str:
    """By a word of the question."""
    return f"<｜tool▁calls▁begin｜>{CALLS}<｜tool▁calls▁end｜>" if "the sum" in prompt else "Paris"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


def test_usage_and_cached_tokens_are_in_the_one_chunk_without_choices(server):
    """litellm#36168: the usage of a last chunk with choices was dropped, so cached tokens were billed in full."""
    body = {"model": "deepseek-chat", "messages": [{"role": "user", "content": "Paris " * 300}]}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    whole, found = None, []
    for _ in range(2):
        whole = httpx.post(f"{server.url}/chat/completions", json=body, headers=server.headers).json()
    response = httpx.post(f"{server.url}/chat/completions", json=body | stream, headers=server.headers)
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            found.append(json.loads(line.removeprefix("data: ")))
    with_usage = [chunk for chunk in found if chunk["usage"]]
    assert with_usage == [chunk for chunk in found if not chunk["choices"]] == found[-1:]
    assert found[-1]["usage"] == whole["usage"]
    assert found[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 200


def test_indices_of_calls_count_from_zero_and_every_part_has_its_own(server):
    """agno#8879, PR#8880: the head of the second call came with the index of the first one."""
    client = openai.OpenAI(base_url=server.url, api_key=server.key)
    chunks = client.chat.completions.create(
        model="deepseek-chat", messages=[{"role": "user", "content": "the sum"}], tools=[TOOL], stream=True
    )
    heads, arguments = [], {}
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or ():
            if part.id:
                heads.append((part.index, part.function.name))
            assert part.index == len(heads) - 1
            arguments[part.index] = arguments.get(part.index, "") + part.function.arguments
    assert heads == [(index, "get_sum") for index in range(4)]
    assert [json.loads(text) for text in arguments.values()] == [{"a": index} for index in range(4)]
    assert chunk.choices[0].finish_reason == "tool_calls"


HALF = {"type": "object", "properties": {"x": {"description": "\ud800"}}}
INFINITE = {"type": "object", "properties": {"x": {"default": float("inf")}}}
QUESTION = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("parameters", [HALF, INFINITE], ids=["half a surrogate pair", "infinity"])
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/responses", "/anthropic/v1/messages", "/api/chat"])
def test_an_object_that_is_no_json_is_a_422(server, path, parameters):
    """Half a surrogate pair in a tool's schema reached the tokenizer and was a 500."""
    tool = {"type": "function", "name": "a", "parameters": parameters}
    if path == "/v1/responses":
        body = {"input": "x", "tools": [tool]}
    elif path == "/anthropic/v1/messages":
        body = {"messages": QUESTION, "max_tokens": 9, "tools": [{"name": "a", "input_schema": parameters}]}
    else:
        body = {"messages": QUESTION, "tools": [{"type": "function", "function": tool}]}
    content = json.dumps({"model": "deepseek-chat"} | body).encode()
    headers = server.headers | {"Content-Type": "application/json"}
    response = httpx.post(server.url + path, content=content, headers=headers)
    assert response.status_code == 422 and "surrogate" in response.text


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/responses", "/anthropic/v1/messages", "/api/chat"])
@pytest.mark.parametrize("name", ["a\r\nSet-Cookie: b", "\ud800", "é"])
@pytest.mark.parametrize("value", [1, None])
def test_odd_names_of_fields_break_no_header(server, path, name, value):
    """Names of ignored fields are in a header of the reply."""
    body = {"model": "deepseek-chat", "input": "x", "messages": QUESTION, "max_tokens": 9, name: value}
    del body["input" if path != "/v1/responses" else "messages"]
    if path in ("/v1/responses", "/api/chat"):
        del body["max_tokens"]
    headers = server.headers | {"Content-Type": "application/json"}
    response = httpx.post(server.url + path, content=json.dumps(body).encode(), headers=headers)
    assert response.status_code in ((200, 400) if value is None else (400,)), response.text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": [1, 2', {"a": [1, 2]}),
        ("", {}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('{"a": NaN}', {"INVALID_JSON": '{"a": NaN}'}),
        ('{"a": 1e999}', {"INVALID_JSON": '{"a": 1e999}'}),
        ("x", {"INVALID_JSON": "x"}),
    ],
)
def test_arguments_are_an_object_whatever_the_model_writes(text, found):
    assert parse_arguments(text) == found
