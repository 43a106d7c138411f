"""DeepSeek's dialect, which is OpenAI's with reasoning: replies of /chat/completions, whole or as a stream."""

import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinkstack.server.api_errors import ApiError
from thinkstack.server.prices import Usage
from thinkstack.server.sse import KEEP_ALIVE_COMMENT, sse, to_json
from thinkstack.server.turns import TokenLogprob, Turn
from thinkstack.text.stream import TokenKind
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.text.tokenizer import Tokenizer

FINGERPRINT = "thinkstack"
LEAST_LOGPROB = -9999.0
"""Log-probability of tokens that have next to none."""
LOGPROB_FIELDS: dict[str, TokenKind] = {"content": "content", "reasoning_content": "reasoning"}
FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "abort": "insufficient_system_resource",
    "error": "insufficient_system_resource",
}
"""By the engine's reason."""


def usage_fields(usage: Usage) -> dict[str, Any]:
    """The usage of a reply."""
    hit, miss = usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens
    return {
        "prompt_tokens": hit + miss,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": hit + miss + usage.completion_tokens,
        "prompt_cache_hit_tokens": hit,
        "prompt_cache_miss_tokens": miss,
        "prompt_tokens_details": {"cached_tokens": hit},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


@dataclass
class Choice:
    """The parts of one choice that have arrived."""

    texts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By kind of event."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    num_complete: int = 0
    """Number of calls that have their end."""
    finish_reason: str | None = None

    def delta(self, event: StreamEvent) -> dict[str, Any] | None:
        """Add an event; returns it as the delta of a chunk, {} for the end, None if there is nothing new."""
        if event.kind == "finish":
            has_calls = self.calls and self.num_complete == len(self.calls) and event.finish_reason == "stop"
            self.finish_reason = "tool_calls" if has_calls else FINISH_REASONS[event.finish_reason or "error"]
            return {}
        if event.kind == "tool_call_start":
            assert event.tool_call is not None
            function = {"name": event.tool_call.name, "arguments": ""}
            call = {"id": f"call_{event.index:02d}_{secrets.token_hex(8)}", "type": "function", "function": function}
            self.calls.append(call)
            return {"tool_calls": [{"index": event.index, **call, "function": dict(function)}]}
        if event.kind == "tool_call_delta":
            self.calls[event.index]["function"]["arguments"] += event.text
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        if event.kind == "tool_call":
            self.num_complete += 1
            return None  # its parts were events before
        self.texts[event.kind].append(event.text)
        return _text_delta(event.kind, event.text)

    def message(self) -> dict[str, Any]:
        """The whole message."""
        reasoning, content = ("".join(self.texts[kind]) for kind in ("reasoning", "content"))
        found: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning or None}
        found["reasoning"] = found["reasoning_content"]
        if self.calls:
            found["tool_calls"] = self.calls
        return found


def _text_delta(kind: str, text: str) -> dict[str, Any]:
    return {"content": text} if kind == "content" else {"reasoning_content": text, "reasoning": text}


def logprob_fields(tokenizer: Tokenizer, found: Mapping[TokenKind, Sequence[TokenLogprob]]) -> dict[str, Any]:
    """Log-probabilities of the content and of the thinking."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        given = list(tokenizer.bytes_of(token)) if tokenizer.is_byte_level else None
        return {"token": tokenizer.decode([token]), "logprob": max(logprob, LEAST_LOGPROB), "bytes": given}

    return {
        name: [
            entry(token, logprob) | {"top_logprobs": [entry(*each) for each in likely]}
            for token, logprob, likely in found.get(kind, ())
        ]
        for name, kind in LOGPROB_FIELDS.items()
    }


class ChatReply:
    """The reply to a chat request."""

    def __init__(self, turn: Turn, model: str, include_usage: bool = False):
        self.turn, self.include_usage = turn, include_usage
        self._head = {
            "id": turn.id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        # all chunks with a choice are equal around it
        start, _, end = self._event([], None).rpartition(b"[]")
        self._start, self._end = start + b"[", b"]" + end
        self._choices = [Choice() for _ in range(turn.prepared.sampling.n)]

    async def whole(self) -> dict[str, Any]:
        """The reply when all choices are finished. Raises Overloaded."""
        async for index, event in self.turn.events():
            if index >= 0:
                self._choices[index].delta(event)
        return self._head | {
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": choice.message(),
                    "logprobs": self._logprobs(index),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(self._choices)
            ],
            "usage": usage_fields(self.turn.usage),
        }

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The reply as server-sent events; an error after the start is an event too."""
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in self.turn.events():
            if index < 0:
                yield KEEP_ALIVE_COMMENT
                continue
            if event.kind in ("content", "reasoning") and not self.turn.request.logprobs:
                yield self._text_chunk(index, event)
                continue
            choice = self._choices[index]
            delta = choice.delta(event)
            if delta is not None:
                yield self._chunk(index, delta, choice.finish_reason)
        if self.include_usage:
            yield self._event([], usage_fields(self.turn.usage))
        yield b"data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(index), "finish_reason": finish_reason}
        return self._start + to_json(choice) + self._end

    def _text_chunk(self, index: int, event: StreamEvent) -> bytes:
        """`_chunk` of new text: one per token, so its constant parts are not encoded again."""
        text = to_json(event.text)
        delta = b'"content":' + text
        if event.kind == "reasoning":
            delta = b'"reasoning_content":%b,"reasoning":%b' % (text, text)
        choice = b'{"index":%d,"delta":{%b},"logprobs":null,"finish_reason":null}' % (index, delta)
        return self._start + choice + self._end

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        if not self.turn.request.logprobs:
            return None
        return logprob_fields(self.turn.model.member.chat.tokenizer, self.turn.take_logprobs(index))

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        body = self._head | {"object": "chat.completion.chunk", "choices": choices}
        if self.include_usage:
            body["usage"] = usage
        return sse(body)

    @staticmethod
    def error(error: ApiError) -> bytes:
        """An error after the start of the stream."""
        return sse(error.openai())
