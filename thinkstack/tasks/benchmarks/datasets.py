"""Published problems from files that the user has: GSM8K and MATH. Nothing is downloaded.

A file is whatever files.read_rows reads; MATH may also be its folder of one JSON file a problem.
"""

import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from thinkstack.files import Row, read_object, read_rows
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.verify.answers import clean, number_of
from thinkstack.tasks.verify.latex import same_spelling, unwrapped
from thinkstack.tasks.verify.quantities import quantity_of
from thinkstack.text.final_answer import last_boxed
from thinkstack.types import ConfigError, Problem

log = logging.getLogger(__name__)
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
MOST_UNANSWERED = 0.01
"""Share of rows without an answer above which a file is refused."""


class Benchmark(Protocol):
    """A published set of problems."""

    @property
    def name(self) -> str:
        """Problem.task of its problems, and its name in tasks/table.py."""

    SOURCE: str
    """Where its files come from, for messages."""

    def load(self, path: str | Path) -> list[Problem]:
        """All problems of a file, in its order. Raises ConfigError if the file is missing or is another's."""

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is right."""


class Gsm8k:
    """Grade-school word problems with whole numbers as answers (arXiv:2110.14168).

    Fields: question, answer; the reference is what follows #### in the answer. Level: lines of the published solution.
    """

    name = "gsm8k"
    SOURCE = "train.jsonl and test.jsonl of github.com/openai/grade-school-math"

    def load(self, path: str | Path) -> list[Problem]:
        return [self._problem(row, where) for where, row in rows(path, ("question", "answer"), self.SOURCE)]

    def _problem(self, row: Row, where: str) -> Problem:
        solution, mark, answer = str(row["answer"]).rpartition("####")
        answer = answer.strip().replace(",", "")
        if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", answer):
            raise ConfigError(f"{where} does not end in '#### number' as GSM8K does; use {self.SOURCE}")
        return published(self.name, str(row["question"]), answer, level=solution.strip().count("\n") + 1)

    def verify(self, problem: Problem, answer: str) -> bool:
        """A number of that value as people write it (tasks/verify/quantities.py), with or without #### or a box around
        it; a percent sign is a unit where the question asks for percent."""
        inside = unwrapped(clean(answer).removeprefix("####"))
        may_be_percent = "percent" in problem.question.casefold()
        return inside is not None and quantity_of(inside, may_be_percent) == number_of(problem.answer)


class Math:
    """Competition problems with LaTeX answers (arXiv:2103.03874).

    Fields: problem, level, and solution or answer; the reference is what the last \\boxed{} of the solution holds, the
    answer where no solution is given. Level: 1 to 5 as published, 0 where the file says "Level ?".
    """

    name = "math"
    SOURCE = "the folder or the JSON lines of github.com/hendrycks/math, or MATH-500"

    def load(self, path: str | Path) -> list[Problem]:
        """A few rows without an answer, as circulating copies have them, are left out with a warning."""
        found, unanswered = [], []
        for where, row in rows(path, ("problem", "level"), self.SOURCE):
            answer = last_boxed(str(row.get("solution") or "")) or row.get("answer")
            if not answer:
                unanswered.append(where)
                continue
            level = re.search(r"\d", str(row["level"]))
            found.append(published(self.name, str(row["problem"]), str(answer), level=int(level[0]) if level else 0))
        if len(unanswered) > len(found) * MOST_UNANSWERED:
            raise ConfigError(
                f"{unanswered[0]} has neither an answer nor a \\boxed{{}} in its solution; use {self.SOURCE}"
            )
        if unanswered:
            log.warning("left out for want of an answer: %s", " ".join(unanswered))
        return found

    def verify(self, problem: Problem, answer: str) -> bool:
        """The same number, or the same LaTeX up to spelling. Formulas that only mean the same:
        tasks/verify/latex.py."""
        return same_spelling(problem.answer, answer)


def split_file(folder: str | Path, split: str, source: str) -> Path:
    """The file of a split ("train", "test") in a data set's folder. Raises ConfigError if there is none."""
    found = [path for ending in ENDINGS if (path := Path(folder) / f"{split}{ending}").is_file()]
    if not found:
        names = " or ".join(f"{split}{ending}" for ending in ENDINGS)
        raise ConfigError(f"{folder} has no {names}; give the folder that holds {source}")
    return found[0]


def published(task: str, question: str, answer: str, level: int) -> Problem:
    """A problem of a data set; its key is the hash of its question."""
    key = f"{digest(task, ' '.join(question.split())):016x}"
    return Problem(question=question, answer=answer, task=task, language="en", level=level, key=key, wording=0)


def rows(path: str | Path, fields: Sequence[str], source: str) -> list[tuple[str, Row]]:
    """The rows of a file, each with its address for messages. Raises ConfigError if there are none or fields lack."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"there is no {path}; give the path of {source}")
    if path.is_dir():
        found = [(str(file), read_object(file)) for file in sorted(path.rglob("*.json"))]
    else:
        found = list(read_rows(path))
    if not found:
        raise ConfigError(f"{path} holds no rows; give the path of {source}")
    for where, row in found:
        missing = [name for name in fields if name not in row]
        if missing:
            raise ConfigError(
                f"{where} has no {', '.join(missing)} (it has {', '.join(row)}); give the path of {source}"
            )
    return found


class DataStream:
    """Problems of a list in an order that `seed` shuffles anew each epoch, without end. Its state is its position."""

    def __init__(self, problems: Sequence[Problem], seed: int):
        if not problems:
            raise ConfigError("a stream of no problems never gives one; check the file and the levels asked for")
        self.problems, self.seed = list(problems), seed
        self.position = 0
        """Problems given so far."""
        self._epoch, self._order = -1, list[int]()

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        start, self.position = self.position, self.position + count
        return [self._at(position) for position in range(start, self.position)]

    def _at(self, position: int) -> Problem:
        epoch, place = divmod(position, len(self.problems))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.problems)))
            random.Random(digest("data stream", self.seed, epoch)).shuffle(self._order)
        return self.problems[self._order[place]]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.position = state["position"]
