"""The engine interface over a pool of vLLM servers, so that one setting moves sampling to servers.

Weights are sent as a checkpoint in a folder that this process and the servers can read. Every completion has the
version of the weights; a completion with a different version is discarded, and the server gets the weights again. A
failed server gets no requests until it responds again; its requests are sent to the other servers."""

import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import torch

from thinkstack.checkpoint.model import save_model
from thinkstack.config import Count, CountOrZero, Positive
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.interface import AnyEngine, Health, OnFinish, WhileRunning, check_request
from thinkstack.engine.logits_processor import needs_no_processing
from thinkstack.engine.vllm import Server, ServerError, WrongWeights, check_sampling, new_id
from thinkstack.kernels.precision import DTYPES, resolve_precision
from thinkstack.models.precision import inference_copy
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, ConfigError, RequestError, SamplingParams

log = logging.getLogger(__name__)

KEY = "VLLM_API_KEY"
"""Environment variable with the servers' API key."""
RETRY_SECONDS, POLL_SECONDS = 5.0, 0.2
"""Seconds between two checks of a failed server, and between two searches for a free server."""
PROBE_PARAMS = SamplingParams(temperature=2.0, max_tokens=16)
"""Parameters of the request that verifies new weights: at this temperature, raw log-probabilities differ from
log-probabilities under the sampling distribution."""


@dataclass(frozen=True, kw_only=True)
class ServersConfig:
    """vLLM servers that sample instead of this process; docs/internals/engine.md describes how to start them."""

    addresses: tuple[str, ...] = ()
    """Addresses as http://host:port; empty: sample in this process."""
    weights_folder: str = ""
    """Folder for the transfer of weights, at the same path for this process and all servers; "": a temporary folder of
    the system, for servers on this machine."""
    in_flight: Count = 64
    """Maximum number of concurrent requests per server."""
    timeout_seconds: Positive = 600.0
    """Maximum time for the completions of one request."""
    retries: CountOrZero = 2
    """Number of further attempts for a request after a server has failed."""
    patience_seconds: Positive = 180.0
    """Maximum time to wait for a server while no server is available."""
    tolerance_nats: Positive = 0.1
    """Maximum mean difference of log-probabilities between a server and this process that counts as rounding; servers
    with quantization need a larger value."""

    def __post_init__(self) -> None:
        if self.in_flight < 1 or self.retries < 0:
            raise ConfigError(f"in_flight={self.in_flight} must be at least 1 and retries={self.retries} at least 0")
        if len(set(self.addresses)) < len(self.addresses):
            raise ConfigError(
                f"servers.addresses={list(self.addresses)} contains an address twice; list each address once"
            )


class ServerState:
    """A server of the pool and its state."""

    def __init__(self, server: Server):
        self.server = server
        self.outstanding = 0
        """Number of running requests of the server."""
        self.failure: str | None = "not connected yet"
        """Why the server is unavailable; None while it is available."""
        self.next_check = 0.0
        """Time of the next check of a failed server, on the monotonic clock."""
        self.reports_raw_logprobs = False
        """Whether the server reports raw log-probabilities (--logprobs-mode raw_logprobs)."""


def open_engine(model: Transformer, cfg: EngineConfig, servers: ServersConfig) -> AnyEngine:
    """The engine that samples from `model`: a pool of servers if servers.addresses is set, otherwise this process."""
    return RemoteEngine(model, cfg, servers) if servers.addresses else Engine(model, cfg)


