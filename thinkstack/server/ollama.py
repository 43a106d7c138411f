"""Ollama's dialect: /api/chat with one JSON object a line, /api/tags and /api/version."""

import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

import thinkstack
from thinkstack.engine.interface import Overloaded
from thinkstack.server.api_errors import ApiError
from thinkstack.server.keys import Principal
from thinkstack.server.openapi import OllamaChat, OllamaError, errors, reply
from thinkstack.server.schema import (
    MAX_STOP,
    MAX_TOOLS,
    Extensible,
    JsonObject,
    Penalty,
    ToolInput,
    TurnRequest,
)
from thinkstack.server.sse import parse_arguments, to_json
from thinkstack.server.turns import Turn
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.types import Message, RequestError, Tool, ToolCall

if TYPE_CHECKING:
    from thinkstack.server.app import Server

NDJSON = "application/x-ndjson"


class FunctionBody(BaseModel):
    """A call in the history, its arguments as an object."""

    name: StrictStr
    arguments: JsonObject = Field(default_factory=dict)


class CallBody(BaseModel):
    """A call in the history."""

    function: FunctionBody


class OllamaMessage(BaseModel):
    """A message; unknown fields are ignored, because clients send replies back as they came."""

    role: Literal["system", "user", "assistant", "tool"]
    content: StrictStr = ""
    thinking: StrictStr | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    """Not supported: must be empty."""
    tool_calls: list[CallBody] | None = None
    tool_name: StrictStr | None = None

    def message(self) -> Message:
        """The message as the chat formats have it."""
        if self.role != "assistant":
            return Message(role=self.role, content=self.content, name=self.tool_name)
        calls = [call.function for call in self.tool_calls or ()]
        return Message(
            role="assistant",
            content=self.content,
            reasoning=self.thinking,
            tool_calls=tuple(ToolCall(name=call.name, arguments=to_json(call.arguments).decode()) for call in calls),
        )


