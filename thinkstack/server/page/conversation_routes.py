"""Routes of the page for conversations: the list, one of them, its files and its link."""

import asyncio
import re
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from thinkstack.server.page.conversations import MAX_TITLE, Conversation, new_id
from thinkstack.server.page.documents import html_page, markdown_page
from thinkstack.server.page.fields import Body, PathId, Text
from thinkstack.server.page.page import HEADERS, NO_STORE, Caller, Page
from thinkstack.server.page.shapes import message_json
from thinkstack.server.page.transfer import ConversationInput, entries, export_json, import_json
from thinkstack.server.sse import to_json
from thinkstack.types import RequestError

MEDIA_TYPES = {"json": "application/json", "markdown": "text/markdown", "html": "text/html"}
EXTENSIONS = {"json": "json", "markdown": "md", "html": "html"}


class Title(Body):
    """A new title."""

    title: Annotated[Text, Field(min_length=1, max_length=MAX_TITLE)]


def conversation_json(page: Page, found: Conversation) -> dict[str, Any]:
    """A conversation and the branch that is shown."""

    def describe(messages: Any) -> list[dict[str, Any]]:
        return [message_json(each, found.siblings[each.parent_id], page.answers.find(each.id)) for each in messages]

    return {
        "id": found.id,
        "title": found.title,
        "updated_ms": found.updated_ms,
        "share": None if found.share_token is None else f"/s/{found.share_token}",
        "messages": describe(found.messages),
        "compared": describe(found.compared),
    }


def conversation_routes(page: Page) -> APIRouter:
    """The list, and one conversation."""
    routes = APIRouter(prefix="/page", include_in_schema=False)
    call, store = asyncio.to_thread, page.conversations
    signed_in = Annotated[Caller, Depends(page.caller)]

    @routes.get("/conversations")
    async def list_conversations(
        caller: signed_in, q: Annotated[Text, Query(max_length=200)] = "", before: str = ""
    ) -> JSONResponse:
        """A part of the list."""
        rows, cursor = await call(store.page, caller.user_id, q, _parse_cursor(before))
        following = None if cursor is None else "{}.{}".format(*cursor)
        return JSONResponse({"conversations": rows, "next": following}, headers=NO_STORE)

    @routes.get("/conversations/{conversation_id}")
    async def get_conversation(conversation_id: PathId, caller: signed_in) -> Response:
        """One conversation."""
        found = await call(store.load, caller.user_id, conversation_id)
        return Response(to_json(conversation_json(page, found)), media_type="application/json", headers=NO_STORE)

    @routes.patch("/conversations/{conversation_id}")
    async def rename(conversation_id: PathId, body: Title, caller: signed_in) -> dict[str, Any]:
        """Change the title."""
        await call(store.rename, caller.user_id, conversation_id, body.title)
        return {}

    @routes.delete("/conversations/{conversation_id}")
    async def delete(conversation_id: PathId, caller: signed_in) -> dict[str, Any]:
        """Delete a conversation; its running answers end."""
        page.answers.end(await call(store.delete, caller.user_id, conversation_id))
        return {}

    @routes.post("/messages/{message_id}/select")
    async def select(message_id: PathId, caller: signed_in) -> dict[str, Any]:
        """Show the branch with a message."""
        return conversation_json(page, await call(store.select, caller.user_id, message_id))

    return routes


def transfer_routes(page: Page) -> APIRouter:
    """Links, export and import."""
    routes = APIRouter(include_in_schema=False)
    call, store = asyncio.to_thread, page.conversations
    signed_in = Annotated[Caller, Depends(page.caller)]

    @routes.post("/page/conversations/{conversation_id}/share")
    async def share(conversation_id: PathId, caller: signed_in) -> dict[str, Any]:
        """A link to what is shown now."""
        return {"url": f"/s/{await call(store.share, caller.user_id, conversation_id)}"}

    @routes.delete("/page/conversations/{conversation_id}/share")
    async def unshare(conversation_id: PathId, caller: signed_in) -> dict[str, Any]:
        """Take the link back."""
        await call(store.unshare, caller.user_id, conversation_id)
        return {}

    @routes.get("/s/{token}")
    async def shared(token: PathId) -> Response:
        """A conversation for everybody who has the link."""
        found = await call(store.shared, token)
        headers = HEADERS | {"Cache-Control": "no-store", "X-Robots-Tag": "noindex"}
        return Response(await call(html_page, found.title, entries(found)), media_type="text/html", headers=headers)

    @routes.get("/page/conversations/{conversation_id}/export")
    async def export(
        conversation_id: PathId, caller: signed_in, format: Literal["json", "markdown", "html"] = "json"
    ) -> Response:
        """A conversation as a file."""
        if format == "json":
            row, messages = await call(store.all_messages, caller.user_id, conversation_id)
            title, body = row["title"], to_json(export_json(row["title"], row["leaf_id"], messages))
        else:
            found = await call(store.load, caller.user_id, conversation_id)
            title, body = found.title, (await call(_document, format, found)).encode()
        name = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")[:60] or "conversation"
        # a document with its own style, which runs nothing
        safe = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox"}
        headers = {"Content-Disposition": f'attachment; filename="{name}.{EXTENSIONS[format]}"'} | NO_STORE | safe
        return Response(body, media_type=MEDIA_TYPES[format], headers=headers)

    @routes.post("/page/import")
    async def import_(body: ConversationInput, caller: signed_in) -> dict[str, Any]:
        """A new conversation from an exported one."""
        conversation_id = new_id()
        messages, leaf_id = await call(import_json, body, conversation_id)
        await call(store.import_messages, caller.user_id, conversation_id, body.title, messages, leaf_id)
        return {"id": conversation_id}

    return routes


def _document(format: str, found: Conversation) -> str:
    if format == "markdown":
        return markdown_page(found.title, entries(found))
    css = resources.files("thinkstack.server").joinpath("ui", "share.css").read_text(encoding="utf-8")
    return html_page(found.title, entries(found), css=css)


def _parse_cursor(text: str) -> tuple[int, str] | None:
    if not text:
        return None
    moment, dot, last = text.partition(".")
    if not dot or not moment.isdecimal() or len(moment) > 15:
        raise RequestError(f"before={text[:40]!r} is no place in the list; leave it out", "before")
    return int(moment), last
