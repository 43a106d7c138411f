"""What a stranger may try: control tokens in text, guessed keys, slow and huge requests, other names of this machine,
and the prefixes of other tenants."""

import contextlib
import itertools
import time

import httpx
import pytest
from sqlalchemy import event

from tests import HANG_SECONDS
from tests.server.live import TOKENIZER, live
from tests.server.requests import QUESTION, connect, post
from thinkstack.server.errors import AuthenticationError
from thinkstack.server.settings import ServerSettings


def answer(prompt, index):
    return "Paris, I think.</think>It is Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = ServerSettings(body_seconds=0.3, header_seconds=0.5)
    with live(tmp_path_factory.mktemp("data"), answer, settings=settings) as running:
        yield running


@pytest.fixture
def num_controls(server, monkeypatch):
    """Number of control tokens in the prompt of a request."""
    service, prompts = server.server.models.members["default"].service, []
    submit = service.submit

    async def spy(prompt, *arguments, **named):
        prompts.append(prompt)
        return await submit(prompt, *arguments, **named)

    monkeypatch.setattr(service, "submit", spy)

    def count(path="/chat/completions", **body):
        body = {"model": "deepseek-chat", "max_tokens": 1} | body
        response = httpx.post(server.url + path, json=body, headers=server.headers, timeout=HANG_SECONDS)
        assert response.status_code == 200, response.text
        return sum(token in TOKENIZER.control_of_id for token in prompts.pop())

    return count


def conversation(text):
    """A request with this text in every field that reaches the prompt."""
    call = {"type": "function", "function": {"name": "add", "arguments": f'{{"a": "{text}"}}'}}
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": text, "enum": [text]}}}
    return {
        "messages": [
            {"role": "system", "content": text},
            {"role": "developer", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": "b"}], "name": text},
            {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call | {"id": text}]},
            {"role": "tool", "content": text, "tool_call_id": text},
            {"role": "user", "content": text},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "description": text, "parameters": parameters}}],
    }


def test_no_text_becomes_a_control_token_in_any_field(server, num_controls):
    expected = num_controls(**conversation("plain"))
    for token in TOKENIZER.control:
        for text in (token, f"a{token}b", token * 2):
            assert num_controls(**conversation(text)) == expected, text


def anthropic(text):
    tool = {"name": "add", "description": text, "input_schema": {"type": "object", "description": text}}
    call = {"type": "tool_use", "id": text, "name": "add", "input": {"a": text}}
    blocks = [{"type": "thinking", "thinking": text, "signature": text}, {"type": "text", "text": text}, call]
    result = {"type": "tool_result", "tool_use_id": text, "content": [{"type": "text", "text": text}]}
    messages = [QUESTION[0], {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    return "/anthropic/v1/messages", {"system": text, "messages": messages, "tools": [tool]}


def ollama(text):
    call = {"function": {"name": "add", "arguments": {"a": text}}}
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "thinking": text, "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_name": text},
    ]
    return "/api/chat", {"messages": messages, "stream": False, "max_tokens": None, "options": {"num_predict": 1}}


def responses(text):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": text}]},
        {"type": "function_call", "call_id": text, "name": "add", "arguments": f'{{"a": "{text}"}}'},
        {"type": "function_call_output", "call_id": text, "output": text},
    ]
    return "/responses", {"instructions": text, "input": items, "max_tokens": None, "max_output_tokens": 16}


def completions(text):
    return "/completions", {"prompt": text, "suffix": text}


@pytest.mark.parametrize("dialect", [anthropic, ollama, responses, completions])
def test_no_text_becomes_a_control_token_in_any_dialect(server, num_controls, dialect):
    def count(text):
        path, body = dialect(text)
        return num_controls(path, **body)

    expected = count("plain")
    for token in TOKENIZER.control:
        assert count(f"a{token}b") == expected, token


@pytest.mark.parametrize(("path", "shape"), [("/anthropic/v1/messages", "type"), ("/api/chat", "error")])
def test_refusals_of_limits_have_the_shape_of_the_dialect(server, path, shape):
    size = ServerSettings().max_body_bytes + 1
    response = httpx.post(server.url + path, content=b" " * size, headers=server.headers)
    assert response.status_code == 413
    found = response.json()
    assert found["type"] == "error" if shape == "type" else isinstance(found["error"], str)


def test_no_prefix_becomes_a_control_token(server, num_controls):
    def prefixed(text):
        return {"messages": [*QUESTION, {"role": "assistant", "content": text, "prefix": True}]}

    expected = num_controls(**prefixed("plain"))
    for token in TOKENIZER.control:
        assert num_controls(**prefixed(f"a{token}b")) == expected, token


def test_a_token_that_was_cut_in_two_fields_is_not_put_together(server, num_controls):
    def parts(left, right):
        return {
            "messages": [{"role": "user", "content": [{"type": "text", "text": left}, {"type": "text", "text": right}]}]
        }

    expected = num_controls(**parts("a", "b"))
    for token in TOKENIZER.control:
        assert num_controls(**parts(token[:3], token[3:])) == expected, token


