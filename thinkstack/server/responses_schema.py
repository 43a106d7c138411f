"""Requests of OpenAI's Responses API as JSON, and their meaning for the rest of the server."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, StrictBool, StrictStr, Tag

from thinkstack.server.schema import (
    ALIASES,
    MAX_TOOLS,
    Extensible,
    JsonObject,
    MaxTokens,
    ToolName,
    TurnRequest,
)
from thinkstack.types import Message, RequestError, Role, Tool, ToolCall


class Part(BaseModel):
    """A part of a text; images, files and other kinds are not supported."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text"]
    text: StrictStr


Text = StrictStr | list[Part]


class MessageItem(BaseModel):
    """A message; its type may be missing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class CallItem(BaseModel):
    """A call in the history."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr


class CallOutputItem(BaseModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: StrictStr
    output: Text


class ReasoningItem(BaseModel):
    """Earlier thinking; its summary has no effect."""

    type: Literal["reasoning"]
    content: list[Part] | None = None


def item_type(item: Any) -> str:
    """The tag of an item."""
    found = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return str(found or "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(item_type),
]


class FlatTool(BaseModel):
    """A function that the model may call; tools that a server would run are refused by their type."""

    type: Literal["function"]
    name: ToolName
    description: StrictStr | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None

    def tool(self) -> Tool:
        """The tool as the chat formats have it."""
        empty = {"type": "object", "properties": {}}
        return Tool(
            name=self.name,
            description=self.description or "",
            parameters=self.parameters or empty,
            strict=bool(self.strict),
        )


class FlatToolChoice(BaseModel):
    """The choice of one function."""

    type: Literal["function"]
    name: StrictStr


class TextFormat(BaseModel):
    """The format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonObject | None = Field(None, alias="schema")


class TextConfig(BaseModel):
    """The format of the text; verbosity has no effect."""

    format: TextFormat | None = None


class Reasoning(BaseModel):
    """How much to think, and whether to send the thinking as a summary too."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(Extensible):
    """The body of POST /v1/responses."""

    IGNORED = frozenset(
        (
            "client_metadata", "include", "metadata", "parallel_tool_calls", "prompt_cache_key",
            "prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream_options", "truncation",
            "user",
        )
    )  # fmt: skip
    """Accepted without effect; nothing is ever stored."""

    model: StrictStr
    input: StrictStr | Annotated[list[Item], Field(min_length=1)]
    instructions: StrictStr | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: StrictBool | None = None

    def ignored_fields(self, prefix: str = "") -> list[str]:
        """The given fields that have no effect. Raises RequestError for unknown ones."""
        for name in ("previous_response_id", "conversation"):
            if (self.model_extra or {}).get(name) is not None:
                raise RequestError(f"{name} is not supported, because no response is stored; send all items", name)
        return super().ignored_fields(prefix)

    def turn(self) -> TurnRequest:
        """The meaning of the request. Raises RequestError for fields that contradict each other."""
        effort = self.reasoning.effort if self.reasoning else None
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return TurnRequest(
            model=self.model,
            messages=tuple(self._messages()),
            tools=tuple(tool.tool() for tool in self.tools or ()),
            tool_choice=self._tool_choice(),
            schema=self._schema(),
            thinking=False if effort == "none" else None,
            effort=ALIASES.get(effort or "", effort),
            max_tokens=self.max_output_tokens,
            sampling={name: value for name, value in given.items() if value is not None},
        )

    def _messages(self) -> list[Message]:
        """The conversation; what the assistant did in a row is one message."""
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        turn: list[Item] = []
        for item in self.input:
            if isinstance(item, CallOutputItem) or (isinstance(item, MessageItem) and item.role != "assistant"):
                messages += _assistant(turn)
                turn.clear()
            if isinstance(item, CallOutputItem):
                messages.append(Message(role="tool", content=_text(item.output), tool_call_id=item.call_id))
            elif isinstance(item, MessageItem) and item.role != "assistant":
                role: Role = "system" if item.role == "developer" else item.role
                messages.append(Message(role=role, content=_text(item.content)))
            else:
                turn.append(item)
        return [*messages, *_assistant(turn)]

    def _tool_choice(self) -> str:
        choice = self.tool_choice or "auto"
        if not isinstance(choice, str):
            return f"function:{choice.name}"
        return "none" if choice == "auto" and not self.tools else choice

    def _schema(self) -> Mapping[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise RequestError("text.format.schema is missing; give the schema", "text.format.schema")
        return wanted.json_schema or {}


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _assistant(items: list[Item]) -> list[Message]:
    """The message of an assistant's items, if there are any."""
    if not items:
        return []
    reasoning = [_text(item.content or []) for item in items if isinstance(item, ReasoningItem)]
    calls = [item for item in items if isinstance(item, CallItem)]
    message = Message(
        role="assistant",
        content="".join(_text(item.content) for item in items if isinstance(item, MessageItem)),
        reasoning="".join(reasoning) or None,
        tool_calls=tuple(ToolCall(name=call.name, arguments=call.arguments, id=call.call_id) for call in calls),
    )
    return [message]
