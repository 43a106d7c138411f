"""One attempt at a request: streamed if the server can, read to its end, and counted if it breaks off."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx2

from thinkstack.endpoint.budget import Budget
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.reply import ReplyReader
from thinkstack.endpoint.requests import EndpointCall, EndpointReply, encode_body, make_reply
from thinkstack.endpoint.server import CONNECT_SECONDS, AttemptFailed, OpenAIServer

log = logging.getLogger(__name__)
MODES: tuple[dict[str, Any], ...] = ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}, {})
"""Fields of the ways to ask for a reply, best first; a server that refuses one is asked in the next."""
WHOLE = len(MODES) - 1
REFUSALS = {400, 404, 405, 422, 501}
"""Statuses that may mean that the server has no streams."""
BROKEN_REASONS = {"abort", "error", "insufficient_system_resource"}
"""Finish reasons of vLLM, SGLang and DeepSeek for a completion that the server gave up."""
KEEP_ALIVE_SECONDS = 2.0
"""Time after which an idle connection is not used again; many servers close it after 5 seconds."""
END_SECONDS = 2.0
"""Time for the end of a body after the mark of the end of its stream."""
LIST_ATTEMPTS = 4


class Attempts:
    """The connections to a server."""

    def __init__(
        self,
        cfg: EndpointConfig,
        server: OpenAIServer,
        budget: Budget,
        time: Callable[[], float],
        transport: httpx2.AsyncBaseTransport | None = None,
    ):
        """budget: counts replies that broke off. time: a clock in seconds. transport: an httpx2 transport, for
        tests."""
        self._cfg, self._server, self._budget, self._time = cfg, server, budget, time
        self._transport, self._mode = transport, 0
        self._opened: httpx2.AsyncClient | None = None

    @property
    def _client(self) -> httpx2.AsyncClient:
        if self._opened is None:
            seconds = self._cfg.timeout_seconds
            self._opened = httpx2.AsyncClient(
                headers=self._server.headers,
                timeout=httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS), pool=None),
                limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS),
                transport=self._transport,
            )
        return self._opened

    async def close(self) -> None:
        """Close all connections."""
        if self._opened is not None:
            await self._opened.aclose()

    async def list_models(self) -> list[str]:
        """The models that the server lists. Raises AttemptFailed after a few attempts."""
        for attempt in range(1, LIST_ATTEMPTS + 1):
            try:
                with self._server.as_failure():
                    reply = await self._client.get(f"{self._server.url}/models", timeout=CONNECT_SECONDS)
                    return self._server.names_of(reply)
            except AttemptFailed as failure:
                if attempt == LIST_ATTEMPTS or not failure.can_retry:
                    raise
            await asyncio.sleep(2.0**attempt / 4)
        raise AssertionError("the last attempt returns or raises")

    async def send(self, call: EndpointCall, attempt: int) -> EndpointReply:
        """The reply to a request, as a stream with usage if the server can. Raises AttemptFailed."""
        while True:
            mode = self._mode if call.can_stream else WHOLE
            try:
                return await self._send(call, mode, attempt)
            except AttemptFailed as failure:
                if mode == WHOLE or failure.status not in REFUSALS or not self._blames_stream(failure):
                    raise
                if self._mode == mode:
                    log.info("%s refuses %s (%s); asking without it", self._server.url, list(MODES[mode])[-1], failure)
                    self._mode += 1

    def _blames_stream(self, failure: AttemptFailed) -> bool:
        return "stream" in str(failure).replace(self._server.url, "").lower()

    async def _send(self, call: EndpointCall, mode: int, attempt: int) -> EndpointReply:
        reader, started = ReplyReader(self._server), self._time()
        try:
            with self._server.as_failure():
                await self._read(call, mode, reader)
                reader.finish()
            if reader.finish_reason in BROKEN_REASONS:
                message = f"{self._server.url} gave up an answer (finish_reason {reader.finish_reason!r})"
                raise AttemptFailed(message, can_retry=True)
        except asyncio.CancelledError:
            self._count_lost(call, mode, reader)
            raise
        except AttemptFailed as failure:
            reader.has_begun |= failure.is_timeout and not failure.is_unreachable
            if not reader.finish_reason or reader.finish_reason in BROKEN_REASONS:
                self._count_lost(call, mode, reader)
                raise
            reader.finish(is_broken=True)  # the connection broke after the last token: the answer is whole
        return make_reply(reader, call, self._time() - started, attempt)

    async def _read(self, call: EndpointCall, mode: int, reader: ReplyReader) -> None:
        """Send a request and read its reply."""
        seconds = self._cfg.max_request_seconds
        try:
            async with asyncio.timeout(seconds or None) as limit, self._stream(call, mode) as reply:
                if not reply.is_success:
                    await reply.aread()
                    raise self._server.failure_of(reply)
                reader.has_begun = True
                async for data in reply.aiter_bytes():
                    reader.feed(data)
                    if reader.is_done:  # what follows is the end of the body, but some servers keep it open
                        limit.reschedule(asyncio.get_running_loop().time() + END_SECONDS)
        except TimeoutError as error:
            message = f"{self._server.url} did not finish an answer within max_request_seconds={seconds:g}"
            failure = AttemptFailed(message, can_retry=True)
            failure.is_timeout = True
            raise failure from error

    def _stream(self, call: EndpointCall, mode: int) -> Any:
        body = encode_body({**call.body, **MODES[mode]} if call.can_stream else call.body)
        headers = {"Content-Type": "application/json"}
        return self._client.stream("POST", self._server.url + call.path, content=body, headers=headers)

    def _count_lost(self, call: EndpointCall, mode: int, reader: ReplyReader) -> None:
        """Count what the server may have charged for a reply that broke off: the prompt and the text that arrived, at
        one token per byte; without a stream, max_tokens."""
        if reader.has_begun:
            most = call.max_tokens if call.max_tokens is not None else reader.num_bytes
            self._budget.add_lost(call.max_prompt_tokens, most if mode == WHOLE else min(reader.num_bytes, most))
