"""Chats with a server: every way to send thinking, usage, errors, and keys; over a transport in memory."""

import json
from typing import Any

import httpx2
import pytest

from thinkstack.endpoint.address import find_api_key
from thinkstack.stages.chat import ChatSession
from thinkstack.stages.remote_chat import RemoteModel
from thinkstack.types import ConfigError, RequestError

URL = "http://host:8000/v1"
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def delta(**fields: Any) -> dict[str, Any]:
    """A chunk."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


class FakeServer:
    """Answers every chat request with the same chunks, and records the requests."""

    def __init__(self, *chunks: Any, status: int = 200, models: Any = ("small", "large")):
        self.chunks, self.status, self.models = chunks, status, models
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.path == "/v1/models":
            if self.models is None:
                return httpx2.Response(404, text="no such route")
            return httpx2.Response(200, json={"data": [{"id": name} for name in self.models]})
        if self.status != 200:
            return httpx2.Response(self.status, json=self.chunks[0])
        lines = [": keep-alive", *(f"data: {json.dumps(chunk)}" for chunk in self.chunks), "data: [DONE]"]
        return httpx2.Response(200, text="\n\n".join(lines), headers={"X-Ignored-Fields": "seed"})

    @property
    def body(self) -> Any:
        """The body of the last request."""
        return json.loads(self.requests[-1].content)


def connect(server: FakeServer, name: str = "", **options: Any) -> RemoteModel:
    """A model of the server."""
    return RemoteModel(URL, name, transport=httpx2.MockTransport(server), **options)


def ask(server: FakeServer, question: str = "hello") -> tuple[str, str]:
    """(reasoning, content) of an answer."""
    session = ChatSession(connect(server))
    list(session.ask(question))
    return session.messages[-1].reasoning or "", session.messages[-1].content


@pytest.mark.parametrize(
    "chunks",
    [
        [delta(reasoning_content="so "), delta(reasoning_content="so"), delta(content="Par"), delta(content="is")],
        [delta(reasoning="so so"), delta(content="Paris")],
        [delta(reasoning="so so", reasoning_content="so so"), delta(content="Paris", reasoning_content=None)],
        [delta(content="<th"), delta(content="ink>\nso so\n</thi"), delta(content="nk>\n\nParis")],
        [delta(role="assistant", content=""), delta(reasoning_content="so so", content=""), delta(content="Paris")],
    ],
)
def test_thinking_comes_as_either_field_or_in_tags(chunks):
    assert ask(FakeServer(*chunks, END)) == ("so so", "Paris")


def test_the_request_has_the_conversation_without_thinking_and_only_the_given_options():
    server = FakeServer(delta(reasoning="so"), delta(content="Paris"), END)
    session = ChatSession(connect(server, options={"temperature": 0.5}))
    list(session.ask("one"))
    list(session.ask("two"))
    assert server.body == {
        "model": "small",
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Paris"},
            {"role": "user", "content": "two"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
    }
    session.set_thinking(False)
    list(session.ask("three"))
    assert server.body["thinking"] == {"type": "disabled"}
    assert server.body["chat_template_kwargs"] == {"thinking": False, "enable_thinking": False}


@pytest.mark.parametrize(
    ("details", "cached"),
    [({"prompt_tokens_details": {"cached_tokens": 8}}, 8), ({"prompt_cache_hit_tokens": 9}, 9), ({}, None)],
)
def test_usage_and_ignored_fields_are_in_the_summary(details, cached):
    usage = {"prompt_tokens": 12, "completion_tokens": 3, **details}
    model = connect(FakeServer(delta(content="Paris"), END, {"choices": [], "usage": usage}))
    list(ChatSession(model).ask("hello"))
    found = model.summary
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (12, 3, cached)
    assert (found.finish_reason, found.ignored) == ("stop", "seed")


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (FakeServer({"error": {"message": "too\nlong", "type": "x"}}, status=400), "too long (status 400)"),
        (FakeServer({"error": "model is gone"}, status=404), "model is gone (status 404); the address of most"),
        (FakeServer({"detail": "who are you"}, status=401), "who are you (status 401); give --api-key"),
        (FakeServer({"object": "error", "message": "busy"}, status=503), "busy (status 503)"),
        (FakeServer(delta(content="a"), {"error": {"message": "died"}}), "ended the answer: died"),
        (FakeServer(delta(content="a")), "ended the answer early"),
        (FakeServer({"choices": [7]}), "does not answer as OpenAI's API does"),
        (FakeServer([]), "does not answer as OpenAI's API does"),
    ],
)
def test_an_error_has_the_message_of_the_server_and_the_conversation_survives(server, message):
    session = ChatSession(connect(server))
    with pytest.raises(RequestError) as raised:
        list(session.ask("hello"))
    assert message in str(raised.value) and session.messages == []


def test_an_empty_answer_is_explained():
    model = connect(FakeServer({"choices": [{"delta": {}, "finish_reason": "content_filter"}]}))
    session = ChatSession(model)
    list(session.ask("hello"))
    assert "'content_filter'" in model.explain_empty() and "ended by content_filter" in session.status()


def test_half_of_a_character_can_be_printed_and_sent_back():
    server = FakeServer(delta(content="\ud83d"), delta(content="!"), END)
    session = ChatSession(connect(server))
    list(session.ask("hello"))
    list(session.ask("again"))
    assert session.messages[1].content == "\ufffd!"


def test_a_line_separator_in_an_answer_does_not_end_its_line():
    """Lines were split at U+2028 too, so that the chunk was no JSON and the answer an error."""
    chunks = [json.dumps(chunk, ensure_ascii=False) for chunk in (delta(content="a\u2028b"), END)]
    data = "".join(f"data: {chunk}\n\n" for chunk in chunks)

    def reply(request: httpx2.Request) -> httpx2.Response:
        models = httpx2.Response(200, json={"data": [{"id": "small"}]})
        return models if request.method == "GET" else httpx2.Response(200, content=data.encode())

    session = ChatSession(RemoteModel(URL, transport=httpx2.MockTransport(reply)))
    list(session.ask("hello"))
    assert session.messages[-1].content == "a\u2028b"


def test_a_name_is_one_of_those_that_the_server_lists():
    server = FakeServer()
    assert connect(server).name == "small" and connect(server, "large").name == "large"
    with pytest.raises(ConfigError, match="has no model 'lrge'; did you mean large"):
        connect(server, "lrge")
    model = connect(server)
    with pytest.raises(ConfigError, match="did you mean large"):
        model.change("larg")
    assert model.name == "small"


def test_a_server_without_a_list_takes_any_name_but_needs_one():
    server = FakeServer(models=None)
    assert connect(server, "any").name == "any"
    with pytest.raises(ConfigError, match="/v1/models lists no models; check the address"):
        connect(server)


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "/v1", "http://[::1", "http://host:port"])
def test_an_address_is_checked(url):
    with pytest.raises(ConfigError, match="write it as http://host:port/v1"):
        RemoteModel(url)


def test_a_server_that_is_not_there_is_named():
    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("connection refused")

    with pytest.raises(RequestError, match=r"cannot reach http://host:8000/v1: connection refused; check that"):
        RemoteModel(URL, transport=httpx2.MockTransport(refuse))


def test_the_key_is_the_given_one_or_that_of_the_environment_for_the_host(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "general")
    monkeypatch.setenv("DEEPSEEK_API_KEY", "theirs")
    for host, key in (
        ("api.deepseek.com", "theirs"),
        ("notdeepseek.com", "general"),
        ("localhost", "general"),
    ):
        assert find_api_key(host) == key
    server = FakeServer()
    connect(server)
    assert server.requests[-1].headers["Authorization"] == "Bearer general"
    connect(server, api_key="given")
    assert server.requests[-1].headers["Authorization"] == "Bearer given"
