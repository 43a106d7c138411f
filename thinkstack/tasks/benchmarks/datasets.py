"""Tasks whose problems are read from local files: GSM8K and MATH; jsonl.py has a user's own. Nothing is downloaded.

A file has one of the formats of files.read_rows; MATH may also be the published folder with one JSON file per problem.
"""

import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thinkstack.files import Row, read_object, read_rows
from thinkstack.tasks.benchmarks.prompts import (
    FORMULA_PROMPTS,
    MATH_PROMPTS,
    QUESTION_PROMPTS,
    Prompt,
    asks_for_answer_line,
    fill_prompt,
    find_prompt,
    last_answer_line,
)
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.task import Problems, Task, TaskConfig, final_answer
from thinkstack.tasks.verify.graders import GraderName, check_grader, grade, may_hang, prepare_math_verify
from thinkstack.text.final_answer import last_boxed
from thinkstack.types import ConfigError, Message, Problem, Response, Score, Tool

log = logging.getLogger(__name__)
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
MAX_UNANSWERED_SHARE = 0.01
"""Largest accepted share of rows without an answer."""


class DatasetTask(Task):
    """A task whose problems are in the files of a folder."""

    SOURCE: str
    """What the folder contains and where it comes from; used in messages."""
    PROMPTS: Mapping[str, Prompt] = QUESTION_PROMPTS
    """Prompts by name; the first is the default."""
    FILE_NAMES: tuple[str, ...] = ()
    """Names, without suffix, under which the set is published with all its splits in one file."""
    MAY_BE_SHOWN: bool = True
    """Whether reports may quote questions; False if the authors ask that none is published."""
    CODE_SETTINGS: tuple[str, ...] = ()
    """The settings of TaskConfig that only some tasks have, by name."""
    SHOTS_SPLIT: str = "train"
    """The split of solved examples (num_shots); empty: the task has none."""
    default_grader: GraderName | None = None
    """The grader where the row of the task names none; None: the task compares by rules of its own."""

    def __init__(self, name: str, cfg: TaskConfig):
        self.name, self.cfg = name, cfg
        self._shots: list[Problem] | None = None
        self.template = find_prompt(name, cfg.prompt, self.PROMPTS)
        if cfg.verifier:
            check_grader(cfg.verifier)

    @property
    def grader_name(self) -> GraderName:
        """The grader of this task."""
        found = self.cfg.verifier or self.default_grader
        assert found is not None, "a task with rules of its own replaces the methods that ask"
        return found

    @property
    def grader(self) -> str:
        return self.cfg.verifier or self.default_grader or self.name

    @property
    def chance(self) -> float | None:
        return None

    def file(self, split: str) -> Path:
        """Return the file of a split; `data` may be the file of the test split itself. Raises ConfigError if there is
        none."""
        data = Path(self.cfg.data)
        if data.is_file():
            if split == "test":
                return data
            data = data.parent
        names = [f"{name}{end}" for name in (split, *self.FILE_NAMES) for end in FILE_SUFFIXES]
        found = [path for name in names if (path := data / name).is_file()]
        if not found:
            known = " or ".join(f"{split}{end}" for end in FILE_SUFFIXES)
            raise ConfigError(f"{data} has no {known}; give the folder that contains {self.SOURCE}")
        return found[0]

    def check_files(self, split: str) -> None:
        self.file(split)

    def read(self, path: str | Path) -> list[Problem]:
        """Return all problems of a file, in file order.

        Raises ConfigError if the file is missing or belongs to another data set.
        """
        raise NotImplementedError

    def problems(self, split: str, seed: int) -> Problems:
        """Return the problems of the allowed levels and languages, reshuffled every epoch."""
        cfg, path = self.cfg, self.file(split)
        found = [
            problem
            for problem in self.read(path)
            if (path.name.startswith(f"{split}.") or self.is_in_split(problem, split))
            and (not cfg.levels or problem.level in cfg.levels)
            and (not cfg.languages or problem.language in cfg.languages)
        ]
        if not found:
            raise ConfigError(
                f"tasks.{self.name} has no {split} problems of levels={list(cfg.levels)} and "
                f"languages={list(cfg.languages)} (empty: all); correct them"
            )
        return Problems(Shuffled(found, seed).problem_at, len(found))

    def shots(self, problem: Problem) -> list[Problem]:
        """Return the solved examples before a question. Raises ConfigError if there are fewer than num_shots."""
        if not self.cfg.num_shots:
            return []
        if self._shots is None:
            self._shots = self.read(self.file(self.SHOTS_SPLIT))
        found = [one for one in self._shots if self.is_shot_for(one, problem) and one.key != problem.key]
        if len(found) < self.cfg.num_shots:
            raise ConfigError(
                f"tasks.{self.name}.num_shots={self.cfg.num_shots}: the {self.SHOTS_SPLIT} file has {len(found)} "
                "examples for this question; use as many or fewer"
            )
        return found[: self.cfg.num_shots]

    def is_shot_for(self, example: Problem, problem: Problem) -> bool:
        """Whether an example may stand before a question."""
        return True

    def solution(self, problem: Problem) -> str:
        """Return the assistant's turn for a solved example."""
        return str(problem.metadata.get("solution") or problem.answer)

    def prompt(self, problem: Problem) -> tuple[Sequence[Message], Sequence[Tool]]:
        """Return the messages: the system message of the prompt, solved examples as turns, the question in its text."""
        turns = [Message(role="system", content=self.template.system)] if self.template.system else []
        for place, shot in enumerate(shots := self.shots(problem)):
            text = fill_prompt(self.template, shot, with_description=not place)
            turns.append(replace(shot.messages[-1], content=text))
            turns.append(Message(role="assistant", content=self.solution(shot)))
        text = fill_prompt(self.template, problem, with_description=not shots)
        last = replace(problem.messages[-1], content=text)
        return (*turns, *problem.messages[:-1], last), ()

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        """Return the final answer. If the prompt asks for a line "Answer: ..." and the text is longer than an answer,
        return the last such line."""
        answer = final_answer(problem, response)
        if answer is None and response.answer and asks_for_answer_line(self.template):
            return last_answer_line(response.answer)
        return answer

    def is_in_split(self, problem: Problem, split: str) -> bool:
        """Whether a problem of a file with all splits (FILE_NAMES) belongs to `split`; by default all are tests."""
        return split == "test"

    def verify(self, problem: Problem, response: Response) -> Score:
        """Compare the final answer by the grader."""
        return grade(self.grader_name, problem, self.read_answer(problem, response))

    def may_hang(self, problem: Problem, response: Response) -> bool:
        """Whether math-verify decides; answers that the grader accepts without it are compared in process."""
        return may_hang(self.grader_name, problem, self.read_answer(problem, response))

    def prepare(self) -> None:
        if self.grader in ("latex", "math-verify"):
            prepare_math_verify()


