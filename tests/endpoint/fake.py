"""A server in memory whose answers are scripted, and an event loop whose clock waits for nobody."""

import asyncio
import json
import selectors
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx2

from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.endpoint import Endpoint
from thinkstack.endpoint.requests import EndpointRequest
from thinkstack.types import Message

URL = "http://host:8000/v1"
KEY = "sk-very-secret"
USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


class VirtualSelector(selectors.DefaultSelector):
    """Instead of waiting, it moves the clock of its loop."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0 if timeout else timeout)
        if not events and timeout:
            self.loop.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing else can happen, and then at once."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = VirtualSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def delta(**fields: Any) -> dict[str, Any]:
    """A chunk."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def end(reason: str = "stop") -> dict[str, Any]:
    """The chunk that ends an answer."""
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(**counts: Any) -> dict[str, Any]:
    """The chunk with the usage."""
    return {"choices": [], "usage": USAGE | counts}


def sse(*chunks: Any) -> bytes:
    """Chunks as server-sent events."""
    lines = [f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(lines).encode()


def streamed(*chunks: Any) -> httpx2.Response:
    """A whole stream."""
    return httpx2.Response(200, content=sse(*chunks, "[DONE]"))


def answer(text: str = "Paris", **counts: Any) -> httpx2.Response:
    """A stream with a text, its end and a usage."""
    return streamed(delta(content=text), end(), usage(**counts))


def broken(*parts: bytes | Exception) -> httpx2.Response:
    """A body in these parts, an exception among them."""

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    return httpx2.Response(200, content=body())


def error(status: int, message: str = "it broke", headers: dict[str, str] | None = None, **fields: Any) -> Any:
    """A reply with an error."""
    return httpx2.Response(status, json={"error": {"message": message, **fields}}, headers=headers)


Reply = Callable[[dict[str, Any], int], Any]
"""Function (body, how often this prompt was asked, from 0) -> reply, or an exception to raise."""


class FakeServer:
    """Replies by a function, after `seconds` of the loop's clock, and records what it was asked."""

    def __init__(self, reply: Reply = lambda body, times: answer(), seconds: float = 0.0):
        self.reply, self.seconds = reply, seconds
        self.requests: list[httpx2.Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        """When each request came."""
        self.asked: Counter[str] = Counter()
        """By the last message or prompt."""
        self.running = self.most_running = self.cancelled = 0

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.path.endswith("/models"):
            return httpx2.Response(200, json={"data": [{"id": "small"}, {"id": "large"}]})
        body = json.loads(request.content)
        prompt = str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])
        self.bodies.append(body)
        self.times.append(asyncio.get_running_loop().time())
        number = self.asked[prompt]
        self.asked[prompt] += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.seconds:
                await asyncio.sleep(self.seconds)
            reply = self.reply(body, number)
            if asyncio.iscoroutine(reply):
                reply = await reply
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if isinstance(reply, Exception):
            raise reply
        return reply


def connect(
    server: FakeServer, api_key: str = KEY, loop: asyncio.AbstractEventLoop | None = None, **settings: Any
) -> Endpoint:
    """An endpoint of the server. loop: default one with a virtual clock. settings: fields of EndpointConfig."""
    cfg = EndpointConfig(**{"url": URL, "model": "small"} | settings)
    return Endpoint(cfg, api_key, httpx2.MockTransport(server), loop or VirtualLoop())


def ask(text: str = "question", **fields: Any) -> EndpointRequest:
    """A request."""
    return EndpointRequest(messages=(Message(role="user", content=text),), **{"max_tokens": 20} | fields)


def asks(count: int, **fields: Any) -> list[EndpointRequest]:
    """Different requests."""
    return [ask(f"question {number}", **fields) for number in range(count)]


def answered(endpoint: Endpoint, requests: Sequence[EndpointRequest]) -> list[str]:
    """The contents of the completions of requests."""
    with endpoint:
        return [completion.content for completion in endpoint.complete(requests)]
