"""HTTP clients of one vLLM server: token ids in, token ids and log-probabilities out, and updates of weights.

Only this file depends on the protocol of vLLM (0.32, endpoints for token-in-token-out and reinforcement learning).
"""

import json
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2
import numpy

from thinkstack.kernels.sampling import splitmix64
from thinkstack.types import Completion, ConfigError, FinishReason, RequestError, SamplingParams

GENERATE_PATH, RPC_PATH = "/inference/v1/generate", "/collective_rpc"
MIN_LOGPROB = -9000.0
"""Log-probabilities at or below this are invalid: vLLM returns -9999 for NaN and minus infinity."""
MIN_TEMPERATURE = 0.01
"""Minimum temperature of vLLM, which silently raises lower temperatures to this."""
CONNECT_SECONDS = 10.0
"""Timeout of connections and health checks."""
KEEP_ALIVE_SECONDS = 2.0
"""Time after which an idle connection is not used again; vLLM closes it after 5 seconds."""
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
START_HINT = "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out (docs/internals/engine.md)"


class ServerError(RuntimeError):
    """The server failed; another server, or the same server later, may succeed."""


class ConnectionFailed(ServerError):
    """The server cannot be reached, does not answer in time, or has closed the connection."""


class WrongWeights(ServerError):
    """The server did not use the loaded weights, because it was restarted or another client loaded weights."""


class Server:
    """The calls to one server. All calls raise ServerError, RequestError if the server rejects a request, and
    ConfigError if the server was started with the wrong options."""

    def __init__(
        self, address: str, timeout_seconds: float, key: str = "", transport: httpx2.BaseTransport | None = None
    ):
        """address: http://host:port. timeout_seconds: timeout of a request. key: the server's --api-key. transport: an
        httpx2 transport, for tests."""
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"servers.addresses contains {address!r}; write it as http://host:port")
        self.model = ""
        """The name of the model on the server."""
        self._client = httpx2.Client(transport=transport, **_client_options(self.address, timeout_seconds, key))

    def connect(self) -> int:
        """Check the server's health and get the name of its model. Returns the maximum context length in tokens."""
        self._call("GET", "/health", timeout=CONNECT_SECONDS)
        reply = self._call("GET", "/v1/models", timeout=CONNECT_SECONDS)
        with as_server_error():
            model = reply["data"][0]
            self.model = str(model["id"])
            return int(model["max_model_len"])

    def weights(self) -> str:
        """The version name of the weights that the server uses."""
        reply = self._call("GET", "/weight_info")
        with as_server_error():
            return str(reply["weight_version"])

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without a begin token. Raises ConfigError if the server has no tokenizer."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        reply = self._call("POST", "/tokenize", json=body, timeout=CONNECT_SECONDS)
        with as_server_error():
            return [int(token) for token in reply["tokens"]]

    def probe(self, priority: int = 0) -> tuple[str, bool]:
        """Sample a token. Returns the version name of the weights, and whether the server reports raw
        log-probabilities. Raises RequestError or ServerError if it does not support this priority."""
        sampling = SamplingParams(temperature=2.0, top_k=1, max_tokens=1)  # probability 1 when it is sampled
        body = request_body([0], sampling, self.model, "probe", new_id()) | {"priority": priority}
        reply = self._call("POST", GENERATE_PATH, json=body)
        with as_server_error():
            choice = reply["choices"][0]
            names = [span["version"] for span in choice["weight_versions"] or ()]
            return (names or [""])[-1], choice["logprobs"]["content"][0]["logprob"] < -1e-6

    def load(self, folder: Path, name: str, pause: Literal["wait", "abort"]) -> None:
        """Load the weights in `folder`, a checkpoint in Hugging Face layout at the same path on the server, and reset
        the prefix cache.

        name: the version name of the weights in completions. pause: what happens to running requests; pause="wait" is
        `WhileRunning` "drain".
        """
        self._call("POST", "/pause", params={"mode": pause})
        try:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._call("POST", RPC_PATH, json=body)
            self._call("POST", "/reset_prefix_cache")
            self._call("POST", "/update_weight_version", json={"new_version": name})
        finally:
            self._call("POST", "/resume")

    def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, weights: str, version: int, request_id: str
    ) -> list[Completion]:
        """Generate sampling.n completions of a prompt. weights: the version name that the server must report. version:
        our version of these weights. Raises WrongWeights if the server used other weights."""
        body = request_body(prompt_token_ids, sampling, self.model, weights, request_id)
        reply = self._call("POST", GENERATE_PATH, json=body)
        with as_server_error():
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            found = [completion(choice, sampling, weights, version) for choice in choices]
        if len(found) != sampling.n:
            raise ServerError(f"the server returned {len(found)} completions for n={sampling.n}")
        return found

    def stream(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, weights: str, version: int, request_id: str
    ) -> Iterator[tuple[int, ...]]:
        """Yield the tokens of one completion as they arrive; leaving the loop early aborts it."""
        body = request_body(prompt_token_ids, sampling, self.model, weights, request_id) | {"stream": True}
        with as_server_error(), self._client.stream("POST", GENERATE_PATH, json=body) as reply:
            if reply.is_error:
                reply.read()
                raise_for_status(self.address, reply)
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                _raise_for_event(self.address, event)
                choice = event["choices"][0]
                if choice["finish_reason"] is not None or choice["token_ids"]:
                    yield completion(choice, sampling, weights, version).token_ids

    def abort(self, request_ids: Sequence[str]) -> None:
        """Abort these requests; their calls return the tokens so far. Finished requests are ignored."""
        self._call("POST", "/abort_requests", json={"request_ids": [f"generate-tokens-{name}" for name in request_ids]})

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _call(self, method: str, path: str, **given: Any) -> Any:
        with as_server_error():
            reply = self._client.request(method, path, **given)
            raise_for_status(self.address, reply)
            return reply.json() if reply.content and path != "/health" else None  # vllm-router's is a sentence


