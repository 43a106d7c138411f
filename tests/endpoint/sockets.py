"""A server on a real socket that counts what it is asked, and a process that asks it."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHILD = """
import os, sys
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.endpoint import Endpoint
from thinkstack.endpoint.requests import EndpointRequest
from thinkstack.types import Message

url, cache, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
requests = [
    EndpointRequest(messages=(Message(role="user", content=f"question {number}"),), max_tokens=20)
    for number in range(count)
]
def report(place, completion):
    os.write(1, f"{place} {completion.content}\\n".encode())  # all or nothing, also when the process is killed

with Endpoint(EndpointConfig(url=url, model="small", cache=cache)) as endpoint:
    endpoint.complete(requests, on_finish=report)
"""
"""Asks `count` questions and prints the number and the answer of each as it is reported."""


class CountingServer(ThreadingHTTPServer):
    """Answers every question with how often it was asked."""

    daemon_threads, block_on_close = True, False
    request_queue_size = 128

    def __init__(self, seconds: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seconds, self.asked, self.lock = seconds, Counter[str](), threading.Lock()
        self.connections = 0
        """Of clients that live, or whose requests are not all counted yet."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.lock:
            self.connections -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are no errors."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: CountingServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which waits 40 ms for each part of an answer

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked[question] += 1
            number = self.server.asked[question]
        time.sleep(self.server.seconds)
        chunks = [
            {"choices": [{"delta": {"content": f"answer {number} "}}]},
            {"choices": [{"delta": {"content": "你好"}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}},
        ]
        lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
        data = "".join([*lines, "data: [DONE]\n\n"]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for start in range(0, len(data), 100):  # not along the lines
            self.wfile.write(data[start : start + 100])


@contextmanager
def counting_server(seconds: float) -> Iterator[CountingServer]:
    """A server while the block runs. seconds: time of each answer."""
    with CountingServer(seconds) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def start(server: CountingServer, cache: Path, count: int) -> "subprocess.Popen[str]":
    """A process that asks `count` questions."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, str(cache), str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
