"""Conversations, and what the genuine templates of DeepSeek's models write of them."""

import json
from pathlib import Path
from typing import Any

from thinkstack.types import Message, Tool, ToolCall

FOLDER = Path(__file__).parent


def conversations() -> list[dict[str, Any]]:
    """Each has a key, messages in the form of a request, maybe tools, and "spells" where text spells control tokens."""
    return json.loads((FOLDER / "conversations.json").read_text(encoding="utf-8"))


def read_messages(case: dict[str, Any]) -> list[Message]:
    """The messages of a conversation as ours."""
    return [
        Message(**(turn | {"tool_calls": tuple(ToolCall(**call) for call in turn.get("tool_calls", ()))}))
        for turn in case["messages"]
    ]


def read_tools(case: dict[str, Any]) -> list[Tool]:
    """The tools of a conversation as ours."""
    return [Tool(**tool) for tool in case.get("tools", ())]


def as_request(case: dict[str, Any], as_text: bool = True, without_content: bool = False) -> list[dict[str, Any]]:
    """The messages as transformers takes them. as_text: arguments of calls stay text; else they are read as JSON.
    without_content: a call with nothing said before it has None as its content.
    """
    messages = []
    for turn in case["messages"]:
        message = {key: value for key, value in turn.items() if key not in ("tool_calls", "reasoning")}
        if "reasoning" in turn:
            message["reasoning_content"] = turn["reasoning"]
        if "tool_calls" in turn:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": call if as_text else call | {"arguments": json.loads(call["arguments"])},
                }
                for call in turn["tool_calls"]
            ]
            message["content"] = None if without_content and not turn["content"] else turn["content"]
        messages.append(message)
    return messages


def schemas(case: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools as transformers takes them."""
    return [{"type": "function", "function": tool} for tool in case.get("tools", ())] or None
