"""Benchmarks read from local files: GSM8K and MATH. Nothing is downloaded.

A file has one of the formats of files.read_rows; MATH may also be the published folder with one JSON file per problem.
"""

import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from thinkstack.files import Row, read_object, read_rows
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.verify.answers import parse_number, strip_answer
from thinkstack.tasks.verify.latex import same_spelling, unbox
from thinkstack.tasks.verify.quantities import parse_quantity
from thinkstack.text.final_answer import last_boxed
from thinkstack.types import ConfigError, Problem

log = logging.getLogger(__name__)
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
MAX_UNANSWERED_SHARE = 0.01
"""Largest accepted share of rows without an answer."""


class Benchmark(Protocol):
    """A published set of problems."""

    @property
    def name(self) -> str:
        """The name in tasks/table.py and the value of Problem.task."""

    SOURCE: str
    """Where the files come from; used in messages."""

    def load(self, path: str | Path) -> list[Problem]:
        """Return all problems of a file, in file order.

        Raises ConfigError if the file is missing or belongs to another benchmark.
        """

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is correct."""


class Gsm8k:
    """Grade-school word problems with integer answers (arXiv:2110.14168).

    Fields: question, answer. The reference is the text after #### in the answer; the level is the number of lines of
    the published solution.
    """

    name = "gsm8k"
    SOURCE = "train.jsonl and test.jsonl of github.com/openai/grade-school-math"

    def load(self, path: str | Path) -> list[Problem]:
        return [self._problem(row, where) for where, row in load_rows(path, ("question", "answer"), self.SOURCE)]

    def _problem(self, row: Row, where: str) -> Problem:
        solution, mark, answer = str(row["answer"]).rpartition("####")
        answer = answer.strip().replace(",", "")
        if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", answer):
            raise ConfigError(f"{where} does not end in '#### number' as GSM8K does; use {self.SOURCE}")
        return benchmark_problem(self.name, str(row["question"]), answer, level=solution.strip().count("\n") + 1)

    def verify(self, problem: Problem, answer: str) -> bool:
        """Compare values; tasks/verify/quantities.py lists the accepted spellings. The answer may be after #### or in
        a box.

        A percent sign counts as a unit if the question asks for percent.
        """
        inside = unbox(strip_answer(answer).removeprefix("####"))
        may_be_percent = "percent" in problem.question.casefold()
        return inside is not None and parse_quantity(inside, may_be_percent) == parse_number(problem.answer)


class Math:
    """Competition problems with LaTeX answers (arXiv:2103.03874).

    Fields: problem, level, and solution or answer. The reference is the content of the last \\boxed{} of the solution,
    or the answer field if there is no solution. Level: 1 to 5 as published, 0 where the file says "Level ?".
    """

    name = "math"
    SOURCE = "the folder or the JSON lines of github.com/hendrycks/math, or MATH-500"

    def load(self, path: str | Path) -> list[Problem]:
        """Return all problems; rows without an answer, which some circulating copies have, are skipped with a
        warning."""
        found, unanswered = [], []
        for where, row in load_rows(path, ("problem", "level"), self.SOURCE):
            answer = last_boxed(str(row.get("solution") or "")) or row.get("answer")
            if not answer:
                unanswered.append(where)
                continue
            level = re.search(r"\d", str(row["level"]))
            found.append(
                benchmark_problem(self.name, str(row["problem"]), str(answer), level=int(level[0]) if level else 0)
            )
        if len(unanswered) > len(found) * MAX_UNANSWERED_SHARE:
            raise ConfigError(
                f"{unanswered[0]} has neither an answer nor a \\boxed{{}} in its solution; use {self.SOURCE}"
            )
        if unanswered:
            log.warning("skipped rows without an answer: %s", " ".join(unanswered))
        return found

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` and the reference are the same number, or the same LaTeX up to spelling.

        `verify_formulas` (tasks/verify/latex.py) also accepts equivalent formulas.
        """
        return same_spelling(problem.answer, answer)


def split_file(folder: str | Path, split: str, source: str) -> Path:
    """Return the file of a split ("train", "test") in a data set's folder. Raises ConfigError if there is none."""
    found = [path for ending in FILE_SUFFIXES if (path := Path(folder) / f"{split}{ending}").is_file()]
    if not found:
        names = " or ".join(f"{split}{ending}" for ending in FILE_SUFFIXES)
        raise ConfigError(f"{folder} has no {names}; give the folder that contains {source}")
    return found[0]


def benchmark_problem(task: str, question: str, answer: str, level: int) -> Problem:
    """Build a Problem of a data set; the key is the hash of the question."""
    key = f"{digest(task, ' '.join(question.split())):016x}"
    return Problem(question=question, answer=answer, task=task, language="en", level=level, key=key, wording=0)


def load_rows(path: str | Path, fields: Sequence[str], source: str) -> list[tuple[str, Row]]:
    """Return the rows of a file, each with its location for messages.

    Raises ConfigError if the file is missing or empty, or if a row lacks one of `fields`.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give the path of {source}")
    if path.is_dir():
        found = [(str(file), read_object(file)) for file in sorted(path.rglob("*.json"))]
    else:
        found = list(read_rows(path))
    if not found:
        raise ConfigError(f"{path} has no rows; give the path of {source}")
    for where, row in found:
        missing = [name for name in fields if name not in row]
        if missing:
            raise ConfigError(
                f"{where} has no {', '.join(missing)} (it has {', '.join(row)}); give the path of {source}"
            )
    return found


class DatasetStream:
    """An endless stream over a list of problems, reshuffled from `seed` every epoch. Its state is the position."""

    def __init__(self, problems: Sequence[Problem], seed: int):
        if not problems:
            raise ConfigError("the data set has no problems to sample from; check the file and the requested levels")
        self.problems, self.seed = list(problems), seed
        self.position = 0
        """Number of problems returned so far."""
        self._epoch, self._order = -1, list[int]()

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems."""
        start, self.position = self.position, self.position + count
        return [self._problem_at(position) for position in range(start, self.position)]

    def _problem_at(self, position: int) -> Problem:
        epoch, place = divmod(position, len(self.problems))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.problems)))
            random.Random(digest("data stream", self.seed, epoch)).shuffle(self._order)
        return self.problems[self._order[place]]

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` accepts."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.position = state["position"]
