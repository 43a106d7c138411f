"""OpenAI's /completions, which is also DeepSeek's fill-in-the-middle: text that continues a prompt, without a chat."""

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field, StrictBool, StrictInt, StrictStr

from thinkstack.server.api_errors import ApiError
from thinkstack.server.deepseek import FINGERPRINT, FINISH_REASONS, LEAST_LOGPROB, usage_fields
from thinkstack.server.keys import Principal
from thinkstack.server.openapi import OpenAIError, TextCompletion, errors, reply
from thinkstack.server.schema import SamplingInput, TurnRequest
from thinkstack.server.sse import KEEP_ALIVE_COMMENT, sse
from thinkstack.server.turns import Turn
from thinkstack.text.decode import TextDecoder
from thinkstack.types import RequestError

if TYPE_CHECKING:
    from thinkstack.server.app import Server


class CompletionRequest(SamplingInput):
    """The body of POST /completions."""

    prompt: StrictStr
    suffix: StrictStr | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    def turn(self) -> TurnRequest:
        """The meaning of the request. Raises RequestError for fields that contradict each other."""
        if self.echo and self.logprobs is not None:
            raise RequestError("echo and logprobs exclude each other; leave one out", "echo")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", "stream_options")
        return TurnRequest(
            model=self.model,
            prompt=self.prompt,
            suffix=self.suffix or None,
            thinking=False,
            max_tokens=self.max_tokens,
            stop=self.stop_strings,
            sampling=self.sampling_fields(),
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
            user_id=self.user_id or "",
        )


class CompletionReply:
    """The reply to a completion request."""

    def __init__(self, turn: Turn, body: CompletionRequest):
        self.turn, self.body = turn, body
        self._head = {
            "id": turn.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": FINGERPRINT,
        }
        choices = range(turn.prepared.sampling.n)
        self._offsets = [0 for _ in choices]
        self._decoders = [TextDecoder(turn.model.member.chat.tokenizer) for _ in choices]

    async def whole(self) -> dict[str, Any]:
        """The reply when all choices are finished. Raises Overloaded."""
        texts = [[self.body.prompt if self.body.echo else ""] for _ in self._offsets]
        reasons = ["stop"] * len(texts)
        async for index, event in self.turn.events():
            if index >= 0:
                texts[index].append(event.text)
                reasons[index] = FINISH_REASONS[event.finish_reason or "stop"]
        rows = zip(texts, reasons, strict=True)
        choices = [self._choice(index, "".join(text), reason) for index, (text, reason) in enumerate(rows)]
        return self._head | {"choices": choices, "usage": usage_fields(self.turn.usage)}

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The reply as server-sent events."""
        options = self.body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        if self.body.echo:
            for index in range(len(self._offsets)):
                yield sse(self._head | usage | {"choices": [self._choice(index, self.body.prompt, None)]})
        async for index, event in self.turn.events():
            if index < 0:
                yield KEEP_ALIVE_COMMENT
                continue
            reason = FINISH_REASONS[event.finish_reason] if event.finish_reason else None
            yield sse(self._head | usage | {"choices": [self._choice(index, event.text, reason)]})
        if usage:
            yield sse(self._head | {"choices": [], "usage": usage_fields(self.turn.usage)})
        yield b"data: [DONE]\n\n"

    def _choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": self._logprobs(index), "finish_reason": reason}

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        """The tokens of a choice since the last call, in OpenAI's arrays."""
        if self.body.logprobs is None:
            return None
        decode = self.turn.model.member.chat.tokenizer.decode
        rows: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, likely in self.turn.take_logprobs(index).get("content", ()):
            rows["tokens"].append(decode([token]))
            rows["token_logprobs"].append(max(logprob, LEAST_LOGPROB))
            rows["top_logprobs"].append({decode([each]): max(value, LEAST_LOGPROB) for each, value in likely})
            rows["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].feed([token]))
        return rows

    @staticmethod
    def error(error: ApiError) -> bytes:
        """An error after the start of the stream."""
        return sse(error.openai())


def completion_routes(server: "Server") -> APIRouter:
    """Completions of plain text."""
    routes = APIRouter(responses=errors(OpenAIError))
    caller = Annotated[Principal, Depends(server.principal)]

    @routes.post("/completions", responses=reply(TextCompletion))
    async def completions(body: CompletionRequest, request: Request, principal: caller) -> Response:
        """Continue a text, or fill in the text before a suffix."""
        ignored = body.ignored_fields()
        turn = await server.make_turn(principal, body.turn(), "cmpl-")
        return await server.answer(request, CompletionReply(turn, body), principal, bool(body.stream), ignored)

    return routes
