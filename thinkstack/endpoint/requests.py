"""What an endpoint is asked and what it answers, as our types and as JSON over the wire."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.reply import ReplyReader, thinking_fields, usage_counts
from thinkstack.text.stream_parser import StreamParser
from thinkstack.text.tokenizer import THINK_OPEN
from thinkstack.types import ConfigError, Message, RequestError, Tool, ToolCall

CHAT_PATH, COMPLETIONS_PATH = "/chat/completions", "/completions"
BYTES_PER_TOKEN = 4
"""Bytes of a token where a server reports no usage."""
REFUSED = "refused"
"""finish_reason of a request that the server refuses while it answers others."""
TEMPLATE_TOKENS, MESSAGE_TOKENS = 1024, 16
"""Tokens that a chat template may add to a prompt (a system message, instructions for tools) and to each message."""


@dataclass(frozen=True, kw_only=True)
class EndpointRequest:
    """One completion to ask for; None: the server's default."""

    messages: tuple[Message, ...]
    """The conversation; thinking in it is not sent."""
    tools: tuple[Tool, ...] = ()
    """Functions that the model may call."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float | None = None
    """Nucleus sampling: the smallest set of tokens with at least this total probability."""
    max_tokens: int | None = None
    """Maximum tokens of the completion, thinking included; a budget of tokens or money needs it."""
    seed: int | None = None
    """Seed of the request; many servers promise nothing for it."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion."""
    index: int = 0
    """Which of several samples of the same prompt this is: requests that are equal, index included, are asked once."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise RequestError("a request without messages; give at least one", "messages")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RequestError(f"{name}={value} must be a number of at least 0", name)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens={self.max_tokens} must be at least 1", "max_tokens")
        if isinstance(self.stop, str) or not all(self.stop):
            raise RequestError(f"stop={self.stop!r} must be a tuple of strings that are not empty", "stop")


@dataclass(frozen=True, kw_only=True)
class EndpointCompletion:
    """The answer to a request."""

    reasoning: str | None
    """The thinking, without tags; None if there is none. Of a completion that was cut off in its thinking, all text."""
    content: str
    """The text after the thinking."""
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    """As the server has it: "stop", "length", "tool_calls", "content_filter" ..."""
    prompt_tokens: int
    cached_tokens: int | None
    """Prompt tokens that the server had in its cache; None: not reported."""
    completion_tokens: int
    """Tokens of the completion, thinking included."""
    reasoning_tokens: int | None
    """Those of them that are thinking; None: not reported."""
    is_estimated: bool
    """Whether the server reported no usage: its tokens are one per part of the stream, or one per four bytes if that is
    more."""
    model: str
    """The model that the server names; empty if it names none."""
    system_fingerprint: str
    """The server's name for its software and weights; empty if it has none."""
    seconds: float
    """Time of the attempt that succeeded."""
    attempts: int
    """Number of attempts, the successful one included."""
    from_cache: bool
    """Whether it was paid for by an earlier run."""

    @property
    def is_truncated(self) -> bool:
        """Whether it reached max_tokens or the model's context."""
        return self.finish_reason == "length"


@dataclass(frozen=True, kw_only=True)
class PromptLogprobs:
    """How likely each token of a prompt is after those before it."""

    tokens: tuple[str, ...]
    """The texts of the tokens, as the server writes them."""
    logprobs: tuple[float | None, ...]
    """Natural log-probability of each token; None for the first one."""
    is_greedy: tuple[bool | None, ...]
    """Whether each token is the most likely one; None for the first one."""
    from_cache: bool


