"""MBPP (arXiv:2108.07732): 974 short functions, each with three assertions."""

import ast
from pathlib import Path
from typing import Any

from thinkstack.tasks.benchmarks.code_prompts import MBPP_PROMPTS
from thinkstack.tasks.benchmarks.code_task import CodeTask, code_problem, parsed_statements, text_of, texts_of
from thinkstack.tasks.benchmarks.datasets import load_rows
from thinkstack.tasks.verify.code import CodeVerdict, grade_tests
from thinkstack.tasks.verify.code_blocks import visible_text
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.types import ConfigError, Problem, Response

SPLITS = {"test": range(11, 511), "train": range(601, 975), "validation": range(511, 601), "prompt": range(1, 11)}
"""Numbers of the tasks of each split, as published."""


class Mbpp(CodeTask):
    """Fields: task_id, text (prompt, in the sanitized set), code, test_list; optional: test_setup_code, test_imports.

    The tests use names that the reference solution defines: these are the candidate's. All others are ours.
    """

    SOURCE = "mbpp.jsonl or sanitized-mbpp.json of github.com/google-research/google-research (CC-BY-4.0)"
    FILE_NAMES = ("mbpp", "sanitized-mbpp")
    PROMPTS = MBPP_PROMPTS
    TEST_SECONDS = 10.0

    def read(self, path: str | Path) -> list[Problem]:
        return [
            self._problem(row, where) for where, row in load_rows(path, ("task_id", "code", "test_list"), self.SOURCE)
        ]

    def is_in_split(self, problem: Problem, split: str) -> bool:
        return int(problem.metadata["id"]) in SPLITS.get(split, ())

    def _problem(self, row: dict[str, Any], where: str) -> Problem:
        field = "text" if "text" in row else "prompt"
        if field not in row or not str(row["task_id"]).isdecimal():
            raise ConfigError(f"{where}: needs text (or prompt) and an integer task_id; give {self.SOURCE}")
        code, tests = text_of(row, "code", where), texts_of(row, "test_list", where)
        setup = [str(row.get("test_setup_code") or ""), *row.get("test_imports", [])]
        source = "\n".join([*setup, *tests]) + "\n"
        names = called_names(parsed_statements(code, where, "code"), parsed_statements(source, where, "test_list"))
        if not names:
            raise ConfigError(f"{where}: test_list uses no function that code defines; give {self.SOURCE}")
        metadata = {"tests": "\n".join(tests), "names": names, "imports": imports_of(code), "test": source}
        return code_problem(self.name, text_of(row, field, where), code, str(row["task_id"]), metadata)

    def program(self, problem: Problem, response: Response) -> str | None:
        """Return the last code block; of a response without any fence, as base models give, the text up to [DONE]."""
        text = visible_text(response)
        if "```" in text or "[BEGIN]" not in self.template.text:
            return super().program(problem, response)
        return text.partition("[DONE]")[0].strip() or None

    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        ours: dict[str, Any] = {}
        exec(compile(problem.metadata["imports"], "imports", "exec"), ours)
        return grade_tests(program, problem.metadata["names"], problem.metadata["test"], ours, rung, self.test_seconds)


def called_names(code: list[ast.stmt], tests: list[ast.stmt]) -> list[str]:
    """Return the functions, classes and constants of the reference solution that the tests use, functions first."""
    defined = {part.name: part for part in code if isinstance(part, ast.FunctionDef | ast.ClassDef)}
    used = [node.id for part in tests for node in ast.walk(part) if isinstance(node, ast.Name)]
    found = [name for name in dict.fromkeys(used) if name in defined]
    return sorted(found, key=lambda name: isinstance(defined[name], ast.ClassDef))


def imports_of(code: str) -> str:
    """Return the imports of a module, which its tests may rely on."""
    return "\n".join(
        ast.unparse(part) for part in ast.parse(code).body if isinstance(part, ast.Import | ast.ImportFrom)
    )
