"""Fields of requests: unknown ones, those without effect, and their names in refusals."""

import httpx
import pytest

from tests.server.live import live
from tests.server.requests import post


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), lambda prompt, index: "Paris") as running:
        yield running


@pytest.mark.parametrize(("value", "status"), [(None, 200), (False, 200), (0, 400), (0.0, 400), ("", 400), ([], 400)])
def test_an_unknown_field_is_refused_unless_it_is_null_or_false(server, value, status):
    """0 counted as not given, because it equals False."""
    assert post(server, thinking_token_budget=value).status_code == status


def test_a_known_field_without_effect_is_named_when_it_is_false(server):
    """parallel_tool_calls=false asks for something that it does not get."""
    assert post(server, parallel_tool_calls=False).headers["x-ignored-fields"] == "parallel_tool_calls"


LONG = "Paris " * 9000
CLOSED = {"not": {}}


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("/chat/completions", {"messages": LONG}, "messages", "shorten the prompt or max_tokens by"),
        ("/v1/responses", {"input": LONG}, "input", "shorten the prompt or max_output_tokens by"),
        ("/anthropic/v1/messages", {"messages": LONG}, "messages", "including max_tokens=9;"),
        ("/api/chat", {"messages": LONG}, "messages", "or options.num_predict by"),
        ("/completions", {"prompt": LONG}, "prompt", "shorten the prompt or max_tokens by"),
        ("/v1/responses", {"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens=1000000 is above"),
        ("/api/chat", {"options": {"num_predict": 10**6}}, "num_predict", "options.num_predict=1000000 is above"),
        ("/v1/responses", {"input": [{"role": "assistant", "content": "x"}]}, "input", "user message"),
        ("/v1/responses", {"tools": [CLOSED]}, "tools[0].parameters", "tools[0].parameters cannot"),
        ("/anthropic/v1/messages", {"tools": [CLOSED]}, "tools[0].input_schema", "tools[0].input_schema cannot"),
        ("/chat/completions", {"tools": [CLOSED]}, "tools[0].function.parameters", "tools[0].function.parameters"),
        ("/api/chat", {"format": CLOSED}, "format", "format cannot be compiled"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": CLOSED}}}, "text.format.schema", "not"),
        ("/anthropic/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": CLOSED}}},
         "output_config.format.schema", "output_config.format.schema cannot"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_that_the_dialect_has(server, path, fields, param, words):
    """Responses refused `messages` and `max_tokens`, which its clients had not sent."""
    body = {"messages": "x"} if "responses" not in path and path != "/completions" else {}
    body |= {"/v1/responses": {"input": "x"}, "/anthropic/v1/messages": {"max_tokens": 9}}.get(path, {}) | fields
    if isinstance(body.get("messages"), str):
        body["messages"] = [{"role": "user", "content": body["messages"]}]
    if tools := body.get("tools"):
        function = {"name": "add", "strict": True}
        key = {"/anthropic/v1/messages": "input_schema"}.get(path, "parameters")
        function[key] = tools[0]
        flat = {"/v1/responses": {"type": "function", **function}, "/anthropic/v1/messages": function}
        body["tools"] = [flat.get(path, {"type": "function", "function": function})]
    response = httpx.post(server.url + path, json={"model": "deepseek-chat"} | body, headers=server.headers)
    found = response.json()["error"]
    assert response.status_code == 400
    assert words in (found["message"] if isinstance(found, dict) else found), found
    assert not isinstance(found, dict) or found.get("param", param) == param, found