class Gsm8k(DatasetTask):
    """Grade-school word problems with integer answers (arXiv:2110.14168).

    Fields: question, answer. The reference is the text after #### in the answer; the level is the number of lines of
    the published solution.
    """

    SOURCE = "train.jsonl and test.jsonl of github.com/openai/grade-school-math (MIT)"
    PROMPTS = MATH_PROMPTS
    default_grader = "number"

    def read(self, path: str | Path) -> list[Problem]:
        return [self._problem(row, where) for where, row in load_rows(path, ("question", "answer"), self.SOURCE)]

    def _problem(self, row: Row, where: str) -> Problem:
        solution, mark, answer = str(row["answer"]).rpartition("####")
        answer = answer.strip().replace(",", "")
        if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", answer):
            raise ConfigError(f"{where} does not end in '#### number' as GSM8K does; use {self.SOURCE}")
        metadata = {"level": solution.strip().count("\n") + 1, "solution": str(row["answer"])}
        return question_problem(self.name, str(row["question"]), answer, metadata)


class Math(DatasetTask):
    """Competition problems with LaTeX answers (arXiv:2103.03874).

    Fields: problem, level, and solution or answer. The reference is the content of the last \\boxed{} of the solution,
    or the answer field if there is no solution. Level: 1 to 5 as published, 0 where the file says "Level ?". Answers
    are compared by spelling, then by math-verify, if it is installed.
    """

    SOURCE = "the folder or the JSON lines of github.com/hendrycks/math (MIT)"
    PROMPTS = FORMULA_PROMPTS
    default_grader = "latex"

    def read(self, path: str | Path) -> list[Problem]:
        """Return all problems; rows without an answer, which some circulating copies have, are skipped with a
        warning."""
        found, unanswered = [], []
        for where, row in load_rows(path, ("problem", "level"), self.SOURCE):
            answer = last_boxed(str(row.get("solution") or "")) or row.get("answer")
            if not answer:
                unanswered.append(where)
                continue
            level = re.search(r"\d", str(row["level"]))
            metadata = {"level": int(level[0]) if level else 0, "solution": str(row.get("solution") or "")}
            found.append(question_problem(self.name, str(row["problem"]), str(answer), metadata))
        if len(unanswered) > len(found) * MAX_UNANSWERED_SHARE:
            raise ConfigError(
                f"{unanswered[0]} has neither an answer nor a \\boxed{{}} in its solution; use {self.SOURCE}"
            )
        if unanswered:
            log.warning("skipped rows without an answer: %s", " ".join(unanswered))
        return found


