"""Conversations from files, for supervised fine-tuning: JSON lines in the forms that data sets are published in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinkstack.tasks.datasets import rows
from thinkstack.types import ConfigError, Message

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names of roles in published files."""
FORMS = "messages; conversations; prompt, response and maybe thinking; question and answer"


def read_conversations(paths: Sequence[str]) -> list[list[Message]]:
    """All conversations of `paths` (.jsonl, .jsonl.gz, .parquet), in order; a path may have * in its last part.

    A row is {"messages": [{"role", "content", "reasoning_content"?}]}, {"conversations": [{"from", "value"}]},
    {"prompt", "response", "thinking"?} or {"question", "answer"}. Raises ConfigError, naming file and row, for others.
    """
    files = [file for path in paths for file in _files(Path(path))]
    return [_conversation(row, where) for file in files for where, row in rows(file, (), FORMS)]


def _files(path: Path) -> list[Path]:
    if "*" not in path.name:
        return [path]
    found = sorted(path.parent.glob(path.name))
    if not found:
        raise ConfigError(f"no file matches {path}; give files of conversations")
    return found


def _conversation(row: dict[str, Any], where: str) -> list[Message]:
    try:
        if "messages" in row:
            found = [_turn(turn["role"], turn["content"], turn.get("reasoning_content")) for turn in row["messages"]]
        elif "conversations" in row:
            found = [_turn(turn["from"], turn["value"], None) for turn in row["conversations"]]
        elif "prompt" in row:
            found = [_turn("user", row["prompt"], None), _turn("assistant", row["response"], row.get("thinking"))]
        else:
            found = [_turn("user", row["question"], None), _turn("assistant", row["answer"], None)]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where} is no conversation ({error!r}); known: {FORMS}") from error
    if not found or found[-1].role != "assistant":
        raise ConfigError(f"{where} does not end with an answer of the assistant; leave the row out")
    return found


def _turn(role: str, content: str, reasoning: str | None) -> Message:
    if not isinstance(content, str) or role not in SPEAKERS:
        raise TypeError(f"role {role!r} with content {type(content).__name__}")
    return Message(role=SPEAKERS[role], content=content, reasoning=reasoning or None)  # type: ignore[arg-type]
