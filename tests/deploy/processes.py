"""Processes of the tests of deployment: servers, the router, and clients."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests import HANG_SECONDS
from tests.server.requests import chunks_of

ROOT = Path(__file__).parents[2]
ROUTER = ("--health-check-endpoint=/ready", "--health-check-interval-secs=1", "--cb-timeout-duration-secs=2")
"""Options of vllm-router with which a dead server is left out after a second, and taken back when it is ready."""


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ScriptedServer:
    """A process of tests/deploy/scripted_server.py."""

    def __init__(self, database: str, port: int, log: Path, **settings: Any):
        words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.deploy.scripted_server"),
                    *(f"--database={database}", f"--port={port}", *words),
                ],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.url = f"http://127.0.0.1:{port}"

    def wait_ready(self) -> "ScriptedServer":
        """Wait for the line with the address."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("listening on"), "the server did not start"
        return self

    def count_chats(self) -> int:
        """Requests for completions that have ended or run."""
        text = httpx.get(f"{self.url}/metrics").text
        ended = re.findall(r'^thinkstack_requests_total\{route="/chat/completions".*\} (\S+)$', text, re.MULTILINE)
        running = re.findall(r"^thinkstack_num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
        return int(sum(map(float, ended + running)))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait. Returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(HANG_SECONDS)


@contextlib.contextmanager
def running_router(program: str, servers: list[str], log: Path, *options: str) -> Iterator[str]:
    """`vllm-router` over these servers, as docs/deployment.md starts it. Yields its address."""
    port, metrics = free_port(), free_port()
    command = [program, "--host=127.0.0.1", f"--port={port}", f"--prometheus-port={metrics}", *ROUTER, *options]
    with log.open("ab") as output:
        process = subprocess.Popen([*command, "--worker-urls", *servers], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass
class Outcome:
    """What a client saw of one request."""

    status: int = 0
    text: str = ""
    error: str = ""
    ended: float = 0.0
    arrived: list[float] = field(default_factory=list)
    """Times of the pieces."""

    @property
    def is_whole(self) -> bool:
        """Whether the reply is complete."""
        return self.status == 200 and not self.error and self.text.rstrip().endswith("data: [DONE]")

    @property
    def id(self) -> str:
        """The id of the request, or "" if nothing arrived."""
        found = re.search(r'"id":"([^"]+)"', self.text)
        return found[1] if found else ""

    @property
    def num_tokens(self) -> int:
        """Tokens in the log-probabilities that arrived."""
        chunks = chunks_of(self.text[: self.text.rfind("\n\n") + 2])
        choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
        return sum(len((choice.get("logprobs") or {}).get("content") or ()) for choice in choices)


async def ask(client: httpx.AsyncClient, url: str, key: str, body: dict[str, Any]) -> Outcome:
    """Send a request and read the stream."""
    found = Outcome()
    try:
        headers = {"Authorization": f"Bearer {key}"}
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as reply:
            found.status = reply.status_code
            async for piece in reply.aiter_text():
                found.text += piece
                found.arrived.append(time.monotonic())
    except httpx.HTTPError as error:
        found.error = repr(error)
    found.ended = time.monotonic()
    return found


async def load(url: str, keys: Sequence[str], body: dict[str, Any], until: asyncio.Event) -> list[Outcome]:
    """A client for each key, which asks one request after the other until the event is set."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=len(keys))
    async with httpx.AsyncClient(timeout=HANG_SECONDS, limits=limits, verify=False) as client:

        async def work(key: str) -> list[Outcome]:
            found = []
            while not until.is_set():
                found.append(await ask(client, url, key, body))
            return found

        return [each for rows in await asyncio.gather(*(work(key) for key in keys)) for each in rows]
