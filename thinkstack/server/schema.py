"""Requests of DeepSeek's and OpenAI's chat API as JSON, and their meaning for the rest of the server."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictInt,
    StrictStr,
)
from pydantic_core import CoreSchema

from thinkstack.types import Message, RequestError, Role, Tool, ToolCall

MAX_TOOLS = 128
MAX_STOP = 16
ALIASES = {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}
"""Reasoning efforts with another name."""
ToolName = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("contains half a surrogate pair, a number that is not finite, or too many levels") from error
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_is_json)]
"""An object that can be written as JSON in UTF-8."""


class Extensible(BaseModel):
    """Unknown fields are kept, so that `ignored_fields` can refuse them by name."""

    model_config = ConfigDict(extra="allow")
    IGNORED: ClassVar[Collection[str]] = ()
    """Fields that are accepted without effect; a reply names them in a header."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What OpenAPI says: unknown fields are refused."""
        found = handler.resolve_ref_schema(handler(schema))
        found["properties"] |= {name: {"description": "Accepted without effect."} for name in sorted(cls.IGNORED)}
        found["additionalProperties"] = False
        return found

    def ignored_fields(self, prefix: str = "") -> list[str]:
        """The given fields that have no effect, with `prefix`; a field that is null is not given.

        Raises RequestError for unknown fields, unless they are false, as a switch that is off.
        """
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        given = {name for name, value in extra.items() if name in self.IGNORED or value is not False}
        for name in given.difference(self.IGNORED):
            field = f"{prefix}{name}" if name.isprintable() else None
            raise RequestError(f"the field {prefix + name!r} is not supported; leave it out", field)
        return sorted(prefix + name for name in given)


class TextPart(BaseModel):
    """A part of a message; images and other kinds are not supported."""

    type: Literal["text"]
    text: StrictStr


MessageContent = StrictStr | list[TextPart] | None


class FunctionCall(BaseModel):
    """Name and arguments of a call in the history."""

    name: StrictStr
    arguments: StrictStr = "{}"


class CallInput(BaseModel):
    """A call in the history."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class MessageInput(BaseModel):
    """A message; unknown fields are ignored, because clients send replies back as they came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: MessageContent = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    prefix: StrictBool = False
    """Only with the last message, of role="assistant": the reply goes on from its content."""
    tool_calls: list[CallInput] | None = None
    tool_call_id: StrictStr | None = None

    def message(self) -> Message:
        """The message as the chat formats have it."""
        role: Role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        if role != "assistant":
            return Message(role=role, content=content, tool_call_id=self.tool_call_id, name=self.name)
        calls = tuple(
            ToolCall(name=call.function.name, arguments=call.function.arguments, id=call.id)
            for call in self.tool_calls or ()
        )
        reasoning = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        return Message(role=role, content=content, reasoning=reasoning, tool_calls=calls)


class FunctionInput(BaseModel):
    """A function that the model may call."""

    name: ToolName
    description: StrictStr = ""
    parameters: JsonObject = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: StrictBool = False


class ToolInput(BaseModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionInput


class NamedFunction(BaseModel):
    """The function of `NamedToolChoice`."""

    name: StrictStr


class NamedToolChoice(BaseModel):
    """The choice of one function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """A schema of the reply."""

    name: StrictStr = "reply"
    json_schema: JsonObject = Field(alias="schema")
    strict: StrictBool = True


class ResponseFormat(BaseModel):
    """The format of the content."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Thinking(BaseModel):
    """Whether the model thinks."""

    type: Literal["enabled", "disabled"]


class StreamOptions(BaseModel):
    """Options of a streamed reply."""

    include_usage: StrictBool = False


Penalty = Annotated[float, Field(ge=-2, le=2)]
MaxTokens = Annotated[StrictInt, Field(ge=1)]


class SamplingInput(Extensible):
    """The fields that chat and completion requests share."""

    IGNORED = frozenset(
        ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier",
         "skip_special_tokens", "include_reasoning", "separate_reasoning", "stream_reasoning")  # vllm-router adds these
    )  # fmt: skip

    model: StrictStr
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: MaxTokens | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MAX_STOP)] | None = None
    seed: StrictInt | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user_id: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,512}$")] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings. Raises RequestError for an empty one."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in found:
            raise RequestError("stop contains an empty string; leave it out", "stop")
        return found

    def sampling_fields(self) -> dict[str, Any]:
        """The given fields of SamplingParams."""
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "n")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias:
            try:
                given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
            except ValueError as error:
                raise RequestError(f"the keys of logit_bias are token ids: {error}", "logit_bias") from error
        return given


