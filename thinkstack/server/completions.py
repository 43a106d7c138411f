"""OpenAI's /completions, which is also DeepSeek's fill-in-the-middle: text that continues a prompt, without a chat."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field, StrictBool, StrictInt, StrictStr

from thinkstack.server.api_errors import ApiError
from thinkstack.server.deepseek import FINGERPRINT, FINISH_REASONS, LEAST_LOGPROB, usage_fields
from thinkstack.server.keys import Principal
from thinkstack.server.openapi import OpenAIError, TextCompletion, errors, reply
from thinkstack.server.prices import Usage
from thinkstack.server.schema import SamplingInput, TurnRequest
from thinkstack.server.sse import KEEP_ALIVE_COMMENT, sse
from thinkstack.server.turns import PromptToken, Turn
from thinkstack.text.decode import TextDecoder
from thinkstack.text.stream import TokenKind
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import RequestError

if TYPE_CHECKING:
    from thinkstack.server.app import Server


MAX_PROMPTS = 128
"""Prompts of one request."""
LONG_TOKENS = 2_000
"""Tokens and alternatives of a prompt that are written in a thread from this number on."""


class LogprobRows:
    """OpenAI's arrays of tokens with their log-probabilities."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = functools.cache(lambda token: tokenizer.decode([token]))
        self.fields: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprob: float | None, likely: Sequence[tuple[int, float]], offset: int) -> None:
        """Add a token. logprob: None for the first token of a prompt."""
        top: dict[str, float] = {}
        for each, value in likely:
            top.setdefault(self._decode(each), max(value, LEAST_LOGPROB))  # of tokens with the same text the best
        self.fields["tokens"].append(self._decode(token))
        self.fields["token_logprobs"].append(None if logprob is None else max(logprob, LEAST_LOGPROB))
        self.fields["top_logprobs"].append(None if logprob is None else top)
        self.fields["text_offset"].append(offset)

    def extend(self, other: "LogprobRows") -> None:
        """Add the tokens of `other`."""
        for name, values in other.fields.items():
            self.fields[name] += values


