"""Messages, tools and tool calls between inspect and the chat formats."""

import json
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ContentReasoning,
    ContentText,
)
from inspect_ai.tool import ToolCall as InspectToolCall
from inspect_ai.tool import ToolChoice, ToolFunction, ToolInfo

from thinkstack.types import Message, RequestError, Tool, ToolCall


def from_inspect(message: ChatMessage) -> Message:
    """A message as the chat formats have it. Raises RequestError for content that is not text."""
    content, reasoning = "", None
    if isinstance(message.content, str):
        content = message.content
    else:
        for part in message.content:
            if isinstance(part, ContentText):
                content += part.text
            elif isinstance(part, ContentReasoning):
                reasoning = (reasoning or "") + part.reasoning
            else:
                raise RequestError(f"a message has content of the type {part.type!r}; only text is supported")
    if isinstance(message, ChatMessageTool):
        content = message.error.message if message.error is not None else content
        return Message(role="tool", content=content, tool_call_id=message.tool_call_id, name=message.function)
    if not isinstance(message, ChatMessageAssistant):
        return Message(role=message.role, content=content)
    calls = tuple(
        ToolCall(name=call.function, arguments=json.dumps(call.arguments, ensure_ascii=False), id=call.id)
        for call in message.tool_calls or ()
    )
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls)


def to_inspect(
    reasoning: str, content: str, calls: Sequence[ToolCall], model: str, id_prefix: str
) -> ChatMessageAssistant:
    """The message of a turn, with its reasoning as a part of its own. id_prefix: start of the ids of its calls."""
    parts: list[Any] = [ContentReasoning(reasoning=reasoning), ContentText(text=content)]
    found = [_call(call, f"{id_prefix}_{index}") for index, call in enumerate(calls)]
    return ChatMessageAssistant(
        content=parts if reasoning else content, tool_calls=found or None, model=model, source="generate"
    )


def _call(call: ToolCall, id: str) -> InspectToolCall:
    """Arguments that are no JSON object are named as an error, which inspect shows to the model."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError as error:
        return InspectToolCall(
            id=id, function=call.name, arguments={}, parse_error=f"the arguments are no JSON: {error}"
        )
    if not isinstance(arguments, dict):
        message = f"the arguments are a JSON {type(arguments).__name__}, not an object"
        return InspectToolCall(id=id, function=call.name, arguments={}, parse_error=message)
    return InspectToolCall(id=id, function=call.name, arguments=arguments)


def tools_from_inspect(tools: Sequence[ToolInfo], choice: ToolChoice) -> tuple[tuple[Tool, ...], str]:
    """The tools of a request, and the choice as "none", "auto", "required" or "function:NAME"."""
    if not tools or choice == "none":
        return (), "none"
    found = tuple(
        Tool(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters.model_dump(mode="json", exclude_none=True),
        )
        for tool in tools
    )
    if isinstance(choice, ToolFunction):
        return found, f"function:{choice.name}"
    return found, "required" if choice == "any" else "auto"
