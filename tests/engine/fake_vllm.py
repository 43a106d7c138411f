"""Servers that speak vLLM's protocol and draw with our own engine, each with its own ways to fail."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from tests.engine.vllm_wire import Wire
from thinkstack.checkpoint.model import load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.types import Completion, SamplingParams

GENERATE = "/inference/v1/generate"


class FakeServer(Wire):
    """One server."""

    def __init__(self, context: int = 96):
        super().__init__()
        self.context, self.engine = context, None
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.failing: BaseException | int | str | None = None
        """What it does instead of answering: raise it, answer with that status, or with that text."""
        self.keeps_weights = False
        """Says that it takes over new weights, and does not."""
        self.is_raw = False
        """Reports log-probabilities of the model itself."""
        self.at_once, self.most_at_once = 0, 0
        self.before_answer: Callable[[], object] = lambda: None
        """What it waits for before it draws."""
        self.lock, self.drawing = threading.Lock(), threading.Lock()

    def restart(self) -> None:
        """As after a crash: up again, with weights nobody gave it."""
        self.failing, self.name = None, "default"

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.asked.append(path)
        if isinstance(self.failing, BaseException):
            raise self.failing
        if isinstance(self.failing, int):
            return httpx2.Response(self.failing, json={"error": {"message": "it broke"}})
        if isinstance(self.failing, str):
            return httpx2.Response(200, text=self.failing)
        if path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": "policy", "max_model_len": self.context}]})
        if path == "/weight_info":
            return httpx2.Response(200, json={"weight_version": self.name})
        if path == "/collective_rpc" and not self.keeps_weights:
            folder = json.loads(request.content)["kwargs"]["weights_path"]
            with self.drawing:  # what is being drawn is finished first, and told with the old name
                self.engine = Engine(
                    load_model(Path(folder)), EngineConfig(max_num_seqs=32, max_model_len=self.context)
                )
        if path == "/update_weight_version":
            self.name = json.loads(request.content)["new_version"]
        if path != GENERATE:
            return httpx2.Response(200, json={})
        return self.answer(json.loads(request.content))

    def answer(self, body: dict[str, Any]) -> httpx2.Response:
        self.bodies.append(body)
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.before_answer()
        with self.drawing:
            (group,) = self.engine.generate([body["token_ids"]], [self.sampling(body["sampling_params"])])
            choices = [self.choice(place, found) for place, found in enumerate(group)]
        with self.lock:
            self.at_once -= 1
        if not body.get("stream"):
            return httpx2.Response(200, json={"choices": choices[::-1]})  # in no order
        lines = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
        return httpx2.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))

    def sampling(self, params: dict[str, Any]) -> SamplingParams:
        same = ("n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
        chosen = {name: params[name] for name in same}
        return SamplingParams(**chosen, stop_token_ids=tuple(params["stop_token_ids"]), raw_logprobs=self.is_raw)

    def choice(self, place: int, found: Completion) -> dict[str, Any]:
        content = [
            {"token_id": token, "logprob": value, "rank": 1, "top_logprobs": []}
            for token, value in zip(found.token_ids, found.logprobs, strict=True)
        ]
        return {
            "index": place,
            "finish_reason": found.finish_reason,
            "token_ids": list(found.token_ids),
            "weight_versions": [{"version": self.name, "start": 0, "end": len(content)}],
            "logprobs": {"content": content},
        }


class FakePool(httpx2.BaseTransport):
    """Servers by the name of their host."""

    def __init__(self, *hosts: str, context: int = 96):
        self.servers = {host: FakeServer(context) for host in hosts}

    def __getitem__(self, host: str) -> FakeServer:
        return self.servers[host]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"http://{host}:1" for host in self.servers)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        reply = self.servers[request.url.host].handle_request(request)
        return reply
