"""Multiple choice: MMLU, MMLU-Pro, MMLU-Redux and GPQA, and the reading of an answer's letter."""

import csv
import io
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thinkstack.files import Row, kind_of, read_text
from thinkstack.tasks.benchmarks.datasets import DatasetTask, load_rows, question_problem
from thinkstack.tasks.benchmarks.prompts import (
    CHOICE_PROMPTS,
    GPQA_PROMPTS,
    LETTERS,
    MMLU_PRO_PROMPTS,
    MMLU_PROMPTS,
    Prompt,
    stated_letter,
)
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.task import TaskConfig
from thinkstack.tasks.verify.answers import same_choice, strip_wrappers
from thinkstack.tasks.verify.ifeval import visible_content
from thinkstack.text.final_answer import boxes, last_boxed
from thinkstack.types import ConfigError, Problem, Response

log = logging.getLogger(__name__)
_MARKED_LETTER = re.compile(r"(?<![\w.])\(?([A-Z])[).:](?!\S)")


def choice_problem(
    task: str, question: str, choices: Sequence[str], correct: int, seed: int | None, metadata: dict[str, Any]
) -> Problem:
    """Build the problem of a question with choices, of which number `correct` (from 0) is right.

    seed: shuffle the choices by it and the problem's key, None keeps their order. The key does not depend on the order.
    """
    key = f"{digest(task, ' '.join(question.split()), *sorted(choices)):016x}"
    order = list(range(len(choices)))
    if seed is not None:
        random.Random(digest("choices", seed, key)).shuffle(order)
    metadata = metadata | {"choices": [choices[place] for place in order]}
    found = question_problem(task, question, LETTERS[order.index(correct)], metadata)
    return replace(found, key=key)


def read_letter(problem: Problem, response: Response, prompt: Prompt | None = None) -> str | None:
    """Return the letter of an answer: in the last box, else where the prompt asks for it or after the last "Answer:",
    else the answer that is a letter.

    Only the content counts, never the thinking; None without a letter of one of the choices.
    """
    content = visible_content(response.text) or response.answer or ""
    if boxes(content):
        return _as_letter(last_boxed(content), problem)
    return _as_letter(stated_letter(prompt, content), problem) or _as_letter(response.answer, problem)


def _as_letter(answer: str | None, problem: Problem) -> str | None:
    """The letter of "B", "(B)", "**B**", "B. text" and "B) text"; None for several letters with such marks."""
    if answer is None:
        return None
    letters = LETTERS[: len(problem.metadata["choices"])]
    text = strip_wrappers(answer)
    found = next((letter for letter in letters if same_choice(letter, text)), None)
    marked = set(_MARKED_LETTER.findall(text))
    if found is None and len(marked) == 1 and _MARKED_LETTER.match(text):
        found = marked.pop()
    return found if found is not None and found in letters else None


def distinct(problems: Sequence[Problem]) -> list[Problem]:
    """Give repeated questions keys of their own; MMLU has 106 of them."""
    counts, found = Counter[str](), []
    for problem in problems:
        number = counts[problem.key]
        counts[problem.key] += 1
        found.append(replace(problem, key=f"{digest(problem.key, number):016x}") if number else problem)
    return found


class ChoiceTask(DatasetTask):
    """Questions with choices; the reference is the letter of the correct one."""

    PROMPTS = CHOICE_PROMPTS
    default_grader = "choice"
    FIELDS: tuple[str, ...] = ("question", "choices", "answer")

    def read(self, path: str | Path) -> list[Problem]:
        return distinct([self.problem(row, where) for where, row in load_rows(path, self.FIELDS, self.SOURCE)])

    def problem(self, row: Row, where: str) -> Problem:
        choices = read_choices(row[self.FIELDS[1]], self.FIELDS[1], where)
        return choice_problem(
            self.name,
            str(row["question"]),
            choices,
            read_correct(row["answer"], choices, where),
            self.cfg.choice_seed,
            {"subject": str(row.get("subject") or row.get("category") or "")},
        )

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        return read_letter(problem, response, self.template)


def read_choices(value: Any, name: str, where: str) -> list[str]:
    """Return the choices of a row. Raises ConfigError unless they are a list of 2 to 26 texts."""
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise ConfigError(f"{where}: {name} is {kind_of(value)}; it must be a list of text")
    if not 2 <= len(value) <= len(LETTERS):
        raise ConfigError(f"{where}: {name} has {len(value)} entries; use 2 to {len(LETTERS)}")
    return value


