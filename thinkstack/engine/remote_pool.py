"""A pool of vLLM servers that have the same model and weights, and the state of each.

Threads check the servers; a server that fails gets no requests until a check succeeds.
"""

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from thinkstack.engine.interface import Overloaded
from thinkstack.engine.vllm import AsyncServer, Server, ServerError
from thinkstack.types import ConfigError, RequestError

log = logging.getLogger(__name__)
SILENCE_SECONDS = 120.0
"""Maximum time between two parts of a stream."""


@dataclass(frozen=True, kw_only=True)
class ServedByVllm:
    """What all servers of a pool have in common."""

    model: str
    """Name of the model."""
    max_model_len: int
    reports_raw_logprobs: bool
    """Whether log-probabilities are those at temperature 1 (--logprobs-mode raw_logprobs)."""


class AttachedServer:
    """A server of the pool and its state."""

    def __init__(self, address: str, key: str):
        self.checks = Server(address, SILENCE_SECONDS, key)
        """For the thread that checks the server."""
        self.streams = AsyncServer(self.checks.address, SILENCE_SECONDS, key)
        """For the event loop."""
        self.address = self.checks.address
        self.failure: str | None = "not connected yet"
        """Why the server gets no requests."""
        self.outstanding = 0
        """Number of open streams."""
        self.weights = ""
        """Version name of the weights, as the server has reported it last."""
        self.has_priority = True
        """Whether the server was started with --scheduling-policy priority."""
        self.has_weight_info = True
        """Whether the server tells its weights' name (VLLM_SERVER_DEV_MODE=1); else only its completions do."""
        self.last_seen = time.monotonic()
        """Time of the last successful check."""

    def exclude(self, failure: str) -> None:
        """Send no requests until a check succeeds."""
        if self.failure is None:
            log.warning("%s is unavailable: %s", self.address, failure)
        self.failure = failure

    def note_weights(self, name: str) -> None:
        """The server has reported the version name of its weights; with another one its cache is not used again."""
        if name and name != self.weights:
            if self.weights:
                log.info("%s has other weights now: %s, before %s", self.address, name, self.weights)
            self.weights = name

    def describe(self, texts: Mapping[str, Sequence[int]]) -> ServedByVllm:
        """What the server serves. texts: texts with the token ids that its tokenizer must give. Raises ServerError,
        ConfigError, RequestError."""
        max_model_len = self.checks.connect()
        for text, token_ids in texts.items():
            if (found := self.checks.tokenize(text)) != list(token_ids):
                raise ConfigError(
                    f"{self.address} has another tokenizer than the model's: {text[:20]!r}... is {found[:8]}... there, "
                    f"and {list(token_ids[:8])}... here; start it with the same model"
                )
        try:
            weights, is_raw = self.checks.probe(priority=-1)
            self.has_priority = True
        except (RequestError, ServerError):
            weights, is_raw = self.checks.probe()
            self.has_priority = False
        self.note_weights(weights)
        return ServedByVllm(model=self.checks.model, max_model_len=max_model_len, reports_raw_logprobs=is_raw)

    def check(self) -> None:
        """Check a server that is available. Raises ServerError, ConfigError, RequestError."""
        self.checks.connect()
        if self.has_weight_info:
            try:
                self.note_weights(self.checks.weights())
            except ConfigError:
                self.has_weight_info = False


class ServerPool:
    """Servers that are alike. It attaches to the weights that they have, and never changes them."""

    def __init__(self, addresses: Sequence[str], key: str, texts: Mapping[str, Sequence[int]], check_seconds: float):
        """texts: texts with the token ids that the servers' tokenizer must give. check_seconds: time between two checks
        of a server. Raises ConfigError if no server is available, or if servers differ."""
        self.servers = [AttachedServer(address, key) for address in addresses]
        self._texts, self._check_seconds, self._closed = texts, check_seconds, threading.Event()
        found: ServedByVllm | None = None
        for server in self.servers:
            try:
                found = self._connect(server, found)
            except ServerError as error:
                server.failure = str(error)
                log.warning("%s is unavailable: %s", server.address, error)
            except RequestError as error:
                raise ConfigError(str(error)) from error
        if found is None:
            failures = "; ".join(f"{server.address}: {server.failure}" for server in self.servers)
            raise ConfigError(f"no vLLM server is available: {failures}")
        self.served = found
        names = {server.weights: server.address for server in self.available}
        if len(names) > 1:
            (one, first), (other, second) = list(names.items())[:2]
            raise ConfigError(f"{first} has the weights {one!r} and {second} {other!r}; give them the same weights")
        for server in self.servers:
            threading.Thread(target=self._watch, args=(server,), name="vllm-check", daemon=True).start()

    @property
    def available(self) -> list[AttachedServer]:
        """The servers that get requests."""
        return [server for server in self.servers if server.failure is None]

    def pick(self, preferred: AttachedServer | None, failed: Collection[AttachedServer]) -> AttachedServer:
        """An available server that is not in `failed`: the preferred one, else the one with the fewest streams. Raises
        Overloaded."""
        available = [server for server in self.available if server not in failed]
        if not available:
            raise Overloaded("the model's servers are unavailable; retry later")
        return preferred if preferred in available else min(available, key=lambda server: server.outstanding)

    async def close(self) -> None:
        """End the checks, and close the connections of streams."""
        self._closed.set()
        for server in self.servers:
            await server.streams.close()

    def _connect(self, server: AttachedServer, wanted: ServedByVllm | None) -> ServedByVllm:
        """Make a server available. Raises ServerError, RequestError, and ConfigError if it does not fit."""
        found = server.describe(self._texts)
        if wanted is not None and found != wanted:
            raise ConfigError(f"{server.address} differs from another server of the pool: {found}, not {wanted}")
        server.failure, server.last_seen = None, time.monotonic()
        return found

    def _watch(self, server: AttachedServer) -> None:
        """Check a server again and again, in a thread."""
        while not self._closed.wait(self._check_seconds):
            try:
                if server.failure is None:
                    server.check()
                else:
                    self._connect(server, self.served)
                    log.info("%s is available again", server.address)
            except (ServerError, ConfigError, RequestError) as error:
                server.exclude(str(error))
            else:
                server.last_seen = time.monotonic()
        server.checks.close()
