"""Routes of the page for messages: sending, regenerating, going on, and the stream of an answer."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field, StrictBool

from thinkstack.server.page.conversations import File, StoredMessage, new_id, title_of
from thinkstack.server.page.errors import Conflict, NotFound, TooLarge
from thinkstack.server.page.fields import Body, Id, Name, PathId, Text
from thinkstack.server.page.page import NO_STORE, Caller, Page
from thinkstack.server.page.shapes import message_json, prompt_of
from thinkstack.server.page.transfer import FileInput
from thinkstack.server.schema import TurnRequest
from thinkstack.types import Message, RequestError

MAX_CHARS = 4_000_000
"""Characters of a message with its files; the model's context is the limit before."""
MAX_FILES = 20
MAX_COMPARED = 2
STREAM_HEADERS = NO_STORE | {"X-Accel-Buffering": "no"}


class Send(Body):
    """A message of the user."""

    conversation: Id | None = None
    """None: a new one."""
    parent: Id | None = None
    text: Text
    files: Annotated[tuple[FileInput, ...], Field(max_length=MAX_FILES)] = ()
    files_of: Id | None = None
    """A message whose files are sent again, as it is edited."""
    models: Annotated[list[Name], Field(min_length=1, max_length=MAX_COMPARED)]
    thinking: StrictBool


class Regenerate(Body):
    """Another answer."""

    model: Name
    thinking: StrictBool


class Continue(Body):
    """An answer that goes on."""

    reasoning: Text | None = None
    """The thinking to go on from; None: from the end."""


def message_routes(page: Page) -> APIRouter:
    """Messages."""
    routes = APIRouter(prefix="/page", include_in_schema=False)
    call, store = asyncio.to_thread, page.conversations
    signed_in = Annotated[Caller, Depends(page.caller)]

    @routes.post("/send")
    async def send(body: Send, caller: signed_in) -> dict[str, Any]:
        """Send a message; one or two models answer it."""
        files = tuple(File(name=file.name, text=file.text) for file in body.files)
        if body.files_of is not None:
            files = (*(await call(store.message, caller.user_id, body.files_of)).files, *files)
        _check_message(body.text, files)
        history = [] if body.parent is None else await call(store.history, caller.user_id, body.parent)
        if body.conversation is not None:
            await call(store.check, caller.user_id, body.conversation)
        conversation_id = body.conversation or new_id()
        _check_parent(history, body, conversation_id)
        question = _new_message(page, conversation_id, body.parent, role="user", content=body.text, files=files)
        prompt = prompt_of([*history, question])
        wanted = [_request(page, model, prompt, body.thinking) for model in body.models]
        group_id = new_id() if len(wanted) > 1 else None
        made = [_new_answer(page, question, request, group_id) for request in wanted]
        title = title_of(body.text, files) if body.conversation is None else None
        found = await _start(page, caller, [question], made, wanted, title)
        head = {"id": found["id"], "title": found["title"], "updated_ms": found["updated_ms"]}
        return {"conversation": head, "user": found["user"], "answers": found["answers"]}

    @routes.post("/messages/{message_id}/regenerate")
    async def regenerate(message_id: PathId, body: Regenerate, caller: signed_in) -> dict[str, Any]:
        """Another answer to the same message."""
        *history, old = await call(store.history, caller.user_id, message_id)
        if old.role != "assistant":
            raise Conflict("only answers are regenerated; edit your message instead")
        wanted = _request(page, body.model, prompt_of(history), body.thinking)
        found = await _start(page, caller, [], [_new_answer(page, history[-1], wanted)], [wanted])
        return {"answers": found["answers"]}

    @routes.post("/messages/{message_id}/continue")
    async def go_on(message_id: PathId, body: Continue, caller: signed_in) -> dict[str, Any]:
        """An answer that goes on from another one's thinking, edited or not, or from its content."""
        *history, old = await call(store.history, caller.user_id, message_id)
        if old.role != "assistant" or old.status == "running":
            raise Conflict("only complete answers go on")
        reasoning, content = (old.reasoning, old.content) if body.reasoning is None else (body.reasoning, "")
        if not reasoning.strip() and not content.strip():
            raise RequestError("there is nothing to go on from; regenerate the answer instead", "reasoning")
        begun = Message(role="assistant", content=content, reasoning=reasoning or None)
        prompt = (*prompt_of(history), begun)
        wanted = TurnRequest(model=old.model, messages=prompt, is_prefix=True, thinking=old.thinking or None)
        made = replace(_new_answer(page, history[-1], wanted), reasoning=reasoning, content=content)
        return {"answers": (await _start(page, caller, [], [made], [wanted]))["answers"]}

    return routes


