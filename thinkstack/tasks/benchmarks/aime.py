"""AIME: competition problems whose answers are integers from 0 to 999 (American Invitational Math. Examination)."""

import re
from pathlib import Path

from thinkstack.tasks.benchmarks.datasets import DatasetTask, load_rows, question_problem
from thinkstack.tasks.benchmarks.prompts import AIME_PROMPTS
from thinkstack.types import ConfigError, Problem


class Aime(DatasetTask):
    """The problems of one or several years: an evaluation, without a training split.

    Fields: problem, answer; some copies write answers with leading zeros, as the answer sheets do.
    """

    SOURCE = (
        "test.jsonl, the 30 problems of a year (AIME I and II) with problem and answer, for example "
        "HuggingFaceH4/aime_2024 or yentinglin/aime_2025 (problems copyright of the MAA)"
    )
    PROMPTS = AIME_PROMPTS
    default_grader = "number"

    def read(self, path: str | Path) -> list[Problem]:
        found = []
        for where, row in load_rows(path, ("problem", "answer"), self.SOURCE):
            answer = str(row["answer"]).strip()
            if not re.fullmatch(r"\d{1,3}", answer):
                raise ConfigError(f"{where} has the answer {answer!r}; answers of AIME are integers from 0 to 999")
            found.append(question_problem(self.name, str(row["problem"]), str(int(answer)), {}))
        return found