class ChatRequest(SamplingInput):
    """The body of POST /chat/completions."""

    messages: Annotated[list[MessageInput], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolInput], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    think: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def turn(self) -> "TurnRequest":
        """The meaning of the request. Raises RequestError for fields that contradict each other."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", "stream_options")
        tools = [tool.function for tool in self.tools or ()]
        *earlier, last = self.messages
        if any(message.prefix for message in earlier) or (last.prefix and last.role != "assistant"):
            raise RequestError("prefix=true is for the last message only, of role='assistant'", "messages")
        return TurnRequest(
            model=self.model,
            messages=tuple(message.message() for message in self.messages),
            is_prefix=last.prefix,
            tools=tuple(
                Tool(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
                for tool in tools
            ),
            tool_choice=self._tool_choice(),
            schema=self._schema(),
            thinking=self._thinking(),
            effort=ALIASES.get(self.reasoning_effort or "", self.reasoning_effort),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stop=self.stop_strings,
            sampling=self.sampling_fields(),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            user_id=self.user_id or "",
        )

    def _thinking(self) -> bool | None:
        """Whether to think, by whichever field says so. Raises RequestError if they disagree."""
        kwargs = self.chat_template_kwargs or {}
        given = {
            "thinking": None if self.thinking is None else self.thinking.type == "enabled",
            "think": self.think,
            "chat_template_kwargs": kwargs.get("thinking", kwargs.get("enable_thinking")),
            "reasoning_effort": False if self.reasoning_effort == "none" else None,
        }
        values = {name: value for name, value in given.items() if value is not None}
        if len(set(values.values())) > 1:
            raise RequestError(f"{' and '.join(values)} disagree on whether to think", next(iter(values)))
        return next(iter(values.values()), None)

    def _schema(self) -> Mapping[str, Any] | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise RequestError("response_format.json_schema is missing; give the schema", "response_format.json_schema")
        return {} if wanted.json_schema is None else wanted.json_schema.json_schema

    def _tool_choice(self) -> str:
        choice = self.tool_choice or ("auto" if self.tools else "none")
        return choice if isinstance(choice, str) else f"function:{choice.function.name}"


@dataclass(frozen=True, kw_only=True)
class TurnRequest:
    """A request for an assistant turn in any dialect."""

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    """Text to complete, instead of a conversation."""
    prompt_token_ids: tuple[int, ...] | None = None
    """The prompt as token ids, instead of its text; BOS is not added."""
    suffix: str | None = None
    """With `prompt`: the text after the completion."""
    is_prefix: bool = False
    """Whether the turn goes on from the last message."""
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "none"
    """"none", "auto", "required" or "function:NAME"."""
    schema: Mapping[str, Any] | None = None
    """JSON schema of the content; {}: any JSON object."""
    thinking: bool | None = None
    """None: as the model name says."""
    effort: str | None = None
    """"none", "low", "high" or "max"."""
    max_tokens: int | None = None
    """0: nothing but the prompt is answered, with `prompt_logprobs`."""
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SamplingParams."""
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    """Number of alternatives to each token of the prompt; None: the prompt is not scored."""
    user_id: str = ""
    """Separates the prefix caches of the users of one account."""

    def __post_init__(self) -> None:
        names = {tool.name for tool in self.tools}
        chosen = self.tool_choice.removeprefix("function:")
        if len(names) < len(self.tools):
            raise RequestError("two tools have the same name; rename one", "tools")
        if not names and self.tool_choice != "none":
            raise RequestError(f"tool_choice={chosen!r} needs tools", "tool_choice")
        if chosen != self.tool_choice and chosen not in names:
            raise RequestError(f"tool_choice names {chosen!r}, which is not among the tools", "tool_choice")
        if self.schema is not None and self.tool_choice != "none":
            raise RequestError(
                "a JSON format of the reply and tools exclude each other; leave one out, or use strict tools", "tools"
            )
