"""One vLLM server, spoken to over HTTP: token ids in, ids and log-probabilities out, and other weights on demand.

Everything this package knows about vLLM's protocol (0.32, its token-in-token-out and reinforcement-learning endpoints)
is in this file.
"""

import json
import logging
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import numpy

from thinkstack.engine.sampler import mix
from thinkstack.types import Completion, ConfigError, FinishReason, RequestError, SamplingParams

GENERATE, RPC = "/inference/v1/generate", "/collective_rpc"
IMPOSSIBLE = -9000.0
"""vLLM writes -9999 for a log-probability that is no number, or minus infinity."""
COLDEST = 0.01
"""vLLM raises temperatures below it to it, without a word."""
LOOK_SECONDS = 10.0
"""Longest wait for a connection, or for a server to say that it is alive."""
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
START = "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out (docs/internals/engine.md)"


class ServerFailed(RuntimeError):
    """The server gave no answer that can be used; another one may, and so may this one later."""


class OtherWeights(ServerFailed):
    """The server answered with weights it was not given: it has been started anew, or somebody else uses it."""


class Server:
    """The calls to one server. All raise ServerFailed, RequestError for a request it refuses, and ConfigError where it
    was started in a way that cannot work."""

    def __init__(
        self, address: str, timeout_seconds: float, key: str = "", transport: httpx2.BaseTransport | None = None
    ):
        """address: as http://host:port. timeout_seconds: for one answer. key: what the server was started with as
        --api-key. transport: of httpx2, for tests."""
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"servers.addresses names {address!r}; write it as http://host:port")
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells every request
        self.model = ""
        """What the server calls its model."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(
            base_url=self.address,
            headers=headers,
            timeout=httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, LOOK_SECONDS)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
            trust_env=False,  # a proxy of the environment does not lead to a server of ours
        )

    def connect(self) -> int:
        """Ask whether it is alive, and for the name of its model. Returns the tokens of its context."""
        self._call("GET", "/health", timeout=LOOK_SECONDS)
        reply = self._call("GET", "/v1/models", timeout=LOOK_SECONDS)
        with guarded():
            model = reply["data"][0]
            self.model = str(model["id"])
            return int(model["max_model_len"])

    def weights(self) -> str:
        """What the weights in use were named when they were given."""
        reply = self._call("GET", "/weight_info")
        with guarded():
            return str(reply["weight_version"])

    def load(self, folder: Path, name: str, pause: Literal["wait", "abort"]) -> None:
        """Take over the weights in `folder`, a checkpoint in Hugging Face layout at the same path there.

        name: what answers will call them. pause: what becomes of answers being drawn, as `WhileRunning` says of
        "drain" and "abort". What was cached is forgotten.
        """
        self._call("POST", "/pause", params={"mode": pause})
        try:
            asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._call("POST", RPC, json=asked)
            self._call("POST", "/reset_prefix_cache")
            self._call("POST", "/update_weight_version", json={"new_version": name})
        finally:
            self._call("POST", "/resume")

    def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, weights: str, version: int, request_id: str
    ) -> list[Completion]:
        """The sampling.n answers to a prompt. weights: what must have drawn them, and `version` what they are called
        here. Raises OtherWeights where others did."""
        body = request_body(prompt_token_ids, sampling, self.model, weights, request_id)
        reply = self._call("POST", GENERATE, json=body)
        with guarded():
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            found = [completion(choice, sampling, weights, version) for choice in choices]
        if len(found) != sampling.n:
            raise ServerFailed(f"{len(found)} answers came for n={sampling.n}")
        return found

    def stream(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, weights: str, version: int, request_id: str
    ) -> Iterator[tuple[int, ...]]:
        """The tokens of one answer as they come; leaving the loop early aborts it."""
        body = request_body(prompt_token_ids, sampling, self.model, weights, request_id) | {"stream": True}
        with guarded(), self._client.stream("POST", GENERATE, json=body) as reply:
            self._judge(reply)
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ServerFailed(_message(event))
                choice = event["choices"][0]
                if choice["finish_reason"] is not None or choice["token_ids"]:
                    yield completion(choice, sampling, weights, version).token_ids

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests; their answers come back as far as they are drawn, those that have ended are ignored."""
        self._call("POST", "/abort_requests", json={"request_ids": [f"generate-tokens-{name}" for name in request_ids]})

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _call(self, method: str, path: str, **given: Any) -> Any:
        with guarded():
            reply = self._client.request(method, path, **given)
            self._judge(reply)
            return reply.json() if reply.content else None

    def _judge(self, reply: httpx2.Response) -> None:
        """Raise what a reply other than success means."""
        status = reply.status_code
        if status < 400:
            return
        reply.read()
        try:
            message = _message(reply.json())
        except ValueError:
            message = reply.text[:200]
        path = reply.request.url.path
        if status in (401, 403) and "scale-out" not in message.lower():
            raise ConfigError(f"{self.address} refuses the key ({message}); set VLLM_API_KEY to its --api-key")
        if status == 403 or (status == 404 and "does not exist" not in message):
            raise ConfigError(f"{self.address} has no {path}; {START}")
        if status in (400, 404, 422):
            raise RequestError(f"{self.address} refuses the request: {message}")
        raise ServerFailed(f"{path} answered {status}: {message}")


