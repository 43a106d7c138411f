"""POST /chat/completions over real sockets: replies, streams, usage, refusals, overload, disconnects, shutdown."""

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import ClientDisconnect

from tests import HANG_SECONDS
from tests.server.live import TOKENIZER, LiveServer, live
from tests.server.requests import QUESTION, ledger_rows, post, until
from thinkstack.server.app import ServerSettings
from thinkstack.server.deepseek import ChatReply
from thinkstack.server.prices import Usage
from thinkstack.server.schema import ChatRequest

ENDLESS = "the sum " * 4000


def answer(prompt: str, index: int) -> str:
    """By a word of the question."""
    if "endless" in prompt:
        return ENDLESS
    if "emoji" in prompt:
        return "你好 🙂</think>🙂🙂 你好"
    return "Paris, I think.</think>It is Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end in [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def ledger(server: LiveServer) -> Usage:
    rows = server.server.accounts.usage("user")
    return rows[0].usage if rows else Usage()


@pytest.mark.parametrize("model", ["deepseek-reasoner", "deepseek-flash", "scripted"])
def test_an_answer_has_its_thinking_beside_it(client, model):
    reply = client.chat.completions.create(model=model, messages=QUESTION)
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == ("It is Paris.", "Paris, I think.")
    assert message.reasoning == message.reasoning_content and reply.choices[0].finish_reason == "stop"
    assert (reply.object, reply.model) == ("chat.completion", model)