class StreamPart(NamedTuple):
    """New tokens of a streamed completion. The first part has none: the server has accepted the request."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: FinishReason | None = None
    """Set in the last part."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache, in the last part; None without --enable-prompt-tokens-details."""
    weights: str = ""
    """Version name of the weights, in the last part."""


class AsyncServer:
    """Streams of one server in an event loop. Errors are those of `Server`."""

    def __init__(self, address: str, silence_seconds: float, key: str = ""):
        """silence_seconds: maximum time between two parts of a stream; other arguments as in `Server`."""
        self.address = address
        self._client = httpx2.AsyncClient(**_client_options(address, silence_seconds, key))

    async def stream(self, body: Mapping[str, Any], sampling: SamplingParams) -> AsyncGenerator[StreamPart]:
        """The parts of one completion (n=1). body: a `request_body` for `sampling`. Closing the generator early aborts
        the request."""
        last, num_cached = None, None
        with as_server_error():
            async with self._client.stream(
                "POST", GENERATE_PATH, json={**body, "stream": True, "stream_options": {"include_usage": True}}
            ) as reply:
                if reply.is_error:
                    await reply.aread()
                    raise_for_status(self.address, reply)
                yield StreamPart()
                async for line in reply.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    _raise_for_event(self.address, event)
                    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                    num_cached = details.get("cached_tokens", num_cached)
                    for choice in event["choices"]:
                        found = completion(choice, sampling, None, 0)
                        spans = choice["weight_versions"] or ()
                        is_last = choice["finish_reason"] is not None
                        part = StreamPart(
                            found.token_ids, found.logprobs, found.top_logprobs or (),
                            found.finish_reason if is_last else None, None, spans[-1]["version"] if spans else "",
                        )  # fmt: skip
                        if is_last:
                            last = part  # the usage follows
                        else:
                            yield part
        if last is None:
            raise ServerError("the stream has no end")
        yield last._replace(num_cached_tokens=num_cached)

    async def abort(self, request_id: str) -> None:
        """Abort a request whose stream was closed, for servers behind a proxy that does not pass the end on."""
        body = {"request_ids": [f"generate-tokens-{request_id}"]}
        with as_server_error():
            await self._client.post("/abort_requests", json=body, timeout=CONNECT_SECONDS)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def _client_options(address: str, timeout_seconds: float, key: str) -> dict[str, Any]:
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request
    return {
        "base_url": address,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS)),
        "limits": httpx2.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS
        ),
        "trust_env": False,  # proxy settings of the environment are ignored
    }


def raise_for_status(address: str, reply: httpx2.Response) -> None:
    """Raise an error if the status of a reply, which was read, is an error."""
    status = reply.status_code
    if status < 400:
        return
    try:
        message = _message(reply.json())
    except ValueError:
        message = reply.text[:200]
    path = reply.request.url.path
    if status in (401, 403) and "scale-out" not in message.lower():
        raise ConfigError(f"{address} rejects the API key ({message}); set VLLM_API_KEY to the server's --api-key")
    if status == 403 or (status == 404 and "does not exist" not in message):
        raise ConfigError(f"{address} has no {path}; {START_HINT}")
    if status in (400, 404, 422):
        raise RequestError(f"{address} rejects the request: {message}")
    raise ServerError(f"{path} returned status {status}: {message}")


