"""Failures after the start, in the shape of each dialect: an engine that dies, and replies that nobody waits for."""

import json

import httpx
import pytest

from tests import HANG_SECONDS
from tests.server.live import live
from tests.server.requests import until

PROMPT = [{"role": "user", "content": "endless"}]
DIALECTS = {
    "/completions": {"prompt": "endless", "max_tokens": 6000},
    "/v1/responses": {"input": "endless", "max_output_tokens": 6000},
    "/anthropic/v1/messages": {"messages": PROMPT, "max_tokens": 6000},
    "/api/chat": {"messages": PROMPT, "options": {"num_predict": 6000}},
}
LAST = {
    "/v1/responses": '"type":"response.failed"',
    "/anthropic/v1/messages": '{"type":"error","error":{"type":"overloaded_error"',
    "/api/chat": '{"error":',
    "/completions": "[DONE]",
}
"""What the last line has after the engine has died; completions have finish_reason="insufficient_system_resource"."""


def endless(prompt: str, index: int) -> str:
    return "the sum " * 4000


@pytest.mark.parametrize("path", DIALECTS)
def test_an_engine_that_dies_ends_the_stream_with_an_error(tmp_path, path):
    with live(tmp_path, endless) as server:
        service = server.server.models.members["default"].service
        body = {"model": "deepseek-flash", "stream": True} | DIALECTS[path]
        with httpx.stream("POST", server.url + path, json=body, headers=server.headers, timeout=HANG_SECONDS) as reply:
            until(lambda: service.status.num_sampled > 5)

            def fails(*_):
                raise ValueError("broken")

            server.engine.scheduler.schedule = fails
            lines = [line for line in reply.iter_lines() if line]
        assert LAST[path] in lines[-1]
        assert path != "/completions" or "insufficient_system_resource" in lines[-2]
        until(lambda: not server.server.turns)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", DIALECTS)
def test_a_client_that_leaves_frees_its_blocks(tmp_path, path, stream):
    with live(tmp_path, endless) as server:
        service = server.server.models.members["default"].service
        body = json.dumps({"model": "deepseek-flash", "stream": stream} | DIALECTS[path])
        headers = server.headers | {"Content-Type": "application/json"}
        with httpx.Client(timeout=0.3) as client, pytest.raises(httpx.TimeoutException):
            if stream:
                with client.stream("POST", server.url + path, content=body, headers=headers):
                    until(lambda: service.status.running)
                raise httpx.TimeoutException("left")
            client.post(server.url + path, content=body, headers=headers)
        until(lambda: service.status.running == 0 and service.status.free_blocks == service.status.num_blocks)
        until(lambda: not server.server.turns)
        until(lambda: server.server.accounts.usage("user"))
        (row,) = server.server.accounts.usage("user")
        assert row.usage.completion_tokens < 6000