class Options(Extensible):
    """How to sample."""

    IGNORED = frozenset(
        (
            "num_ctx", "num_keep", "num_batch", "num_gpu", "num_thread", "main_gpu", "use_mmap", "use_mlock", "numa",
            "low_vram", "repeat_last_n",
        )
    )  # fmt: skip
    """Options on how Ollama itself runs a model."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: StrictInt | None = None
    num_predict: StrictInt | None = None
    """max_tokens; -1 and -2: the default of the model."""
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MAX_STOP)] | None = None

    def sampling_fields(self) -> dict[str, Any]:
        """The given fields of SamplingParams."""
        given = self.model_dump(exclude={"num_predict", "stop"} | set(self.model_extra or {}), exclude_none=True)
        if "repeat_penalty" in given:
            given["repetition_penalty"] = given.pop("repeat_penalty")
        return given


class OllamaRequest(Extensible):
    """The body of POST /api/chat."""

    IGNORED = frozenset(("keep_alive",))

    model: StrictStr
    messages: Annotated[list[OllamaMessage], Field(min_length=1)]
    tools: Annotated[list[ToolInput], Field(max_length=MAX_TOOLS)] | None = None
    think: StrictBool | Literal["low", "medium", "high", "max"] | None = None
    format: Literal["", "json"] | JsonObject | None = None
    options: Options | None = None
    stream: StrictBool = True

    def ignored_fields(self, prefix: str = "") -> list[str]:
        """The given fields that have no effect, with those of the options. Raises RequestError for unknown ones."""
        options = self.options or Options()
        return super().ignored_fields(prefix) + options.ignored_fields("options.")

    def turn(self) -> TurnRequest:
        """The meaning of the request. Raises RequestError."""
        options = self.options or Options()
        stop = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
        if "" in stop:
            raise RequestError("options.stop contains an empty string; leave it out", "options.stop")
        if options.num_predict == 0:
            raise RequestError("options.num_predict=0 asks for nothing; use 1 or more", "options.num_predict")
        tools = [tool.function for tool in self.tools or ()]
        effort = {"medium": "high"}.get(self.think, self.think) if isinstance(self.think, str) else None
        return TurnRequest(
            model=self.model,
            messages=tuple(message.message() for message in self.messages),
            tools=tuple(
                Tool(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
                for tool in tools
            ),
            tool_choice="auto" if tools else "none",
            schema={} if self.format == "json" else self.format or None,
            thinking=None if self.think is None else bool(self.think),
            effort=effort,
            max_tokens=options.num_predict if options.num_predict and options.num_predict > 0 else None,
            stop=stop,
            sampling=options.sampling_fields(),
        )


class OllamaReply:
    """The reply to a chat request of Ollama."""

    def __init__(self, turn: Turn, model: str):
        self.turn, self._model = turn, model
        self._began = time.perf_counter_ns()
        self._first: int | None = None
        """When the first token came."""

    async def whole(self) -> dict[str, Any]:
        """The reply when it is finished. Raises Overloaded."""
        texts: dict[str, str] = {"content": ""}
        calls: list[Any] = []
        last: dict[str, Any] = {}
        async for index, event in self.turn.events():
            if index >= 0:
                message, last = self._part(event)
                calls += message.pop("tool_calls", [])
                for name, text in message.items():
                    texts[name] = texts.get(name, "") + text
        return self._line(texts | ({"tool_calls": calls} if calls else {}), last)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The reply one part a line; clients cannot read blank lines, so an empty part is the keep-alive."""
        async for index, event in self.turn.events():
            message, last = ({"content": ""}, {}) if index < 0 else self._part(event)
            if index < 0 or message or last:
                yield to_json(self._line({"content": ""} | message, last)) + b"\n"

    def _part(self, event: StreamEvent) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of the message that an event adds, and those of the last line."""
        self._first = self._first or time.perf_counter_ns()
        if event.kind == "finish":
            return {}, self._last_fields(event)
        if event.kind == "tool_call":
            assert event.tool_call is not None
            function = {"name": event.tool_call.name, "arguments": parse_arguments(event.tool_call.arguments)}
            return {"tool_calls": [{"function": function}]}, {}
        if event.kind in ("reasoning", "content"):
            return {"thinking" if event.kind == "reasoning" else "content": event.text}, {}
        return {}, {}

    def _last_fields(self, event: StreamEvent) -> dict[str, Any]:
        if event.finish_reason not in ("stop", "length"):
            raise Overloaded("the request was ended by the server; send it again")
        usage, now = self.turn.usage, time.perf_counter_ns()
        first = self._first or now
        return {
            "done_reason": event.finish_reason,
            "total_duration": now - self._began,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens,
            "prompt_eval_duration": first - self._began,
            "eval_count": usage.completion_tokens,
            "eval_duration": now - first,
        }

    def _line(self, message: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": self._model,
            "created_at": datetime.now(UTC).isoformat(),
            "message": {"role": "assistant"} | message,
            "done": bool(last),
        } | last

    @staticmethod
    def error(error: ApiError) -> bytes:
        """An error after the start of the stream."""
        return to_json(error.ollama()) + b"\n"


def ollama_routes(server: "Server") -> APIRouter:
    """Chat and models for clients of Ollama."""
    routes = APIRouter(prefix="/api", responses=errors(OllamaError))
    caller = Annotated[Principal, Depends(server.principal)]

    @routes.post("/chat", responses=reply(OllamaChat, NDJSON))
    async def chat(body: OllamaRequest, request: Request, principal: caller) -> Response:
        """Answer a conversation."""
        ignored = body.ignored_fields()
        turn = await server.make_turn(principal, body.turn())
        reply = OllamaReply(turn, body.model)
        return await server.answer(request, reply, principal, body.stream, ignored, NDJSON)

    @routes.get("/tags")
    async def tags(principal: caller) -> dict[str, Any]:
        """The model names of this server."""
        started = datetime.fromtimestamp(server.started, UTC).isoformat()
        names = [model.name for model in server.models if not principal.models or model.name in principal.models]
        return {"models": [{"name": name, "model": name, "modified_at": started, "details": {}} for name in names]}

    @routes.get("/version")
    async def version(principal: caller) -> dict[str, str]:
        """The version of this server."""
        return {"version": thinkstack.__version__}

    return routes
