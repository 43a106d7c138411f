"""POST /v1/responses over real sockets with the openai client: items, streams, tools, schemas, errors."""

import json
import time

import httpx
import openai
import pytest

from tests import HANG_SECONDS
from tests.server.live import live
from thinkstack.server.app import ServerSettings

QUESTION = "What is the capital of France?"
TOOL = {"type": "function", "name": "get_sum", "description": "Add", "parameters": {"type": "object"}, "strict": False}
CALL = '<｜tool▁call▁begin｜>get_sum<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def answer(prompt: str, index: int) -> str:
    """By a word of the question."""
    if "endless" in prompt:
        return "the sum " * 4000
    if "says 3" in prompt:
        return "The sum is 3."
    thinking = "" if prompt.endswith("</think>") else "the tool.</think>"
    if "as JSON" in prompt:
        return f'{thinking}{{"a":1}}'
    if "sum" in prompt:
        words = "" if "call now" in prompt else "I ask."  # a forced call is not introduced
        return f"{thinking}{words}<｜tool▁calls▁begin｜>{CALL * 2}<｜tool▁calls▁end｜>"
    return f"{thinking}It is 你好 🙂 Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)


def ask(client, **fields):
    return client.responses.create(**({"model": "deepseek-flash", "input": QUESTION} | fields))


def test_reasoning_is_an_item_before_the_message(client):
    found = ask(client, instructions="Be short.", max_output_tokens=200)
    reasoning, message = found.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "the tool.", [])
    assert (message.type, found.output_text, message.status) == ("message", "It is 你好 🙂 Paris.", "completed")
    assert (found.status, found.object, found.store, found.error) == ("completed", "response", False, None)
    usage = found.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


def test_thinking_can_be_off(client):
    found = ask(client, reasoning={"effort": "none"})
    assert [item.type for item in found.output] == ["message"]
    assert found.usage.output_tokens_details.reasoning_tokens == 0


def plain(response):
    """The items without their ids."""
    return [item.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for item in response.output]


DELTAS = [f"response.{name}.delta" for name in ("output_text", "reasoning_text", "function_call_arguments")]
CASES = [
    {},
    {"reasoning": {"effort": "low", "summary": "auto"}},
    {"input": "the sum", "tools": [TOOL]},
    {"max_output_tokens": 7},
    {"input": "the sum", "tools": [TOOL], "reasoning": {"effort": "none"}, "max_output_tokens": 14},
    {"input": "as JSON", "text": {"format": {"type": "json_object"}}},
]


@pytest.mark.parametrize("fields", CASES)
def test_a_stream_is_the_whole_response(client, fields):
    whole = ask(client, **fields)
    with client.responses.stream(**({"model": "deepseek-flash", "input": QUESTION} | fields)) as stream:
        events = list(stream)
    last = events[-1].response
    assert events[-1].type == f"response.{whole.status}"
    assert last.output and [item.type for item in last.output] == [item.type for item in whole.output]
    assert last.usage.output_tokens == whole.usage.output_tokens and last.incomplete_details == whole.incomplete_details


@pytest.mark.parametrize("fields", CASES)
def test_events_add_up_to_the_items_of_the_whole_response(client, fields):
    whole, texts, done = ask(client, **fields), {}, []
    for number, event in enumerate(ask(client, **fields, stream=True)):
        assert event.sequence_number == number
        if event.type in DELTAS:
            texts[event.output_index] = texts.get(event.output_index, "") + event.delta
        elif event.type == "response.output_item.done":
            done.append(event.item)
            item = event.item
            text = item.arguments if item.type == "function_call" else item.content[0].text
            assert texts.get(event.output_index, "") == text
    last = event.response
    assert last.status == whole.status and [item.id for item in last.output] == [item.id for item in done]
    assert plain(last) == plain(whole)


def test_a_summary_is_streamed_for_clients_that_show_nothing_else(client):
    """awesome-deepseek-integration#738: Codex shows summaries only."""
    events = list(ask(client, reasoning={"summary": "auto"}, stream=True))
    summary = "".join(event.delta for event in events if event.type == "response.reasoning_summary_text.delta")
    assert summary == "the tool." and events[-1].response.output[0].summary[0].text == summary
    names = [event.type for event in events if "summary_part" in event.type]
    assert names == ["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "get_sum"}])
def test_tools_are_called_and_answered(client, choice):
    text = "the sum" if choice == "auto" else "the sum, call now"
    items = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
    found = ask(client, input=items, tools=[TOOL], tool_choice=choice)
    calls = [item for item in found.output if item.type == "function_call"]
    assert calls[0].name == "get_sum" and isinstance(json.loads(calls[0].arguments), dict)
    items += [item.model_dump(exclude_none=True) for item in found.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "the tool says 3"} for call in calls]
    assert ask(client, input=items, tools=[TOOL]).output_text == "The sum is 3."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("effort", ["none", "high"])
def test_a_schema_holds_for_the_text_and_not_for_the_thinking(client, stream, effort):
    """vllm#44012: with a schema, the thinking followed the schema too, or the schema was dropped."""
    text = {"format": {"type": "json_schema", "name": "reply", "schema": SCHEMA, "strict": True}}
    found = ask(client, input="as JSON", text=text, reasoning={"effort": effort}, stream=stream)
    found = list(found)[-1].response if stream else found
    assert json.loads(found.output[-1].content[0].text) == {"a": 1}
    if effort == "high":
        assert found.output[0].content[0].text == "the tool."


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 422, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 422, None),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 422, None),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"background": True}, 400, "background"),
        ({"tools": [{"type": "web_search"}]}, 422, None),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema"),
        ({"model": "deepseek-flsh"}, 400, "model"),
        ({"max_output_tokens": 0}, 422, "max_output_tokens"),
    ],
)
def test_a_bad_request_names_its_field(server, fields, status, param):
    body = {"model": "deepseek-flash", "input": QUESTION} | fields
    response = httpx.post(f"{server.url}/v1/responses", json=body, headers=server.headers)
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"}), error
    assert param is None or error["param"] == param


def test_what_is_stored_elsewhere_is_ignored_and_named(server):
    body = {"model": "deepseek-flash", "input": QUESTION, "store": True, "include": [], "background": False}
    response = httpx.post(f"{server.url}/v1/responses", json=body, headers=server.headers)
    assert response.status_code == 200 and response.json()["store"] is False
    assert response.headers["x-ignored-fields"] == "include, store"


def test_a_failure_after_the_start_is_the_last_event(tmp_path):
    settings = ServerSettings(max_wait=0.3, keep_alive_seconds=0.05)
    with live(tmp_path, answer, settings=settings, max_num_seqs=1) as server:
        body = {"model": "deepseek-flash", "input": "endless", "max_output_tokens": 6000, "stream": True}
        path, service = f"{server.url}/v1/responses", server.server.models.members["default"].service
        with httpx.stream("POST", path, json=body, headers=server.headers) as running:
            deadline = time.monotonic() + HANG_SECONDS
            while not service.status.running and time.monotonic() < deadline:
                time.sleep(0.005)
            text = httpx.post(path, json=body, headers=server.headers, timeout=HANG_SECONDS).text
            running.close()
    name, data = text.strip().rpartition("\n\n")[2].split("\n")
    last = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed" and last["response"]["error"]["code"] == "overloaded_error"
    assert ": keep-alive\n\n" in text and "[DONE]" not in text and last["sequence_number"] == 2
