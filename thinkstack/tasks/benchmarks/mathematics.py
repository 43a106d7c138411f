"""Mathematics with answers that are numbers or formulas: AMC23, CMATH, MGSM and Minerva (OCWCourses)."""

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from thinkstack.files import Row, kind_of
from thinkstack.tasks.benchmarks.datasets import DatasetTask, load_rows, question_problem
from thinkstack.tasks.benchmarks.prompts import FORMULA_PROMPTS, MATH_PROMPTS, MGSM_PROMPTS
from thinkstack.tasks.verify import latex
from thinkstack.tasks.verify.answers import strip_answer
from thinkstack.tasks.verify.graders import GraderName
from thinkstack.tasks.verify.language_id import detect_language
from thinkstack.tasks.verify.quantities import parse_quantity
from thinkstack.text.final_answer import last_boxed
from thinkstack.types import ConfigError, Problem, Response, Score

_SCIENTIFIC = re.compile(
    r"(?P<digits>[+-]?[0-9]+(?:\.[0-9]+)?)\s*(?:[eE]|(?:\\times|\\cdot|×|\*)\s*10\s*\^)\s*\{?(?P<power>[+-]?[0-9]{1,3})\}?"
)


class NumberTask(DatasetTask):
    """Problems whose answer is one number; currencies and units are optional."""

    PROMPTS = MATH_PROMPTS
    default_grader: GraderName | None = "number"
    FIELDS: tuple[str, ...] = ("question", "answer")
    LANGUAGE = "en"
    """Language of all questions; empty: found from the text of each."""

    def read(self, path: str | Path) -> list[Problem]:
        return [self.problem(row, where) for where, row in load_rows(path, self.FIELDS, self.SOURCE)]

    def problem(self, row: Row, where: str) -> Problem:
        question = self.question(row, where)
        code = self.LANGUAGE or detect_language(question) or "en"
        found = question_problem(self.name, question, self.reference(row["answer"], where), self.facts(row))
        return replace(found, language="zh" if code == "zh-cn" else code)

    def question(self, row: Row, where: str) -> str:
        """Return the text of a row's question. Raises ConfigError if it is not text."""
        text = row[self.FIELDS[0]]
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: {self.FIELDS[0]} is {kind_of(text)}, or empty; give {self.SOURCE}")
        return text

    def reference(self, answer: Any, where: str) -> str:
        """Return a row's answer. Raises ConfigError if it is not a number."""
        text = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer).strip()
        if isinstance(answer, bool) or parse_quantity(text, may_be_percent=True) is None:
            raise ConfigError(f"{where}: answer is {answer!r:.60}, not a number; give {self.SOURCE}")
        return text

    def facts(self, row: Row) -> dict[str, Any]:
        """Return the metadata of a row."""
        return {}


class Amc23(NumberTask):
    """40 problems of AMC 12 of 2023 whose answers are numbers. Fields: problem, answer."""

    SOURCE = "test.jsonl with problem and answer, from AI-MO/aimo-validation-amc (problems copyright of the MAA)"
    FIELDS = ("problem", "answer")


class Cmath(NumberTask):
    """Chinese elementary-school problems (arXiv:2306.16636). Fields: question, answer, grade, which is the level.

    Percent signs are optional.
    """

    SOURCE = "test.jsonl with question, answer and grade, from weitianwen/cmath (CC BY 4.0)"
    LANGUAGE = "zh"
    default_grader = None

    def verify(self, problem: Problem, response: Response) -> Score:
        answer = self.read_answer(problem, response)
        inside = None if answer is None else latex.unbox(strip_answer(answer))
        value = None if inside is None else parse_quantity(inside, may_be_percent=True)
        return Score(total=float(value is not None and value == parse_quantity(problem.answer, may_be_percent=True)))

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return False

    def facts(self, row: Row) -> dict[str, Any]:
        return {"level": int(row.get("grade", 1))}


class Mgsm(NumberTask):
    """GSM8K's first 250 test questions in ten languages (arXiv:2210.03057), one file for each.

    Fields: question, or messages whose first is the question; answer.
    """

    FILE_NAMES = ("mgsm_zh", "mgsm_en")
    SOURCE = "test.jsonl with question (or messages) and answer, from juletxara/mgsm (CC BY-SA 4.0)"
    PROMPTS = MGSM_PROMPTS
    FIELDS = ("answer",)
    LANGUAGE = ""

    def question(self, row: Row, where: str) -> str:
        turns = row.get("messages")
        first = turns[0] if isinstance(turns, list) and turns else {}
        text = row.get("question") or (first.get("content") if isinstance(first, dict) else None)
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where} has neither question nor messages with a question; give {self.SOURCE}")
        return text


class Minerva(DatasetTask):
    """272 problems of MIT's undergraduate courses (OCWCourses, arXiv:2206.14858). Fields: problem, solution.

    The reference is the last box of the solution. Numbers in scientific notation are compared exactly: 4.5e33 and
    4.5 \\times 10^{33} are equal. The published tolerance for rounded numbers is not applied.
    """

    FILE_NAMES = ("minerva_math",)
    SOURCE = (
        "test.jsonl with problem and solution, OCWCourses of arXiv:2206.14858, for example math-ai/minervamath (no "
        "licence stated; the courses of MIT OpenCourseWare are CC BY-NC-SA 4.0)"
    )
    PROMPTS = FORMULA_PROMPTS
    default_grader = "latex"

    def read(self, path: str | Path) -> list[Problem]:
        found = []
        for where, row in load_rows(path, ("problem", "solution"), self.SOURCE):
            reference = last_boxed(str(row["solution"]))
            if reference is None:
                raise ConfigError(f"{where}: solution has no \\boxed{{}}; give {self.SOURCE}")
            found.append(question_problem(self.name, str(row["problem"]), reference, {"subject": row.get("type", "")}))
        return found

    def verify(self, problem: Problem, response: Response) -> Score:
        return Score(total=1.0) if self._is_same_number(problem, response) else super().verify(problem, response)

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return not self._is_same_number(problem, response) and super().may_hang(problem, response)

    def _is_same_number(self, problem: Problem, response: Response) -> bool:
        """Whether reference and answer are one number, of which one may be in scientific notation."""
        wanted, answer = parse_scientific(problem.answer), self.read_answer(problem, response)
        inside = None if answer is None else latex.unbox(strip_answer(answer))
        return wanted is not None and inside is not None and parse_scientific(inside) == wanted


def parse_scientific(text: str) -> Fraction | None:
    """Return the value of a number in scientific notation, or of a quantity; None for anything else."""
    match = _SCIENTIFIC.match(text.strip().strip("$").strip())
    if match is None:
        return parse_quantity(text)
    rest = text.strip().strip("$")[match.end() :]
    has_unit = parse_quantity(f"1{rest}") == 1
    return Fraction(match["digits"]) * Fraction(10) ** int(match["power"]) if has_unit else None
