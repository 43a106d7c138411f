"""Ways in which servers answer, and what the completion says."""

import asyncio
import json
from dataclasses import replace

import httpx2
import pytest

from tests.endpoint.fake import (
    KEY,
    FakeServer,
    answer,
    answered,
    ask,
    broken,
    connect,
    delta,
    end,
    error,
    sse,
    streamed,
    usage,
)
from thinkstack.types import Message, Tool, ToolCall


def one(reply, request=None, **settings):
    """The completion of a request that is replied to in this way."""
    server = FakeServer(lambda body, times: reply)
    with connect(server, **settings) as endpoint:
        return endpoint.complete([request or ask()])[0]


def whole(message, reason="stop", **fields):
    """A reply without a stream."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    return httpx2.Response(200, json={"choices": [choice], **fields})


@pytest.mark.parametrize(
    "reply",
    [
        streamed(delta(reasoning_content="so "), delta(reasoning_content="so"), delta(content="Paris"), end()),
        streamed(delta(reasoning="so so"), delta(content="Par"), delta(content="is"), end()),
        streamed(delta(content="<th"), delta(content="ink>so so</think>\n\nPar"), delta(content="is"), end()),
        whole({"content": "Paris", "reasoning_content": "so so"}),
        whole({"content": "<think>so so</think>Paris"}),
    ],
)
def test_thinking_comes_as_a_field_or_as_a_leading_block_streamed_or_whole(reply):
    found = one(reply)
    assert (found.reasoning, found.content, found.finish_reason) == ("so so", "Paris", "stop")


def test_a_content_that_begins_inside_thinking_is_thinking_up_to_the_tag_and_all_of_it_if_cut_off():
    found = one(answer("so so</think>\n\nParis"), opens_thinking=True)
    assert (found.reasoning, found.content) == ("so so", "Paris")
    cut_off = one(streamed(delta(content="so the answer is 3"), end("length")), opens_thinking=True)
    assert (cut_off.reasoning, cut_off.content, cut_off.is_truncated) == ("so the answer is 3", "", True)
    parsed = one(streamed(delta(reasoning="so so"), delta(content="Paris"), end()), opens_thinking=True)
    assert (parsed.reasoning, parsed.content) == ("so so", "Paris")  # the server has a parser after all


def test_usage_has_the_cached_and_the_thinking_tokens():
    details = {"prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details": {"reasoning_tokens": 3}}
    found = one(answer(**details))
    assert (found.prompt_tokens, found.cached_tokens, found.completion_tokens, found.reasoning_tokens) == (10, 8, 5, 3)
    assert not found.is_estimated
    assert one(answer(prompt_cache_hit_tokens=4)).cached_tokens == 4


def test_without_usage_the_tokens_are_estimated_and_marked():
    found = one(streamed(*[delta(content="word ")] * 7, end()))
    assert found.is_estimated and found.completion_tokens == 9  # 35 bytes, four per token
    parts = one(streamed(*[delta(content="a")] * 7, end()))
    assert parts.completion_tokens == 7  # one per part


@pytest.mark.parametrize("value", ["12", 3.5, -1, True, None])
def test_usage_that_is_no_count_is_estimated_and_the_answer_is_kept(value):
    found = one(streamed(delta(content="Paris"), end(), {"usage": {"prompt_tokens": 1, "completion_tokens": value}}))
    assert found.content == "Paris" and found.is_estimated


def test_model_and_fingerprint_are_those_that_the_server_names():
    names = {"model": "small-2026", "system_fingerprint": "fp_1"}
    found = one(streamed(delta(content="Paris") | names, end()))
    assert (found.model, found.system_fingerprint, found.attempts, found.from_cache) == ("small-2026", "fp_1", 1, False)


def test_tool_calls_are_put_together_from_their_parts():
    parts = [
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "add", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"x": 1,'}}]),
        delta(tool_calls=[{"index": 1, "id": "b", "function": {"name": "sum", "arguments": "{}"}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ' "y": 2}'}}]),
    ]
    found = one(streamed(*parts, end("tool_calls")))
    assert found.tool_calls == (
        ToolCall(name="add", arguments='{"x": 1, "y": 2}', id="a"),
        ToolCall(name="sum", arguments="{}", id="b"),
    )
    calls = [{"id": "a", "function": {"name": "add", "arguments": "{}"}}]
    assert one(whole({"content": None, "tool_calls": calls})).tool_calls == (
        ToolCall(name="add", arguments="{}", id="a"),
    )


@pytest.mark.parametrize("text", ["你好 🙂 é", "a\u2028b\u2029c\x85d\x0be", "line\nbreak\r\nand \x1c"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_characters_may_be_cut_anywhere_and_only_line_feeds_end_lines(text, size):
    """U+2028 in an answer ended the line of its chunk, so that every such answer was garbage."""
    chunk = json.dumps(delta(content=text), ensure_ascii=False)
    data = f"data: {chunk}\r\n\r\n".encode() + sse(end(), usage(), "[DONE]")
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    assert one(broken(*parts)).content == text


def test_a_surrogate_pair_may_be_cut_between_chunks():
    data = b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\ndata: {"choices":[{"delta":{"content":"\\ude42"}}]}\n'
    assert one(broken(data, sse(end()))).content == "🙂"


def test_an_answer_is_whole_when_the_connection_breaks_after_its_end():
    found = one(broken(sse(delta(content="Paris"), end()), httpx2.ReadError("reset")), retries=0)
    assert (found.content, found.is_estimated) == ("Paris", True)


def test_a_body_that_the_server_keeps_open_after_the_end_does_not_hold_the_request_up():
    async def body():
        yield sse(delta(content="Paris"), end(), usage(), "[DONE]")
        await asyncio.sleep(500)

    found = one(httpx2.Response(200, content=body()), retries=0)
    assert (found.content, found.completion_tokens, found.seconds) == ("Paris", 5, 2.0)


def test_a_server_without_usage_or_without_streams_is_asked_without_them_and_then_always_so():
    def reply(body, times):
        if "stream_options" in body:
            return error(400, "unknown field stream_options")
        return error(422, "stream: extra inputs are not permitted") if "stream" in body else whole({"content": "Paris"})

    server = FakeServer(reply)
    with connect(server, concurrency=1) as endpoint:
        assert [found.content for found in endpoint.complete([ask("a"), ask("b")])] == ["Paris", "Paris"]
        assert endpoint.spent.retries == 0
    assert [sorted(set(body) & {"stream", "stream_options"}) for body in server.bodies] == [
        ["stream", "stream_options"],
        ["stream"],
        [],
        [],
    ]


def test_the_request_has_what_is_given_and_nothing_else():
    server = FakeServer()
    tool = Tool(name="add", description="Adds.", parameters={"type": "object"})
    call = ToolCall(name="add", arguments="{}", id="a")
    history = (
        Message(role="user", content="one"),
        Message(role="assistant", content="", reasoning="hm", tool_calls=(call,)),
        Message(role="tool", content="3", tool_call_id="a"),
    )
    request = replace(ask(tools=(tool,), temperature=0, top_p=0.9, seed=7, stop=("END",)), messages=history)
    with connect(server, thinking=False, extra_body={"top_k": 5}, max_tokens_field="max_completion_tokens") as endpoint:
        endpoint.complete([request])
    assert server.bodies == [
        {
            "model": "small",
            "messages": [
                {"role": "user", "content": "one"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "3", "tool_call_id": "a"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
                }
            ],
            "temperature": 0,
            "top_p": 0.9,
            "max_completion_tokens": 20,
            "seed": 7,
            "stop": ["END"],
            "thinking": {"type": "disabled"},
            "chat_template_kwargs": {"thinking": False, "enable_thinking": False},
            "top_k": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert server.requests[-1].headers["Authorization"] == f"Bearer {KEY}"
    with connect(bare := FakeServer()) as endpoint:
        endpoint.complete([ask(max_tokens=None)])
    assert set(bare.bodies[0]) == {"model", "messages", "stream", "stream_options"}


def test_the_model_is_the_first_that_the_server_lists():
    server = FakeServer()
    assert answered(connect(server, model=""), [ask()]) == ["Paris"]
    assert server.bodies[0]["model"] == "small"