class Math500(Math):
    """The 500 test problems of MATH that OpenAI chose (arXiv:2305.20050). Fields: those of MATH."""

    SOURCE = (
        "math500.jsonl or test.jsonl, the 500 problems of HuggingFaceH4/MATH-500 or github.com/openai/prm800k (MIT)"
    )
    FILE_NAMES = ("math500", "MATH-500")

    def file(self, split: str) -> Path:
        """Return the file: math500 before test, since a folder may have all of MATH's test set too."""
        named = [Path(self.cfg.data) / f"{name}{end}" for name in self.FILE_NAMES for end in FILE_SUFFIXES]
        return next((path for path in named if path.is_file()), None) or super().file(split)

    def read(self, path: str | Path) -> list[Problem]:
        found = super().read(path)
        if len(found) != 500:
            raise ConfigError(f"{path} has {len(found):,} problems; MATH-500 has 500; give {self.SOURCE}")
        return found


def question_problem(task: str, question: str, answer: str, metadata: dict[str, Any]) -> Problem:
    """Build the Problem of a single English question; the key is the hash of the question."""
    key = f"{digest(task, ' '.join(question.split())):016x}"
    messages = (Message(role="user", content=question),)
    return Problem(messages=messages, answer=answer, task=task, language="en", key=key, metadata=metadata)


def load_rows(path: str | Path, fields: Sequence[str], source: str) -> list[tuple[str, Row]]:
    """Return the rows of a file, each with its location for messages.

    Raises ConfigError if the file is missing or empty, or if a row lacks one of `fields`.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give the path of {source}")
    if path.is_dir():
        found = [(str(file), read_object(file)) for file in sorted(path.rglob("*.json"))]
    else:
        found = list(read_rows(path))
    if not found:
        raise ConfigError(f"{path} has no rows; give the path of {source}")
    for where, row in found:
        missing = [name for name in fields if name not in row]
        if missing:
            raise ConfigError(
                f"{where} has no {', '.join(missing)} (it has {', '.join(row)}); give the path of {source}"
            )
    return found


class Shuffled:
    """A list of problems, reshuffled from `seed` every epoch."""

    def __init__(self, problems: Sequence[Problem], seed: int):
        self.problems, self.seed = problems, seed
        self._epoch, self._order = -1, list[int]()

    def problem_at(self, index: int) -> Problem:
        """Return problem `index` of the endless sequence."""
        epoch, place = divmod(index, len(self.problems))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.problems)))
            random.Random(digest("data stream", self.seed, epoch)).shuffle(self._order)
        return self.problems[self._order[place]]
