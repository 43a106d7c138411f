"""The interface of a task, its settings, and its stream of problems. Puzzles, benchmarks and a user's files alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from thinkstack.config import CountOrZero, Input, SecondsOrZero, Temperature
from thinkstack.tasks.verify.graders import GraderName
from thinkstack.types import Message, Problem, Response, Score, Tool

if TYPE_CHECKING:
    from thinkstack.text.chat import ChatFormat

Method = Literal["sampled", "letters", "cloze"]
"""How a model answers a question; see TaskConfig.method."""
DEFAULT_TASKS = ("chain", "nested", "cups", "kinship")
"""Tasks of the demo."""
MAX_ANSWER_CHARACTERS = 64
"""A longer answer counts as no answer, since it could contain several answers. If the reference is longer than this,
the limit is twice the length of the reference."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Settings of one task: a row of a recipe's `tasks`."""

    data: Annotated[str, Input("data")] = ""
    """Folder with the files of the splits (train, test) of a published set or of your own task; empty for generated
    tasks."""
    levels: tuple[int, ...] = ()
    """Allowed levels; empty: all levels of the task."""
    languages: tuple[str, ...] = ()
    """Allowed languages of generated questions; empty: all languages of the task."""
    unseen_wordings: bool = False
    """Use the wordings of generated questions that training never uses."""
    num_samples: CountOrZero = 0
    """Completions sampled per problem in an evaluation; 0: as many as the evaluation says."""
    temperature: Temperature | None = None
    """Sampling temperature in an evaluation; None: that of the evaluation."""
    max_tokens: CountOrZero = 0
    """Maximum tokens of a completion in an evaluation, which may say less; 0: as many as the evaluation says."""
    num_problems: CountOrZero = 0
    """Maximum number of test problems in an evaluation, which may say less; 0: as many as the evaluation says."""
    method: Method = "sampled"
    """How a model answers in an evaluation: "sampled" text, or, of multiple choice, the log-likelihood of the "letters"
    of the choices or of their texts ("cloze")."""
    num_shots: CountOrZero = 0
    """Solved examples before each question: the first ones of the train file, of MMLU those of the subject in the dev
    file."""
    since: str = ""
    """First date of a problem, YYYY-MM-DD, for sets with dates (LiveCodeBench); empty: no limit."""
    until: str = ""
    """Last date of a problem, YYYY-MM-DD; empty: no limit."""
    time_limit_seconds: SecondsOrZero = 0.0
    """Time limit of one test of code; 0: as published, or as the problem says. It is part of the score."""
    unsafe_code: bool = False
    """Run code that a model wrote without a sandbox where the machine has none."""
    verifier: GraderName | None = None
    """The grader, which compares answers with the reference: "text" (the default of your own task), "number", "choice",
    "strict", "latex" or "math-verify"; tasks/verify/graders.py explains them."""
    prompt: str = ""
    """Name of a published prompt of the task, such as "deepseek" or "simple-evals" (tasks/benchmarks/prompts.py), or a
    text of your own with {question}, and {choices} for multiple choice; empty: the task's default."""
    choice_seed: int | None = None
    """Shuffle the choices of every question by this seed; None keeps the order of the file (GPQA, whose file has the
    correct one first, is then shuffled by 0)."""


def default_tasks() -> dict[str, TaskConfig]:
    """Return the rows of DEFAULT_TASKS without settings."""
    return dict.fromkeys(DEFAULT_TASKS, TaskConfig())


class Problems:
    """An endless sequence of problems, read by index or as a stream whose only state is its position."""

    def __init__(self, problem_at: Callable[[int], Problem], size: int | None = None):
        """size: number of different problems, after which they repeat; None: unlimited."""
        self.problem_at, self.size = problem_at, size
        self.position = 0
        """Index of the next problem of the stream."""

    def __getitem__(self, index: int) -> Problem:
        return self.problem_at(index)

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems."""
        start, self.position = self.position, self.position + count
        return [self.problem_at(index) for index in range(start, self.position)]

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` accepts."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.position = state["position"]


class Task(Protocol):
    """A source of problems whose answers can be verified; made by `make_task` (tasks/table.py)."""

    name: str
    """Name of the row in a recipe's `tasks`."""
    cfg: TaskConfig
    """Settings of that row."""

    @property
    def chance(self) -> float | None:
        """Probability that a blind guess is correct; None if unknown."""

    @property
    def grader(self) -> str:
        """Name of the grader that compares answers with the reference (verify/graders.py); the task's name if it has
        rules of its own."""
        return self.name

    @property
    def num_samples(self) -> int:
        """Completions sampled per problem in an evaluation; 0: as many as the evaluation says."""
        return self.cfg.num_samples

    def check_files(self, split: str) -> None:
        """Raise ConfigError if a file of the split is missing."""
        return

    def problems(self, split: str, seed: int) -> Problems:
        """Return the problems of a split ("train", "test"). Raises ConfigError for files that cannot be read."""

    def prompt(self, problem: Problem) -> tuple[Sequence[Message], Sequence[Tool]]:
        """Return the messages and tools of the prompt."""
        return problem.messages, ()

    def encode(self, problem: Problem, chat: ChatFormat) -> Sequence[int]:
        """Return the prompt token ids."""
        messages, tools = self.prompt(problem)
        return chat.prompt(messages, tools)

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        """Return the final answer, by which completions of one problem are compared; None if there is none."""
        return final_answer(problem, response)

    def verify(self, problem: Problem, response: Response) -> Score:
        """Return a Score whose total is the accuracy, 0 to 1, or which is unscorable."""

    def may_hang(self, problem: Problem, response: Response) -> bool:
        """Whether `verify` must run in a process that can be killed (verify/pool.py)."""
        return False

    def verify_seconds(self, problem: Problem) -> float | None:
        """Return the longest time of `verify` in such a process; None: the pool's."""
        return None

    def prepare(self) -> None:
        """Import what `verify` needs; called in such a process before its time limit starts."""
        return

    def measures(self, problem: Problem, response: Response) -> Mapping[str, float]:
        """Return measures of a response that only this task has, by name."""
        return {}


def final_answer(problem: Problem, response: Response) -> str | None:
    """Return the final answer of a response; None if there is none or if it is too long (MAX_ANSWER_CHARACTERS).

    The length limit applies to the answer, not to the text around it.
    """
    answer = response.answer
    longest = MAX_ANSWER_CHARACTERS if len(problem.answer) <= MAX_ANSWER_CHARACTERS else 2 * len(problem.answer)
    return answer if answer is not None and len(answer) <= longest else None


def encode_prompt(chat: ChatFormat, task: Task, problem: Problem) -> tuple[int, ...]:
    """Return the prompt token ids of a problem. Training and evaluation use this function."""
    return tuple(task.encode(problem, chat))
