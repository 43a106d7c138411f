"""A member on vLLM servers, through the HTTP API: real sockets, with fake servers that speak vLLM's protocol."""

import contextlib

import httpx
import pytest

from tests import HANG_SECONDS
from tests.server.fake_vllm import BLOCK, FakeVllm, answer, attach
from tests.server.live import TOKENIZER, live
from tests.server.requests import chunks_of, get, post, until

SCHEMA = {"type": "object", "properties": {"capital": {"type": "string"}}, "required": ["capital"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
CALL = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>find<｜tool▁sep｜>{"q": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'


def answer_json(prompt):
    return '{"capital": "Paris"}' if prompt.endswith("</think>") else "Paris, I think.</think>free text"


@pytest.fixture
def api(tmp_path):
    """Start an API server over fake servers."""
    with contextlib.ExitStack() as running:

        def start(*servers, name="api"):
            folder = tmp_path / name
            folder.mkdir()
            return running.enter_context(live(folder, lambda prompt, index: "", member=attach(*servers)))

        yield start


@pytest.fixture
def vllm():
    with FakeVllm(answer) as server:
        yield server


def message(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def streamed(server, **body):
    """Chunks of a stream."""
    return chunks_of(post(server, stream=True, stream_options={"include_usage": True}, **body).text)


def joined(chunks, field):
    return "".join(chunk["choices"][0]["delta"].get(field) or "" for chunk in chunks if chunk.get("choices"))


def test_a_stream_is_the_whole_reply_and_cached_tokens_are_told(api, vllm):
    server = api(vllm)
    first, whole = (post(server, model="deepseek-reasoner").json() for _ in range(2))
    chunks = streamed(server, model="deepseek-reasoner")
    reply = whole["choices"][0]["message"]
    assert (reply["reasoning_content"], reply["content"]) == ("Paris, I think.", "It is Paris.")
    assert (joined(chunks, "reasoning_content"), joined(chunks, "content")) == ("Paris, I think.", "It is Paris.")
    assert chunks[-1]["usage"] == whole["usage"]
    assert first["usage"]["prompt_cache_hit_tokens"] == 0
    hit, prompt = whole["usage"]["prompt_cache_hit_tokens"], whole["usage"]["prompt_tokens"]
    assert 0 < prompt - hit <= BLOCK < hit
    assert whole["usage"]["completion_tokens"] == first["usage"]["completion_tokens"]
    assert len({body["sampling_params"]["seed"] for body in vllm.bodies}) == 3


def test_several_choices_have_their_own_seeds_and_the_prompt_is_computed_once(api, vllm):
    reply = post(api(vllm), n=3).json()
    one = len(TOKENIZER.encode("It is Paris.")) + 1
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["It is Paris."] * 3
    assert reply["usage"]["completion_tokens"] == 3 * one
    assert reply["usage"]["prompt_cache_hit_tokens"] == 0
    assert len({body["sampling_params"]["seed"] for body in vllm.bodies}) == 3
    assert len({(body["cache_salt"], tuple(body["token_ids"])) for body in vllm.bodies}) == 1


def test_a_stop_string_ends_the_stream(api, vllm):
    vllm.holds_after = len(TOKENIZER.encode("It is Par"))
    choice = post(api(vllm), stop=["is"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It ", "stop")
    until(lambda: vllm.aborted == [vllm.bodies[0]["request_id"]])
    until(lambda: "/abort_requests" in vllm.paths)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_aborts_the_request(api, vllm, is_stream):
    server = api(vllm)
    vllm.holds_after = 2
    body = {"model": "deepseek-chat", "messages": [{"role": "user", "content": "?"}], "stream": is_stream, "n": 2}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/chat/completions", json=body, headers=server.headers, timeout=0.5)
    until(lambda: len(vllm.aborted) == 2)
    until(lambda: server.server.models.members["default"].service.status.running == 0)


@pytest.mark.parametrize("failure", ["drop", "status"])
def test_another_server_answers_if_one_fails_before_the_first_token(api, vllm, failure):
    with FakeVllm(answer) as other:
        server = api(vllm, other)
        vllm.refuses_generate = failure
        assert message(post(server))["content"] == "It is Paris."
        assert joined(streamed(server), "content") == "It is Paris."
        assert (len(vllm.bodies), len(other.bodies)) == (0, 2)


def test_a_server_that_dies_in_the_middle_is_an_error_and_others_go_on(api, vllm):
    with FakeVllm(answer) as other:
        server = api(vllm, other)
        vllm.dies_after = other.holds_after = 3
        (dying, going) = (vllm, other) if len(vllm.bodies) <= len(other.bodies) else (other, vllm)
        chunks = streamed(server)
        assert joined(chunks, "content") and "failed in the middle" in chunks[-1]["error"]["message"]
        assert (len(dying.bodies), len(going.bodies)) == (1, 0)
        vllm.dies_after, other.holds_after = 0, None
        assert message(post(server))["content"] == "It is Paris."
        vllm.dies_after = other.dies_after = 3
        response = post(server)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")


def test_tenants_and_users_do_not_share_the_cache(api, vllm):
    server = api(vllm)
    accounts = server.server.accounts
    key = accounts.add_key(accounts.add_user("bob"), "test")
    replies = [
        post(server),
        post(server),
        post(server, key=key),
        post(server, user_id="u1"),
        post(server, user_id="u2"),
    ]
    hits = [reply.json()["usage"]["prompt_cache_hit_tokens"] for reply in replies]
    assert [hit > 0 for hit in hits] == [False, True, False, False, False]
    assert len({body["cache_salt"] for body in vllm.bodies}) == 4


@pytest.mark.parametrize("name", ["deepseek-chat", "deepseek-reasoner"])
def test_a_schema_travels_and_applies_after_the_thinking(api, vllm, name):
    vllm.answer = answer_json
    server = api(vllm)
    reply = message(post(server, model=name, response_format=JSON_SCHEMA))
    assert reply["content"] == '{"capital": "Paris"}'
    assert (reply.get("reasoning_content") or "") == ("Paris, I think." if name == "deepseek-reasoner" else "")
    with_grammar = [body for body in vllm.bodies if "structured_outputs" in body["sampling_params"]]
    assert len(with_grammar) == 1 and len(vllm.bodies) == (2 if name == "deepseek-reasoner" else 1)
    schema = with_grammar[0]["sampling_params"]["structured_outputs"]["json"]
    assert {key: schema[key] for key in SCHEMA} == SCHEMA
    assert with_grammar[0]["reasoning_ended"] is True


def test_usage_of_a_completion_in_two_streams_is_that_of_its_tokens(api, vllm):
    vllm.answer = answer_json
    server = api(vllm)
    usages = [
        post(server, model="deepseek-reasoner", response_format={"type": "json_object"}).json()["usage"]
        for _ in range(2)
    ]
    text = 'Paris, I think.</think>{"capital": "Paris"}'
    tokens = len(TOKENIZER.encode_pieces(TOKENIZER.split_controls(text))) + 1
    assert [usage["completion_tokens"] for usage in usages] == [tokens, tokens]
    assert [usage["prompt_cache_hit_tokens"] > 0 for usage in usages] == [False, True]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_strict_tools_travel_as_a_grammar_that_begins_with_the_call(api, vllm, choice):
    text = "I look. " if choice == "auto" else ""
    vllm.answer = lambda prompt: CALL if prompt.endswith("I look. ") else text + CALL
    function = {
        "name": "find",
        "parameters": {"type": "object", "properties": {"q": {"type": "integer"}}},
        "strict": True,
    }
    tools = [{"type": "function", "function": function}]
    reply = message(post(api(vllm), tools=tools, tool_choice=choice))
    assert reply["tool_calls"][0]["function"] == {"name": "find", "arguments": '{"q": 1}'}
    assert (reply["content"] or "").strip() == text.strip()
    assert "grammar" in vllm.bodies[-1]["sampling_params"]["structured_outputs"]
    assert len(vllm.bodies) == (2 if choice == "auto" else 1)


def test_a_grammar_within_a_content_is_refused(api, vllm):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": '{"capital"', "prefix": True}]
    response = post(api(vllm), messages=messages, response_format=JSON_SCHEMA)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert vllm.bodies == []


def test_thinking_ends_at_its_budget(api, vllm):
    vllm.answer = lambda prompt: "It is Paris." if prompt.endswith("</think>") else "the sum " * 1000
    body = {"model": "deepseek-flash", "reasoning_effort": "low", "max_tokens": 1500}
    reply = post(api(vllm), **body).json()
    assert reply["choices"][0]["message"]["content"] == "It is Paris."
    answer_tokens = len(TOKENIZER.encode("It is Paris.")) + 1
    assert reply["usage"]["completion_tokens"] == 1024 + 1 + answer_tokens


def test_answer_now_closes_the_thinking(api, vllm):
    vllm.answer = lambda prompt: "It is Paris." if prompt.endswith("</think>") else "the sum " * 1000
    vllm.holds_after = 5
    server, url = api(vllm), ""
    body = {"model": "deepseek-reasoner", "messages": [{"role": "user", "content": "?"}], "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/chat/completions", json=body, headers=server.headers, timeout=HANG_SECONDS
    ) as reply:
        url = f"{server.url}/requests/{reply.headers['X-Request-Id']}/answer-now"
        assert httpx.post(url, headers=server.headers).status_code == 200
        vllm.go.set()
        chunks = chunks_of("".join(reply.iter_text()))
    assert joined(chunks, "content") == "It is Paris."
    assert len(vllm.bodies) == 2
    output = vllm.bodies[1]["token_ids"][len(vllm.bodies[0]["token_ids"]) :]
    assert output[-1] == TOKENIZER.control_id("</think>") and len(output) == 5 + 1


def test_two_api_processes_on_one_pool_push_nothing(api, vllm):
    one, two = api(vllm, name="one"), api(vllm, name="two")
    assert message(post(one)) == message(post(two))
    assert {path.split("?")[0] for path in vllm.paths} == {
        "/health", "/v1/models", "/tokenize", "/inference/v1/generate", "/weight_info"
    }  # fmt: skip


def test_new_weights_of_the_servers_are_noticed_and_part_the_cache(api, vllm):
    server = api(vllm)
    key = server.server.accounts.add_key(server.server.accounts.user_id("ada"), "root", scopes=("chat", "admin"))

    def weights():
        return get(server, "/admin/status", key).json()["members"]["default"]["weights"]

    post(server)
    assert weights() == ["default"]
    vllm.weights = "step 7"
    until(lambda: weights() == ["step 7"])
    assert post(server).json()["usage"]["prompt_cache_hit_tokens"] == 0
    response = httpx.post(
        f"{server.url}/admin/weights", json={"model": "other"}, headers={"Authorization": f"Bearer {key}"}
    )
    assert response.status_code == 400 and vllm.address in response.json()["error"]["message"]


def test_log_probabilities_are_those_of_the_server(api, vllm):
    choice = post(api(vllm), logprobs=True, top_logprobs=2).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == len(TOKENIZER.encode("It is Paris."))
    assert {entry["logprob"] for entry in content} == {-0.5}
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
