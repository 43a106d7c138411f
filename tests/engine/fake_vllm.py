"""Fake servers with vLLM's protocol that sample with our engine and can fail in several ways."""

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
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.failing: BaseException | int | str | None = None
        """The failure to produce: an exception to raise, a status, or a text."""
        self.keeps_weights = False
        """Whether it reports new weights as loaded without loading them."""
        self.is_raw = False
        """Whether it reports raw log-probabilities."""
        self.at_once, self.most_at_once = 0, 0
        self.before_answer: Callable[[], object] = lambda: None
        """A function to call before sampling."""
        self.lock, self.sampling_lock = threading.Lock(), threading.Lock()

    def restart(self) -> None:
        """Restart as after a crash, with the weights of the start."""
        self.failing, self.name = None, "default"

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.paths.append(path)
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
            with self.sampling_lock:  # running requests finish first and report the old version
                self.engine = Engine(
                    load_model(Path(folder)), EngineConfig(max_num_seqs=32, max_model_len=self.context)
                )
        if path == "/update_weight_version":
            self.name = json.loads(request.content)["new_version"]
        if path != GENERATE:
            return httpx2.Response(200, json={})
        return self.complete(json.loads(request.content))

    def complete(self, body: dict[str, Any]) -> httpx2.Response:
        self.bodies.append(body)
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.before_answer()
        with self.sampling_lock:
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
    """Servers by host name."""

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