class RemoteEngine:
    """An engine that samples on a pool of servers with the weights of one model."""

    def __init__(
        self,
        model: Transformer,
        cfg: EngineConfig,
        servers: ServersConfig,
        version: int = 0,
        transport: httpx2.BaseTransport | None = None,
    ):
        """Loads the weights of `model` into the servers. transport: an httpx2 transport, for tests.

        Raises ConfigError if no server accepts the weights, or if servers do not support a setting in cfg.
        """
        if cfg.return_routed_experts:
            raise ConfigError(
                "router_replay (return_routed_experts of the engine) is set, but servers do not return routed experts; "
                "remove the setting, or sample in this process (no servers.addresses)"
            )
        if cfg.quantization != "none":
            raise ConfigError(
                f"quantization={cfg.quantization!r}: quantization of servers is set by their option --quantization; "
                "use quantization='none'"
            )
        self.cfg, self.servers = cfg, servers
        shared = Path(servers.weights_folder or tempfile.gettempdir()).absolute()
        shared.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="thinkstack-", dir=shared)  # deleted with the engine
        os.chmod(self._folder.name, 0o755)  # servers may run as another user
        key = os.environ.get(KEY, "")
        self.server_states = [
            ServerState(Server(each, servers.timeout_seconds, key, transport)) for each in servers.addresses
        ]
        self._changed, self._in_flight = threading.Lock(), set[str]()
        self._failed = 0
        self._last_error: str | None = None
        self._weights: Path | None = None
        self.max_model_len = min(cfg.max_model_len or model.cfg.max_positions, model.cfg.max_positions)
        self.load_weights(model, version)
        if not any(state.failure is None for state in self.server_states):
            raise ConfigError(f"no server is available: {self._failures()}")

    # -- weights

    def load_weights(self, model: Transformer, version: int, running: WhileRunning = "refuse") -> None:
        """Load the weights of `model`, with adapters merged, into all servers. Failed servers get the weights when they
        respond again. running: what happens to running requests; servers do not support running="keep".

        Raises RequestError if running="refuse" and requests are running.
        """
        if running == "keep":
            raise RequestError(
                'running="keep" would combine a cache of old weights with new weights; use running="drain" or "abort"'
            )
        if running == "refuse" and self._in_flight:
            raise RequestError("weights cannot change while requests are running; finish or abort them first")
        name, before = f"{uuid.uuid4().hex[:16]}:{version}", self._weights
        folder = Path(self._folder.name) / name.replace(":", "-")
        save_model(
            folder, inference_copy(model, DTYPES[resolve_precision(self.cfg.dtype)])
        )  # after an error the old weights stay in use
        self._model, self.version, self._name, self._weights = model, version, name, folder
        with ThreadPoolExecutor(len(self.server_states)) as threads:
            list(threads.map(lambda state: self._connect(state, running == "abort"), self.server_states))
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    def _connect(self, state: ServerState, aborts: bool = False) -> bool:
        """Connect, load the weights unless the server has them, and verify them. Returns whether the server is
        available; sets state.failure if not."""
        server = state.server
        try:
            context = server.connect()
            if self.cfg.max_model_len > context:
                raise ConfigError(
                    f"max_model_len={self.cfg.max_model_len:,} exceeds the context length {context:,} of "
                    f"{server.address}; "
                    f"start it with --max-model-len {self.cfg.max_model_len}"
                )
            if server.weights() != self._name:
                assert self._weights is not None
                server.load(self._weights, self._name, "abort" if aborts else "wait")
            state.reports_raw_logprobs = self._verify_weights(server)
        except (ServerError, RequestError, ConfigError) as error:
            self._exclude(state, str(error))
            return False
        with self._changed:
            self.max_model_len = min(self.max_model_len, context)
            if state.failure not in (None, "not connected yet"):
                log.info("%s is available again", server.address)
            state.failure = None
        return True

    @torch.no_grad()
    def _verify_weights(self, server: Server) -> bool:
        """Raise ConfigError unless a server samples from the loaded weights. Returns whether the server reports raw
        log-probabilities instead of log-probabilities under the sampling distribution."""
        size, device = self._model.cfg.vocab_size, next(self._model.parameters()).device
        prompt = [(37 * place + 11) % size for place in range(8)]
        (found,) = server.generate(prompt, PROBE_PARAMS, self._name, self.version, new_id())
        ids = torch.tensor([[*prompt, *found.token_ids]], device=device)
        logits = self._model(ids[:, :-1])[0, len(prompt) - 1 :].double().cpu()
        reported = torch.tensor(found.logprobs, dtype=torch.float64)
        processed, raw = (
            float((row.log_softmax(-1)[range(len(reported)), found.token_ids] - reported).abs().mean())
            for row in (logits / PROBE_PARAMS.temperature, logits)
        )
        if not min(processed, raw) <= self.servers.tolerance_nats:
            raise ConfigError(
                f"{server.address} does not sample from the loaded weights: log-probabilities differ by "
                f"{min(processed, raw):.2f} nats on average (tolerance_nats={self.servers.tolerance_nats}); start the "
                "server with a checkpoint of this model, or raise tolerance_nats if it uses quantization"
            )
        return raw < processed

    # -- requests

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Generate sampling.n completions for each prompt. on_finish is called for each prompt that is finished.

        Raises RequestError for a request that is rejected, or that fails in all attempts.
        """
        pairs = [(self._check(*pair), pair[1]) for pair in zip(prompts, samplings, strict=True)]
        num_threads = min(len(pairs), self.servers.in_flight * len(self.server_states))
        threads, cancelled = ThreadPoolExecutor(max(num_threads, 1)), threading.Event()
        try:
            waiting = [threads.submit(self._complete, prompt, sampling, cancelled) for prompt, sampling in pairs]
            place_of = {future: place for place, future in enumerate(waiting)}
            for done in as_completed(waiting):
                completions = done.result()
                if on_finish is not None:
                    on_finish(place_of[done], completions)
        except BaseException:
            cancelled.set()
            threads.shutdown(wait=False, cancel_futures=True)
            self._abort_all()
            raise
        finally:
            threads.shutdown()
        return [done.result() for done in waiting]

    def stream(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Generate one completion and yield its tokens as they arrive; leaving the loop early aborts it. If a server
        fails before the first token, another server is used."""
        if sampling.n != 1:
            raise RequestError(f"n={sampling.n}: streaming supports one completion; use n=1")
        prompt_token_ids = self._check(prompt_token_ids, sampling)
        failures: list[str] = []
        while True:
            has_tokens = False
            with self._server_for(sampling, failures, threading.Event()) as (state, request_id):
                for tokens in state.server.stream(prompt_token_ids, sampling, self._name, self.version, request_id):
                    has_tokens = True
                    yield from tokens
                return
            if has_tokens:
                raise RequestError(f"the stream was interrupted: {failures[-1]}; send the request again")

    def health(self) -> Health:
        """The state of the pool; `alive` if any server is available."""
        with self._changed:
            return Health(
                alive=any(state.failure is None for state in self.server_states),
                running=sum(state.outstanding for state in self.server_states),
                waiting=0,
                failed=self._failed,
                last_error=self._last_error,
                version=self.version,
            )

    def close(self) -> None:
        """Remove the weights folder and close all connections."""
        self._folder.cleanup()
        for state in self.server_states:
            state.server.close()

    def _check(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
        """The token ids of the prompt, after validation: an invalid request may crash the engine of a server."""
        check_sampling(sampling)
        return check_request(prompt, sampling, self.max_model_len, self._model.cfg.vocab_size)

    def _complete(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, cancelled: threading.Event
    ) -> list[Completion]:
        failures: list[str] = []
        while True:
            with self._server_for(sampling, failures, cancelled) as (state, request_id):
                return state.server.generate(prompt_token_ids, sampling, self._name, self.version, request_id)

    @contextmanager
    def _server_for(
        self, sampling: SamplingParams, failures: list[str], cancelled: threading.Event
    ) -> Iterator[tuple[ServerState, str]]:
        """A server for a request, and a request id. A failure of the server ends the block without an exception and is
        appended to `failures`; too many failures raise RequestError. cancelled: set when the caller stops waiting."""
        state, request_id = self._acquire(cancelled), new_id()
        try:
            if sampling.raw_logprobs != state.reports_raw_logprobs and not _raw_equals_processed(sampling):
                raise RequestError(_logprobs_mode_message(state))
            with self._changed:
                self._in_flight.add(request_id)
            yield state, request_id
        except ServerError as error:
            failures.append(f"{state.server.address}: {error}")
            with self._changed:
                self._failed += 1
            self._exclude(state, str(error), retry_now=isinstance(error, WrongWeights))
            if len(failures) > self.servers.retries:
                raise RequestError(
                    f"no server completed a request in {len(failures)} attempts: {failures[-1]}; check the servers"
                ) from error
        finally:
            with self._changed:
                self._in_flight.discard(request_id)
                state.outstanding -= 1

    def _acquire(self, cancelled: threading.Event) -> ServerState:
        """Wait for an available server below its request limit, and return the available server with the fewest
        requests; a failed server that responds again is available."""
        since, has_checked = time.monotonic(), False
        while True:
            state = self._try_acquire(has_checked)
            if state is not None and (state.failure is None or self._connect(state)):
                return state
            with self._changed:
                if state is not None:
                    state.outstanding, has_checked = state.outstanding - 1, True
                if any(each.failure is None for each in self.server_states):
                    since = time.monotonic()
            if cancelled.is_set():
                raise RequestError("the request was cancelled")
            if time.monotonic() - since > self.servers.patience_seconds:
                raise RequestError(f"no server is available: {self._failures()}; restart a server and resume")
            time.sleep(POLL_SECONDS if state is None else 0.0)

    def _try_acquire(self, has_checked: bool) -> ServerState | None:
        """An available server, or a failed server to check again; None if all are busy. has_checked: whether the
        request has already checked a failed server; such a request prefers available servers."""
        with self._changed:
            now = time.monotonic()
            due = [state for state in self.server_states if state.failure is not None and state.next_check <= now]
            free = [
                state
                for state in self.server_states
                if state.failure is None and state.outstanding < self.servers.in_flight
            ]
            if not due and not free:
                return None
            state = due[0] if due and not (has_checked and free) else min(free, key=lambda each: each.outstanding)
            state.next_check = now + RETRY_SECONDS
            state.outstanding += 1
            return state

    def _exclude(self, state: ServerState, reason: str, retry_now: bool = False) -> None:
        """Send no requests to a server until a check succeeds. retry_now: whether the next request may check it."""
        with self._changed:
            self._last_error = f"{state.server.address}: {reason}"
            if state.failure is None:
                log.warning("%s is unavailable: %s", state.server.address, reason)
                state.next_check = time.monotonic() + (0.0 if retry_now else RETRY_SECONDS)
            state.failure = reason

    def _abort_all(self) -> None:
        """Abort all running requests on the available servers."""
        with self._changed:
            names = list(self._in_flight)
        for state in self.server_states:
            if names and state.failure is None:
                with suppress(ServerError, RequestError, ConfigError):
                    state.server.abort(names)

    def _failures(self) -> str:
        return "; ".join(
            f"{each.server.address}: {each.failure}" for each in self.server_states if each.failure is not None
        )


def _raw_equals_processed(sampling: SamplingParams) -> bool:
    """Whether raw log-probabilities equal log-probabilities under the sampling distribution."""
    is_unfiltered = sampling.top_p == 1 and not sampling.top_k and not sampling.min_p
    return needs_no_processing(sampling) and is_unfiltered and sampling.temperature in (0, 1)


def _logprobs_mode_message(state: ServerState) -> str:
    wanted, other = ("processed", "raw") if state.reports_raw_logprobs else ("raw", "processed")
    return (
        f"{state.server.address} reports {other} log-probabilities, but this request (raw_logprobs="
        f"{not state.reports_raw_logprobs}) needs {wanted} log-probabilities; start it with --logprobs-mode "
        f"{wanted}_logprobs"
    )
