"""DeepSeek's dialect, which is OpenAI's with reasoning: replies of /chat/completions, whole or as a stream."""

import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from thinkstack.server.api_errors import ApiError
from thinkstack.server.prices import Usage
from thinkstack.server.turns import Turn
from thinkstack.text.stream import StreamEvent

FINGERPRINT = "thinkstack"


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
    finish_reason: str | None = None

    def delta(self, event: StreamEvent) -> dict[str, Any]:
        """Add an event; returns it as the delta of a chunk, {} for the end."""
        if event.kind == "finish":
            self.finish_reason = "tool_calls" if self.calls and event.finish_reason == "stop" else event.finish_reason
            return {}
        if event.kind == "tool_call":
            assert event.tool_call is not None
            call = {
                "index": len(self.calls),
                "id": f"call_{len(self.calls):02d}_{secrets.token_hex(8)}",
                "type": "function",
                "function": {"name": event.tool_call.name, "arguments": event.tool_call.arguments},
            }
            self.calls.append(call)
            return {"tool_calls": [call]}
        self.texts[event.kind].append(event.text)
        return _text_delta(event.kind, event.text)

    def message(self) -> dict[str, Any]:
        """The whole message."""
        reasoning, content = ("".join(self.texts[kind]) for kind in ("reasoning", "content"))
        found: dict[str, Any] = {"role": "assistant", "content": content}
        if "reasoning" in self.texts and reasoning:
            found |= _text_delta("reasoning", reasoning)
        if self.calls:
            found["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in self.calls]
        return found


def _text_delta(kind: str, text: str) -> dict[str, Any]:
    return {"content": text} if kind == "content" else {"reasoning_content": text, "reasoning": text}


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
        self._choices = [Choice() for _ in range(turn.prepared.sampling.n)]

    async def whole(self) -> dict[str, Any]:
        """The reply when all choices are finished. Raises Overloaded."""
        async for index, event in self.turn.events():
            if index >= 0:
                self._choices[index].delta(event)
        return self._head | {
            "object": "chat.completion",
            "choices": [
                {"index": index, "message": choice.message(), "logprobs": None, "finish_reason": choice.finish_reason}
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
                yield b": keep-alive\n\n"
                continue
            choice = self._choices[index]
            delta = choice.delta(event)
            yield self._chunk(index, delta, choice.finish_reason)
        if self.include_usage:
            yield self._event([], usage_fields(self.turn.usage))
        yield b"data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}], None)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        body = self._head | {"object": "chat.completion.chunk", "choices": choices}
        if self.include_usage:
            body["usage"] = usage
        return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    @staticmethod
    def error(error: ApiError) -> bytes:
        """An error after the start of the stream."""
        return b"data: " + json.dumps(error.openai(), ensure_ascii=False).encode() + b"\n\n"
