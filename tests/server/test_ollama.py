"""POST /api/chat over real sockets with the ollama client: lines, thinking, tools, formats, options, errors."""

import json
import time

import httpx
import ollama
import pytest

from tests import HANG_SECONDS
from tests.server.live import live
from thinkstack.server.app import ServerSettings

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {"type": "function", "function": {"name": "get_sum", "description": "Add", "parameters": {"type": "object"}}}
LINES = "one\x85two\u2028three\u2029four\x0bfive\x1csix"
"""What `str.splitlines` splits, as the ollama client and others that use httpx do."""
CALL = '<｜tool▁call▁begin｜>get_sum<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'


def answer(prompt: str, index: int) -> str:
    """By a word of the question."""
    if "endless" in prompt:
        return "the sum " * 4000
    if "says 3" in prompt:
        return "The sum is 3."
    if "lines" in prompt:
        return f"the\x85tool.</think>{LINES}"
    if "as JSON" in prompt:
        return 'the tool.</think>{"a":1}'
    thinking = "" if prompt.endswith("</think>") else "the tool.</think>"
    if "sum" in prompt:
        return f"{thinking}I ask.<｜tool▁calls▁begin｜>{CALL * 2}<｜tool▁calls▁end｜>"
    return f"{thinking}It is 你好 🙂 Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


@pytest.fixture
def client(server):
    return ollama.Client(host=server.url, headers=server.headers)


def ask(client, **fields):
    return client.chat(**({"model": "deepseek-r1:14b", "messages": QUESTION} | fields))


def test_an_answer_has_its_thinking_and_its_counts(client):
    reply = ask(client)
    assert (reply.message.content, reply.message.thinking) == ("It is 你好 🙂 Paris.", "the tool.")
    assert (reply.done, reply.done_reason, reply.model) == (True, "stop", "deepseek-r1:14b")
    assert reply.prompt_eval_count > 5 and reply.eval_count > 5
    assert reply.total_duration >= reply.prompt_eval_duration + reply.eval_duration > 0


@pytest.mark.parametrize(
    "fields", [{}, {"think": False}, {"think": True}, {"think": "low"}, {"options": {"num_predict": 9}}]
)
def test_a_stream_is_the_whole_reply(client, fields):
    whole = ask(client, **fields)
    *parts, last = ask(client, **fields, stream=True)
    assert not any(part.done for part in parts) and last.done
    for name in ("content", "thinking"):
        assert "".join(getattr(part.message, name) or "" for part in parts) == (getattr(whole.message, name) or "")
    assert (last.done_reason, last.eval_count) == (whole.done_reason, whole.eval_count)
    assert last.prompt_eval_count == whole.prompt_eval_count


def test_replies_are_streams_by_default(server):
    response = httpx.post(
        f"{server.url}/api/chat", json={"model": "deepseek-r1:14b", "messages": QUESTION}, headers=server.headers
    )
    assert response.headers["content-type"] == "application/x-ndjson"
    assert json.loads(response.text.splitlines()[-1])["done"]


def test_characters_that_break_lines_break_no_line_of_a_stream(server, client):
    asked = [{"role": "user", "content": "What lines?"}]
    parts = list(client.chat(model="deepseek-r1:14b", messages=asked, think=True, stream=True))
    assert "".join(part.message.content or "" for part in parts) == LINES
    body = {"model": "deepseek-reasoner", "messages": asked, "stream": True}
    with httpx.stream("POST", f"{server.url}/chat/completions", json=body, headers=server.headers) as reply:
        chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == LINES
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "the\x85tool."


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_with_objects_and_answered(client, stream):
    user = {"role": "user", "content": "the sum"}
    found = ask(client, messages=[user], tools=[TOOL], think=False, stream=stream)
    calls = [call for part in (found if stream else [found]) for call in part.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("get_sum", {"a": 1})] * 2
    history = [user, {"role": "assistant", "content": "I ask.", "tool_calls": calls}]
    history.append({"role": "tool", "tool_name": "get_sum", "content": "the tool says 3"})
    assert ask(client, messages=history, tools=[TOOL]).message.content == "The sum is 3."


