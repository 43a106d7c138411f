"""POST /anthropic/v1/messages over real sockets with the anthropic client: blocks, streams, tools, counts, errors."""

import json
import time

import anthropic
import httpx
import pytest

from tests import HANG_SECONDS
from tests.server.live import live
from thinkstack.server.app import ServerSettings

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS = [
    {
        "name": "get_sum",
        "description": "Add",
        "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    }
]
CALL = "<｜tool▁call▁begin｜>get_sum<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
CALLS = f"<｜tool▁calls▁begin｜>{CALL.format(arguments=json.dumps({'a': 1}))}{CALL.format(arguments='{}')}"


def answer(prompt: str, index: int) -> str:
    """By a word of the question."""
    if "endless" in prompt:
        return "the sum " * 4000
    if "say it" in prompt:
        return " is Paris."
    if "says 3" in prompt:
        return "The sum is 3."
    thinking = "" if prompt.endswith("</think>") else "the tool.</think>"
    if "sum" in prompt:
        words = "" if "call now" in prompt else "I ask."  # a forced call is not introduced
        return f"{thinking}{words}{CALLS}<｜tool▁calls▁end｜>"
    return f"{thinking}It is 你好 🙂 Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


@pytest.fixture
def client(server):
    return anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key=server.key, max_retries=0)


def ask(client, **fields):
    return client.messages.create(**({"model": "deepseek-flash", "max_tokens": 500, "messages": QUESTION} | fields))


def test_thinking_is_a_block_before_the_text(client):
    message = ask(client)
    assert [(block.type, getattr(block, block.type)) for block in message.content] == [
        ("thinking", "the tool."), ("text", "It is 你好 🙂 Paris.")
    ]  # fmt: skip
    assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "end_turn")
    assert message.content[0].signature and message.id.startswith("msg_")


