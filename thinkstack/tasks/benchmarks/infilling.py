"""Infilling of code: the missing line between a prefix and a suffix (single-line infilling of HumanEval)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from thinkstack.files import kind_of
from thinkstack.tasks.benchmarks.datasets import DatasetTask, load_rows, question_problem
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.chat import ChatFormat
from thinkstack.text.fim import fim_prompt
from thinkstack.text.tokenizer import THINK_OPEN
from thinkstack.types import ConfigError, Problem, Response, Score


class Infilling(DatasetTask):
    """The accuracy is exact match of the line, without outer blanks, as in SantaCoder's and Qwen2.5-Coder's tables.

    Fields: prompt, suffix, canonical_solution, language of the program. The prompt has the control tokens of fill in
    the middle, not the chat format; of a completion the first line that is not empty counts. Nothing is executed.
    """

    SOURCE = (
        "test.parquet or test.jsonl with prompt, suffix and canonical_solution, from bigcode/santacoder-fim-task "
        "(OpenRAIL)"
    )
    FIELDS = ("prompt", "suffix", "canonical_solution")
    FILE_NAMES = ("hm_fim",)
    SHOTS_SPLIT = ""

    def read(self, path: str | Path) -> list[Problem]:
        found = []
        for where, row in load_rows(path, self.FIELDS, self.SOURCE):
            for name in self.FIELDS:
                if not isinstance(row[name], str):
                    raise ConfigError(f"{where}: {name} is {kind_of(row[name])}; it must be text")
            if not row["canonical_solution"].strip():
                raise ConfigError(f"{where}: canonical_solution is empty; give {self.SOURCE}")
            metadata = {"suffix": row["suffix"], "subject": str(row.get("language", ""))}
            text = f"{row['prompt']}\n{row['suffix']}"
            problem = question_problem(self.name, text, row["canonical_solution"].strip(), metadata)
            found.append(replace(problem, key=f"{digest(self.name, row['prompt'], row['suffix']):016x}"))
        return found

    def encode(self, problem: Problem, chat: ChatFormat) -> Sequence[int]:
        prefix = problem.question.removesuffix(f"\n{problem.metadata['suffix']}")
        return fim_prompt(chat.tokenizer, prefix, problem.metadata["suffix"])

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        """The first line with text, without the think tag that some chat formats put before every completion."""
        text = response.text.removeprefix(THINK_OPEN)
        return next((line.strip() for line in text.split("\n") if line.strip()), None)

    def verify(self, problem: Problem, response: Response) -> Score:
        return Score(total=float(self.read_answer(problem, response) == problem.answer))

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return False