@contextmanager
def guarded() -> Iterator[None]:
    """Whatever goes wrong on the way, as ServerFailed."""
    try:
        yield
    except httpx2.TimeoutException as error:
        raise ServerFailed(f"no answer in time ({type(error).__name__})") from error
    except httpx2.HTTPError as error:
        raise ServerFailed(f"{type(error).__name__}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ServerFailed(f"what came is not vLLM's ({type(error).__name__}: {error})") from error


def request_body(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, model: str, weights: str, request_id: str
) -> dict[str, Any]:
    """What `generate` sends. cache_salt is the weights' name: what others left in the cache is never found."""
    check_sampling(sampling)
    count = sampling.top_logprobs
    params = {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "min_tokens": sampling.min_tokens,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,
        "detokenize": False,
        "seed": server_seed(sampling.seed),
        "logprobs": count + 1 if count else 0,  # vLLM counts the drawn token among them
    }
    return {
        "request_id": request_id,
        "model": model,
        "token_ids": list(prompt_token_ids),
        "cache_salt": weights,
        "sampling_params": params,
    }


def server_seed(seed: int) -> int:
    """vLLM draws answer k of a request with seed + k: requests of neighboring seeds would share answers, so a hash of
    the seed is sent."""
    value = numpy.array([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=numpy.uint64)
    with numpy.errstate(over="ignore"):
        return int(mix(value)[0] >> numpy.uint64(2))


def check_sampling(sampling: SamplingParams) -> None:
    """Raise RequestError for what a server cannot do, or would do otherwise without saying so."""
    if sampling.thinking_budget is not None:
        raise RequestError(
            f"thinking_budget={sampling.thinking_budget} is not known to vLLM servers; leave it out, or draw in this "
            "process (no servers.addresses)"
        )
    if 0 < sampling.temperature < COLDEST:
        raise RequestError(
            f"temperature={sampling.temperature} would be raised to {COLDEST} by vLLM; use 0 or at least {COLDEST}"
        )


def completion(choice: dict[str, Any], sampling: SamplingParams, weights: str, version: int) -> Completion:
    """An answer, or a piece of a streamed one, as vLLM tells it."""
    drawn_by = {span["version"] for span in choice["weight_versions"] or ()}
    if drawn_by - {weights}:
        raise OtherWeights(f"answered with weights {sorted(drawn_by - {weights})[0]!r} instead of {weights!r}")
    tokens, content = tuple(choice["token_ids"]), choice["logprobs"]["content"] or ()
    logprobs = tuple(float(entry["logprob"]) for entry in content)
    if tuple(entry["token_id"] for entry in content) != tokens:
        raise ServerFailed("log-probabilities came for other tokens than were drawn")
    if any(value <= IMPOSSIBLE or math.isnan(value) for value in logprobs):
        raise RequestError("the model's logits are not finite; check the weights")
    reason = choice["finish_reason"]
    if reason is not None and reason not in REASONS:
        raise ServerFailed(f"an answer ended by {reason!r}")
    top = None
    if sampling.top_logprobs:
        top = tuple(_alternatives(entry["top_logprobs"], sampling.top_logprobs) for entry in content)
    return Completion(
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason=REASONS.get(reason, "abort"),
        weights_version=version,
        top_logprobs=top,
    )


def _alternatives(entries: Sequence[dict[str, Any]], count: int) -> tuple[tuple[int, float], ...]:
    """The most likely ones; the drawn token is told beside them and may not be among them."""
    likely = sorted((entry for entry in entries if entry["logprob"] > IMPOSSIBLE), key=lambda entry: entry["rank"])
    return tuple((entry["token_id"], float(entry["logprob"])) for entry in likely if entry["rank"] <= count)


def new_id() -> str:
    """A name for a request that no other has."""
    return uuid.uuid4().hex


def _message(reply: Any) -> str:
    """What an error reply says."""
    error = reply.get("error", reply.get("detail", reply)) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
