"""Conversations as files: export and import as JSON, export for reading."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from thinkstack.server.page.conversations import (
    MAX_TITLE,
    Conversation,
    File,
    Stats,
    StoredMessage,
    new_id,
)
from thinkstack.server.page.documents import Entry
from thinkstack.server.page.fields import Body, Name, Text
from thinkstack.server.page.markdown import render
from thinkstack.types import RequestError

FORMAT, VERSION = "thinkstack-conversation", 1
MAX_MESSAGES = 10_000


class FileInput(Body):
    """An attached file."""

    name: Name
    text: Text


class StatsInput(BaseModel):
    """The statistics of an answer; only numbers."""

    model_config = ConfigDict(extra="ignore")

    prompt_cache_hit_tokens: Annotated[int, Field(ge=0)] = 0
    prompt_cache_miss_tokens: Annotated[int, Field(ge=0)] = 0
    completion_tokens: Annotated[int, Field(ge=0)] = 0
    reasoning_tokens: Annotated[int, Field(ge=0)] = 0
    draft_tokens: Annotated[int, Field(ge=0)] = 0
    accepted_tokens: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    thinking_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    first_token_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    cost_pico: Annotated[int, Field(ge=0, le=2**62)] | None = None


class MessageInput(Body):
    """A message; ids are positions in the list."""

    id: Annotated[int, Field(ge=0)]
    parent: Annotated[int, Field(ge=0)] | None = None
    role: Literal["user", "assistant"]
    content: Text
    reasoning: Text = ""
    files: tuple[FileInput, ...] = ()
    model: Name = ""
    thinking: bool = False
    group: Annotated[int, Field(ge=0)] | None = None
    status: Literal["", "stop", "length", "stopped", "failed"] = ""
    error: Annotated[Text, Field(max_length=1000)] = ""
    created_ms: Annotated[int, Field(ge=0, le=2**53)] = 0
    stats: StatsInput = StatsInput()


class ConversationInput(Body):
    """An exported conversation."""

    format: Literal["thinkstack-conversation"]
    version: Literal[1]
    title: Annotated[Text, Field(min_length=1, max_length=MAX_TITLE)]
    leaf: Annotated[int, Field(ge=0)] | None = None
    messages: Annotated[list[MessageInput], Field(max_length=MAX_MESSAGES)]


def export_json(title: str, leaf_id: str | None, messages: list[StoredMessage]) -> dict[str, Any]:
    """A conversation with all its branches. Ids are positions, so that export after import gives the same file."""
    places = {message.id: place for place, message in enumerate(messages)}
    groups: dict[str, int] = {}
    for message in messages:
        if message.group_id is not None:
            groups.setdefault(message.group_id, len(groups))
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "leaf": places.get(leaf_id or ""),
        "messages": [
            {
                "id": places[message.id],
                "parent": places.get(message.parent_id or ""),
                "role": message.role,
                "content": message.content,
                "reasoning": message.reasoning,
                "files": [{"name": file.name, "text": file.text} for file in message.files],
                "model": message.model,
                "thinking": message.thinking,
                "group": groups.get(message.group_id or ""),
                "status": "stopped" if message.status == "running" else message.status,
                "error": message.error,
                "created_ms": message.created_ms,
                "stats": vars(message.stats),
            }
            for message in messages
        ],
    }


def import_json(found: ConversationInput, conversation_id: str) -> tuple[list[StoredMessage], str | None]:
    """The messages of an exported conversation with new ids, and the id of the leaf. Raises RequestError for a tree
    that is none."""
    ids, groups, rows = [new_id() for _ in found.messages], dict[int, str](), list[StoredMessage]()
    for place, message in enumerate(found.messages):
        if message.id != place:
            raise RequestError(f"message {place} has the id {message.id}; ids are positions in the list", "messages")
        if message.parent is not None and message.parent >= place:
            raise RequestError(f"message {place} comes before its parent {message.parent}", "messages")
        parent = None if message.parent is None else found.messages[message.parent]
        if (message.role == "user") != (parent is None or parent.role == "assistant"):
            raise RequestError(f"message {place} has the role of its parent; user and assistant alternate", "messages")
        if (message.role == "user") != (message.status == ""):
            raise RequestError(f"message {place} of role {message.role} has the status {message.status!r}", "messages")
        group_id = None if message.group is None else groups.setdefault(message.group, new_id())
        rows.append(
            StoredMessage(
                id=ids[place],
                conversation_id=conversation_id,
                parent_id=None if message.parent is None else ids[message.parent],
                role=message.role,
                content=message.content,
                reasoning=message.reasoning,
                files=tuple(File(name=file.name, text=file.text) for file in message.files),
                model=message.model,
                thinking=message.thinking,
                group_id=group_id,
                status=message.status,
                error=message.error,
                html=render(message.content) if message.role == "assistant" else "",
                stats=Stats(**message.stats.model_dump()),
                created_ms=message.created_ms,
            )
        )
    if found.leaf is not None and found.leaf >= len(ids):
        raise RequestError(f"leaf={found.leaf} is not among the {len(ids)} messages", "leaf")
    return rows, None if found.leaf is None else ids[found.leaf]


def entries(conversation: Conversation) -> list[Entry]:
    """The branch of a conversation for reading."""
    return [
        Entry(
            role="user" if message.role == "user" else "assistant",
            text=message.content,
            reasoning=message.reasoning,
            files=tuple(file.name for file in message.files),
            model=message.model,
        )
        for message in conversation.messages
    ]