def read_correct(answer: Any, choices: Sequence[str], where: str) -> int:
    """Return the place of the correct choice, from 0: the answer is its letter, its place, or its text."""
    text = str(answer).strip()
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(text.upper())
    if isinstance(answer, str) and choices.count(text) == 1:
        return choices.index(text)
    raise ConfigError(
        f"{where}: answer is {answer!r:.60}; it must be a letter up to {LETTERS[len(choices) - 1]}, a place from 0 to "
        f"{len(choices) - 1}, or the text of one choice"
    )


class Mmlu(ChoiceTask):
    """57 subjects, four choices (arXiv:2009.03300). Fields: question, choices, answer, subject."""

    SOURCE = "test.jsonl with question, choices, answer and subject, from github.com/hendrycks/test or cais/mmlu (MIT)"
    PROMPTS = MMLU_PROMPTS
    SHOTS_SPLIT = "dev"

    def is_shot_for(self, example: Problem, problem: Problem) -> bool:
        return bool(example.metadata["subject"] == problem.metadata["subject"])

    @property
    def chance(self) -> float:
        return 0.25


class MmluPro(ChoiceTask):
    """Up to ten choices (arXiv:2406.01574). Fields: question, options, answer, category."""

    SOURCE = "test.jsonl with question, options, answer and category, from TIGER-Lab/MMLU-Pro (MIT)"
    PROMPTS = MMLU_PRO_PROMPTS
    FIELDS = ("question", "options", "answer")


class MmluRedux(ChoiceTask):
    """MMLU with its errors marked (arXiv:2406.04127). Fields: question, choices, answer, error_type, correct_answer.

    Rows with error_type "ok" are used as they are, and "wrong_groundtruth" with its correct_answer. All other rows have
    no single right answer and are left out; their number is logged.
    """

    SOURCE = (
        "test.jsonl with question, choices, answer, error_type and correct_answer, from edinburgh-dawg/mmlu-redux-2.0 "
        "(CC BY 4.0)"
    )
    FIELDS = ("question", "choices", "answer", "error_type")

    @property
    def chance(self) -> float:
        return 0.25

    def read(self, path: str | Path) -> list[Problem]:
        found, left_out = [], Counter[str]()
        for where, row in load_rows(path, self.FIELDS, self.SOURCE):
            corrected = row.get("correct_answer")
            if row["error_type"] == "wrong_groundtruth" and corrected not in (None, ""):
                digits = isinstance(corrected, str) and corrected.strip().isdigit()
                row = row | {"answer": int(corrected) if digits else corrected}
            elif row["error_type"] != "ok":
                left_out[str(row["error_type"])] += 1
                continue
            found.append(self.problem(row, where))
        if left_out:
            log.info("%s: left out %s", path, ", ".join(f"{count} {kind}" for kind, count in left_out.items()))
        return distinct(found)


class Gpqa(ChoiceTask):
    """Graduate-level questions (arXiv:2311.12022), always shuffled, since the file has the correct answer first.

    The authors ask that the questions are never published in plain text; use your own copy, test.csv or a path.
    """

    SOURCE = (
        "your own copy of gpqa_diamond.csv (or test.csv, test.jsonl) with Question, Correct Answer and Incorrect "
        "Answer 1 to 3, from github.com/idavidrein/gpqa (CC BY 4.0; do not republish it)"
    )
    PROMPTS = GPQA_PROMPTS
    MAY_BE_SHOWN = False
    FIELDS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

    @property
    def chance(self) -> float:
        return 0.25

    def __init__(self, name: str, cfg: TaskConfig):
        super().__init__(name, replace(cfg, choice_seed=cfg.choice_seed or 0))

    def file(self, split: str) -> Path:
        names = [f"{split}.csv", *(["gpqa_diamond.csv"] if split == "test" else [])]
        found = [path for name in names if (path := Path(self.cfg.data) / name).is_file()]
        return found[0] if found else super().file(split)

    def read(self, path: str | Path) -> list[Problem]:
        rows = _read_csv(Path(path)) if Path(path).suffix == ".csv" else load_rows(path, self.FIELDS, self.SOURCE)
        return distinct([self.problem(row, where) for where, row in rows])

    def problem(self, row: Row, where: str) -> Problem:
        for name in self.FIELDS:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ConfigError(f"{where}: {name} is {kind_of(row.get(name))}, or empty; give {self.SOURCE}")
        question, *choices = (row[name].strip() for name in self.FIELDS)
        subject = {"subject": str(row.get("Subdomain") or "")}
        return choice_problem(self.name, question, choices, 0, self.cfg.choice_seed, subject)


def _read_csv(path: Path) -> list[tuple[str, Row]]:
    """Return the rows of a CSV file with their places."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    return [(f"{path} row {number}", dict(row)) for number, row in enumerate(reader, start=1)]
