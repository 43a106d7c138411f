"""LiveCodeBench (arXiv:2403.07974): problems of programming contests with dates; each case has 6 s.

The user's own copy: release files of code_generation_lite, whose hidden cases are pickled text. The text is read from
the opcodes; nothing is unpickled.
"""

import base64
import binascii
import datetime
import json
import pickletools
import zlib
from pathlib import Path
from typing import Any

from thinkstack.files import Row
from thinkstack.tasks.benchmarks.code_prompts import LIVECODEBENCH_PROMPTS
from thinkstack.tasks.benchmarks.code_task import CodeTask, code_problem, text_of
from thinkstack.tasks.benchmarks.datasets import load_rows
from thinkstack.tasks.verify.code import Call, Case, CodeVerdict, grade_calls, grade_scripts
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.types import ConfigError, Problem

STAR_IMPORTS = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io"
PREAMBLE = (
    "".join(f"from {name} import *\n" for name in f"{STAR_IMPORTS} sys json builtins typing".split())
    + "".join(f"import {name}\n" for name in f"{STAR_IMPORTS} sys json".split())
    + "sys.setrecursionlimit(50000)\n"
)
"""Code that the published harness puts before every program."""
FIELDS = ("question_content", "question_id", "contest_date", "starter_code", "public_test_cases", "private_test_cases")
MAX_CASES_BYTES = 1 << 30
"""Largest unpacked text of the hidden cases of one problem."""


class LiveCodeBench(CodeTask):
    """Fields: question_content, question_id, contest_date, starter_code, public_test_cases, private_test_cases,
    metadata; optional: platform, difficulty. `since` and `until` select problems by contest_date."""

    SOURCE = (
        "your copy of a release of livecodebench/code_generation_lite, as test.jsonl (CC; problems copyright of "
        "LeetCode, AtCoder and Codeforces)"
    )
    FILE_NAMES = ("test6", "test5", "test4", "test3", "test2")
    CODE_SETTINGS = (*CodeTask.CODE_SETTINGS, "since", "until")
    PROMPTS = LIVECODEBENCH_PROMPTS
    TEST_SECONDS = 6.0

    def read(self, path: str | Path) -> list[Problem]:
        since, until = (date_of(getattr(self.cfg, name), f"tasks.{self.name}.{name}") for name in ("since", "until"))
        found = []
        for where, row in load_rows(path, FIELDS, self.SOURCE):
            date = date_of(text_of(row, "contest_date", where)[:10], f"{where}: contest_date")
            if date and (since is None or date >= since) and (until is None or date <= until):
                found.append(self._problem(row, date, where))
        return found

    def _problem(self, row: dict[str, Any], date: datetime.date, where: str) -> Problem:
        cases = [*_cases(row, "public_test_cases", where), *_cases(row, "private_test_cases", where)]
        if not cases:
            raise ConfigError(f"{where}: has no test cases; give {self.SOURCE}")
        starter = text_of(row, "starter_code", where)
        name = _function_name(row, where) if cases[0]["testtype"] == "functional" else ""
        known = {key: row[key] for key in ("platform", "difficulty") if key in row}
        metadata: Row = known | {"date": str(date), "function": name, "cases": cases, "starter_code": starter}
        question = text_of(row, "question_content", where)
        return code_problem(self.name, question, "", str(row["question_id"]), metadata)

    def num_tests(self, problem: Problem) -> int:
        return len(problem.metadata["cases"])

    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        cases, name = problem.metadata["cases"], problem.metadata["function"]
        if not name:
            scripts = [Case(standard_input=case["input"], output=case["output"]) for case in cases]
            return grade_scripts(PREAMBLE + program, scripts, rung, self.test_seconds)
        calls = [
            Call(
                arguments=[json.loads(line) for line in case["input"].split("\n")], expected=json.loads(case["output"])
            )
            for case in cases
        ]
        if "class Solution" in program:
            name = f"Solution.{name}"
        return grade_calls(PREAMBLE + program, name, calls, rung, [self.test_seconds] * len(calls), _same_result)


def _same_result(found: Any, expected: Any) -> bool:
    """As published: equal, where a tuple counts as a list."""
    return bool((list(found) if isinstance(found, tuple) else found) == expected)


def date_of(text: str, where: str) -> datetime.date | None:
    """Return a date; None for "". Raises ConfigError for anything but YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text) if text else None
    except ValueError as error:
        raise ConfigError(f"{where}={text!r} is not a date; write YYYY-MM-DD") from error


def _function_name(row: dict[str, Any], where: str) -> str:
    try:
        found = json.loads(row.get("metadata") or "{}").get("func_name")
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{where}: metadata is not a JSON object; give the published file") from error
    if not isinstance(found, str):
        raise ConfigError(f"{where}: metadata has no func_name, which functional cases need; give the published file")
    return found


def _cases(row: dict[str, Any], field: str, where: str) -> list[dict[str, str]]:
    """Return the cases of a field: JSON, or JSON in a pickled text, compressed, in base64."""
    text = text_of(row, field, where)
    try:
        found = json.loads(text if text.lstrip().startswith("[") else _unpacked(text))
    except (ValueError, zlib.error, binascii.Error) as error:
        raise ConfigError(
            f"{where}: {field} is neither JSON nor packed JSON ({error}); give the published file"
        ) from error
    for case in found if isinstance(found, list) else [None]:
        if not isinstance(case, dict) or not all(
            isinstance(case.get(key), str) for key in ("input", "output", "testtype")
        ):
            raise ConfigError(
                f"{where}: {field} has a case without input, output and testtype; give the published file"
            )
    return list(found)


def _unpacked(text: str) -> str:
    """Return the text of a pickle that holds a single text."""
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_CASES_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {MAX_CASES_BYTES} bytes")
    texts = [value for _, value, _ in pickletools.genops(data) if isinstance(value, str)]
    if len(texts) != 1:
        raise ValueError("no pickled text")
    return texts[0]
