"""The engine's interface over a pool of vLLM servers, so that recipes draw elsewhere by one setting.

Weights go to the servers as a checkpoint in a folder that both sides see. Every answer says which weights drew it; one
of others is thrown away, and the server gets the weights again. A server that fails is left out until it answers again;
its requests go to the others.
"""

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
from thinkstack.engine.sampler import is_plain
from thinkstack.engine.vllm import OtherWeights, Server, ServerFailed, check_sampling, new_id
from thinkstack.models.precision import DTYPES, inference_copy, resolve_precision
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, ConfigError, RequestError, SamplingParams

log = logging.getLogger(__name__)

KEY = "VLLM_API_KEY"
"""Environment variable with the servers' key."""
AGAIN_SECONDS, POLL_SECONDS = 5.0, 0.2
"""Between two looks at a failed server; between two looks for a free one."""
PROBE = SamplingParams(temperature=2.0, max_tokens=16)
"""SampledTokens from new weights to see that they have arrived: at this temperature, log-probabilities of the model
itself are others than those drawn from."""


@dataclass(frozen=True, kw_only=True)
class ServersConfig:
    """vLLM servers that draw instead of this process; how to start them is said in docs/internals/engine.md."""

    addresses: tuple[str, ...] = ()
    """Each as http://host:port; empty draws in this process."""
    weights_folder: str = ""
    """Folder that this process and all servers see at the same path, for weights on their way; "" is one of the
    system's temporary ones, for servers on this machine."""
    in_flight: Count = 64
    """Requests that a server gets at once."""
    timeout_seconds: Positive = 600.0
    """Longest wait for the answers to one request."""
    retries: CountOrZero = 2
    """Further tries for a request that a server fails to answer."""
    patience_seconds: Positive = 180.0
    """How long to wait for a server to come back where none is left."""
    tolerance_nats: Positive = 0.1
    """Mean difference of log-probabilities between a server and this process that is put down to rounding; servers that
    quantize need more."""

    def __post_init__(self) -> None:
        if self.in_flight < 1 or self.retries < 0:
            raise ConfigError(f"in_flight={self.in_flight} must be at least 1 and retries={self.retries} at least 0")
        if len(set(self.addresses)) < len(self.addresses):
            raise ConfigError(f"servers.addresses={list(self.addresses)} names a server twice; name each once")


class Member:
    """A server of the pool and how it is doing."""

    def __init__(self, server: Server):
        self.server = server
        self.outstanding = 0
        """Requests it has not answered yet."""
        self.failure: str | None = "not connected yet"
        """Why it is left out; None while it answers."""
        self.next_look = 0.0
        """When to look at a failed one again, on the monotonic clock."""
        self.is_raw = False
        """Whether it reports the model's own log-probabilities."""


def open_engine(model: Transformer, cfg: EngineConfig, servers: ServersConfig) -> AnyEngine:
    """The engine that draws from `model`: servers where some are named, else this process."""
    return RemoteEngine(model, cfg, servers) if servers.addresses else Engine(model, cfg)


