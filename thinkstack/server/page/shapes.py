"""Messages as the page's JSON, and as the prompt of a model."""

from collections.abc import Sequence
from typing import Any

from thinkstack.server.page.conversations import File, StoredMessage
from thinkstack.server.page.live import LiveAnswer
from thinkstack.server.page.markdown import render
from thinkstack.server.prices import format_amount
from thinkstack.types import Message

USAGE = ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "completion_tokens", "reasoning_tokens")


def message_json(message: StoredMessage, siblings: Sequence[str], live: LiveAnswer | None = None) -> dict[str, Any]:
    """A message for the page. siblings: ids of the messages with the same parent. live: the answer, if it runs."""
    found: dict[str, Any] = {
        "id": message.id,
        "parent": message.parent_id,
        "role": message.role,
        "created_ms": message.created_ms,
        "siblings": list(siblings),
    }
    if message.role == "user":
        files = [{"name": file.name, "chars": len(file.text)} for file in message.files]
        return found | {"text": message.content, "files": files}
    return found | _answer_json(message, live)


def _answer_json(message: StoredMessage, live: LiveAnswer | None) -> dict[str, Any]:
    stats, num_reasoning, num_content = message.stats, len(message.reasoning), len(message.content)
    html, tail, state = message.html, "", "answering"
    if live is not None:
        num_reasoning, num_content = live.position
        html, state = "".join(live.blocks), live.state
        tail = "" if live.is_ended else live.splitter.tail
    elif message.status != "running" and not html:
        html = render(message.content)
    return {
        "model": message.model,
        "thinking": message.thinking,
        "status": message.status,
        "error": message.error,
        "html": html,
        "tail": tail,
        "text": "",
        "state": state,
        "at": f"{num_reasoning}.{num_content}",
        "reasoning_chars": num_reasoning,
        "thinking_seconds": stats.thinking_seconds if live is None or live.is_ended else live.thinking_seconds,
        "seconds": stats.seconds,
        "first_token_seconds": stats.first_token_seconds,
        "usage": {name: getattr(stats, name) for name in USAGE},
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "cost": None if stats.cost_pico is None else format_amount(stats.cost_pico),
    }


def with_files(text: str, files: Sequence[File]) -> str:
    """The prompt of a message with attached files, in DeepSeek's published template. Source: the README of
    DeepSeek-R1, "Official Prompts"."""
    for file in reversed(files):
        text = f"[file name]: {file.name}\n[file content begin]\n{file.text}\n[file content end]\n{text}"
    return text


def prompt_of(history: Sequence[StoredMessage]) -> tuple[Message, ...]:
    """The conversation as the chat formats have it."""
    return tuple(
        Message(role="user", content=with_files(message.content, message.files))
        if message.role == "user"
        else Message(role="assistant", content=message.content, reasoning=message.reasoning or None)
        for message in history
    )