@pytest.mark.parametrize(
    "off", [{"thinking": {"type": "disabled"}}, {"extra_body": {"output_config": {"effort": "none"}}}]
)
def test_thinking_can_be_off(client, off):
    assert [block.type for block in ask(client, **off).content] == ["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        {"messages": [{"role": "user", "content": "the sum"}], "tools": TOOLS},
        {"max_tokens": 5},
        {"stop_sequences": ["Par"]},
    ],
)
def test_a_stream_is_the_whole_message(client, fields):
    whole = ask(client, **fields)
    with client.messages.stream(
        **({"model": "deepseek-flash", "max_tokens": 500, "messages": QUESTION} | fields)
    ) as stream:
        streamed = stream.get_final_message()
    plain = [
        [block.model_dump(exclude={"id", "signature", "parsed_output", "caller"}) for block in message.content]
        for message in (whole, streamed)
    ]
    assert plain[0] == plain[1]
    assert (whole.stop_reason, whole.stop_sequence) == (streamed.stop_reason, streamed.stop_sequence)
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    for usage in (whole.usage, streamed.usage):
        total = usage.input_tokens + usage.cache_read_input_tokens
        assert total == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_events_have_the_protocols_order(server):
    body = {"model": "deepseek-flash", "max_tokens": 500, "messages": QUESTION, "stream": True}
    response = httpx.post(f"{server.url}/anthropic/v1/messages", json=body, headers={"x-api-key": server.key})
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in blocks]
    bodies = [json.loads(lines[1].removeprefix("data: ")) for lines in blocks]
    assert names == [body["type"] for body in bodies]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    starts = [name for name in names if name in ("content_block_start", "content_block_stop")]
    assert starts == ["content_block_start", "content_block_stop"] * 2
    assert bodies[0]["message"]["content"] == [] and bodies[0]["message"]["stop_reason"] is None


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_sum"}])
def test_tools_are_called_and_answered(client, choice):
    text = "the sum" if choice["type"] == "auto" else "the sum, call now"
    user = {"role": "user", "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]}
    called = ask(client, messages=[user], tools=TOOLS, tool_choice=choice, thinking={"type": "disabled"})
    calls = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use" and calls[0].name == "get_sum"
    if choice["type"] == "auto":
        assert [call.input for call in calls] == [{"a": 1}, {}] and len({call.id for call in calls}) == 2
    result = {
        "type": "tool_result",
        "tool_use_id": calls[0].id,
        "content": [{"type": "text", "text": "the tool says 3"}],
    }
    history = [user, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    assert ask(client, messages=history, tools=TOOLS).content[-1].text == "The sum is 3."


def test_no_tools_with_tool_choice_none(client):
    user = [{"role": "user", "content": "the sum"}]
    counted = [
        client.messages.count_tokens(model="deepseek-flash", messages=user, **fields).input_tokens
        for fields in ({}, {"tools": TOOLS, "tool_choice": {"type": "none"}}, {"tools": TOOLS})
    ]
    assert counted[0] == counted[1] < counted[2]


def test_a_call_that_is_cut_off_has_its_complete_part(client):
    message = ask(client, messages=[{"role": "user", "content": "the sum"}], tools=TOOLS, max_tokens=14)
    assert message.stop_reason == "max_tokens"
    assert all(isinstance(block.input, dict) for block in message.content if block.type == "tool_use")


def test_a_stop_sequence_is_named(client):
    message = ask(client, stop_sequences=["xyz", "Par"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Par")
    assert message.content[-1].text.rstrip() == "It is 你好 🙂"


def test_a_last_message_of_the_assistant_is_continued(client):
    history = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "The capital"}]
    assert [block.text for block in ask(client, messages=history).content] == [" is Paris."]


@pytest.mark.parametrize("fields", [{}, {"system": "Be short."}, {"tools": TOOLS}, {"thinking": {"type": "disabled"}}])
def test_counted_tokens_are_the_billed_ones(client, fields):
    """CLIProxyAPI#679: the count was an estimate."""
    counted = client.messages.count_tokens(model="deepseek-flash", messages=QUESTION, **fields).input_tokens
    for _ in range(2):
        usage = ask(client, **fields).usage
        assert usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens == counted


def test_a_schema_is_followed_after_thinking(tmp_path):
    def text(prompt, index):
        return 'the tool.</think>{"a":1}'

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    with live(tmp_path, text) as server:
        client = anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key=server.key)
        config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
        message = ask(client, extra_body={"output_config": config})
    assert json.loads(message.content[-1].text) == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"messages": []}, 422, "messages"),
        ({"max_tokens": None}, 422, "max_tokens"),
        ({"model": "deepseek-chta", "max_tokens": 5}, 400, "did you mean deepseek-chat"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 422, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, 422, "document"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, 400, "role"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 422, "custom"),
        ({"tool_choice": {"type": "any"}}, 400, "needs tools"),
        ({"stop_sequences": [""]}, 400, "stop_sequences"),
        ({"frames": 3}, 400, "frames"),
    ],
)
def test_errors_have_anthropics_shape(server, fields, status, words):
    body = {"model": "deepseek-flash", "max_tokens": 500, "messages": QUESTION} | fields
    response = httpx.post(f"{server.url}/anthropic/v1/messages", json=body, headers=server.headers)
    found = response.json()
    assert (response.status_code, set(found)) == (status, {"type", "error", "request_id"}), found
    assert found["error"]["type"] == "invalid_request_error" and words in found["error"]["message"], found


def test_the_client_raises_its_own_errors(server):
    client = anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key="sk-wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as raised:
        ask(client)
    assert raised.value.body["error"]["type"] == "authentication_error"


def test_ignored_fields_are_named(server):
    body = {"model": "deepseek-flash", "max_tokens": 500, "messages": QUESTION, "service_tier": "auto", "top_k": 3}
    body |= {"metadata": {"user_id": "user_1"}}
    response = httpx.post(f"{server.url}/anthropic/v1/messages", json=body, headers=server.headers)
    assert (response.status_code, response.headers["x-ignored-fields"]) == (200, "service_tier")


def test_silence_is_filled_with_pings_and_a_failure_is_an_event(tmp_path):
    settings = ServerSettings(max_wait=0.3, keep_alive_seconds=0.05)
    with live(tmp_path, answer, settings=settings, max_num_seqs=1) as server:
        body = {"model": "deepseek-flash", "max_tokens": 6000, "stream": True}
        body["messages"] = [{"role": "user", "content": "endless"}]
        path, service = f"{server.url}/anthropic/v1/messages", server.server.models.members["default"].service
        with httpx.stream("POST", path, json=body, headers=server.headers) as running:
            deadline = time.monotonic() + HANG_SECONDS
            while not service.status.running and time.monotonic() < deadline:
                time.sleep(0.005)
            text = httpx.post(path, json=body, headers=server.headers, timeout=HANG_SECONDS).text
            running.close()
    assert 'event: ping\ndata: {"type":"ping"}' in text
    assert text.endswith("\n\n") and '"type":"overloaded_error"' in text.rpartition("event: error\n")[2]