class RemoteEngine:
    """A pool of servers with the weights of one model."""

    def __init__(
        self,
        model: Transformer,
        cfg: EngineConfig,
        servers: ServersConfig,
        version: int = 0,
        transport: httpx2.BaseTransport | None = None,
    ):
        """Gives the servers the weights of `model`. transport: of httpx2, for tests.

        Raises ConfigError if none of them can take them, or cfg asks for what servers do not do.
        """
        if cfg.return_routed_experts:
            raise ConfigError(
                "router_replay (return_routed_experts of an engine) is set, but servers do not return the experts they "
                "used; leave it out, or sample in this process (no servers.addresses)"
            )
        if cfg.weights != "plain":
            raise ConfigError(
                f"weights={cfg.weights!r}: servers pack by a setting of their own (--quantization) and get plain "
                "weights; use weights='plain'"
            )
        self.cfg, self.servers = cfg, servers
        shared = Path(servers.weights_folder or tempfile.gettempdir()).absolute()
        shared.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="thinkstack-", dir=shared)  # goes when the engine does
        os.chmod(self._folder.name, 0o755)  # servers may be another user's
        key = os.environ.get(KEY, "")
        self.members = [Member(Server(each, servers.timeout_seconds, key, transport)) for each in servers.addresses]
        self._changed, self._under_way = threading.Lock(), set[str]()
        self._failed = 0
        self._last_error: str | None = None
        self._weights: Path | None = None
        self.max_model_len = min(cfg.max_model_len or model.cfg.max_positions, model.cfg.max_positions)
        self.load_weights(model, version)
        if not any(member.failure is None for member in self.members):
            raise ConfigError(f"none of the servers can be used: {self._failures()}")

    # -- weights

    def load_weights(self, model: Transformer, version: int, running: WhileRunning = "refuse") -> None:
        """Give the weights of `model` to all servers; adapters are merged. Servers that fail get them when they are
        back. running: what becomes of answers being drawn; servers cannot "keep" them.

        Raises RequestError where that is "refuse" and there are some.
        """
        if running == "keep":
            raise RequestError(
                'running="keep" would mix old context with new weights on a server; use "drain" or "abort"'
            )
        if running == "refuse" and self._under_way:
            raise RequestError("weights cannot change while answers are being drawn; finish or abort them first")
        name, before = f"{uuid.uuid4().hex[:16]}:{version}", self._weights
        folder = Path(self._folder.name) / name.replace(":", "-")
        save_model(
            folder, inference_copy(model, DTYPES[resolve_precision(self.cfg.dtype)])
        )  # if the disk refuses, the old ones stay
        self._model, self.version, self._name, self._weights = model, version, name, folder
        with ThreadPoolExecutor(len(self.members)) as threads:
            list(threads.map(lambda member: self._bring_up(member, running == "abort"), self.members))
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    def _bring_up(self, member: Member, aborts: bool = False) -> bool:
        """Connect, hand the weights over unless they are there, and see that they are these. Returns whether the server
        can be used; why not is kept."""
        server = member.server
        try:
            context = server.connect()
            if self.cfg.max_model_len > context:
                raise ConfigError(
                    f"max_model_len={self.cfg.max_model_len:,} exceeds the {context:,} of {server.address}; "
                    f"start it with --max-model-len {self.cfg.max_model_len}"
                )
            if server.weights() != self._name:
                assert self._weights is not None
                server.load(self._weights, self._name, "abort" if aborts else "wait")
            member.is_raw = self._compare(server)
        except (ServerFailed, RequestError, ConfigError) as error:
            self._leave_out(member, str(error))
            return False
        with self._changed:
            self.max_model_len = min(self.max_model_len, context)
            if member.failure not in (None, "not connected yet"):
                log.info("%s answers again", server.address)
            member.failure = None
        return True

    @torch.no_grad()
    def _compare(self, server: Server) -> bool:
        """See that a server draws from the weights it was given. Returns whether it reports the model's own
        log-probabilities instead of those that were drawn from."""
        size, device = self._model.cfg.vocab_size, next(self._model.parameters()).device
        prompt = [(37 * place + 11) % size for place in range(8)]
        (found,) = server.generate(prompt, PROBE, self._name, self.version, new_id())
        ids = torch.tensor([[*prompt, *found.token_ids]], device=device)
        logits = self._model(ids[:, :-1])[0, len(prompt) - 1 :].double().cpu()
        theirs = torch.tensor(found.logprobs, dtype=torch.float64)
        drawn, own = (
            float((row.log_softmax(-1)[range(len(theirs)), found.token_ids] - theirs).abs().mean())
            for row in (logits / PROBE.temperature, logits)
        )
        if not min(drawn, own) <= self.servers.tolerance_nats:
            raise ConfigError(
                f"{server.address} draws from other weights than it was given: log-probabilities differ by "
                f"{min(drawn, own):.2f} nats on average (tolerance_nats={self.servers.tolerance_nats}); start it with "
                "a checkpoint of this very model, or raise tolerance_nats if it quantizes"
            )
        return own < drawn

    # -- requests

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Answer all prompts: sampling.n completions for each. on_finish is told of each as soon as it is answered.

        Raises RequestError for what is refused, and for a request that no server answers.
        """
        pairs = [(self._check(*pair), pair[1]) for pair in zip(prompts, samplings, strict=True)]
        many = min(len(pairs), self.servers.in_flight * len(self.members))
        threads, halt = ThreadPoolExecutor(max(many, 1)), threading.Event()
        try:
            waiting = [threads.submit(self._answer, prompt, sampling, halt) for prompt, sampling in pairs]
            place_of = {future: place for place, future in enumerate(waiting)}
            for done in as_completed(waiting):
                completions = done.result()
                if on_finish is not None:
                    on_finish(place_of[done], completions)
        except BaseException:
            halt.set()
            threads.shutdown(wait=False, cancel_futures=True)
            self._abort_all()
            raise
        finally:
            threads.shutdown()
        return [done.result() for done in waiting]

    def stream(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Draw one answer and yield its tokens as they come; leaving the loop early aborts it. A server that fails
        before the first token is replaced by another."""
        if sampling.n != 1:
            raise RequestError(f"a stream carries one answer, not n={sampling.n}")
        prompt_token_ids = self._check(prompt_token_ids, sampling)
        failures: list[str] = []
        while True:
            seen = False
            with self._served(sampling, failures, threading.Event()) as (member, request_id):
                for tokens in member.server.stream(prompt_token_ids, sampling, self._name, self.version, request_id):
                    seen = True
                    yield from tokens
                return
            if seen:
                raise RequestError(f"the answer broke off: {failures[-1]}; ask again")

    def health(self) -> Health:
        """How it is; alive while any server is."""
        with self._changed:
            return Health(
                alive=any(member.failure is None for member in self.members),
                running=sum(member.outstanding for member in self.members),
                waiting=0,
                failed=self._failed,
                last_error=self._last_error,
                version=self.version,
            )

    def close(self) -> None:
        """Remove the weights on their way, and close all connections."""
        self._folder.cleanup()
        for member in self.members:
            member.server.close()

    def _check(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
        """The prompt's ids. A server's engine may die of a request that cannot be served; none of these gets there."""
        check_sampling(sampling)
        return check_request(prompt, sampling, self.max_model_len, self._model.cfg.vocab_size)

    def _answer(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, halt: threading.Event
    ) -> list[Completion]:
        failures: list[str] = []
        while True:
            with self._served(sampling, failures, halt) as (member, request_id):
                return member.server.generate(prompt_token_ids, sampling, self._name, self.version, request_id)

    @contextmanager
    def _served(
        self, sampling: SamplingParams, failures: list[str], halt: threading.Event
    ) -> Iterator[tuple[Member, str]]:
        """A server for a request, and a name for it. The server's failing ends the block without an exception and is
        noted, but for one failure too many: RequestError. halt: set once nobody waits for the answer."""
        member, request_id = self._pick(halt), new_id()
        try:
            if sampling.raw_logprobs != member.is_raw and not _is_same_raw(sampling):
                raise RequestError(_other_kind(member))
            with self._changed:
                self._under_way.add(request_id)
            yield member, request_id
        except ServerFailed as error:
            failures.append(f"{member.server.address}: {error}")
            with self._changed:
                self._failed += 1
            self._leave_out(member, str(error), at_once=isinstance(error, OtherWeights))
            if len(failures) > self.servers.retries:
                raise RequestError(
                    f"no server answered a request, tried {len(failures)} times: {failures[-1]}"
                ) from error
        finally:
            with self._changed:
                self._under_way.discard(request_id)
                member.outstanding -= 1

    def _pick(self, halt: threading.Event) -> Member:
        """The usable server with the fewest requests, once one has room; a failed one that answers again counts."""
        since, looked = time.monotonic(), False
        while True:
            member = self._claim(looked)
            if member is not None and (member.failure is None or self._bring_up(member)):
                return member
            with self._changed:
                if member is not None:
                    member.outstanding, looked = member.outstanding - 1, True
                if any(each.failure is None for each in self.members):
                    since = time.monotonic()
            if halt.is_set():
                raise RequestError("nobody waits for this answer any more")
            if time.monotonic() - since > self.servers.patience_seconds:
                raise RequestError(f"no server is left: {self._failures()}; start one again and go on")
            time.sleep(POLL_SECONDS if member is None else 0.0)

    def _claim(self, looked: bool) -> Member | None:
        """A server to ask, or a failed one to look at again; None where all are busy. looked: whether the same request
        has looked at one already, and should not wait for another while there are servers that work."""
        with self._changed:
            now = time.monotonic()
            due = [member for member in self.members if member.failure is not None and member.next_look <= now]
            free = [
                member
                for member in self.members
                if member.failure is None and member.outstanding < self.servers.in_flight
            ]
            if not due and not free:
                return None
            member = due[0] if due and not (looked and free) else min(free, key=lambda each: each.outstanding)
            member.next_look = now + AGAIN_SECONDS
            member.outstanding += 1
            return member

    def _leave_out(self, member: Member, reason: str, at_once: bool = False) -> None:
        """Ask a server nothing until it has been looked at again. at_once: the next request may do so."""
        with self._changed:
            self._last_error = f"{member.server.address}: {reason}"
            if member.failure is None:
                log.warning("%s is left out: %s", member.server.address, reason)
                member.next_look = time.monotonic() + (0.0 if at_once else AGAIN_SECONDS)
            member.failure = reason

    def _abort_all(self) -> None:
        """End what is under way, where the server still listens."""
        with self._changed:
            names = list(self._under_way)
        for member in self.members:
            if names and member.failure is None:
                with suppress(ServerFailed, RequestError, ConfigError):
                    member.server.abort(names)

    def _failures(self) -> str:
        return "; ".join(f"{each.server.address}: {each.failure}" for each in self.members if each.failure is not None)


def _is_same_raw(sampling: SamplingParams) -> bool:
    """Whether the model's own log-probabilities are those drawn from."""
    is_unfiltered = sampling.top_p == 1 and not sampling.top_k and not sampling.min_p
    return is_plain(sampling) and is_unfiltered and sampling.temperature in (0, 1)


def _other_kind(member: Member) -> str:
    wanted, other = ("processed", "raw") if member.is_raw else ("raw", "processed")
    return (
        f"{member.server.address} reports {other} log-probabilities, this request (raw_logprobs={not member.is_raw}) "
        f"asks for {wanted} ones; start it with --logprobs-mode {wanted}_logprobs"
    )
