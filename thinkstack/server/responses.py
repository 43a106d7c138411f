"""OpenAI's Responses API, without a memory: /v1/responses."""

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from thinkstack.engine.interface import Overloaded
from thinkstack.server.api_errors import ApiError
from thinkstack.server.keys import Principal
from thinkstack.server.openapi import OpenAIError, OpenAIResponse, errors, reply
from thinkstack.server.prices import Usage
from thinkstack.server.responses_schema import ResponsesRequest
from thinkstack.server.sse import KEEP_ALIVE_COMMENT, sse
from thinkstack.server.turns import Turn
from thinkstack.text.stream_parser import StreamEvent

if TYPE_CHECKING:
    from thinkstack.server.app import Server

Fields = dict[str, Any]


def usage_fields(usage: Usage) -> Fields:
    """The usage of a response."""
    hit, miss = usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens
    return {
        "input_tokens": hit + miss,
        "input_tokens_details": {"cached_tokens": hit, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": hit + miss + usage.completion_tokens,
    }


def text_part(text: str) -> Fields:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponsesReply:
    """The reply to a Responses request: items of reasoning, messages and calls, one after the other."""

    def __init__(self, turn: Turn, body: ResponsesRequest):
        self.turn, self._created = turn, int(time.time())
        echoed = {"instructions", "max_output_tokens", "model", "reasoning", "tool_choice", "tools"}
        self._echo = {"tools": [], "tool_choice": "auto"} | body.model_dump(include=echoed, exclude_none=True)
        self._has_summary = body.reasoning is not None and body.reasoning.summary is not None
        self._output: list[Fields] = []
        self._texts: list[str] = []
        """Parts of the open item."""
        self._is_open = self._is_cut = False
        """Whether the last item goes on; whether it is a call without its end."""
        self._status = "in_progress"
        self._num_events = 0

    async def whole(self) -> Fields:
        """The response when it is finished. Raises Overloaded."""
        async for index, event in self.turn.events():
            if index >= 0:
                for _ in self._feed(event):
                    pass
        return self._response(usage_fields(self.turn.usage))

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The response as server-sent events."""
        for name in ("response.created", "response.in_progress"):
            yield self._event({"type": name, "response": self._response(None)})
        async for index, event in self.turn.events():
            if index < 0:
                yield KEEP_ALIVE_COMMENT
                continue
            for each in self._feed(event):
                yield self._event(each)
        last = self._response(usage_fields(self.turn.usage))
        yield self._event({"type": f"response.{self._status}", "response": last})

    def _event(self, fields: Fields) -> bytes:
        self._num_events += 1
        return sse(fields | {"sequence_number": self._num_events - 1}, fields["type"])

    def _response(self, usage: Fields | None, error: Fields | None = None) -> Fields:
        is_incomplete = self._status == "incomplete"
        return self._echo | {
            "id": self.turn.id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_incomplete else None,
            "metadata": {},
            "output": list(self._output),
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": self.turn.prepared.sampling.temperature,
            "top_p": self.turn.prepared.sampling.top_p,
            "usage": usage,
        }

    def _feed(self, event: StreamEvent) -> Iterator[Fields]:
        """The events of the protocol that an event leads to."""
        if event.kind == "finish":
            if event.finish_reason not in ("stop", "length"):
                raise Overloaded("the request was ended by the server; send it again")
            self._status = "completed" if event.finish_reason == "stop" else "incomplete"
            yield from self._close(self._status)
        elif event.kind == "tool_call_start":
            assert event.tool_call is not None
            call = {"call_id": f"call_{secrets.token_hex(12)}", "name": event.tool_call.name, "arguments": ""}
            yield from self._close()
            yield from self._open("function_call", "fc_", call)
            self._is_cut = True
        elif event.kind == "tool_call":
            self._is_cut = False
        elif event.kind == "tool_call_delta":
            yield self._delta("function_call_arguments", event.text)
        elif event.kind == "reasoning":
            if not self._is_open or self._output[-1]["type"] != "reasoning":
                yield from self._close()
                yield from self._open("reasoning", "rs_", {"summary": [], "content": []})
            yield self._delta("reasoning_text", event.text, {"content_index": 0})
            if self._has_summary:
                place = self._place | {"summary_index": 0}
                yield {"type": "response.reasoning_summary_text.delta", "delta": event.text} | place
        elif event.kind == "content":
            if not self._is_open or self._output[-1]["type"] != "message":
                yield from self._close()
                yield from self._open("message", "msg_", {"role": "assistant", "content": []})
            yield self._delta("output_text", event.text, {"content_index": 0, "logprobs": []})

    @property
    def _place(self) -> Fields:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _open(self, item_type: str, prefix: str, fields: Fields) -> Iterator[Fields]:
        item_id = f"{prefix}{secrets.token_hex(12)}"
        self._output.append({"id": item_id, "type": item_type, "status": "in_progress"} | fields)
        self._texts, self._is_open = [], True
        index = len(self._output) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": dict(self._output[-1])}
        if item_type != "function_call":
            part = text_part("") if item_type == "message" else {"type": "reasoning_text", "text": ""}
            yield {"type": "response.content_part.added", "content_index": 0, "part": part} | self._place
        if item_type == "reasoning" and self._has_summary:
            place = self._place | {"summary_index": 0}
            yield {
                "type": "response.reasoning_summary_part.added",
                "part": {"type": "summary_text", "text": ""},
            } | place

    def _delta(self, name: str, text: str, fields: Fields | None = None) -> Fields:
        self._texts.append(text)
        return {"type": f"response.{name}.delta", "delta": text} | self._place | (fields or {})

    def _close(self, status: str = "completed") -> Iterator[Fields]:
        """End the open item."""
        if not self._is_open:
            return
        self._is_open, text, item, place = False, "".join(self._texts), self._output[-1], self._place
        item["status"] = "incomplete" if self._is_cut else status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield {"type": "response.function_call_arguments.done", "name": item["name"], "arguments": text} | place
        else:
            is_message = item["type"] == "message"
            part = text_part(text) if is_message else {"type": "reasoning_text", "text": text}
            item["content"] = [part]
            done = place | {"content_index": 0}
            logprobs: Fields = {"logprobs": []} if is_message else {}
            yield {"type": f"response.{part['type']}.done", "text": text} | done | logprobs
            yield {"type": "response.content_part.done", "part": part} | done
        if item["type"] == "reasoning" and self._has_summary:
            summary = {"type": "summary_text", "text": text}
            item["summary"] = [summary]
            done = place | {"summary_index": 0}
            yield {"type": "response.reasoning_summary_text.done", "text": text} | done
            yield {"type": "response.reasoning_summary_part.done", "part": summary} | done
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}

    def error(self, error: ApiError) -> bytes:
        """An error after the start of the stream."""
        self._status = "failed"
        found = {"code": error.type, "message": error.message}
        return self._event({"type": "response.failed", "response": self._response(None, found)})


def responses_routes(server: "Server") -> APIRouter:
    """Responses that are not stored."""
    routes = APIRouter(responses=errors(OpenAIError))
    caller = Annotated[Principal, Depends(server.principal)]

    @routes.post("/responses", responses=reply(OpenAIResponse))
    async def responses(body: ResponsesRequest, request: Request, principal: caller) -> Response:
        """Answer a text or a conversation."""
        ignored = body.ignored_fields()
        turn = await server.make_turn(principal, body.turn(), "resp_")
        return await server.answer(request, ResponsesReply(turn, body), principal, bool(body.stream), ignored)

    return routes
