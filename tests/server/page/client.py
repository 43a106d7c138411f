"""A browser's part in the tests of the page: cookies, the token against forgery, and streams of answers."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests import HANG_SECONDS
from tests.server.live import LiveServer

PASSWORD = "correct horse"


@dataclass
class Seen:
    """What a reader of an answer has."""

    reasoning: str = ""
    blocks: list[str] = field(default_factory=list)
    tail: str = ""
    at: str = "0.0"
    events: list[str] = field(default_factory=list)
    message: dict[str, Any] | None = None
    """The complete answer."""

    def take(self, name: str, body: dict[str, Any]) -> None:
        self.events.append(name)
        if name == "reasoning":
            self.reasoning += body["text"]
        elif name == "content" and "blocks" in body:
            self.blocks += body["blocks"]
            self.tail = body["tail"]
        elif name == "content":
            self.tail += body["append"]
        elif name == "end":
            self.blocks += body["blocks"]
            self.tail, self.message = "", body["message"]
        elif name == "reset":
            self.blocks, self.tail = [body["message"]["html"]], body["message"]["tail"]


class Browser:
    """One user's browser."""

    def __init__(self, server: LiveServer, name: str = "", password: str = PASSWORD):
        """name: who signs in; "" for nobody."""
        self.http = httpx.Client(base_url=server.url, timeout=HANG_SECONDS)
        self.csrf = ""
        if name:
            assert self.call("POST", "/page/sign-in", {"name": name, "password": password}) == {}
            self.csrf = self.call("GET", "/page/me")["csrf"]

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        content = None if body is None else json.dumps(body)
        given = {"X-CSRF-Token": self.csrf, "Content-Type": "application/json"}
        return self.http.request(method, path, content=content, headers=given | headers)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        reply = self.request(method, path, body)
        assert reply.is_success, (reply.status_code, reply.text)
        return reply.json()

    def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
        """Status, code and message of a refusal."""
        reply = self.request(method, path, body, **headers)
        found = reply.json()["error"]
        return reply.status_code, found["code"], found["message"]

    def send(self, text: str, **values: Any) -> dict[str, Any]:
        body = {"text": text, "models": ["scripted"], "thinking": True} | values
        return self.call("POST", "/page/send", body)

    def ask(self, text: str, **values: Any) -> dict[str, Any]:
        """Send a message and wait for its complete answer; returns the answer."""
        return self.read(self.send(text, **values)["answers"][0]["id"]).message

    def events(self, message_id: str, after: str = "0.0") -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(position, name, data) of the events of an answer."""
        path = f"/page/answers/{message_id}/events?after={after}"
        with self.http.stream("GET", path) as reply:
            assert reply.status_code == 200, reply.read()
            place = name = ""
            for line in reply.iter_lines():
                key, _, value = line.partition(": ")
                if key == "id":
                    place = value
                elif key == "event":
                    name = value
                elif key == "data":
                    yield place, name, json.loads(value)

    def read(self, message_id: str, seen: Seen | None = None, count: int = 10**9) -> Seen:
        """Read an answer on from what was seen: to its end, or a number of events with text."""
        seen = seen or Seen()
        for place, name, body in self.events(message_id, seen.at):
            seen.take(name, body)
            seen.at = place
            count -= name in ("reasoning", "content")
            if count <= 0:
                break
        return seen


class Pace:
    """Makes an engine's steps wait: for a time each, or for the test."""

    def __init__(self, server: LiveServer, seconds: float = 0.0):
        self.seconds, self.go = seconds, threading.Event()
        self.go.set()
        step = server.engine.step

        def paced() -> Any:
            self.go.wait(HANG_SECONDS)
            time.sleep(self.seconds)
            return step()

        server.engine.step = paced