@dataclass(frozen=True, kw_only=True)
class EndpointCall:
    """One request over the wire, without the fields of streams."""

    path: str
    body: Mapping[str, Any]
    index: int = 0
    max_tokens: int | None
    can_stream: bool
    max_prompt_tokens: int
    """Tokens that the prompt has at most: its bytes and what a template adds."""

    def key(self, url: str) -> str:
        """The content of the request as a hash: host and path, all fields of the body, the index. No API key."""
        address = urlsplit(url + self.path)
        content = {"version": 1, "url": f"{address.netloc.lower()}{address.path}", "index": self.index}
        text = json.dumps(content | {"body": self.body}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EndpointReply:
    """The texts and counts of a reply, as the cache has them: thinking is read from the content when it is used."""

    reasoning: str
    content: str
    tool_calls: list[dict[str, str]]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    reasoning_tokens: int | None
    is_estimated: bool
    model: str
    system_fingerprint: str
    logprobs: dict[str, Any] | None
    seconds: float
    attempts: int

    def as_row(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_row(cls, row: Any) -> "EndpointReply | None":
        """From JSON; None for a row of another form."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**row) if isinstance(row, dict) and set(row) == names else None


def refused_reply(reason: str) -> EndpointReply:
    """The reply for a request that the server refuses: REFUSED, the reason, and no tokens."""
    return EndpointReply(
        reasoning="", content=reason, tool_calls=[], finish_reason=REFUSED, prompt_tokens=0, cached_tokens=None,
        completion_tokens=0, reasoning_tokens=None, is_estimated=False, model="", system_fingerprint="", logprobs=None,
        seconds=0.0, attempts=1,
    )  # fmt: skip


def chat_call(request: EndpointRequest, cfg: EndpointConfig, model: str) -> EndpointCall:
    """The request for a chat completion. Raises RequestError for text that cannot be sent."""
    messages = [to_openai(message, with_reasoning=False) for message in request.messages]
    tools = [_tool(tool) for tool in request.tools]
    fields = {
        "tools": tools or None,
        "temperature": None if request.temperature is None else float(request.temperature),
        "top_p": None if request.top_p is None else float(request.top_p),
        cfg.max_tokens_field: request.max_tokens,
        "seed": request.seed,
        "stop": list(request.stop) or None,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    size = _num_bytes(messages) + 2 * _num_bytes(tools)  # templates indent the schemas of tools
    return EndpointCall(
        path=CHAT_PATH,
        body={"model": model, "messages": messages, **given, **thinking_fields(cfg.thinking), **cfg.extra_body},
        index=request.index,
        max_tokens=request.max_tokens,
        can_stream=True,
        max_prompt_tokens=size + MESSAGE_TOKENS * len(messages) + TEMPLATE_TOKENS,
    )


def echo_call(prompt: str | Sequence[int], model: str, max_tokens: int) -> EndpointCall:
    """The request for the log-probabilities of a prompt, as lm-eval's local-completions sends it."""
    given = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    if not given:
        raise RequestError("a prompt without tokens has no log-probabilities; give text or token ids", "prompt")
    body = {"model": model, "prompt": given, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 1}
    size = _num_bytes(given) if isinstance(given, str) else len(given)
    return EndpointCall(
        path=COMPLETIONS_PATH,
        body=body,
        max_tokens=max_tokens,
        can_stream=False,
        max_prompt_tokens=size + MESSAGE_TOKENS,
    )


def to_openai(message: Message, with_reasoning: bool = True) -> dict[str, Any]:
    """A message of a conversation as OpenAI's API has it."""
    fields: dict[str, Any] = {"role": message.role}
    if with_reasoning and message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    fields["content"] = message.content
    if message.tool_calls:
        fields["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    given = {"tool_call_id": message.tool_call_id, "name": message.name}
    return fields | {name: value for name, value in given.items() if value is not None}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": {**function, **({"strict": True} if tool.strict else {})}}


def encode_body(body: Mapping[str, Any]) -> bytes:
    """A body as JSON. Raises RequestError for what JSON in UTF-8 cannot express."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        message = f"a request has {surrogate}, half of a character (an unpaired surrogate); remove it"
        raise RequestError(message, "messages") from error


def _num_bytes(value: Any) -> int:
    return len(encode_body({"": value})) - len('{"":}') if value else 0


def make_reply(reader: ReplyReader, call: EndpointCall, seconds: float, attempts: int) -> EndpointReply:
    """The reply that was read, with estimates where the server reports no usage."""
    counts = usage_counts(reader.usage)
    prompt, completion = counts["prompt_tokens"], counts["completion_tokens"]
    is_estimated = prompt is None or completion is None
    if prompt is None:
        prompt = math.ceil(call.max_prompt_tokens / BYTES_PER_TOKEN)
    if completion is None:
        completion = max(reader.num_deltas, math.ceil(reader.num_bytes / BYTES_PER_TOKEN))
    return EndpointReply(
        reasoning=str(reader.texts["reasoning"]),
        content=str(reader.texts["content"]),
        tool_calls=[reader.tool_calls[place] for place in sorted(reader.tool_calls)],
        finish_reason=reader.finish_reason,
        prompt_tokens=prompt,
        cached_tokens=counts["cached_tokens"],
        completion_tokens=completion,
        reasoning_tokens=counts["reasoning_tokens"],
        is_estimated=is_estimated,
        model=reader.model,
        system_fingerprint=reader.system_fingerprint,
        logprobs=reader.logprobs,
        seconds=seconds,
        attempts=attempts,
    )


def make_completion(reply: EndpointReply, opens_thinking: bool, from_cache: bool) -> EndpointCompletion:
    """The completion of a reply: thinking is the field of the server, or the think block at the start of the content.

    opens_thinking: the content begins inside the think block, unless the server has a field for thinking.
    """
    parser = StreamParser()
    if opens_thinking and not reply.reasoning and reply.finish_reason != REFUSED:
        parser.skip([THINK_OPEN])
    events = parser.feed(reply.content) + parser.finish("length" if reply.finish_reason == "length" else "stop")
    texts = {kind: "".join(event.text for event in events if event.kind == kind) for kind in ("reasoning", "content")}
    calls = [
        ToolCall(name=call["name"], arguments=call["arguments"], id=call["id"] or None) for call in reply.tool_calls
    ]
    calls += [event.tool_call for event in events if event.kind == "tool_call" and event.tool_call is not None]
    return EndpointCompletion(
        reasoning=(reply.reasoning + texts["reasoning"]).strip() or None,
        content=texts["content"],
        tool_calls=tuple(calls),
        finish_reason=reply.finish_reason,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        completion_tokens=reply.completion_tokens,
        reasoning_tokens=reply.reasoning_tokens,
        is_estimated=reply.is_estimated,
        model=reply.model,
        system_fingerprint=reply.system_fingerprint,
        seconds=reply.seconds,
        attempts=reply.attempts,
        from_cache=from_cache,
    )


def make_prompt_logprobs(reply: EndpointReply, call: EndpointCall, from_cache: bool) -> PromptLogprobs:
    """The log-probabilities of a prompt, without the token that was sampled after it.

    Raises ConfigError for a server that does not score prompts: some return the sampled token alone.
    """
    found, prompt = reply.logprobs or {}, call.body["prompt"]
    logprobs, tokens, top = (found.get(name) or [] for name in ("token_logprobs", "tokens", "top_logprobs"))
    count = reply.prompt_tokens if not reply.is_estimated else len(logprobs) - (call.max_tokens or 0)
    count = count if isinstance(prompt, str) else len(prompt)
    is_whole = len(tokens) == len(logprobs) == len(top) and 0 <= len(logprobs) - count <= 1
    rows = list(zip(logprobs[1:count], top[1:count], strict=True)) if is_whole else []
    if not is_whole or count < 1 or logprobs[0] is not None or not all(isinstance(row[1], dict) for row in rows):
        raise ConfigError(
            f"the server gave {len(logprobs)} log-probabilities for a prompt of {count} tokens: it does not score "
            "prompts by echo=true with logprobs; use a server that does, such as vLLM"
        )
    return PromptLogprobs(
        tokens=tuple(map(str, tokens[:count])),
        logprobs=(None, *(float(value) for value, _ in rows)),
        is_greedy=(None, *(float(value) >= max(map(float, likely.values())) for value, likely in rows)),
        from_cache=from_cache,
    )
