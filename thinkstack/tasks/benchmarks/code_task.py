"""Tasks whose answers are programs: prompts, extraction of the program, and the sandbox that its tests need."""

import ast
from abc import abstractmethod

from thinkstack.files import Row
from thinkstack.tasks.benchmarks.datasets import DatasetTask
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.verify.code import CodeVerdict
from thinkstack.tasks.verify.code_blocks import last_code_block, visible_text
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.tasks.verify.sandbox import choose_rung
from thinkstack.types import ConfigError, Message, Problem, Response, Score

NOT_RUN = "code, not run"
"""Grader of a completion without a program."""
MARGIN_SECONDS = 60.0
"""Time of a verifier beside the limits of its tests: start of the sandbox, reading of results, a slow machine."""


class CodeTask(DatasetTask):
    """A task whose verifier runs the program of a response in a sandbox."""

    CODE_SETTINGS: tuple[str, ...] = ("time_limit_seconds", "unsafe_code")
    SHOTS_SPLIT = ""
    TEST_SECONDS: float
    """Published time limit of one test, or of all tests of a problem together, where these are one program."""

    @property
    def test_seconds(self) -> float:
        """The time limit of one test: of the row of the recipe, else the published one."""
        return self.cfg.time_limit_seconds or self.TEST_SECONDS

    def check_files(self, split: str) -> None:
        """Raise ConfigError if the file of the split or a sandbox is missing."""
        super().check_files(split)
        choose_rung(self.cfg.unsafe_code)

    @abstractmethod
    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        """Run the tests of a problem on a program."""

    def program(self, problem: Problem, response: Response) -> str | None:
        """Return the program of a response: its last complete code block outside thinking; None if there is none."""
        return last_code_block(visible_text(response))

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        """Return the program, by which completions of one problem are compared."""
        return self.program(problem, response)

    def num_tests(self, problem: Problem) -> int:
        """How many tests have a time limit of their own."""
        return 1

    def verify(self, problem: Problem, response: Response) -> Score:
        """Run the tests of the problem on the program of the response."""
        program = self.program(problem, response)
        if program is None:
            return Score(total=0.0, grader=NOT_RUN, detail="no complete code block outside thinking")
        return self.grade(problem, program, choose_rung(self.cfg.unsafe_code)).score()

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return self.program(problem, response) is not None

    def verify_seconds(self, problem: Problem) -> float:
        return MARGIN_SECONDS + 2 * self.num_tests(problem) * self.test_seconds

    def prepare(self) -> None:
        choose_rung(self.cfg.unsafe_code)


def code_problem(task: str, question: str, program: str, name: str, metadata: Row) -> Problem:
    """Build the Problem of one row. name: its identifier in the set; program: the reference solution, "" if unknown."""
    return Problem(
        messages=(Message(role="user", content=question),),
        answer=program,
        task=task,
        language="en",
        key=f"{digest(task, name):016x}",
        metadata={"id": name, **metadata},
    )


def text_of(row: Row, field: str, where: str) -> str:
    """Return a text field. Raises ConfigError for another type."""
    value = row[field]
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {field} is {type(value).__name__}, not text; give the published file")
    return value


def texts_of(row: Row, field: str, where: str) -> list[str]:
    """Return a field with a list of texts. Raises ConfigError for another type."""
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: {field} must be a list of texts; give the published file")
    return value


def parsed_statements(code: str, where: str, field: str) -> list[ast.stmt]:
    """Return the statements of Python code of a benchmark. Raises ConfigError for code that is not Python."""
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}: {field} is not Python ({error}); give the published file") from error
