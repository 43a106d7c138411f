"""Anthropic's dialect: /anthropic/v1/messages and its count of tokens."""

import secrets
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

from thinkstack.engine.interface import Overloaded
from thinkstack.server.api_errors import ApiError
from thinkstack.server.keys import Principal
from thinkstack.server.openapi import AnthropicError, AnthropicMessage, errors, reply
from thinkstack.server.prices import Usage
from thinkstack.server.schema import (
    ALIASES,
    MAX_STOP,
    MAX_TOOLS,
    Extensible,
    JsonObject,
    MaxTokens,
    ToolName,
    TurnRequest,
)
from thinkstack.server.sse import parse_arguments, sse, to_json
from thinkstack.server.turns import Turn
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.types import Message, RequestError, Tool, ToolCall

if TYPE_CHECKING:
    from thinkstack.server.app import Server

DELTAS = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
"""By type of block: the type of its deltas, and the field of their text, which is that of the block too."""


class TextBlock(BaseModel):
    """Text of either side; cache_control has no effect."""

    type: Literal["text"]
    text: StrictStr


class ThinkingBlock(BaseModel):
    """Earlier thinking; signatures are not checked."""

    type: Literal["thinking"]
    thinking: StrictStr


class ToolUseBlock(BaseModel):
    """A call in the history."""

    type: Literal["tool_use"]
    id: StrictStr
    name: StrictStr
    input: JsonObject


class ToolResultBlock(BaseModel):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: StrictStr
    content: StrictStr | list[TextBlock] = ""


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
"""Images, documents and other types are refused by name."""


