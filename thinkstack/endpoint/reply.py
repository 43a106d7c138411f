"""The reply to a completion request, streamed or whole, as the texts and counts in it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from thinkstack.endpoint.server import AttemptFailed, OpenAIServer

MAX_REPLY_BYTES = 2**28
"""Bytes of a reply after which it counts as endless."""


class Delta(NamedTuple):
    """New text of a reply."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclass
class ReplyText:
    """A text that comes in parts. Half of a surrogate pair waits for the other half, and is U+FFFD without it."""

    parts: list[str] = field(default_factory=list)
    held: str = ""

    def feed(self, text: str | None, is_last: bool = False) -> str:
        """Add a part. Returns the text that is complete."""
        text = self.held + (text or "")
        self.held = text[-1] if not is_last and text and "\ud800" <= text[-1] <= "\udbff" else ""
        text = text[: len(text) - len(self.held)].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self.parts.append(text)
        return text

    def __str__(self) -> str:
        return "".join(self.parts)


class ReplyReader:
    """Reads the bytes of a reply of /chat/completions or /completions: server-sent events, or one JSON object.

    Errors of the form are those that `OpenAIServer.as_failure` converts.
    """

    def __init__(self, server: OpenAIServer):
        self._server = server
        self._line, self._whole = list[bytes](), list[bytes]()
        """The parts of the line that has not ended, and the lines of a JSON object."""
        self.num_bytes = self.num_deltas = 0
        """Bytes of text, and parts that had text."""
        self._num_read = 0
        self.has_begun = self.is_done = False
        """Whether the server accepted the request, and whether it sent the mark of the end."""
        self.texts = {"reasoning": ReplyText(), "content": ReplyText()}
        self.tool_calls: dict[int, dict[str, str]] = {}
        """By index: id, name and arguments, as far as they came."""
        self.finish_reason = self.model = self.system_fingerprint = ""
        self.usage: dict[str, Any] = {}
        self.logprobs: dict[str, Any] | None = None

    def feed(self, data: bytes) -> list[Delta]:
        """Read the next bytes. Returns the new texts. Raises AttemptFailed for an error among the events."""
        self._num_read += len(data)
        if self._num_read > MAX_REPLY_BYTES:
            raise AttemptFailed(f"{self._server.url} sends an endless answer: over {MAX_REPLY_BYTES:,} bytes")
        self._line.append(data)
        if b"\n" not in data:
            return []
        # Lines end at line feeds alone: JSON may contain U+2028 and the like, where str.splitlines would cut.
        *lines, rest = b"".join(self._line).split(b"\n")
        self._line = [rest]
        return [delta for line in lines for delta in self._feed_line(line)]

    def finish(self, is_broken: bool = False) -> list[Delta]:
        """Read the end. Returns the last texts. Raises AttemptFailed for a reply that ended early.

        is_broken: the connection broke, so that the last line is not whole.
        """
        deltas = [] if is_broken else self._feed_line(b"".join(self._line))
        self._line.clear()
        if self._whole and not is_broken:
            deltas += self._feed_chunk(json.loads(b"\n".join(self._whole)))
        for kind, text in self.texts.items():
            if last := text.feed("", is_last=True):
                deltas.append(Delta(kind, last))  # type: ignore[arg-type]
        if not self.finish_reason:
            message = f"{self._server.url} ended the answer early, without a finish_reason; ask again"
            raise AttemptFailed(message, can_retry=True)
        return deltas

    def _feed_line(self, line: bytes) -> list[Delta]:
        line = line.removesuffix(b"\r")
        if self._whole or line.lstrip()[:1] == b"{":
            self._whole.append(line)  # one JSON object, though a stream was asked for
            return []
        name, _, value = line.partition(b":")
        value = value.strip()
        if name != b"data" or value == b"[DONE]":
            self.is_done |= name == b"data"
            return []
        return self._feed_chunk(json.loads(value))

    def _feed_chunk(self, chunk: dict[str, Any]) -> list[Delta]:
        if chunk.get("error"):
            raise self._server.failure_in_stream(chunk)
        self.usage = chunk.get("usage") or self.usage
        self.model = str(chunk.get("model") or self.model)
        self.system_fingerprint = str(chunk.get("system_fingerprint") or self.system_fingerprint)
        choices = [choice for choice in chunk.get("choices") or () if not choice.get("index")]  # of n=1, the only one
        return [delta for choice in choices for delta in self._feed_choice(choice)]

    def _feed_choice(self, choice: dict[str, Any]) -> Iterator[Delta]:
        message = choice.get("delta") or choice.get("message") or {}
        found = {
            "reasoning": message.get("reasoning_content") or message.get("reasoning"),
            "content": message.get("content") or choice.get("text"),
        }
        for kind, value in found.items():
            if text := self.texts[kind].feed(value):
                self.num_bytes, self.num_deltas = self.num_bytes + len(text.encode()), self.num_deltas + 1
                yield Delta(kind, text)  # type: ignore[arg-type]
        for place, call in enumerate(message.get("tool_calls") or ()):
            self._feed_call(call, place)
        self.logprobs = choice.get("logprobs") or self.logprobs
        self.finish_reason = str(choice.get("finish_reason") or self.finish_reason)

    def _feed_call(self, call: dict[str, Any], place: int) -> None:
        given = call.get("index")
        known = self.tool_calls.setdefault(place if given is None else int(given), {})
        function = call.get("function") or {}
        known["id"] = str(call.get("id") or known.get("id", ""))
        known["name"] = known.get("name") or str(function.get("name") or "")
        known["arguments"] = known.get("arguments", "") + (function.get("arguments") or "")
        self.num_bytes += len((function.get("arguments") or "").encode("utf-8", "surrogatepass"))


def usage_counts(usage: Mapping[str, Any]) -> dict[str, int | None]:
    """The counts in the usage of a reply: prompt_tokens, cached_tokens, completion_tokens and reasoning_tokens; None:
    not reported."""
    prompt, completion = (_details(usage, name) for name in ("prompt_tokens_details", "completion_tokens_details"))
    cached = _count(prompt.get("cached_tokens"))
    return {
        "prompt_tokens": _count(usage.get("prompt_tokens")),
        "cached_tokens": _count(usage.get("prompt_cache_hit_tokens")) if cached is None else cached,
        "completion_tokens": _count(usage.get("completion_tokens")),
        "reasoning_tokens": _count(completion.get("reasoning_tokens")),
    }


def _details(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = usage.get(name)
    return found if isinstance(found, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def thinking_fields(thinking: bool | None) -> dict[str, Any]:
    """The fields that turn thinking on or off: DeepSeek's, and that of vLLM, SGLang and llama.cpp."""
    if thinking is None:
        return {}
    return {
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "chat_template_kwargs": {"thinking": thinking, "enable_thinking": thinking},
    }
