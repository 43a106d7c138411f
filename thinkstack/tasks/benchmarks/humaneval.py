"""HumanEval (Codex paper, arXiv:2107.03374): 164 functions to complete, each with a `check` function."""

import ast
from pathlib import Path
from typing import Any

from thinkstack.tasks.benchmarks.code_prompts import HUMANEVAL_PROMPTS
from thinkstack.tasks.benchmarks.code_task import CodeTask, code_problem, parsed_statements, text_of
from thinkstack.tasks.benchmarks.datasets import load_rows
from thinkstack.tasks.verify.code import CodeVerdict, grade_tests
from thinkstack.tasks.verify.code_blocks import continuation, visible_text
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.types import ConfigError, Problem, Response


class HumanEval(CodeTask):
    """Fields: task_id, prompt, entry_point, canonical_solution, test.

    The program of a response is the code before the function in the prompt (imports and helper functions), then the
    last complete code block. A response without any fence continues the prompt, as base models do.
    """

    SOURCE = "HumanEval.jsonl.gz of github.com/openai/human-eval (MIT)"
    FIELDS: tuple[str, ...] = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    FILE_NAMES: tuple[str, ...] = ("HumanEval",)
    PROMPTS = HUMANEVAL_PROMPTS
    TEST_SECONDS = 3.0

    def read(self, path: str | Path) -> list[Problem]:
        return [self._problem(row, where) for where, row in load_rows(path, self.FIELDS, self.SOURCE)]

    def _problem(self, row: dict[str, Any], where: str) -> Problem:
        texts = {name: text_of(row, name, where) for name in ("task_id", "prompt", "entry_point", "canonical_solution")}
        prompt, entry_point = texts["prompt"], texts["entry_point"]
        names = [getattr(part, "name", "") for part in parsed_statements(f"{prompt}\n    pass\n", where, "prompt")]
        if entry_point not in names:
            raise ConfigError(f"{where}: prompt does not define entry_point={entry_point!r}; give {self.SOURCE}")
        return code_problem(
            self.name,
            prompt.strip(),
            prompt + texts["canonical_solution"],
            texts["task_id"],
            {"prompt": prompt, "entry_point": entry_point, **self.tests(row, where)},
        )

    def tests(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the metadata that `grade` needs. Raises ConfigError for a row of the wrong shape."""
        test = text_of(row, "test", where)
        parsed_statements(test, where, "test")
        return {"test": test}

    def program(self, problem: Problem, response: Response) -> str | None:
        block = super().program(problem, response)
        if block is not None:
            return head(problem) + block
        text = visible_text(response)
        return None if "```" in text or not text.strip() else problem.metadata["prompt"] + continuation(text)

    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        """Run `check`; helper functions of the prompt that it uses are ours, not the candidate's."""
        helpers: dict[str, Any] = {}
        exec(compile(head(problem), "prompt", "exec"), helpers)
        entry_point = problem.metadata["entry_point"]
        tests = f"{problem.metadata['test']}\n\ncheck({entry_point})\n"
        return grade_tests(program, [entry_point], tests, helpers, rung, self.test_seconds)


def head(problem: Problem) -> str:
    """Return the code of the prompt before the function that is to be completed."""
    prompt = problem.metadata["prompt"]
    for part in ast.parse(f"{prompt}\n    pass\n").body:
        if getattr(part, "name", "") == problem.metadata["entry_point"]:
            return "".join(prompt.splitlines(keepends=True)[: part.lineno - 1])
    raise AssertionError("read has found the function")