@pytest.mark.parametrize(
    "off",
    [
        {"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}, {"think": False},
        {"chat_template_kwargs": {"thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}},
        {"model": "deepseek-chat"},
    ],
)  # fmt: skip
def test_thinking_can_be_off_by_every_field(tmp_path, off):
    with live(tmp_path, lambda prompt, index: "Paris.") as plain:
        message = post(plain, **({"model": "deepseek-flash"} | off)).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Paris.", "reasoning_content": None, "reasoning": None}


@pytest.mark.parametrize("interval", [0.0, 100.0])
def test_tokens_of_a_stream_come_together_within_its_interval(tmp_path, interval):
    text = "the sum is 3, " * 40
    settings = ServerSettings(stream_interval=interval)
    with live(tmp_path, lambda prompt, index: text, settings=settings) as running:
        chunks = events(post(running, stream=True))
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    texts = [delta["content"] for delta in deltas if delta.get("content")]
    assert "".join(texts) == text and (len(texts) <= 2) == (interval > 0)


@pytest.mark.parametrize("question", ["France", "emoji"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_reply(server, question, n):
    body = {"model": "deepseek-reasoner", "messages": [{"role": "user", "content": question}], "n": n}
    whole = post(server, **body).json()
    response = post(server, **body, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert {(each["id"], each["created"], each["model"], each["object"]) for each in (*chunks, last)} == {
        (last["id"], last["created"], "deepseek-reasoner", "chat.completion.chunk")
    }
    assert last["choices"] == [] and all(each["usage"] is None for each in chunks)
    assert last["usage"] == whole["usage"] | {
        name: last["usage"][name]
        for name in ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "prompt_tokens_details")
    }
    for index in range(n):
        own = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        assert [each["delta"].get("role") for each in own] == ["assistant"] + [None] * (len(own) - 1)
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["stop"]
        message = whole["choices"][index]["message"]
        for name in ("content", "reasoning_content", "reasoning"):
            assert "".join(each["delta"].get(name, "") for each in own) == message[name]


def test_no_chunk_has_half_a_character(server):
    body = {"model": "deepseek-reasoner", "messages": [{"role": "user", "content": "emoji"}], "stream": True}
    assert "\ufffd" not in post(server, **body).text


@pytest.mark.parametrize(
    ("stop", "content", "reasoning"),
    [("Paris", "It is", "Paris, I think."), (["is", "Par"], "It", "Paris, I think."), ("think", "It is Paris.", None)],
)
def test_stop_strings_end_the_content_and_never_the_thinking(server, stop, content, reasoning):
    choice = post(server, model="deepseek-reasoner", stop=stop).json()["choices"][0]
    assert choice["message"]["content"].strip() == content and choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"] == (reasoning or "Paris, I think.")


@pytest.mark.parametrize("max_tokens", [1, 5, 12, 16])
def test_a_cut_reply_is_whole_json_with_one_finish_reason(server, max_tokens):
    reply = post(server, model="deepseek-reasoner", max_tokens=max_tokens).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == max_tokens


def test_usage_adds_up_in_reply_stream_and_ledger(server):
    before, rows = ledger(server), []
    for index in range(4):
        body = {"messages": [{"role": "user", "content": f"{index} " * 200}], "n": 2}
        rows.append(post(server, **body).json()["usage"])
        rows.append(events(post(server, **body, stream=True, stream_options={"include_usage": True}))[-1]["usage"])
    after = ledger(server)
    assert sum(row["completion_tokens"] for row in rows) == after.completion_tokens - before.completion_tokens
    hits = sum(row["prompt_cache_hit_tokens"] for row in rows)
    assert hits == after.prompt_cache_hit_tokens - before.prompt_cache_hit_tokens > 0
    misses = sum(row["prompt_cache_miss_tokens"] for row in rows)
    assert misses == after.prompt_cache_miss_tokens - before.prompt_cache_miss_tokens
    for row in rows:
        assert row["prompt_tokens"] == row["prompt_cache_hit_tokens"] + row["prompt_cache_miss_tokens"]
        assert row["total_tokens"] == row["prompt_tokens"] + row["completion_tokens"]
        assert row["prompt_tokens_details"]["cached_tokens"] == row["prompt_cache_hit_tokens"]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"model": "deepseek-chta"}, 400, "model", "did you mean deepseek-chat"),
        ({"messages": []}, 422, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, 400, "messages", "8,192"),
        ({"max_tokens": 8193}, 400, "max_tokens", "8192"),
        ({"max_tokens": 8190}, 400, "max_tokens", "8,192"),
        ({"max_tokens": 0}, 422, "max_tokens", "greater than or equal to 1"),
        ({"temperature": 3}, 422, "temperature", "2"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs=true"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
        ({"stop": ["a"] * 17}, 422, "stop", "16"),
        ({"stop": ""}, 400, "stop", "empty"),
        ({"n": 17}, 400, "n", "16"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "99999"),
        ({"frames": 3}, 400, "frames", "not supported"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 422, "messages.0.role", "system"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, None, ""),
        ({"tools": [{"type": "function", "function": {}}]}, 422, "tools.0.function.name", "required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 422, "tools.0.function.name", "pattern"),
        ({"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, 400, "thinking", "disagree"),
        ({"user_id": "a b"}, 422, "user_id", "pattern"),
    ],
)
def test_a_bad_request_names_its_field(server, body, status, param, words):
    response = post(server, **body)
    error = response.json()["error"]
    assert (response.status_code, words in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe", b'{"model": "deepseek-chat"', b"null"])
def test_broken_json_is_a_400_or_422_with_words(server, content):
    headers = server.headers | {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/chat/completions", content=content, headers=headers)
    assert response.status_code in (400, 422) and response.json()["error"]["message"]


def test_ignored_fields_are_named(server):
    response = post(server, user="ada", store=True)
    assert response.status_code == 200 and response.headers["x-ignored-fields"] == "store, user"


def test_sampling_fields_that_a_model_name_fixes_are_named(server):
    response = post(server, model="deepseek-reasoner", temperature=0.1, seed=3, user="ada")
    assert response.headers["x-ignored-fields"] == "temperature, user"
    assert "x-ignored-fields" not in post(server, temperature=0.1).headers


def test_both_spellings_of_thinking_are_taken_back(server):
    messages = [*QUESTION, {"role": "assistant", "content": "Paris", "reasoning": "I know", "audio": None}, *QUESTION]
    assert post(server, messages=messages).status_code == 200
    messages[1] = {"role": "assistant", "content": "Paris", "reasoning_content": "I know", "refusal": None}
    assert post(server, messages=messages).status_code == 200


@pytest.mark.parametrize("path", ["/chat/completions", "/models", "/user/balance", "/v1/models", "/beta/models"])
@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer sk-wrong", "Basic abc"])
def test_no_route_without_a_key(server, path, key):
    method = "POST" if "chat" in path else "GET"
    headers = {} if key is None else {"Authorization": key}
    response = httpx.request(method, server.url + path, headers=headers, json={} if method == "POST" else None)
    assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"


def test_a_body_above_the_limit_is_refused_before_it_is_read(server):
    size = ServerSettings().max_body_bytes + 1
    response = httpx.post(f"{server.url}/chat/completions", content=b" " * size, headers=server.headers)
    assert response.status_code == 413 and str(size - 1) in response.json()["error"]["message"]

    def pieces():
        for _ in range(20):
            yield b" " * 2**20

    response = httpx.post(f"{server.url}/chat/completions", content=pieces(), headers=server.headers)
    assert response.status_code == 413


def is_idle(server: LiveServer) -> bool:
    status = next(iter(server.server.models.members.values())).service.status
    return (status.running, status.waiting, status.free_blocks) == (0, 0, status.num_blocks)


ENDLESS_BODY = {"model": "deepseek-reasoner", "messages": [{"role": "user", "content": "endless"}], "max_tokens": 6000}


@contextlib.contextmanager
def endless_request(server: LiveServer, is_stream: bool) -> Iterator[None]:
    """A running request on a connection that is never read from; at the end the client leaves."""
    body = json.dumps(ENDLESS_BODY | {"stream": is_stream}).encode()
    head = f"POST /chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: not is_idle(server))
        yield


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("after", [0.0, 0.05])
def test_a_client_that_leaves_frees_its_blocks_and_is_charged_what_it_got(server, is_stream, after):
    before = ledger(server)
    with endless_request(server, is_stream=is_stream):
        time.sleep(after)
    until(lambda: is_idle(server))
    until(lambda: not server.server.turns)
    assert ledger(server).completion_tokens - before.completion_tokens < 6000


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_reply_that_nobody_begins_to_read_frees_and_settles_its_turn(server, is_stream):
    """A client that leaves before the first chunk: no iterator has begun, so none has an end.

    Its own row is awaited: the turn of the test before may be settled meanwhile, and a count that it passed hung.
    """
    api = server.server

    class Gone:
        """A request whose client has left."""

        state = SimpleNamespace()

        async def receive(self) -> dict[str, str]:
            return {"type": "http.disconnect"}

    async def client_leaves() -> str:
        principal = api.accounts.authenticate(server.key)
        turn = await api.make_turn(principal, ChatRequest(**ENDLESS_BODY).turn())
        with contextlib.suppress(asyncio.CancelledError, OSError):
            response = await api.answer(Gone(), ChatReply(turn, "deepseek-reasoner"), principal, is_stream)

            async def send(message: object) -> None:
                raise OSError("the client has left")

            with contextlib.suppress(ClientDisconnect):
                await response({"type": "http", "asgi": {"spec_version": "2.4"}}, Gone().receive, send)
        assert turn.id not in api.turns and turn.status == "abort"
        return str(turn.id)

    turn_id = asyncio.run_coroutine_threadsafe(client_leaves(), server.loop).result(HANG_SECONDS)
    until(lambda: is_idle(server))
    until(lambda: [row["status"] for row in ledger_rows(server) if row["request_id"] == turn_id] == ["abort"])


def test_a_client_that_stops_reading_does_not_stop_the_others(server):
    with endless_request(server, is_stream=True):
        assert post(server).status_code == 200
    until(lambda: is_idle(server))


def test_a_full_server_refuses_with_a_time_to_come_back(tmp_path):
    settings = ServerSettings(max_wait=0.3, keep_alive_seconds=0.05)
    with live(tmp_path, answer, settings=settings, max_num_seqs=1, max_waiting=1) as server:
        service = server.server.models.members["default"].service
        with concurrent.futures.ThreadPoolExecutor() as threads:
            first = threads.submit(post, server, **ENDLESS_BODY, stream=True)
            until(lambda: service.status.running == 1)
            second = threads.submit(post, server, **ENDLESS_BODY, stream=True)
            until(lambda: service.status.waiting == 1)
            third = post(server)
            assert third.status_code == 503 and int(third.headers["retry-after"]) > 0
            assert third.json()["error"]["type"] == "overloaded_error"
            text = second.result().text
            assert ": keep-alive\n\n" in text and "waited too long" in text and "[DONE]" not in text
            assert first.result().text.endswith("data: [DONE]\n\n")


def test_an_engine_that_dies_ends_streams_with_an_error_and_turns_red(tmp_path):
    with live(tmp_path, answer) as server:
        engine, service = server.engine, server.server.models.members["default"].service
        with concurrent.futures.ThreadPoolExecutor() as threads:
            running = threads.submit(post, server, **ENDLESS_BODY, stream=True)
            until(lambda: service.status.num_sampled > 5)

            def fails(*_: Any) -> None:
                raise ValueError("broken")

            engine.scheduler.schedule = fails  # type: ignore[method-assign]
            text = running.result().text
        assert '"finish_reason":"insufficient_system_resource"' in text
        for _ in range(3):
            post(server)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert post(server).status_code == 503


def test_shutting_down_finishes_what_runs(tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with live(tmp_path, answer) as server:
            service = server.server.models.members["default"].service
            running = threads.submit(post, server, **(ENDLESS_BODY | {"max_tokens": 2000}))
            until(lambda: service.status.num_sampled > 5)
        assert running.result().json()["usage"]["completion_tokens"] == 2000
    assert ledger(server).completion_tokens == 2000


def test_thinking_ends_on_demand(server):
    with httpx.stream(
        "POST", f"{server.url}/chat/completions", json=ENDLESS_BODY | {"stream": True}, headers=server.headers
    ) as response:
        lines = response.iter_lines()
        next(lines)
        name = response.headers["x-request-id"]
        assert httpx.post(f"{server.url}/v1/requests/{name}/answer-now", headers=server.headers).status_code == 200
        text = "\n".join(lines)
    assert '"delta":{"content":"' in text.replace('"delta":{"role":"assistant","content":""}', "")
    other = httpx.post(f"{server.url}/v1/requests/{name}/answer-now", headers=server.headers)
    assert other.status_code == 404


def test_special_tokens_in_text_are_text(server):
    for token in TOKENIZER.control:
        prompt_tokens = post(server, messages=[{"role": "user", "content": f"a {token} b"}]).json()["usage"]
        plain = post(server, messages=[{"role": "user", "content": "a  b"}]).json()["usage"]
        assert prompt_tokens["prompt_tokens"] > plain["prompt_tokens"] + 1, token


def test_many_clients_at_once_get_their_own_answers(tmp_path):
    def echo(prompt: str, index: int) -> str:
        return f"</think>{prompt.rpartition('<｜User｜>')[2].partition('<｜Assistant｜>')[0]}"

    with live(tmp_path, echo) as server, concurrent.futures.ThreadPoolExecutor(32) as threads:

        def ask(number: int) -> bool:
            text = f"What is {number}? "
            found = post(server, model="deepseek-reasoner", messages=[{"role": "user", "content": text}])
            assert found.status_code == 200, found.text
            return found.json()["choices"][0]["message"]["content"].strip() == text.strip()

        assert all(threads.map(ask, range(60)))
        assert threading.active_count() < 200
