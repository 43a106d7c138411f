"""CRUXEval (arXiv:2401.03065): predict the output of a short function for an input, or an input for an output.

Answers are literals. An output is compared as a value and no code runs; an input is passed to the published function,
which runs in the sandbox, since inputs of a model may keep it busy for ever.
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkstack.tasks.benchmarks.code_prompts import CRUXEVAL_INPUT_PROMPTS, CRUXEVAL_OUTPUT_PROMPTS
from thinkstack.tasks.benchmarks.code_task import CodeTask, code_problem, text_of
from thinkstack.tasks.benchmarks.datasets import load_rows
from thinkstack.tasks.benchmarks.prompts import Prompt
from thinkstack.tasks.verify.code import Call, CodeVerdict, grade_calls
from thinkstack.tasks.verify.code_blocks import last_code_block, visible_text
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.types import ConfigError, Problem, Response

_TAGGED = re.compile(r"\[ANSWER\](.*?)\[/ANSWER\]", re.DOTALL)


class CruxEvalOutput(CodeTask):
    """Output prediction (CRUXEval-O). Fields: code, input, output, id."""

    SOURCE = "cruxeval.jsonl of github.com/facebookresearch/cruxeval (MIT), as test.jsonl"
    FILE_NAMES = ("cruxeval",)
    TEST_SECONDS = 3.0
    PROMPTS: Mapping[str, Prompt] = CRUXEVAL_OUTPUT_PROMPTS

    def read(self, path: str | Path) -> list[Problem]:
        found = []
        for where, row in load_rows(path, ("code", "input", "output", "id"), self.SOURCE):
            texts = {name: text_of(row, name, where) for name in ("code", "input", "output", "id")}
            if literal(texts["output"]) is None or call_of(f"f({texts['input']})") is None:
                raise ConfigError(f"{where}: input and output must be literals; give {self.SOURCE}")
            metadata = {name: texts[name] for name in ("code", "input", "output")}
            found.append(code_problem(self.name, texts["code"], "", texts["id"], metadata))
        return found

    def program(self, problem: Problem, response: Response) -> str | None:
        """Return the last answer between tags, or the last code block, or what follows a prompt that opens the tag;
        None if there is none of these."""
        text = visible_text(response)
        tagged = _TAGGED.findall(text)
        found = tagged[-1].strip() if tagged else last_code_block(text)
        if found is None and self.template.text.endswith("[ANSWER]\n"):
            found = text.partition("[/ANSWER]")[0].strip() or None
        return found

    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        """Compare the literal after ==, or the only literal, with the output, by value as published."""
        found = literal(program.strip().removeprefix("assert ").rpartition("==")[2])
        reason = "the answer is no literal" if found is None else ""
        if found is not None and found != literal(problem.metadata["output"]):
            reason = "another value"
        return CodeVerdict(passed=not reason, grader="literals", rung=None, reason=reason)

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return False


class CruxEvalInput(CruxEvalOutput):
    """Input prediction (CRUXEval-I). Fields: code, input, output, id."""

    PROMPTS = CRUXEVAL_INPUT_PROMPTS

    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        """Call the published function with the literal arguments of the answer, f(...) or their list alone."""
        text = program.strip().removeprefix("assert ").strip()
        found = call_of(text) or call_of(f"f({text})")
        if found is None:
            return CodeVerdict(passed=False, grader="literals", rung=None, reason="the answer is no call with literals")
        (expected,) = literal(problem.metadata["output"]) or (None,)
        call = Call(arguments=found[0], keywords=found[1], expected=expected)
        code = problem.metadata["code"]
        return grade_calls(code, "f", [call], rung, [self.test_seconds], lambda found, wanted: bool(found == wanted))

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return self.program(problem, response) is not None


def literal(text: str) -> tuple[Any] | None:
    """Return a tuple with the value of a Python literal; None for any other text."""
    try:
        return (ast.literal_eval(text.strip()),)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def call_of(text: str) -> tuple[list[Any], dict[str, Any]] | None:
    """Return the literal arguments of the call f(...), which a comparison may follow; None for any other text."""
    try:
        node = ast.parse(text, mode="eval").body
        call = node.left if isinstance(node, ast.Compare) else node
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "f":
            return None
        if any(keyword.arg is None for keyword in call.keywords):
            return None
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return [ast.literal_eval(argument) for argument in call.args], keywords
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
