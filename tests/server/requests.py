"""What the tests of the server share: requests, streams, the ledger, and waiting for something to happen."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
from sqlalchemy import RowMapping, select

from tests import HANG_SECONDS
from tests.server.live import LiveServer
from thinkstack.server.database import ledger as ledger_table

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def post(server: LiveServer, key: str = "", **body: Any) -> httpx.Response:
    """POST /chat/completions with a key; the model and a question are filled in."""
    body = {"model": "deepseek-chat", "messages": QUESTION} | body
    headers = {"Authorization": f"Bearer {key or server.key}"}
    return httpx.post(f"{server.url}/chat/completions", json=body, headers=headers, timeout=HANG_SECONDS)


def get(server: LiveServer, path: str, key: str = "", **headers: str) -> httpx.Response:
    """GET with a key."""
    headers = {"Authorization": f"Bearer {key or server.key}"} | headers
    return httpx.get(server.url + path, headers=headers, timeout=HANG_SECONDS)


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, or of its beginning."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def connect(server: LiveServer) -> socket.socket:
    """A bare connection."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=HANG_SECONDS)


def ledger_rows(server: LiveServer) -> list[RowMapping]:
    """All rows of the ledger."""
    with server.server.accounts.database.read() as connection:
        return list(connection.execute(select(ledger_table).order_by(ledger_table.c.id)).mappings().all())


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
