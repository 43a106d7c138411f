"""What OpenAPI says of replies and errors; requests are described by their own classes.

The fields of a reply that can be missing have a default here.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Fields = dict[str, Any]
Declared = dict[int | str, dict[str, Any]]
"""By status: what a route may reply."""


class Described(BaseModel):
    """A reply without other fields than those named."""

    model_config = ConfigDict(extra="forbid")


class OpenAIErrorFields(Described):
    """An error of DeepSeek's and OpenAI's dialect."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(Described):
    """The body of an error of DeepSeek's and OpenAI's dialect."""

    error: OpenAIErrorFields


class AnthropicErrorFields(Described):
    """An error of Anthropic's dialect."""

    type: str
    message: str


class AnthropicError(Described):
    """The body of an error of Anthropic's dialect."""

    type: Literal["error"]
    error: AnthropicErrorFields
    request_id: str


class OllamaError(Described):
    """The body of an error of Ollama's dialect."""

    error: str


class CompletionUsage(Described):
    """The usage of a reply in DeepSeek's dialect."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class ChatMessage(Described):
    """The message of a chat completion."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[Fields] = []


class ChatChoice(Described):
    """One of the n choices of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: Fields | None
    finish_reason: Literal["stop", "length", "tool_calls", "insufficient_system_resource"]


class ChatCompletion(Described):
    """A whole reply of /chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class TextChoice(Described):
    """One of the n choices of a completion."""

    text: str
    index: int
    logprobs: Fields | None
    finish_reason: Literal["stop", "length", "insufficient_system_resource"]


class TextCompletion(Described):
    """A whole reply of /completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: CompletionUsage


class OpenAIResponse(BaseModel):
    """A whole reply of /responses; fields of the request are repeated."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[Fields]
    usage: Fields
    error: None
    incomplete_details: Fields | None


class AnthropicMessage(Described):
    """A whole reply of /messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Fields]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: dict[str, int]


class OllamaChat(Described):
    """A whole reply of /api/chat, or a line of a stream; counts and durations are in the last line alone."""

    model: str
    created_at: str
    message: Fields
    done: bool
    done_reason: Literal["stop", "length"] = "stop"
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class HealthReply(Described):
    """The state of the members."""

    status: Literal["ok", "failed"]
    members: dict[str, str] = {}


EVENT = {"itemSchema": {"type": "object", "required": ["data"], "properties": {
    "event": {"type": "string"}, "data": {"type": "string", "description": "JSON, or [DONE]"},
}}}  # fmt: skip
"""A server-sent event."""
WORDS = {
    400: "Broken JSON, an unknown model or field, a prompt that is too long, or fields that contradict each other.",
    401: "No key, or an unknown, expired or revoked one.",
    402: "The largest possible cost is above the balance.",
    403: "The key is not for this route or model.",
    404: "There is no such route or request.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    421: "The Host header names another machine than this one, on a server without keys.",
    422: "A value has the wrong type or is out of range.",
    429: "A limit of the user or key; see Retry-After.",
    500: "The server failed.",
    503: "The queue is full, the wait was too long, or the engine has stopped; see Retry-After.",
}
"""When a status is sent."""


def errors(body: type[BaseModel]) -> Declared:
    """All errors of a dialect. body: their shape."""
    return {status: {"model": body, "description": words} for status, words in WORDS.items()}


def reply(body: type[BaseModel], media_type: str = "text/event-stream") -> Declared:
    """A reply that is whole or a stream. media_type: that of a stream."""
    late = "After blank lines a whole reply may be an error instead."
    part = EVENT if media_type == "text/event-stream" else {"schema": {"type": "string"}}
    return {
        200: {
            "model": body,
            "description": f"The reply; with stream=true its parts. {late}",
            "content": {media_type: part},
        }
    }