class CompletionRequest(SamplingInput):
    """The body of POST /completions."""

    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[StrictInt], Field(min_length=1)]
        | Annotated[list[Annotated[list[StrictInt], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    """A text or token ids, or several of either; BOS is added to texts alone."""
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    """0: with echo, the prompt alone."""
    suffix: StrictStr | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [each for each in self.prompt if isinstance(each, int)]
        if ids:
            return [tuple(ids)]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt if not isinstance(each, int)]

    def turns(self) -> list[TurnRequest]:
        """The meaning of the request for each prompt. Raises RequestError for fields that contradict each other."""
        prompts = self.prompts
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens=0 needs echo=true; otherwise nothing is answered", "max_tokens")
        if self.suffix and not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError("suffix needs prompts of text, not token ids", "suffix")
        if self.suffix and self.echo and self.logprobs is not None:
            raise RequestError("suffix excludes echo with logprobs; leave one of them out", "suffix")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", "stream_options")
        if self.stream and len(prompts) > 1:
            raise RequestError(f"a stream has one prompt, not {len(prompts)}; send one, or stream=false", "prompt")
        return [self._turn(prompt) for prompt in prompts]

    def _turn(self, prompt: str | tuple[int, ...]) -> TurnRequest:
        has_logprobs = self.logprobs is not None
        return TurnRequest(
            model=self.model,
            prompt=prompt if isinstance(prompt, str) else "",
            prompt_token_ids=None if isinstance(prompt, str) else prompt,
            suffix=self.suffix or None,
            thinking=False,
            max_tokens=self.max_tokens,
            stop=self.stop_strings,
            sampling=self.sampling_fields(),
            logprobs=has_logprobs,
            top_logprobs=self.logprobs or 0,
            prompt_logprobs=self.logprobs if self.echo else None,
            user_id=self.user_id or "",
        )


class CompletionReply:
    """The reply to a completion request with one prompt."""

    def __init__(self, turn: Turn, body: CompletionRequest):
        self.turn, self.body = turn, body
        self.head = {
            "id": turn.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": FINGERPRINT,
        }
        tokenizer, request = turn.model.member.chat.tokenizer, turn.request
        text = request.prompt or ""
        if body.echo and request.prompt_token_ids is not None:
            text = tokenizer.decode(request.prompt_token_ids)
        self._echo = text if body.echo else ""
        self._num_hidden = len(tokenizer.begin_ids) if request.prompt_token_ids is None else 0
        """Tokens at the start of the prompt that the text does not have."""
        self._prompt_rows: LogprobRows | None = None
        choices = range(turn.prepared.sampling.n)
        self._offsets = [len(self._echo) for _ in choices]
        self._decoders = [TextDecoder(tokenizer) for _ in choices]

    async def whole(self) -> dict[str, Any]:
        """The reply when all choices are finished. Raises Overloaded."""
        return self.head | {"choices": await self.choices(), "usage": usage_fields(self.turn.usage)}

    async def choices(self) -> list[dict[str, Any]]:
        """All choices when they are finished. Raises Overloaded."""
        texts = [[self._echo] for _ in self._offsets]
        reasons = ["stop"] * len(texts)
        async for index, event in self.turn.events():
            if index >= 0:
                texts[index].append(event.text)
                reasons[index] = FINISH_REASONS[event.finish_reason or "stop"]
        await self._read_prompt()
        rows = zip(texts, reasons, strict=True)
        return [self._choice(index, "".join(text), reason, True) for index, (text, reason) in enumerate(rows)]

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The reply as server-sent events. An echo comes with the first event: its log-probabilities are known then."""
        options = self.body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        is_echoed = not self.body.echo
        async for index, event in self.turn.events():
            if index < 0:
                yield KEEP_ALIVE_COMMENT
                continue
            if not is_echoed:
                await self._read_prompt()
            for each in () if is_echoed else range(len(self._offsets)):
                yield sse(self.head | usage | {"choices": [self._choice(each, self._echo, None, True, False)]})
            is_echoed = True
            reason = FINISH_REASONS[event.finish_reason] if event.finish_reason else None
            yield sse(self.head | usage | {"choices": [self._choice(index, event.text, reason)]})
        if usage:
            yield sse(self.head | {"choices": [], "usage": usage_fields(self.turn.usage)})
        yield b"data: [DONE]\n\n"

    def _choice(
        self, index: int, text: str, reason: str | None, with_prompt: bool = False, with_completion: bool = True
    ) -> dict[str, Any]:
        """A choice with the log-probabilities of the tokens since the last call. with_prompt: and of the prompt's."""
        logprobs: LogprobRows | None = None
        if self.body.logprobs is not None:
            logprobs = LogprobRows(self.turn.model.member.chat.tokenizer)
            if with_prompt and self._prompt_rows is not None:
                logprobs.extend(self._prompt_rows)
            if with_completion:
                self._add_completion(logprobs, index)
        return {
            "text": text,
            "index": index,
            "logprobs": None if logprobs is None else logprobs.fields,
            "finish_reason": reason,
        }

    async def _read_prompt(self) -> None:
        """Read the log-probabilities of the prompt, in a thread if it is long."""
        if self.turn.request.prompt_logprobs is None:
            return
        tokens = self.turn.prompt_logprobs()
        if len(tokens) * (2 + self.turn.request.prompt_logprobs) < LONG_TOKENS:
            self._prompt_rows = self._rows_of_prompt(tokens)
        else:
            self._prompt_rows = await asyncio.to_thread(self._rows_of_prompt, tokens)

    def _rows_of_prompt(self, tokens: Sequence[PromptToken]) -> LogprobRows:
        tokenizer = self.turn.model.member.chat.tokenizer
        rows, offset, decoder = LogprobRows(tokenizer), 0, TextDecoder(tokenizer)
        for place, (token, logprob, likely) in enumerate(tokens):
            rows.add(token, logprob, likely, min(offset, len(self._echo)))
            if place >= self._num_hidden:
                offset += len(decoder.feed([token]))
        return rows

    def _add_completion(self, rows: "LogprobRows", index: int) -> None:
        """With an echo also the token that ends the completion, so that there is one entry for each token."""
        found = self.turn.take_logprobs(index)
        kinds: tuple[TokenKind, ...] = ("content", "markup") if self.body.echo else ("content",)
        for token, logprob, likely in (each for kind in kinds for each in found.get(kind, ())):
            rows.add(token, logprob, likely, self._offsets[index])
            self._offsets[index] += len(self._decoders[index].feed([token]))

    @staticmethod
    def error(error: ApiError) -> bytes:
        """An error after the start of the stream."""
        return sse(error.openai())


class BatchReply:
    """The reply to a completion request with several prompts, whole: the choices of the first prompt come first."""

    def __init__(self, turns: Sequence[Turn], body: CompletionRequest):
        self._replies = [CompletionReply(turn, body) for turn in turns]
        self.turn = turns[0]

    async def whole(self) -> dict[str, Any]:
        """The reply when all prompts are finished. Raises Overloaded."""
        found = await asyncio.gather(*(reply.choices() for reply in self._replies))
        choices = [choice for some in found for choice in some]
        usage = Usage.sum(reply.turn.usage for reply in self._replies)
        return self._replies[0].head | {
            "choices": [choice | {"index": index} for index, choice in enumerate(choices)],
            "usage": usage_fields(usage),
        }

    def chunks(self) -> AsyncGenerator[bytes]:
        """Not supported: `CompletionRequest.turns` refuses it."""
        raise AssertionError("a stream has one prompt")

    error = staticmethod(CompletionReply.error)


def completion_routes(server: "Server") -> APIRouter:
    """Completions of plain text."""
    routes = APIRouter(responses=errors(OpenAIError))
    caller = Annotated[Principal, Depends(server.principal)]

    @routes.post("/completions", responses=reply(TextCompletion))
    async def completions(body: CompletionRequest, request: Request, principal: caller) -> Response:
        """Continue texts, fill in the text before a suffix, or score prompts by echo with logprobs."""
        ignored = body.ignored_fields()
        turns = [await server.make_turn(principal, wanted, "cmpl-") for wanted in body.turns()]
        reply = CompletionReply(turns[0], body) if len(turns) == 1 else BatchReply(turns, body)
        return await server.answer(request, reply, principal, bool(body.stream), ignored, turns=turns)

    return routes