def _raise_for_event(address: str, event: Any) -> None:
    """Raise an error if an event of a stream is an error."""
    if "error" in event:
        if isinstance(event["error"], dict) and event["error"].get("code") in (400, 404, 422):
            raise RequestError(f"{address} rejects the request: {_message(event)}")
        raise ServerError(_message(event))


@contextmanager
def as_server_error() -> Iterator[None]:
    """Convert errors of the transport and of the protocol to ServerError."""
    try:
        yield
    except httpx2.TimeoutException as error:
        raise ConnectionFailed(f"timeout ({type(error).__name__})") from error
    except httpx2.HTTPError as error:
        raise ConnectionFailed(f"{type(error).__name__}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ServerError(f"not a reply of vLLM ({type(error).__name__}: {error})") from error


def request_body(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, model: str, weights: str, request_id: str
) -> dict[str, Any]:
    """The body of a generate request. cache_salt is the version name of the weights, so that cached blocks of other
    weights are never used."""
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
        "logprobs": count + 1 if count else 0,  # vLLM includes the sampled token in the count
    }
    if sampling.allowed_token_ids:
        params["allowed_token_ids"] = list(sampling.allowed_token_ids)
    return {
        "request_id": request_id,
        "model": model,
        "token_ids": list(prompt_token_ids),
        "cache_salt": weights,
        "sampling_params": params,
    }


def server_seed(seed: int) -> int:
    """A hash of the seed. vLLM samples completion k of a request with seed + k, so that requests with consecutive seeds
    would otherwise share completions."""
    value = numpy.array([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=numpy.uint64)
    with numpy.errstate(over="ignore"):
        return int(splitmix64(value)[0] >> numpy.uint64(2))


def check_sampling(sampling: SamplingParams) -> None:
    """Raise RequestError for parameters that a server does not support, or silently changes."""
    if sampling.thinking_budget is not None:
        raise RequestError(
            f"thinking_budget={sampling.thinking_budget} is not supported by vLLM servers; remove it, or sample in "
            "this process (no servers.addresses)",
            "thinking_budget",
        )
    if sampling.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs are not read from vLLM servers; ask a vLLM server itself, or sample in this process",
            "prompt_logprobs",
        )
    if 0 < sampling.temperature < MIN_TEMPERATURE:
        raise RequestError(
            f"temperature={sampling.temperature} would be raised to {MIN_TEMPERATURE} by vLLM; use 0 or at least "
            f"{MIN_TEMPERATURE}",
            "temperature",
        )


def completion(choice: dict[str, Any], sampling: SamplingParams, weights: str | None, version: int) -> Completion:
    """The Completion of a choice in vLLM's reply, or of a part of a stream. weights: None: any version name."""
    versions = {span["version"] for span in choice["weight_versions"] or ()}
    if weights is not None and versions - {weights}:
        raise WrongWeights(f"the server used weights {sorted(versions - {weights})[0]!r} instead of {weights!r}")
    tokens, content = tuple(choice["token_ids"]), choice["logprobs"]["content"] or ()
    logprobs = tuple(float(entry["logprob"]) for entry in content)
    if tuple(entry["token_id"] for entry in content) != tokens:
        raise ServerError("log-probabilities do not belong to the sampled tokens")
    if any(value <= MIN_LOGPROB or math.isnan(value) for value in logprobs):
        raise RequestError("the model's logits are not finite; check the weights")
    reason = choice["finish_reason"]
    if reason is not None and reason not in REASONS:
        raise ServerError(f"unknown finish reason {reason!r}")
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
    """The `count` most likely tokens; vLLM also lists the sampled token, which may not be among them."""
    likely = sorted((entry for entry in entries if entry["logprob"] > MIN_LOGPROB), key=lambda entry: entry["rank"])
    return tuple((entry["token_id"], float(entry["logprob"])) for entry in likely if entry["rank"] <= count)


def new_id() -> str:
    """A unique request id."""
    return uuid.uuid4().hex


def _message(reply: Any) -> str:
    """The message of an error reply."""
    error = reply.get("error", reply.get("detail", reply)) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
