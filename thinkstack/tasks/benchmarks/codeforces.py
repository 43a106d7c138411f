"""Codeforces: the user's problems with their tests, and a rating from given standings. The protocol is ours.

DeepSeek reports ratings and percentiles whose problems, tests and standings are not published; figures of this file are
comparable with each other alone. The rating follows CodeElo (arXiv:2501.01257).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkstack.files import Row
from thinkstack.tasks.benchmarks.code_prompts import CODEFORCES_PROMPTS
from thinkstack.tasks.benchmarks.code_task import CodeTask, code_problem, text_of
from thinkstack.tasks.benchmarks.datasets import load_rows
from thinkstack.tasks.verify.code import Case, CodeVerdict, grade_scripts, same_tokens
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.types import ConfigError, Problem

STATEMENT = (
    "{description}\n\n### Input\n{input_format}\n\n### Output\n{output_format}\n\n{examples}"
    "Time limit: {time_limit:g} s."
)
DEFAULT_LIMITS = {"time_limit": 6.0, "memory_limit": 1024.0}
"""Limits of a problem that states none: seconds of a test, and megabytes."""
MEBIBYTE = 1 << 20
LOWEST_RATING, HIGHEST_RATING = -1000.0, 6000.0


class Codeforces(CodeTask):
    """Fields, named as in open-r1/codeforces: id, description, input_format, output_format, official_tests (a list of
    input and output); optional: examples, time_limit (seconds), memory_limit (MB), rating, contest_id, index.

    An output is right if it has the words of the expected one; problems with several right outputs need a checker,
    which is not run: leave them out.
    """

    SOURCE = "test.jsonl with your problems and tests, fields as in open-r1/codeforces (copyright of Codeforces)"
    FIELDS = ("id", "description", "input_format", "output_format", "official_tests")
    PROMPTS = CODEFORCES_PROMPTS
    TEST_SECONDS = DEFAULT_LIMITS["time_limit"]

    def read(self, path: str | Path) -> list[Problem]:
        return [self._problem(row, where) for where, row in load_rows(path, self.FIELDS, self.SOURCE)]

    def _problem(self, row: dict[str, Any], where: str) -> Problem:
        if row.get("generated_checker"):
            raise ConfigError(f"{where}: {row['id']} has generated_checker, and checkers are not run; leave it out")
        cases, examples = _cases(row, "official_tests", where), _cases(row, "examples", where)
        if not cases:
            raise ConfigError(f"{where}: official_tests is empty; give {self.SOURCE}")
        limits = {
            key: row.get(key) or value for key, value in (("time_limit", self.TEST_SECONDS), ("memory_limit", 1024))
        }
        for key, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ConfigError(f"{where}: {key} is {value!r}; use a positive number")
        texts = {key: text_of(row, key, where) for key in ("description", "input_format", "output_format")}
        shown = "".join(
            f"### Example\nInput:\n```\n{case['input'].strip()}\n```\nOutput:\n```\n{case['output'].strip()}\n```\n\n"
            for case in examples
        )
        question = STATEMENT.format(**texts, examples=shown, time_limit=self.seconds_of(limits["time_limit"]))
        known: Row = {key: row[key] for key in ("rating", "contest_id", "index") if key in row}
        return code_problem(self.name, question, "", str(row["id"]), known | limits | {"cases": cases})

    def seconds_of(self, published: float) -> float:
        """The limit of a test: of the row of the recipe, else the problem's."""
        return self.cfg.time_limit_seconds or float(published)

    def num_tests(self, problem: Problem) -> int:
        return len(problem.metadata["cases"])

    def verify_seconds(self, problem: Problem) -> float:
        extra = self.seconds_of(problem.metadata["time_limit"]) / self.test_seconds
        return super().verify_seconds(problem) * max(extra, 1.0)

    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        cases = [Case(standard_input=case["input"], output=case["output"]) for case in problem.metadata["cases"]]
        seconds = self.seconds_of(problem.metadata["time_limit"])
        memory_bytes = int(problem.metadata["memory_limit"] * MEBIBYTE)
        return grade_scripts(program, cases, rung, seconds, memory_bytes, same_tokens)


def _cases(row: Mapping[str, Any], field: str, where: str) -> list[dict[str, str]]:
    found = row.get(field) or []
    for case in found if isinstance(found, list) else [None]:
        if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise ConfigError(f"{where}: {field} must be a list of objects with the texts input and output")
    return [{"input": case["input"], "output": case["output"]} for case in found]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One row of the standings of a contest."""

    rating: float
    """Rating of the participant before the contest."""
    points: float
    penalty: float = 0.0
    """Decides among equal points; less is better."""


def read_standings(path: str | Path) -> dict[str, list[Standing]]:
    """Return the standings of each contest. Fields of a row: contest_id, rating, points; optional: penalty."""
    contests: dict[str, list[Standing]] = {}
    for where, row in load_rows(path, ("contest_id", "rating", "points"), "the standings of your contests"):
        values = {key: row.get(key, 0.0) for key in ("rating", "points", "penalty")}
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{where}: {key} is {value!r}, not a number; correct it")
        contests.setdefault(str(row["contest_id"]), []).append(Standing(**values))
    return contests


def rank_of(points: float, penalty: float, standings: Sequence[Standing]) -> int:
    """Return the rank in the standings, from 1: one more than the number of participants who did better."""
    return 1 + sum((-row.points, row.penalty) < (-points, penalty) for row in standings)


def performance(rank: int, standings: Sequence[Standing]) -> float:
    """Return the rating whose expected rank among the participants is `rank`.

    The expected rank of rating r is 1 + sum over participants i of 1 / (1 + 10 ** ((r - r_i) / 400)). Between
    LOWEST_RATING and HIGHEST_RATING, which the first and the last rank reach. Source: CodeElo, section 3.
    """
    low, high = LOWEST_RATING, HIGHEST_RATING
    for _ in range(60):
        middle = (low + high) / 2
        expected = 1 + sum(1 / (1 + 10 ** ((middle - row.rating) / 400)) for row in standings)
        low, high = (low, middle) if expected < rank else (middle, high)
    return low


def rating(results: Mapping[str, tuple[float, float]], contests: Mapping[str, Sequence[Standing]]) -> float:
    """Return the mean performance over the contests of `results`: contest_id -> (points, penalty).

    Raises ConfigError for a contest without standings.
    """
    missing = [name for name in results if not contests.get(name)]
    if missing or not results:
        raise ConfigError(f"no standings of the contests {', '.join(missing) or '(none given)'}; add their rows")
    found = [performance(rank_of(*result, contests[name]), contests[name]) for name, result in results.items()]
    return sum(found) / len(found)