@pytest.mark.parametrize("format", ["json", {"type": "object", "properties": {"a": {"type": "integer"}}}])
def test_a_format_is_followed_after_thinking(client, format):
    message = ask(client, messages=[{"role": "user", "content": "as JSON"}], format=format).message
    assert json.loads(message.content) == {"a": 1} and message.thinking == "the tool."


def test_options_reach_the_sampler(server, client):
    assert ask(client, options={"stop": ["Par"]}).message.content.rstrip() == "It is 你好 🙂"
    short = ask(client, options={"num_predict": 3, "seed": 1, "top_k": 5, "repeat_penalty": 1.1, "num_ctx": 4096})
    assert (short.done_reason, short.eval_count) == ("length", 3)
    body = {"model": "deepseek-r1:14b", "messages": QUESTION, "options": {"num_ctx": 4096}, "keep_alive": "5m"}
    response = httpx.post(f"{server.url}/api/chat", json=body, headers=server.headers)
    assert response.headers["x-ignored-fields"] == "keep_alive, options.num_ctx"


def test_models_and_version(server, client):
    assert "deepseek-r1:14b" in [model.model for model in client.list().models]
    assert httpx.get(f"{server.url}/api/version", headers=server.headers).json()["version"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "deepseek-r1:15b"}, 400, "did you mean deepseek-r1:14b"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 422, "images"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 422, "role"),
        ({"options": {"mirostat": 1}}, 400, "options.mirostat"),
        ({"options": {"num_predict": 0}}, 400, "num_predict"),
        ({"options": {"temperature": 3}}, 422, "options.temperature"),
        ({"frames": 3}, 400, "frames"),
    ],
)
def test_errors_have_ollamas_shape(server, fields, status, words):
    body = {"model": "deepseek-r1:14b", "messages": QUESTION} | fields
    response = httpx.post(f"{server.url}/api/chat", json=body, headers=server.headers)
    found = response.json()
    assert (response.status_code, set(found)) == (status, {"error"}) and words in found["error"], found


def test_no_answer_without_a_key(server):
    with pytest.raises(ollama.ResponseError, match="no API key") as raised:
        ask(ollama.Client(host=server.url))
    assert raised.value.status_code == 401


def test_a_server_without_keys_answers_clients_as_they_are(tmp_path, monkeypatch):
    with live(tmp_path, answer) as server:
        monkeypatch.setattr(server.server, "local_principal", server.server.accounts.authenticate(server.key))
        assert ask(ollama.Client(host=server.url)).message.content == "It is 你好 🙂 Paris."


def test_silence_is_filled_and_a_failure_ends_the_stream(tmp_path):
    settings = ServerSettings(max_wait=0.3, keep_alive_seconds=0.05)
    with live(tmp_path, answer, settings=settings, max_num_seqs=1) as server:
        body = {"model": "deepseek-r1:14b", "messages": [{"role": "user", "content": "endless"}]}
        body["options"] = {"num_predict": 6000}
        service = server.server.models.members["default"].service
        with httpx.stream("POST", f"{server.url}/api/chat", json=body, headers=server.headers) as running:
            deadline = time.monotonic() + HANG_SECONDS
            while not service.status.running and time.monotonic() < deadline:
                time.sleep(0.005)
            client, parts = ollama.Client(host=server.url, headers=server.headers), []
            with pytest.raises(ollama.ResponseError, match="waited too long"):
                parts += ask(client, stream=True)
            text = httpx.post(f"{server.url}/api/chat", json=body, headers=server.headers, timeout=HANG_SECONDS).text
            running.close()
    *empty, last = map(json.loads, text.splitlines())
    assert empty and all(part["message"]["content"] == "" for part in empty) and "waited" in last["error"]
