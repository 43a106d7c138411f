"""Bad input gets a status, the field and a way out, in the error shape of each dialect, and the others go on."""

import json

import httpx
import pytest

from tests.server.live import live
from tests.server.requests import QUESTION, post

EXPLODING = {"allOf": [{"anyOf": [{"properties": {f"{n}{m}": {}}} for m in range(9)]} for n in range(9)]}
NAMELESS = {"description": "Add", "parameters": {"type": "object"}}
FORMAT = {"type": "json_schema", "schema": EXPLODING}
DIALECTS = {
    "/chat/completions": {"messages": QUESTION},
    "/v1/responses": {"input": "What is the capital of France?"},
    "/anthropic/v1/messages": {"messages": QUESTION, "max_tokens": 9},
    "/api/chat": {"messages": QUESTION},
}
CASES = {
    "unknown model": {path: ({"model": "deepseek-chta"}, 400, "did you mean deepseek-chat") for path in DIALECTS},
    "no text": {
        "/chat/completions": ({"messages": []}, 422, "messages"),
        "/v1/responses": ({"input": []}, 422, "input"),
        "/anthropic/v1/messages": ({"messages": []}, 422, "messages"),
        "/api/chat": ({"messages": []}, 422, "messages"),
    },
    "wrong order of roles": {
        "/chat/completions": ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, 400, "user message"),
        "/v1/responses": ({"input": [{"role": "assistant", "content": "x"}]}, 400, "user message"),
        "/anthropic/v1/messages": (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "a", "input": {}}]}]},
            400, "role='assistant'",
        ),
        "/api/chat": ({"messages": [{"role": "system", "content": "x"}]}, 400, "user message"),
    },
    "a tool without a name": {
        "/chat/completions": ({"tools": [{"type": "function", "function": NAMELESS}]}, 422, "tools.0.function.name"),
        "/v1/responses": ({"tools": [{"type": "function"} | NAMELESS]}, 422, "tools.0.name"),
        "/anthropic/v1/messages": ({"tools": [{"input_schema": {}}]}, 422, "tools.0.name"),
        "/api/chat": ({"tools": [{"type": "function", "function": NAMELESS}]}, 422, "tools.0.function.name"),
    },
    "a schema that explodes": {
        "/chat/completions": (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": EXPLODING}}},
            400, "simplify the schema",
        ),
        "/v1/responses": ({"text": {"format": FORMAT}}, 400, "simplify the schema"),
        "/anthropic/v1/messages": ({"output_config": {"format": FORMAT}}, 400, "simplify the schema"),
        "/api/chat": ({"format": EXPLODING}, 400, "simplify the schema"),
    },
    "broken JSON": {path: ('{"model": "deepseek-chat", ', 400, "not JSON") for path in DIALECTS},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), lambda prompt, index: "Paris.") as running:
        yield running


def message(path, body):
    """The message of an error, whose shape is that of the dialect."""
    if path == "/api/chat":
        assert set(body) == {"error"}
        return body["error"]
    if path.startswith("/anthropic"):
        assert set(body) == {"type", "error", "request_id"} and body["error"]["type"] == "invalid_request_error"
        return body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["message"]


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_the_shape_of_each_dialect(server, case, path):
    fields, status, words = CASES[case][path]
    content = fields if isinstance(fields, str) else json.dumps({"model": "deepseek-chat"} | DIALECTS[path] | fields)
    headers = server.headers | {"Content-Type": "application/json"}
    response = httpx.post(server.url + path, content=content.encode(), headers=headers)
    assert (response.status_code, words in message(path, response.json())) == (status, True), response.text
    assert post(server).status_code == 200


def test_a_result_without_a_call_is_refused(server):
    messages = [{"role": "user", "content": "What?"}, {"role": "tool", "content": "3", "tool_call_id": "a"}]
    response = post(server, model="deepseek-chat", messages=messages)
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
    assert "message 1 has the role 'tool'" in response.json()["error"]["message"]


def test_an_unknown_route_is_named(server):
    for method, path in (("POST", "/v1/embeddings"), ("GET", "/chat/completions")):
        response = httpx.request(method, f"{server.url}{path}", headers=server.headers)
        assert response.status_code in (404, 405) and f"{method} {path}" in response.json()["error"]["message"]
