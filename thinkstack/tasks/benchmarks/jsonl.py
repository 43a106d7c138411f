"""A user's own task: problems in JSON lines or parquet, with a choice of verifiers."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thinkstack.files import Row, kind_of
from thinkstack.tasks.benchmarks.choices import choice_problem, read_choices, read_correct, read_letter
from thinkstack.tasks.benchmarks.datasets import DatasetTask, load_rows
from thinkstack.tasks.benchmarks.prompts import CHOICE_PROMPTS, MATH_PROMPTS, fill_prompt
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.verify import answers
from thinkstack.tasks.verify.quantities import parse_quantity
from thinkstack.types import ConfigError, Message, Problem, Response, Tool

ROLES = ("system", "user", "assistant")


class JsonlTask(DatasetTask):
    """Problems of a user's files. Fields: question or messages, answer; optional: level, language, and any others,
    which become metadata.

    With the verifier "choice", rows may have choices; the answer is then the letter of the correct one, its place from
    0, or its text.
    """

    PROMPTS = MATH_PROMPTS | {f"choice-{name}": text for name, text in CHOICE_PROMPTS.items()}
    SOURCE = "train.jsonl and test.jsonl (or .jsonl.gz, .parquet) with the fields question or messages, and answer"
    default_grader = "text"

    def read(self, path: str | Path) -> list[Problem]:
        return [self._problem(dict(row), where) for where, row in load_rows(path, ("answer",), self.SOURCE)]

    def prompt(self, problem: Problem) -> tuple[Sequence[Message], Sequence[Tool]]:
        """Questions with choices have a prompt for multiple choice unless the row names another."""
        if self.grader == "choice" and "choices" in problem.metadata and not self.cfg.prompt:
            text = fill_prompt(CHOICE_PROMPTS["letter"], problem)
            return (*problem.messages[:-1], replace(problem.messages[-1], content=text)), ()
        return super().prompt(problem)

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        if self.grader == "choice" and "choices" in problem.metadata:
            return read_letter(problem, response, self.template)
        return super().read_answer(problem, response)

    def _problem(self, row: Row, where: str) -> Problem:
        messages = _messages(row, where)
        reference = row.pop("answer")
        if isinstance(reference, bool) or not isinstance(reference, str | int | float) or not str(reference).strip():
            raise ConfigError(f"{where}: answer is {kind_of(reference)}; it must be text or a number, not empty")
        choices = row.pop("choices", None) if self.grader == "choice" else None
        if choices is None:
            self._check_reference(str(reference), where)
        language = row.pop("language", "en")
        if not isinstance(language, str):
            raise ConfigError(f"{where}: language is {kind_of(language)}; use text such as en or zh")
        if not isinstance(row.get("level", 1), int):
            raise ConfigError(f"{where}: level is {row['level']!r}; use an integer")
        for name, value in row.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ConfigError(f"{where}: {name} is {kind_of(value)}, not a JSON value; leave it out") from error
        text = " ".join(" ".join(message.content.split()) for message in messages)
        if choices is not None:
            choices = read_choices(choices, "choices", where)
            correct = read_correct(reference, choices, where)
            made = choice_problem(self.name, text, choices, correct, self.cfg.choice_seed, row)
            return replace(made, messages=messages, language=language)
        return Problem(
            messages=messages,
            answer=str(reference).strip(),
            task=self.name,
            language=language,
            key=f"{digest(self.name, text):016x}",
            metadata=row,
        )

    def _check_reference(self, reference: str, where: str) -> None:
        """Raise ConfigError for a reference that the grader cannot compare."""
        if self.grader == "number" and parse_quantity(reference) is None:
            raise ConfigError(
                f"{where}: answer is {reference!r}, not a number; correct it, or set tasks.{self.name}.verifier"
            )
        if self.grader == "choice" and not answers.same_choice(reference, reference):
            raise ConfigError(
                f"{where}: answer is {reference!r}, not a single letter; correct it, or set tasks.{self.name}.verifier"
            )


def _messages(row: Row, where: str) -> tuple[Message, ...]:
    """Take the messages of a row: its question, or a conversation that ends with a user's message."""
    if ("question" in row) == ("messages" in row):
        raise ConfigError(f"{where} has {', '.join(row)}; it needs question or messages, one of them")
    if "question" in row:
        return (Message(role="user", content=_text(row.pop("question"), "question", where)),)
    turns = row.pop("messages")
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"{where}: messages is {kind_of(turns)}; use a list of objects with role and content")
    messages = tuple(_message(turn, f"messages[{index}]", where) for index, turn in enumerate(turns))
    if messages[-1].role != "user":
        raise ConfigError(f"{where}: the last of the messages has role={messages[-1].role!r}; it must be the user's")
    return messages


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: {name} is {kind_of(turn)}; use an object with role and content")
    if turn.get("role") not in ROLES:
        raise ConfigError(f"{where}: {name}.role is {turn.get('role')!r}; use one of {', '.join(ROLES)}")
    return Message(role=turn["role"], content=_text(turn.get("content"), f"{name}.content", where))


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {name} is {kind_of(value)}; it must be text, not empty")
    return value
