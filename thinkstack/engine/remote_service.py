"""The interface of `EngineService` over a pool of vLLM servers.

The service attaches to the weights that the servers have and never changes them, so that several processes can share
a pool. A request goes to the server with the fewest requests, to another one if that server fails before the first
token.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from itertools import count

from thinkstack.engine.grammar import StructuredOutputs
from thinkstack.engine.interface import Overloaded, ServiceStatus, check_request
from thinkstack.engine.outputs import CompletionUpdate
from thinkstack.engine.remote import KEY, RETRY_SECONDS
from thinkstack.engine.remote_completion import RemoteCompletion
from thinkstack.engine.remote_pool import AttachedServer, ServerPool
from thinkstack.engine.sequence_table import Request
from thinkstack.engine.service import EngineStopped, Generation
from thinkstack.engine.vllm import ConnectionFailed, ServerError, StreamPart, check_sampling, new_id
from thinkstack.types import ConfigError, FinishReason, RequestError, SamplingParams

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 3
"""Number of servers that a request is sent to, so that a request that crashes servers does not crash all of them."""


@dataclass(frozen=True, kw_only=True)
class RemoteStatus(ServiceStatus):
    """What the service of a pool does now. Blocks and steps are 0: vLLM's own /metrics has them."""

    weights: tuple[str, ...]
    """Version names of the weights of the available servers; several while they are replaced."""
    servers: Mapping[str, str]
    """Why each server is unavailable, by address; "" for those that are available."""


@dataclass(eq=False)
class LiveRequest:
    """A request that runs."""

    generation: Generation
    request: Request
    accepted: "asyncio.Future[None]"
    """Done when a server has accepted the first completion."""
    completions: list[RemoteCompletion]
    tasks: dict[int, "asyncio.Task[None]"] = field(default_factory=dict)
    """The task of each completion that was started."""
    give_up: asyncio.TimerHandle | None = None
    server: AttachedServer | None = None
    """The server that has the prompt in its cache."""


