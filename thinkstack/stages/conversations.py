"""Conversations from files, for supervised fine-tuning: rows in the forms that data sets are published in.

Nothing is dropped silently: a key that may carry content is refused by its name, any other that is not used is listed
once for its file. docs/sft.md has the table.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from thinkstack.files import Row, kind_of, log_unused_keys, matching_files, read_rows
from thinkstack.stages.turns import REASONING, TRAINED, Fields, answer, read_tools, read_turns
from thinkstack.tasks.puzzles.corpus import worked_example
from thinkstack.tasks.table import puzzle_tasks
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
"""Keys of a row that would change what is learnt, and that are not read."""
FORMS = f"a list of turns ({', '.join(TURNS)}), or one of {', '.join(QUESTIONS)} with one of {', '.join(ANSWERS)}"


class Conversation(list[Message]):
    """The turns of a row, the tools beside them, and where the row stands."""

    def __init__(self, messages: Iterable[Message], tools: Sequence[Tool] = (), where: str = "the conversation"):
        super().__init__(messages)
        self.tools, self.where = tuple(tools), where


def read_conversations(paths: Sequence[str], with_masks: bool = False) -> list[Conversation]:
    """All conversations of `paths`, in order; a path may have * in its last part. Files: files.read_rows.

    with_masks: the caller honours Message.is_trained; without, a row that switches a turn off is refused. Raises
    ConfigError, naming file, row and key, for rows that are no conversations or hold what would be lost.
    """
    found = [conversation for path in paths for file in matching_files(Path(path)) for conversation in _read(file)]
    for conversation in found:
        if not with_masks and not all(message.is_trained for message in conversation):
            raise ConfigError(f"{conversation.where} has turns that are not to be learnt, which is not known here")
    return found


def worked_conversations(tasks: Sequence[str], count: int, seed: int, languages: tuple[str, ...]) -> list[Conversation]:
    """`count` problems of generated tasks with their worked solutions as thinking: data that needs no file."""
    suite = puzzle_tasks(tasks)
    for family in suite:
        if languages and not set(languages) & set(family.wordings):
            raise ConfigError(
                f"{family.name} has none of the languages {list(languages)}; it has {list(family.wordings)}"
            )
    found = []
    for index in range(count):
        problem, working = worked_example(suite, seed, index, languages)
        asked = Message(role="user", content=problem.question)
        told = Message(role="assistant", content=working.answer, reasoning="\n".join(working.lines))
        found.append(Conversation((asked, told), where=f"worked example {index} of {problem.task}"))
    return found


def _read(path: Path) -> list[Conversation]:
    found, unused = [], Counter[str]()
    for where, row in read_rows(path):
        notes: set[str] = set()
        found.append(_conversation(row, where, notes))
        unused.update(sorted(notes))
    if not found:
        raise ConfigError(f"{path} holds no rows; give files of conversations")
    log_unused_keys(path, unused)
    return found


def _conversation(row: Row, where: str, notes: set[str]) -> Conversation:
    fields = Fields(row, where)
    system, tools = fields.take_text(SYSTEM), read_tools(fields.take(TOOLS), where, notes)
    has_turns = any(name in fields.left for name in TURNS)
    messages = read_turns(fields.take(TURNS), where, notes) if has_turns else _pair(fields, notes)
    if system is not None and Message(role="system", content=system) not in messages:
        if any(message.role == "system" for message in messages):
            raise ConfigError(f"{where} has a system text beside its turns and another among them; keep one of them")
        messages.insert(0, Message(role="system", content=system))
    fields.refuse(key for key in fields.left if key in (*CONTENT, *REASONING, *TRAINED))
    if isinstance(fields.left.get("label"), bool):  # TRL's form of answers that are wanted and of those that are not
        fields.refuse(["label"])
    notes.update(fields.left)
    if not messages or messages[-1].role != "assistant":
        raise ConfigError(f"{where} does not end with an answer of the assistant; leave the row out")
    if not any(message.is_trained for message in messages if message.role == "assistant"):
        raise ConfigError(f"{where} has no turn to train on, all are switched off; leave the row out")
    return Conversation(messages, tools, where)


def _pair(fields: Fields, notes: set[str]) -> list[Message]:
    """A question and its answer, after the rounds before them. Where TRL has lists of turns, its prompt is context."""
    row, where = fields.values, fields.where
    if not any(name in row for name in ANSWERS) or not any(name in row for name in QUESTIONS):
        raise ConfigError(f"{where} is no conversation (it has {', '.join(row)}); known: {FORMS}")
    messages = _history(fields)
    more = fields.take(("input",)) if isinstance(fields.left.get("instruction"), str) else None
    asked, said = _value(fields, QUESTIONS), _value(fields, ANSWERS)
    if isinstance(asked, list):
        messages += read_turns(asked, f"{where}, prompt", notes, trains=False)
    else:
        texts = [fields.as_text(text, "the question") for text in (asked, more) if text is not None]
        messages.append(Message(role="user", content="\n".join(texts)))
    if isinstance(said, list):
        return messages + read_turns(said, f"{where}, completion", notes)
    return [*messages, answer(fields.as_text(said, "the answer"), fields)]


def _value(fields: Fields, names: Sequence[str]) -> Any:
    value = fields.take(names)
    if value is None and "" not in (fields.values.get(name) for name in names):
        raise ConfigError(
            f"{fields.where}: {next(name for name in names if name in fields.values)} holds nothing; leave the row out"
        )
    return "" if value is None else value


def _history(fields: Fields) -> list[Message]:
    """Earlier rounds: a list of pairs [question, answer] under "history"."""
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
