"""Read conversations for supervised fine-tuning from files in the formats of published data sets.

Nothing is dropped silently: an unread key that may have content raises ConfigError; other unused keys are logged once
per file. docs/guides/sft.md has the table of keys.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from thinkstack.files import Row, kind_of, log_unused_keys, matching_files, read_rows
from thinkstack.stages.turns import REASONING, TRAINED, Fields, answer, read_tools, read_turns
from thinkstack.tasks.puzzles.corpus import worked_example
from thinkstack.tasks.puzzles.puzzle import PuzzleTask
from thinkstack.types import ConfigError, Message, Tool

TURNS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "instruction", "query", "input")
ANSWERS = ("response", "completion", "answer", "output")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
CONTENT = (
    *("image", "images", "video", "videos", "audio", "audios", "context", "documents", "history", "chosen", "rejected"),
    *("choices", "options", "candidates"),
    *("thought", "thoughts", "cot", "chain_of_thought", "reasoning_details"),
    *("loss_scale", "kto_tag", "chat_template_kwargs"),
)
"""Keys of a row that would change the training target but are not supported; a row with one raises ConfigError."""
ROW_FORMATS = f"a list of turns ({', '.join(TURNS)}), or one of {', '.join(QUESTIONS)} with one of {', '.join(ANSWERS)}"


class Conversation(list[Message]):
    """The turns of a row, with the tools and the address (file and line) of the row."""

    def __init__(self, messages: Iterable[Message], tools: Sequence[Tool] = (), where: str = "the conversation"):
        super().__init__(messages)
        self.tools, self.where = tuple(tools), where


def read_conversations(paths: Sequence[str], with_masks: bool = False) -> list[Conversation]:
    """All conversations of `paths`, in order; the last part of a path may contain *. File formats: files.read_rows.

    with_masks: whether the caller uses Message.is_trained; False rejects rows with untrained turns. Raises ConfigError
    with file, row and key for rows that are not conversations or have unsupported content.
    """
    conversations = [c for path in paths for file in matching_files(Path(path)) for c in _read_file(file)]
    for conversation in conversations:
        if not with_masks and not all(message.is_trained for message in conversation):
            raise ConfigError(
                f"{conversation.where} has turns that are masked from training, which is not supported here; "
                "remove the row"
            )
    return conversations


def worked_conversations(tasks: Sequence[PuzzleTask], count: int, seed: int) -> list[Conversation]:
    """Conversations of `count` problems of generated tasks; the worked solution of each problem is the thinking."""
    conversations = []
    for index in range(count):
        problem, working = worked_example(tasks, seed, index)
        solution = Message(role="assistant", content=working.answer, reasoning="\n".join(working.lines))
        conversations.append(
            Conversation((*problem.messages, solution), where=f"worked example {index} of {problem.task}")
        )
    return conversations


def _read_file(path: Path) -> list[Conversation]:
    conversations, counts = [], Counter[str]()
    for where, row in read_rows(path):
        unused: set[str] = set()
        conversations.append(_conversation(row, where, unused))
        counts.update(sorted(unused))
    if not conversations:
        raise ConfigError(f"{path} has no rows; use files of conversations")
    log_unused_keys(path, counts)
    return conversations


def _conversation(row: Row, where: str, unused: set[str]) -> Conversation:
    fields = Fields(row, where)
    system, tools = fields.take_text(SYSTEM), read_tools(fields.take(TOOLS), where, unused)
    has_turns = any(name in fields.left for name in TURNS)
    messages = read_turns(fields.take(TURNS), where, unused) if has_turns else _pair(fields, unused)
    if system is not None and Message(role="system", content=system) not in messages:
        if any(message.role == "system" for message in messages):
            raise ConfigError(f"{where} has one system prompt under a key and another as a turn; keep one of them")
        messages.insert(0, Message(role="system", content=system))
    fields.refuse(key for key in fields.left if key in (*CONTENT, *REASONING, *TRAINED))
    if isinstance(
        fields.left.get("label"), bool
    ):  # TRL's unpaired preference format: whether the completion is desirable
        fields.refuse(["label"])
    unused.update(fields.left)
    if not messages or messages[-1].role != "assistant":
        raise ConfigError(f"{where} does not end with an assistant message; remove the row")
    if not any(message.is_trained for message in messages if message.role == "assistant"):
        raise ConfigError(f"{where} has no turn to train on: all assistant turns are masked; remove the row")
    return Conversation(messages, tools, where)


def _pair(fields: Fields, unused: set[str]) -> list[Message]:
    """A question and its answer, after the history. A prompt that is a list of turns (TRL) is context only."""
    row, where = fields.values, fields.where
    if not any(name in row for name in ANSWERS) or not any(name in row for name in QUESTIONS):
        raise ConfigError(f"{where} is not a conversation (it has the keys {', '.join(row)}); use {ROW_FORMATS}")
    messages = _history(fields)
    extra_input = fields.take(("input",)) if isinstance(fields.left.get("instruction"), str) else None
    question, reply = _value(fields, QUESTIONS), _value(fields, ANSWERS)
    if isinstance(question, list):
        messages += read_turns(question, f"{where}, prompt", unused, trains=False)
    else:
        texts = [fields.as_text(text, "the question") for text in (question, extra_input) if text is not None]
        messages.append(Message(role="user", content="\n".join(texts)))
    if isinstance(reply, list):
        return messages + read_turns(reply, f"{where}, completion", unused)
    return [*messages, answer(fields.as_text(reply, "the answer"), fields)]


def _value(fields: Fields, names: Sequence[str]) -> Any:
    value = fields.take(names)
    if value is None and "" not in (fields.values.get(name) for name in names):
        raise ConfigError(
            f"{fields.where}: {next(name for name in names if name in fields.values)} is empty; remove the row"
        )
    return "" if value is None else value


def _history(fields: Fields) -> list[Message]:
    """Earlier turns: a list of pairs [question, answer] under the key "history"."""
    rounds = fields.take(("history",)) or []
    if not isinstance(rounds, list):
        raise ConfigError(f"{fields.where}: history is {kind_of(rounds)}, not a list of [question, answer]; correct it")
    messages = []
    for number, pair in enumerate(rounds, start=1):
        where = f"{fields.where}: round {number} of history"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ConfigError(f"{where} is not [question, answer]; correct it")
        messages += [Message(role="user", content=pair[0]), answer(pair[1], Fields({}, where))]
    return messages
