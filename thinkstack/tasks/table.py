"""The task families by name, and problems drawn from several of them.

A problem is a function of (families, split, seed, index): a stream of them has no state but its position, and two runs
that ask for the same indices ask the same questions.
"""

import random
from collections.abc import Sequence
from typing import Any

from thinkstack.config import did_you_mean
from thinkstack.tasks.benchmarks import reasoning_gym as gym
from thinkstack.tasks.benchmarks.datasets import Benchmark, Gsm8k, Math
from thinkstack.tasks.puzzles import puzzle as puzzles
from thinkstack.tasks.puzzles.arithmetic import Chain, Nested
from thinkstack.tasks.puzzles.choice import Choice
from thinkstack.tasks.puzzles.cups import Cups
from thinkstack.tasks.puzzles.kin import Kin
from thinkstack.tasks.puzzles.kinship import Kinship
from thinkstack.tasks.puzzles.modular import Modular
from thinkstack.tasks.puzzles.programs import Bug, Program
from thinkstack.tasks.puzzles.puzzle import PuzzleTask, Verifier, digest
from thinkstack.tasks.puzzles.quadratic import Quadratic
from thinkstack.tasks.puzzles.sums import Sums, Times
from thinkstack.tasks.puzzles.table_lookup import Table
from thinkstack.tasks.verify.answers import is_correct
from thinkstack.types import ConfigError, Problem

PUZZLES: dict[str, PuzzleTask] = {
    "chain": Chain(),
    "nested": Nested(),
    "cups": Cups(),
    "kinship": Kinship(),
    "modular": Modular(),
    "quadratic": Quadratic(),
    "kin": Kin(),
    "table": Table(),
    "program": Program(),
    "bug": Bug(),
    "choice": Choice(),
    "sums": Sums(),
    "times": Times(),
}

BENCHMARKS: dict[str, Benchmark] = {"gsm8k": Gsm8k(), "math": Math()}
"""Published problems, read from a file that the user has."""
TASKS: dict[str, object] = {**PUZZLES, **BENCHMARKS}


def puzzle_tasks(names: Sequence[str]) -> list[PuzzleTask]:
    """The families called `names`, in that order; gym/NAME is a data set of reasoning-gym.

    Raises ConfigError for an unknown name, for none at all, or if a package that a name needs is not installed.
    """
    if not names:
        raise ConfigError(f"no task is named; choose from {', '.join(PUZZLES)}")
    return [_puzzle_task(name) for name in names]


def _puzzle_task(name: str) -> PuzzleTask:
    if name.startswith(gym.PREFIX):
        return gym.puzzle_task(name)
    if name not in PUZZLES:
        raise ConfigError(f"unknown task {name!r}{did_you_mean(name, PUZZLES)}")
    return PUZZLES[name]


def verify(problem: Problem, answer: str | None) -> bool:
    """Whether `answer` is right by the rule of the problem's task; no answer is wrong.

    A family or data set that is Judging decides itself; all others, tasks outside the tables included, are compared
    strictly.
    """
    if answer is None:
        return False
    task = gym.puzzle_task(problem.task) if problem.task.startswith(gym.PREFIX) else TASKS.get(problem.task)
    if isinstance(task, Verifier):
        return task.verify(problem, answer)
    return is_correct(problem.answer, answer)


def problem_at(
    tasks: Sequence[PuzzleTask],
    split: str,
    seed: int,
    index: int,
    levels: Sequence[int] | None = None,
    unseen_wordings: bool = False,
    languages: Sequence[str] = (),
) -> Problem:
    """Problem `index` of the stream that the other arguments name.

    Families take turns by index; level, language and wording are drawn. levels: allowed difficulties, of which a family
    uses those it has; None allows all. unseen_wordings: use the wordings that training never uses. languages: those
    that may be used; () allows all.
    Raises ConfigError for an unknown split, or if a family has none of the levels or languages.
    """
    task = tasks[index % len(tasks)]
    allowed = [level for level in task.levels if levels is None or level in levels]
    if not allowed:
        known = ", ".join(map(str, task.levels))
        raise ConfigError(f"{task.name} has none of the levels {list(levels or ())}; its levels are {known}")
    rng = random.Random(digest("problem", seed, split, index))
    puzzle = puzzles.generate_puzzle(task, split, rng.choice(allowed), ("problem", seed, index))
    spoken = tuple(language for language in task.wordings if not languages or language in languages)
    if not spoken:
        raise ConfigError(f"{task.name} has none of the languages {list(languages)}; it has {list(task.wordings)}")
    language = rng.choice(spoken)
    wordings = puzzles.unseen_wordings if unseen_wordings else puzzles.seen_wordings
    return puzzles.pose(task, puzzle, language, rng.choice(wordings(task, language)))


def problems(
    tasks: Sequence[PuzzleTask],
    split: str,
    seed: int,
    count: int,
    levels: Sequence[int] | None = None,
    unseen_wordings: bool = False,
    languages: Sequence[str] = (),
) -> list[Problem]:
    """The first `count` problems of a stream; arguments as in `problem_at`."""
    return [problem_at(tasks, split, seed, index, levels, unseen_wordings, languages) for index in range(count)]


class ProblemStream:
    """Problems 0, 1, 2, ... of one stream. Its state is its position and nothing else."""

    def __init__(
        self,
        tasks: Sequence[PuzzleTask],
        split: str,
        seed: int,
        levels: Sequence[int] | None = None,
        unseen_wordings: bool = False,
        languages: Sequence[str] = (),
    ):
        """Arguments as in `problem_at`."""
        self.tasks, self.split, self.seed = list(tasks), split, seed
        self.levels, self.unseen_wordings, self.languages = levels, unseen_wordings, languages
        self.position = 0
        """Index of the next problem."""

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        start, self.position = self.position, self.position + count
        return [
            problem_at(self.tasks, self.split, self.seed, index, self.levels, self.unseen_wordings, self.languages)
            for index in range(start, self.position)
        ]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.position = state["position"]
