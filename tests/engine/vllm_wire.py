"""Replies of a vLLM server to the requests here, recorded by tests.golden.record_vllm and replayed in tests.

The replay has one piece of a server's state: which weights it holds, and what they are called.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from safetensors import safe_open

from tests.tiny import GQA_TINY
from thinkstack.models.config import GQAConfig
from thinkstack.types import SamplingParams

FILE = Path(__file__).parents[1] / "golden" / "vllm.json"
SERVED = replace(
    GQA_TINY,
    vocab_size=360,
    hidden_size=128,
    num_layers=2,
    intermediate_size=256,
    max_positions=512,
    attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=32),
)
"""Widths that vLLM supports; initialized with seeds 0 and 1."""
CONTEXT = 256
PROMPT = [1, 2, 3]
ASKED = {
    "greedy": SamplingParams(temperature=0, max_tokens=8, top_logprobs=3),
    "ended": SamplingParams(temperature=0, max_tokens=8, stop_token_ids=(153, 269)),
    "banned": SamplingParams(temperature=0, max_tokens=8, stop_token_ids=(46, 269), min_tokens=5),
    "group": SamplingParams(max_tokens=12, n=4, seed=3),
    "cold": SamplingParams(temperature=0.5, max_tokens=12, seed=4, top_logprobs=2),
    "top_k": SamplingParams(max_tokens=12, top_k=4),
    "top_p": SamplingParams(max_tokens=12, top_p=0.6),
    "min_p": SamplingParams(max_tokens=12, min_p=0.2),
    "penalties": SamplingParams(max_tokens=12, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
    "bias": SamplingParams(max_tokens=12, logit_bias={3: 5.0}),
    "everything": SamplingParams(
        max_tokens=12, temperature=0.7, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.2, logit_bias={3: 2.0}
    ),
}
STREAMED = SamplingParams(temperature=0, max_tokens=6)
REFUSED = SamplingParams(temperature=3.0, max_tokens=2)
"""vLLM accepts temperatures up to 2."""
NAME, PATH = "NAME", "PATH"
"""Placeholders in records for the weights' name and folder, which differ in every run."""


def label(folder: Path) -> str:
    """A fingerprint of the weights in a folder, the same on every machine."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return f"{file.get_tensor('model.embed_tokens.weight').double().abs().mean():.4f}"


def question(request: httpx2.Request) -> dict[str, Any]:
    """A request without the parts that differ between runs."""
    body = json.loads(request.content) if request.content else None
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if key not in ("request_id", "request_ids")}
        for key in ("cache_salt", "new_version"):
            if key in body:
                body[key] = NAME
        if "kwargs" in body:
            body["kwargs"] = {"weights_path": PATH}
    return {"method": request.method, "path": request.url.raw_path.decode(), "body": body}


class Wire(httpx2.BaseTransport):
    """Tracks the weights that a server is given."""

    def __init__(self) -> None:
        self.weights, self.name = "", "default"

    def notice(self, request: httpx2.Request) -> None:
        """Track a request that changes the weights."""
        body = json.loads(request.content) if request.content else {}
        if request.url.path == "/collective_rpc":
            self.weights = label(Path(body["kwargs"]["weights_path"]))
        if request.url.path == "/update_weight_version":
            self.name = body["new_version"]


class Recorder(Wire):
    """Forwards requests and records the replies."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = httpx2.HTTPTransport()
        self.records: list[dict[str, Any]] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        reply = self.inner.handle_request(request)
        reply.read()
        self.notice(request)
        text = reply.text.replace(self.name, NAME)
        record = question(request) | {"weights": self.weights, "status": reply.status_code, "reply": text}
        if record not in self.records:
            self.records.append(record)
        return httpx2.Response(reply.status_code, text=reply.text)


class Replay(Wire):
    """Replays recorded replies; an unknown request is an error of the test."""

    def __init__(self, records: list[dict[str, Any]]):
        super().__init__()
        self.records = records
        self.asked: list[str] = []
        """Paths in order of arrival."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.notice(request)
        wanted = question(request)
        self.asked.append(wanted["path"])
        if wanted["path"] == "/weight_info":
            return httpx2.Response(200, json={"weight_version": self.name})
        for record in self.records:
            same = all(record[key] == value for key, value in wanted.items())
            if same and record["weights"] in ("", self.weights):
                return httpx2.Response(record["status"], text=record["reply"].replace(NAME, self.name))
        raise AssertionError(f"no record of {wanted} with weights {self.weights}")
