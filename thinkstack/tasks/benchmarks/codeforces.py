"""Codeforces: the user's problems with their tests. A rating from given standings is in evals/contests.py."""

from collections.abc import Mapping
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


class Codeforces(CodeTask):
    """Fields, named as in open-r1/codeforces: id, description, input_format, output_format, official_tests (a list of
    input and output); optional: examples, time_limit (seconds), memory_limit (MB), and for a rating contest_id and
    points (of a contest whose problems have points).

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
        known: Row = {key: row[key] for key in ("rating", "contest_id", "index", "points") if row.get(key) is not None}
        for key, value in (limits | {"points": known.get("points", 1)}).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ConfigError(f"{where}: {key} is {value!r}; use a positive number")
        texts = {key: text_of(row, key, where) for key in ("description", "input_format", "output_format")}
        shown = "".join(
            f"### Example\nInput:\n```\n{case['input'].strip()}\n```\nOutput:\n```\n{case['output'].strip()}\n```\n\n"
            for case in examples
        )
        question = STATEMENT.format(**texts, examples=shown, time_limit=self.seconds_of(limits["time_limit"]))
        if not isinstance(known.get("contest_id", ""), str | int):
            raise ConfigError(f"{where}: contest_id is {known['contest_id']!r:.60}; use a number or text")
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
