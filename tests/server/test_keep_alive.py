"""Replies that take long: what clients and proxies see until they come, whole or streamed, and when they fail."""

import contextlib
import itertools
import json
import threading

import anthropic
import httpx
import ollama
import openai
import pytest

from tests import HANG_SECONDS
from tests.server.live import live
from tests.server.requests import QUESTION, until
from thinkstack.server.settings import ServerSettings

BODIES = {
    "/chat/completions": {"messages": QUESTION},
    "/completions": {"prompt": "What is the capital of France?"},
    "/v1/responses": {"input": QUESTION},
    "/anthropic/v1/messages": {"messages": QUESTION, "max_tokens": 100},
    "/api/chat": {"messages": QUESTION},
}
NUMBERS = itertools.count()
GATE = threading.Event()
"""Set: the engine answers."""


def answer(prompt: str, index: int) -> str:
    GATE.wait(HANG_SECONDS)
    return "It is Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = ServerSettings(keep_alive_seconds=0.05)
    with live(tmp_path_factory.mktemp("data"), answer, settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def dead_server(tmp_path_factory):
    """A server that takes an engine for dead soon."""
    settings = ServerSettings(keep_alive_seconds=0.05, max_step_seconds=0.1)
    with live(tmp_path_factory.mktemp("data"), answer, settings=settings) as running:
        yield running


@pytest.fixture(autouse=True)
def closed_gate():
    GATE.clear()
    yield
    GATE.set()


@contextlib.contextmanager
def request(server, path, **fields):
    """A request to the engine that does not answer; each one has a prompt of its own, which no script knows."""
    body = json.loads(json.dumps(BODIES[path]).replace("What is ", f"What is {next(NUMBERS)}? "))
    body |= {"model": "deepseek-chat", "stream": False} | fields
    url = server.url + path
    with httpx.stream("POST", url, json=body, headers=server.headers, timeout=HANG_SECONDS) as reply:
        yield reply


def last_line(reply):
    """The last line, if the earlier ones are blank and there are some."""
    pieces = reply.iter_raw()
    waited = next(pieces) + next(pieces)
    assert waited.strip() == b""
    GATE.set()
    *blank, line = b"".join(pieces).split(b"\n")
    assert not any(blank)
    return json.loads(line)


@pytest.mark.parametrize("path", BODIES)
def test_blank_lines_keep_a_whole_reply_alive(server, path):
    with request(server, path) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"] == "application/json"
        assert "Paris" in json.dumps(last_line(reply))
    until(lambda: not server.server.turns)


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_after_blank_lines_is_an_error_in_the_shape_of_the_dialect(dead_server, path):
    with request(dead_server, path) as reply:
        found = json.loads(reply.read())
    error = found["error"]
    assert reply.status_code == 200 and reply.content.startswith(b"\n")
    assert (error if path == "/api/chat" else error["message"]) == "the engine does not respond"
    assert path == "/api/chat" or error["type"] == "overloaded_error"
    assert ("request_id" in found) == path.startswith("/anthropic")


def test_the_official_clients_read_replies_after_blank_lines(server):
    def question():
        return [{"role": "user", "content": f"Where is {next(NUMBERS)}?"}]

    first = openai.OpenAI(base_url=server.url, api_key=server.key)
    second = anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key=server.key)
    third = ollama.Client(host=server.url, headers=server.headers)
    calls = [
        lambda: first.chat.completions.create(model="deepseek-chat", messages=question()).choices[0].message.content,
        lambda: first.responses.create(model="deepseek-chat", input=question()).output_text,
        lambda: second.messages.create(model="deepseek-chat", messages=question(), max_tokens=9).content[-1].text,
        lambda: third.chat("deepseek-chat", messages=question()).message.content,
    ]
    for call in calls:
        GATE.clear()
        threading.Timer(0.2, GATE.set).start()
        assert call() == "It is Paris."


@pytest.mark.parametrize("path", BODIES)
def test_streams_are_neither_cached_nor_held_back_by_proxies(server, path):
    GATE.set()
    with request(server, path, stream=True) as reply:
        assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-accel-buffering"] == "no"
        reply.read()


def test_a_client_that_leaves_between_blank_lines_frees_its_blocks(server):
    service = server.server.models.members["default"].service
    with request(server, "/chat/completions") as reply:
        next(reply.iter_raw())
    until(lambda: not server.server.turns)
    GATE.set()
    until(lambda: service.status.running == 0 and service.status.free_blocks == service.status.num_blocks)