def answer_routes(page: Page) -> APIRouter:
    """The text of answers, their streams, and what ends them."""
    routes = APIRouter(prefix="/page", include_in_schema=False)
    call, store, answers = asyncio.to_thread, page.conversations, page.answers
    signed_in = Annotated[Caller, Depends(page.caller)]

    @routes.get("/messages/{message_id}/source")
    async def source(message_id: PathId, caller: signed_in) -> JSONResponse:
        """The text of a message."""
        message = await call(store.message, caller.user_id, message_id)
        live = answers.find(message_id)
        if live is not None:
            message = live.snapshot()
        at = f"{len(message.reasoning)}.{len(message.content)}"
        return JSONResponse({"content": message.content, "reasoning": message.reasoning, "at": at}, headers=NO_STORE)

    @routes.get("/answers/{message_id}/events")
    async def events(message_id: PathId, caller: signed_in, after: str = "0.0") -> Response:
        """What comes after a position of an answer, as it is made."""
        place = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", after)
        if place is None:
            raise RequestError(f"after={after[:40]!r} is no position; write 0.0 for the start", "after")
        message = await call(store.message, caller.user_id, message_id)
        if message.role != "assistant":
            raise NotFound("there is no such answer")
        stream = await answers.events(caller.user_id, message_id, (int(place[1]), int(place[2])))
        return StreamingResponse(stream, media_type="text/event-stream", headers=STREAM_HEADERS)

    @routes.post("/answers/{message_id}/stop")
    async def stop(message_id: PathId, caller: signed_in) -> dict[str, Any]:
        """End an answer now."""
        await answers.command(caller.user_id, message_id, "stop")
        return {}

    @routes.post("/answers/{message_id}/answer-now")
    async def answer_now(message_id: PathId, caller: signed_in) -> dict[str, Any]:
        """Close the thinking of an answer now."""
        await answers.command(caller.user_id, message_id, "answer_now")
        return {}

    return routes


async def _start(
    page: Page,
    caller: Caller,
    before: Sequence[StoredMessage],
    made: Sequence[StoredMessage],
    wanted: Sequence[TurnRequest],
    title: str | None = None,
) -> dict[str, Any]:
    """Start the turns of answers, write their messages, and read the turns into them. before: messages to add first."""
    turns = await page.answers.start_turns(caller.principal, wanted)
    made = [replace(message, thinking=turn.prepared.is_thinking) for message, turn in zip(made, turns, strict=True)]
    try:
        conversation_id = made[0].conversation_id
        found = await asyncio.to_thread(
            page.conversations.add, caller.user_id, conversation_id, [*before, *made], title
        )
        siblings = found.siblings[made[0].parent_id]
        lives = [await page.answers.open(message, siblings) for message in made]
    except BaseException:
        for turn in turns:
            turn.close()
        raise
    for live, turn in zip(lives, turns, strict=True):
        page.answers.launch(live, turn)
    answers = [page.answers.describe(live) for live in lives]
    user = message_json(before[0], found.siblings[before[0].parent_id]) if before else None
    return {"id": found.id, "title": found.title, "updated_ms": found.updated_ms, "user": user, "answers": answers}


def _request(page: Page, model: str, messages: tuple[Message, ...], thinking: bool) -> TurnRequest:
    """A request to a model; one that has not this mode of thinking uses the mode that it has. Raises RequestError."""
    can_choose = page.server.models.get(model).member.can_start(thinking)
    return TurnRequest(model=model, messages=messages, thinking=thinking if can_choose else None)


def _new_message(page: Page, conversation_id: str, parent_id: str | None, **values: Any) -> StoredMessage:
    created_ms = int(page.server.accounts.clock() * 1000)
    return StoredMessage(
        id=new_id(), conversation_id=conversation_id, parent_id=parent_id, created_ms=created_ms, **values
    )


def _new_answer(page: Page, question: StoredMessage, wanted: TurnRequest, group_id: str | None = None) -> StoredMessage:
    return _new_message(
        page, question.conversation_id, question.id, role="assistant", model=wanted.model, status="running",
        group_id=group_id, process_id=page.server.accounts.process_id,
    )  # fmt: skip


def _check_message(text: str, files: Sequence[File]) -> None:
    if not text.strip() and not files:
        raise RequestError("the message is empty", "text")
    size = len(text) + sum(len(file.text) for file in files)
    if size > MAX_CHARS:
        raise TooLarge(f"the message has {size:,} characters with its files, above {MAX_CHARS:,}; shorten it")


def _check_parent(history: Sequence[StoredMessage], body: Send, conversation_id: str) -> None:
    if not history:
        return
    last = history[-1]
    if last.conversation_id != conversation_id:
        raise NotFound("the message to answer belongs to another conversation")
    if last.role != "assistant":
        raise Conflict("a message follows an answer; the last one is not an answer")
    if last.status == "running":
        raise Conflict("the last answer is still being made; wait for it or stop it")