class RemoteService:
    """Serves requests on vLLM servers, in one event loop."""

    def __init__(
        self,
        addresses: Sequence[str],
        vocab_size: int,
        texts: Mapping[str, Sequence[int]],
        max_model_len: int = 0,
        check_seconds: float = RETRY_SECONDS,
    ):
        """texts: texts with the token ids that the servers' tokenizer must give. max_model_len: 0: that of the servers.

        Raises ConfigError if no server is available, and if servers differ from each other or from the model.
        """
        self._secret = os.environ.get(KEY, "")
        self._pool = ServerPool(addresses, self._secret, texts, check_seconds)
        self._vocab_size = vocab_size
        self._ids, self._num_sampled, self._is_closing = count(), 0, False
        self._live: dict[Request, LiveRequest] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        context = self._pool.served.max_model_len
        if max_model_len > context:
            raise ConfigError(
                f"max_model_len={max_model_len:,} exceeds the {context:,} of the servers; start them with "
                f"--max-model-len {max_model_len}"
            )
        self._max_model_len = max_model_len or context

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of prompt and completion together."""
        return self._max_model_len

    @property
    def status(self) -> RemoteStatus:
        """The state now. Running are completions with tokens, waiting the requests without a first token."""
        servers, available = self._pool.servers, self._pool.available
        started = [live for live in list(self._live.values()) if live.request.is_started]
        return RemoteStatus(
            running=sum(len(live.generation.open) for live in started),
            waiting=len(self._live) - len(started),
            free_blocks=0,
            num_blocks=0,
            num_preemptions=0,
            num_steps=0,
            step_seconds=0.0,
            num_sampled=self._num_sampled,
            seconds_since_heartbeat=time.monotonic() - max(server.last_seen for server in servers),
            failure=None if available else f"no vLLM server is available, of {len(servers)}",
            weights=tuple(sorted({server.weights for server in available})),
            servers={server.address: server.failure or "" for server in servers},
        )

    async def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        tenant: str = "",
        priority: int = 0,
        cache_salt: str = "",
        grammar: StructuredOutputs | None = None,
        max_wait: float = math.inf,
    ) -> Generation:
        """Send a request; see `EngineService.submit`. Returns when a server has accepted it. max_wait: seconds after
        which it is given up without a first token. raw_logprobs=False: log-probabilities are those that the servers
        report.

        Raises RequestError if the servers do not support the request, Overloaded if none is available, EngineStopped.
        """
        prompt = check_request(prompt_token_ids, sampling, self.max_model_len, self._vocab_size)
        check_sampling(replace(sampling, thinking_budget=None))
        if sampling.raw_logprobs and not self._pool.served.reports_raw_logprobs:
            raise RequestError(
                "the model's servers report no log-probabilities at temperature 1; leave logprobs out, or start them "
                "with --logprobs-mode raw_logprobs",
                "logprobs",
            )
        if self._is_closing:
            raise self._stopped_error()
        request = Request(
            next(self._ids), prompt, sampling, [None] * sampling.n, priority, cache_salt=cache_salt, tenant=tenant
        )
        completions = [RemoteCompletion(request, index, grammar) for index in range(sampling.n)]
        generation, loop = Generation(self, sampling.n), asyncio.get_running_loop()
        generation.request = request
        live = self._live[request] = LiveRequest(generation, request, loop.create_future(), completions)
        if max_wait < math.inf:
            live.give_up = loop.call_later(max_wait, self._give_up_waiting, live)
        self._start(live, 0)
        try:
            await live.accepted
        except BaseException:
            self._forget(live)
            raise
        return generation

    async def close(self, max_wait: float = 0.0) -> None:
        """Refuse new requests, finish the others within `max_wait` seconds, and abort the rest."""
        self._is_closing, deadline = True, time.monotonic() + max_wait
        while self._live and time.monotonic() < deadline and self.status.failure is None:
            await asyncio.sleep(0.02)
        tasks = [task for live in self._live.values() for task in live.tasks.values()]
        for live in list(self._live.values()):
            self._fail(live, self._stopped_error())
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._aborts, return_exceptions=True)
        await self._pool.close()

    def post(self, command: Callable[[], None]) -> None:
        """Execute a command; used by `Generation`."""
        command()

    async def call(self, command: Callable[[], None]) -> None:
        """Execute a command; used by `Generation`."""
        command()

    def abort_now(self, generation: Generation) -> None:
        """Abort a generation."""
        for index in sorted(generation.open):
            self._end(generation, index, "abort")

    def end_now(self, generation: Generation, index: int) -> None:
        """End one completion of a generation."""
        self._end(generation, index, "stop")

    def end_thinking_now(self, generation: Generation) -> None:
        """Close the thinking of a generation at its next token."""
        if generation.request is not None:
            generation.request.sampling = replace(generation.request.sampling, thinking_budget=0)

    def _start(self, live: LiveRequest, index: int) -> None:
        live.tasks[index] = asyncio.create_task(self._run(live, live.completions[index]))

    async def _run(self, live: LiveRequest, completion: RemoteCompletion) -> None:
        """The task of one completion."""
        try:
            await self._complete(live, completion)
        except (RequestError, Overloaded) as error:
            self._fail(live, error)
        except Exception:
            log.exception("a completion failed")
            self._fail(live, EngineStopped("the server of the model failed; send the request again"))

    async def _complete(self, live: LiveRequest, completion: RemoteCompletion) -> None:
        """Sample a completion, in one stream or several, and publish its tokens."""
        reason: FinishReason | None = None
        is_first = completion.index == 0
        while reason is None:
            injected = completion.close_thinking()
            if injected or not completion.num_left:
                reason = None if completion.num_left else "length"
                certain = tuple(((token, 0.0),) for token in injected) if live.request.sampling.top_logprobs else ()
                self._publish(live, completion, StreamPart(injected, (0.0,) * len(injected), certain), reason)
                continue
            async with aclosing(self._parts(live, completion)) as parts:
                async for part in parts:
                    if is_first and part.num_cached_tokens is not None:
                        live.request.num_cached_tokens = min(part.num_cached_tokens, len(live.request.prompt_token_ids))
                    num_taken = completion.take(part.token_ids)
                    reason = completion.finish_reason(part.finish_reason)
                    taken = StreamPart(
                        part.token_ids[:num_taken], part.logprobs[:num_taken], part.top_logprobs[:num_taken]
                    )
                    self._publish(live, completion, taken, reason)
                    if completion.must_restart:
                        break
            is_first = False

    async def _parts(self, live: LiveRequest, completion: RemoteCompletion) -> AsyncGenerator[StreamPart]:
        """The parts of the next stream, from the first server that begins it."""
        failed: set[AttachedServer] = set()
        while True:
            if len(failed) == MAX_ATTEMPTS:
                raise Overloaded(f"{MAX_ATTEMPTS} of the model's servers failed at this request; retry later")
            server, request_id = self._pool.pick(live.server, failed), new_id()
            has_tokens = is_over = False
            body, sampling = completion.next_body(self._pool.served.model, self._salt(live.request, server), request_id)
            if live.request.priority and server.has_priority:
                body["priority"] = live.request.priority
            server.outstanding += 1
            try:
                async with aclosing(server.streams.stream(body, sampling)) as parts:
                    async for part in parts:
                        if not live.accepted.done():
                            live.accepted.set_result(None)
                        if part.token_ids and not live.request.is_started:
                            self._start_others(live, server)
                        has_tokens, is_over = has_tokens or bool(part.token_ids), part.finish_reason is not None
                        server.note_weights(part.weights)
                        yield part
                return
            except (ServerError, ConfigError) as error:
                is_over = True
                failed.add(server)
                if isinstance(error, ConnectionFailed | ConfigError):
                    server.exclude(str(error))
                log.warning("%s failed during a request: %s", server.address, error)
                if has_tokens:
                    raise EngineStopped("the model's server failed in the middle; send the request again") from error
            except RequestError as error:
                is_over = True
                raise RequestError(f"vLLM {str(error).removeprefix(server.address).strip()}", error.field) from error
            finally:
                server.outstanding -= 1
                if not is_over:
                    self._abort_soon(server, request_id)

    def _start_others(self, live: LiveRequest, server: AttachedServer) -> None:
        """The first token was sampled: the other completions find the prompt in the server's cache."""
        live.request.is_started, live.server = True, server
        if live.give_up is not None:
            live.give_up.cancel()
        for index in sorted(live.generation.open - {0}):
            self._start(live, index)

    def _salt(self, request: Request, server: AttachedServer) -> str:
        """The salt of the prefix cache: of a tenant, for certain weights, and not to be guessed without the API key."""
        text = json.dumps([server.weights, request.tenant, request.cache_salt])
        return hmac.new(self._secret.encode(), text.encode(), hashlib.sha256).hexdigest()

    def _publish(
        self, live: LiveRequest, completion: RemoteCompletion, part: StreamPart, reason: FinishReason | None
    ) -> None:
        generation, index = live.generation, completion.index
        if index not in generation.open or not (part.token_ids or reason):
            return
        self._num_sampled += len(part.token_ids)
        if reason is not None:
            generation.open.discard(index)
        generation.receive(
            [CompletionUpdate(live.request, index, part.token_ids, part.logprobs, part.top_logprobs, reason)]
        )
        if not generation.open:
            self._forget(live)

    def _end(self, generation: Generation, index: int, reason: FinishReason) -> None:
        """End a completion that runs."""
        live = self._live.get(generation.request) if generation.request is not None else None
        if live is not None and index in generation.open:
            if index in live.tasks:
                live.tasks[index].cancel()
            self._publish(live, live.completions[index], StreamPart(), reason)

    def _give_up_waiting(self, live: LiveRequest) -> None:
        self._fail(live, Overloaded("the request waited too long for its turn; retry later"))

    def _fail(self, live: LiveRequest, error: Exception) -> None:
        if live.request not in self._live:
            return
        self._forget(live)
        if live.accepted.done():
            live.generation.receive(error)
        else:
            live.accepted.set_exception(error)

    def _forget(self, live: LiveRequest) -> None:
        """End the tasks of a request."""
        self._live.pop(live.request, None)
        if live.give_up is not None:
            live.give_up.cancel()
        for task in live.tasks.values():
            if task is not asyncio.current_task():
                task.cancel()

    def _abort_soon(self, server: AttachedServer, request_id: str) -> None:
        async def abort() -> None:
            with suppress(ServerError):
                await server.streams.abort(request_id)

        if server.failure is not None:
            return
        task = asyncio.create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _stopped_error(self) -> EngineStopped:
        return EngineStopped("the server is shutting down")