def test_every_wrong_key_takes_the_path_of_the_right_one(server):
    statements = []
    engine = server.server.accounts.database.engine
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    def path(key):
        statements.clear()
        try:
            server.server.accounts.authenticate(key)
        except AuthenticationError as error:
            return str(error), list(statements)
        return None, list(statements)

    path(server.key)  # writes the last use
    _, right = path(server.key)
    wrong = [path(key) for key in ("", "sk-", "sk-wrong", server.key[:-1], server.key[:-1] + "x", "\x00", "ä" * 9000)]
    assert len(right) == 2 and {message for message, _ in wrong} == {wrong[0][0]}
    assert all(found == right for _, found in wrong)


def test_replies_to_wrong_keys_never_contain_the_key(server):
    for key in ("sk-0123456789abcdef", server.key[:-1] + "fe"[server.key[-1] == "f"]):
        response = post(server, key)
        assert response.status_code == 401 and key not in response.text


def test_a_slow_body_is_a_408_and_the_end_of_the_connection(server):
    began = time.monotonic()
    with connect(server) as connection:
        head = f"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
        connection.sendall((head + "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{").encode())
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
    assert reply.startswith(b"HTTP/1.1 408 ") and b"within 0.3 seconds" in reply
    assert time.monotonic() - began >= 0.3
    assert post(server).status_code == 200


@pytest.mark.parametrize("request_number", [1, 2])
def test_slow_headers_are_the_end_of_the_connection(server, request_number):
    """A byte at a time (slowloris), in the first request of a connection and in a later one."""
    with connect(server) as connection:
        if request_number == 2:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in connection.recv(65536)
        began, others = time.monotonic(), 0
        connection.settimeout(0.05)
        with pytest.raises(ConnectionError):
            for byte in itertools.cycle(b"GET /health HTTP/1.1\r\nX: " + b"y" * 1000):
                connection.sendall(bytes([byte]))
                others += post(server).status_code == 200
                with contextlib.suppress(TimeoutError):
                    if connection.recv(65536) == b"":
                        raise ConnectionResetError
        assert 0.3 < time.monotonic() - began < HANG_SECONDS and others > 1


def test_a_connection_that_sends_nothing_is_closed(server):
    with connect(server) as connection:
        assert connection.recv(65536) == b""


def test_huge_headers_are_refused(tmp_path):
    settings = ServerSettings(header_seconds=HANG_SECONDS)  # it is the size that is refused
    with live(tmp_path, answer, settings=settings) as server, connect(server) as connection:
        connection.settimeout(60)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        reply = b""
        with contextlib.suppress(ConnectionError):  # refused while we were still sending
            for number in range(400):
                connection.sendall(f"X-{number}: {'x' * 1000}\r\n".encode())
            while piece := connection.recv(65536):
                reply += piece
        assert not reply or reply.startswith(b"HTTP/1.1 400 ")
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_server_without_keys_answers_to_names_of_this_machine_alone(tmp_path):
    with live(tmp_path, answer, no_keys=True) as server:
        port, body = server.url.rpartition(":")[2], {"model": "deepseek-chat", "messages": QUESTION}

        def status(host, path="/chat/completions"):
            return httpx.post(server.url + path, json=body, headers={"Host": host}).status_code

        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert status(host) == 200, host
        odd = ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0",
               "10.0.0.1", "localhost@evil.example", "[::ffff:10.0.0.1]", "", "localhost:80:80")  # fmt: skip
        for host in odd:
            assert status(host) in (400, 421), host
        assert httpx.get(f"{server.url}/models", headers={"Host": "evil.example"}).status_code == 421
        assert httpx.get(f"{server.url}/admin/status").status_code == 401


def test_a_form_of_a_strange_page_cannot_send_a_request(tmp_path):
    """A browser sends text/plain to another origin without asking; JSON it does not."""
    with live(tmp_path, answer, no_keys=True) as server:
        body = b'{"model": "deepseek-chat", "messages": [{"role": "user", "content": "x"}]}'
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            response = httpx.post(f"{server.url}/chat/completions", content=body, headers={"Content-Type": kind})
            assert response.status_code == 400, kind
        response = httpx.options(f"{server.url}/chat/completions", headers={"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in response.headers


def test_a_prefix_of_another_tenant_or_user_id_is_a_miss(server):
    accounts = server.server.accounts
    other = accounts.add_key(accounts.add_user("other"))
    messages = [{"role": "user", "content": "the sum of 1 and 2 " * 40}]

    def hits(key="", **body):
        return post(server, key, messages=messages, **body).json()["usage"]["prompt_cache_hit_tokens"]

    assert (hits(), hits() > 0) == (0, True)
    assert (hits(other), hits(other) > 0) == (0, True)
    assert (hits(user_id="a"), hits(user_id="b"), hits(user_id="a") > 0) == (0, 0, True)
    assert (hits(other, user_id="a"), hits() > 0) == (0, True)