class MessageBody(BaseModel):
    """A message."""

    role: Literal["user", "assistant"]
    content: StrictStr | list[Block]

    def messages(self) -> Iterator[Message]:
        """The messages as the chat formats have them; each result of a tool is one of its own."""
        blocks = [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        results = [block for block in blocks if isinstance(block, ToolResultBlock)]
        calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
        thinking = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
        text = _text([block for block in blocks if isinstance(block, TextBlock)])
        if self.role == "assistant":
            if results:
                raise RequestError("a tool_result is for messages of role='user'", "messages")
            yield Message(
                role="assistant",
                content=text,
                reasoning="".join(thinking) if thinking else None,
                tool_calls=tuple(
                    ToolCall(name=call.name, arguments=to_json(call.input).decode(), id=call.id) for call in calls
                ),
            )
            return
        if calls or thinking:
            raise RequestError("tool_use and thinking are for messages of role='assistant'", "messages")
        for result in results:
            yield Message(role="tool", content=_text(result.content), tool_call_id=result.tool_use_id)
        if text or not results:
            yield Message(role="user", content=text)


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


class ToolBody(BaseModel):
    """A function that the model may call; tools that a server would run are refused by their type."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: StrictStr = ""
    input_schema: JsonObject
    strict: StrictBool = False


class ToolChoiceBody(BaseModel):
    """Whether tools are used."""

    type: Literal["none", "auto", "any", "tool"]
    name: StrictStr = ""


class ThinkingBody(BaseModel):
    """Whether the model thinks; budget_tokens has no effect. "adaptive": as the model name says."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(BaseModel):
    """A schema of the reply."""

    type: Literal["json_schema"]
    json_schema: JsonObject = Field(alias="schema")


class OutputConfig(BaseModel):
    """How much to think, and the format of the text."""

    effort: Literal["none", "low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(BaseModel):
    """Whom a request is for."""

    user_id: Annotated[StrictStr, Field(max_length=1024)] | None = None


class CountRequest(Extensible):
    """The body of POST /anthropic/v1/messages/count_tokens."""

    IGNORED = frozenset(("container", "context_management", "inference_geo", "mcp_servers", "service_tier"))

    model: StrictStr
    messages: Annotated[list[MessageBody], Field(min_length=1)]
    system: StrictStr | list[TextBlock] = ""
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)

    def turn(self, **fields: Any) -> TurnRequest:
        """The meaning of the request. A last message of the assistant is continued. Raises RequestError."""
        system = _text(self.system)
        messages = [Message(role="system", content=system)] if system else []
        for message in self.messages:
            messages += message.messages()
        switch = {"enabled": True, "disabled": False}
        config = self.output_config
        return TurnRequest(
            model=self.model,
            messages=tuple(messages),
            is_prefix=messages[-1].role == "assistant",
            tools=tuple(
                Tool(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
                for tool in self.tools
            ),
            tool_choice=self._tool_choice(),
            schema=None if config.format is None else config.format.json_schema,
            thinking=False if config.effort == "none" else switch.get(self.thinking.type if self.thinking else ""),
            effort=ALIASES.get(config.effort or "", config.effort),
            **fields,
        )

    def _tool_choice(self) -> str:
        if self.tool_choice is None:
            return "auto" if self.tools else "none"
        kinds = {"any": "required", "tool": f"function:{self.tool_choice.name}"}
        return kinds.get(self.tool_choice.type, self.tool_choice.type)


class MessagesRequest(CountRequest):
    """The body of POST /anthropic/v1/messages."""

    max_tokens: MaxTokens
    stop_sequences: Annotated[list[StrictStr], Field(max_length=MAX_STOP)] = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    metadata: Metadata = Field(default_factory=Metadata)
    stream: StrictBool = False

    def turn(self, **fields: Any) -> TurnRequest:
        """The meaning of the request. Raises RequestError."""
        if "" in self.stop_sequences:
            raise RequestError("stop_sequences contains an empty string; leave it out", "stop_sequences")
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return super().turn(
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences),
            sampling={name: value for name, value in given.items() if value is not None},
            user_id=self.metadata.user_id or "",
        )


def usage_fields(usage: Usage) -> dict[str, int]:
    """The usage of a message; input_tokens are those that were not cached."""
    return {
        "input_tokens": usage.prompt_cache_miss_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.prompt_cache_hit_tokens,
        "output_tokens": usage.completion_tokens,
    }


class MessagesReply:
    """The reply to a messages request: blocks of thinking, text and calls, one after the other."""

    def __init__(self, turn: Turn, model: str):
        self.turn, self._model = turn, model
        self._blocks: list[dict[str, Any]] = []
        self._texts: list[str] = []
        """Parts of the open block."""
        self._is_open = self._is_cut = False
        """Whether the last block goes on; whether it is a call without its end."""
        self._stop_reason: str | None = None

    async def whole(self) -> dict[str, Any]:
        """The message when it is finished. Raises Overloaded."""
        async for index, event in self.turn.events():
            if index >= 0:
                for _ in self._feed(event):
                    pass
        return self._message(self._blocks)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The message as server-sent events, with pings as keep-alives."""
        is_started = False
        async for index, event in self.turn.events():
            if index < 0:
                yield sse({"type": "ping"}, "ping")
                continue
            if not is_started:
                is_started = True
                yield sse({"type": "message_start", "message": self._message([])}, "message_start")
            for each in self._feed(event):
                yield sse(each, each["type"])
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self.turn.stop_string(0)}
        last = {"type": "message_delta", "delta": delta, "usage": usage_fields(self.turn.usage)}
        yield sse(last, "message_delta")
        yield sse({"type": "message_stop"}, "message_stop")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.turn.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self.turn.stop_string(0),
            "usage": usage_fields(self.turn.usage),
        }

    def _feed(self, event: StreamEvent) -> Iterator[dict[str, Any]]:
        """The events of the protocol that an event leads to."""
        if event.kind == "finish":
            yield from self._close()
            self._stop_reason = self._reason(event)
        elif event.kind == "tool_call_start":
            yield from self._close()
            self._is_cut = True
            assert event.tool_call is not None
            call_id = f"toolu_{secrets.token_hex(12)}"
            yield self._open({"type": "tool_use", "id": call_id, "name": event.tool_call.name, "input": {}})
        elif event.kind == "tool_call":
            self._is_cut = False
        elif event.kind == "tool_call_delta":
            yield self._delta("input_json_delta", "partial_json", event.text)
        elif event.kind in ("reasoning", "content"):
            block_type = "thinking" if event.kind == "reasoning" else "text"
            delta_type, field = DELTAS[block_type]
            if not self._is_open or self._blocks[-1]["type"] != block_type:
                yield from self._close()
                signature = {"signature": ""} if block_type == "thinking" else {}
                yield self._open({"type": block_type, field: ""} | signature)
            yield self._delta(delta_type, field, event.text)

    def _open(self, block: dict[str, Any]) -> dict[str, Any]:
        self._blocks.append(block)
        self._texts, self._is_open = [], True
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta_type: str, field: str, text: str) -> dict[str, Any]:
        self._texts.append(text)
        delta = {"type": delta_type, field: text}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._is_open:
            return
        self._is_open, text, block, index = False, "".join(self._texts), self._blocks[-1], len(self._blocks) - 1
        if block["type"] == "tool_use":
            block["input"] = parse_arguments(text)
        else:
            block[DELTAS[block["type"]][1]] = text
        if block["type"] == "thinking":
            block["signature"] = self.turn.id  # clients send thinking back only with a signature
            delta = {"type": "signature_delta", "signature": self.turn.id}
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}

    def _reason(self, event: StreamEvent) -> str:
        if event.finish_reason not in ("stop", "length"):
            raise Overloaded("the request was ended by the server; send it again")
        if event.finish_reason == "length":
            return "max_tokens"
        if self.turn.stop_string(0) is not None:
            return "stop_sequence"
        has_calls = any(block["type"] == "tool_use" for block in self._blocks)
        return "tool_use" if has_calls and not self._is_cut else "end_turn"

    @staticmethod
    def error(error: ApiError) -> bytes:
        """An error after the start of the stream."""
        return sse(error.anthropic(), "error")


def anthropic_routes(server: "Server") -> APIRouter:
    """Messages, and the number of tokens that one would be billed for."""
    routes = APIRouter(prefix="/anthropic/v1", responses=errors(AnthropicError))
    caller = Annotated[Principal, Depends(server.principal)]

    @routes.post("/messages", responses=reply(AnthropicMessage))
    async def messages(body: MessagesRequest, request: Request, principal: caller) -> Response:
        """Answer a conversation."""
        ignored = body.ignored_fields()
        turn = await server.make_turn(principal, body.turn(), "msg_")
        return await server.answer(request, MessagesReply(turn, body.model), principal, body.stream, ignored)

    @routes.post("/messages/count_tokens")
    async def count_tokens(body: CountRequest, principal: caller) -> dict[str, int]:
        """The number of input tokens of a conversation, cached or not."""
        body.ignored_fields()
        turn = await server.make_turn(principal, body.turn())
        return {"input_tokens": len(turn.prepared.prompt_token_ids)}

    return routes
