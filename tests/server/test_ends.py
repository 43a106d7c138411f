"""Each way to end a turn (end token, length, stop string, abort) in each of its states (thinking, content, call)."""

import concurrent.futures
import json

import httpx
import pytest

from tests import HANG_SECONDS
from tests.server.live import live
from tests.server.requests import chunks_of, post, until

CALL = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": "'
OPENINGS = {"thinking": "", "content": "I think.</think>", "call": f"I think.</think>It is {CALL}"}
TOOL = {"name": "add", "description": "", "parameters": {"type": "object"}}
STATES = ("thinking", "content", "call")
ENDS = ("end token", "length", "stop string", "abort")


def answer(prompt: str, index: int) -> str:
    """By the state and the end that the question names."""
    text = prompt.rpartition("<｜User｜>")[2].partition("<｜Assistant｜>")[0]
    state, _, end = text.partition(" ")
    words = {"end token": "Paris ", "length": "the sum " * 200, "stop string": "the France " * 200}
    if state not in OPENINGS:
        return "It is 3."
    return OPENINGS[state] + words.get(end, "the sum " * 4000)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


def ask(server, state, end, **fields):
    """The reply to a request that ends in this state in this way."""
    tokens = {"length": 60, "stop string": 100}.get(end, 6000)
    body = {"model": "deepseek-reasoner", "tools": [{"type": "function", "function": TOOL}], "max_tokens": tokens}
    body |= {"messages": [{"role": "user", "content": f"{state} {end}"}], "stop": ["Fran"]} | fields
    if end != "abort":
        return post(server, **body)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        reply, service = threads.submit(post, server, **body), server.server.models.members["default"].service
        until(lambda: server.server.turns)
        sampled = service.status.num_sampled
        until(lambda: service.status.num_sampled > sampled + 60)
        for turn in list(server.server.turns.values()):
            server.loop.call_soon_threadsafe(turn.abort)
        return reply.result()


def joined(chunks):
    """The message and the finish reasons of the chunks of a stream."""
    message, reasons = {"content": "", "reasoning_content": "", "arguments": ""}, []
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content", "")
            message["reasoning_content"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                message["arguments"] += call["function"]["arguments"]
            reasons.append(choice["finish_reason"])
    return message, reasons


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", STATES)
def test_every_end_in_every_state_is_one_finish_reason_and_no_half_call_is_a_whole_one(server, state, end):
    (choice,) = ask(server, state, end).json()["choices"]
    text = ask(server, state, end, stream=True).text
    streamed, reasons = joined(chunks_of(text))
    is_stopped = end == "end token" or (end, state) == ("stop string", "content")
    expected = "stop" if is_stopped else "insufficient_system_resource" if end == "abort" else "length"
    assert choice["finish_reason"] == expected
    assert reasons == [None] * (len(reasons) - 1) + [expected] and text.endswith("data: [DONE]\n\n")
    message = choice["message"]
    assert bool(message["content"].strip()) == (state != "thinking") or (end, state) == ("stop string", "content")
    assert ("tool_calls" in message) == (state == "call")
    assert "Fran" not in message["content"] and "<｜" not in json.dumps(message, ensure_ascii=False)
    if end != "abort":
        calls = message.get("tool_calls", [{"function": {"arguments": ""}}])
        assert streamed["content"] == message["content"]
        assert streamed["reasoning_content"] == message["reasoning_content"]
        assert streamed["arguments"] == calls[0]["function"]["arguments"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "whole", "cut"),
    [
        ("/v1/responses", {"input": "call end token", "tools": [{"type": "function", **TOOL}]},
         '"status":"incomplete","call_id"', '"type":"function_call","status":"completed"'),
        ("/anthropic/v1/messages", {"max_tokens": 900, "tools": [{"name": "add", "input_schema": {"type": "object"}}]},
         '"stop_reason":"end_turn"', '"tool_use","stop'),
        ("/api/chat", {"tools": [{"type": "function", "function": TOOL}]}, '"done_reason":"stop"', "tool_calls"),
    ],
)  # fmt: skip
def test_a_call_that_the_model_breaks_off_is_whole_in_no_dialect(server, path, body, whole, cut, stream):
    """A call without its end was finish_reason="tool_calls", stop_reason="tool_use" and status="completed"."""
    body = {"model": "deepseek-reasoner", "stream": stream} | body
    if "input" not in body:
        body["messages"] = [{"role": "user", "content": "call end token"}]
    text = httpx.post(server.url + path, json=body, headers=server.headers, timeout=HANG_SECONDS).text
    assert whole in text and cut not in text, text


def test_a_thinking_budget_closes_the_thought_and_is_reported(server, monkeypatch):
    model = server.server.models.get("deepseek-reasoner")
    monkeypatch.setitem(model.config.efforts, "low", 7)
    reply = ask(server, "thinking", "length", reasoning_effort="low").json()
    usage, message = reply["usage"], reply["choices"][0]["message"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 7 + 1  # with the end of the thinking
    assert usage["completion_tokens"] == 60 and message["reasoning_content"] and message["content"]


def test_nothing_is_injected_after_the_result_of_a_tool_when_thinking_is_off(server):
    """</think> replaced the first token: the prompt of V3.1 ends in the result there, and a turn that had not begun to
    think counted as one that had."""
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
    ]
    choice = post(server, model="deepseek-chat", messages=messages).json()["choices"][0]
    assert choice["message"]["content"] == "It is 3." and choice["message"]["reasoning_content"] is None
