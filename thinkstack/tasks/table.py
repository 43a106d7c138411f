"""The tasks by name, and sampling of problems from several tasks.

A problem is a function of (tasks, split, seed, index): the only state of a stream is its position, and two runs that
use the same indices get the same questions.
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
"""Published benchmarks, read from local files."""
TASKS: dict[str, object] = {**PUZZLES, **BENCHMARKS}


def puzzle_tasks(names: Sequence[str]) -> list[PuzzleTask]:
    """Return the puzzle tasks called `names`, in that order; gym/NAME is a data set of reasoning-gym.

    Raises ConfigError for an unknown name, for an empty list, or if a name needs a package that is not installed.
    """
    if not names:
        raise ConfigError(f"no task is given; choose from {', '.join(PUZZLES)}")
    return [_puzzle_task(name) for name in names]


def _puzzle_task(name: str) -> PuzzleTask:
    if name.startswith(gym.PREFIX):
        return gym.puzzle_task(name)
    if name not in PUZZLES:
        raise ConfigError(f"unknown task {name!r}{did_you_mean(name, PUZZLES)}")
    return PUZZLES[name]


def verify(problem: Problem, answer: str | None) -> bool:
    """Whether `answer` is correct for the problem's task; None is wrong.

    A task that is a Verifier verifies the answer itself. For any other task, including tasks outside the tables, the
    answer must equal the reference up to `normalize`.
    """
    if answer is None:
        return False
    task = gym.puzzle_task(problem.task) if problem.task.startswith(gym.PREFIX) else TASKS.get(problem.task)
    if isinstance(task, Verifier):
        return task.verify(problem, answer)
    return is_correct(problem.answer, answer)


def generate_problem(
    tasks: Sequence[PuzzleTask],
    split: str,
    seed: int,
    index: int,
    levels: Sequence[int] | None = None,
    unseen_wordings: bool = False,
    languages: Sequence[str] = (),
) -> Problem:
    """Generate problem `index` of the stream that the other arguments define.

    Tasks alternate by index; level, language and wording are sampled. levels: allowed levels; each task uses the ones
    that it has; None allows all. unseen_wordings: use the wordings that training never uses. languages: allowed
    languages; () allows all.
    Raises ConfigError for an unknown split, or if a task has none of the levels or languages.
    """
    task = tasks[index % len(tasks)]
    allowed = [level for level in task.levels if levels is None or level in levels]
    if not allowed:
        known = ", ".join(map(str, task.levels))
        raise ConfigError(f"{task.name} has none of the levels {list(levels or ())}; its levels are {known}")
    rng = random.Random(digest("problem", seed, split, index))
    puzzle = puzzles.generate_puzzle(task, split, rng.choice(allowed), ("problem", seed, index))
    allowed_languages = tuple(language for language in task.wordings if not languages or language in languages)
    if not allowed_languages:
        raise ConfigError(f"{task.name} has none of the languages {list(languages)}; it has {list(task.wordings)}")
    language = rng.choice(allowed_languages)
    wordings = puzzles.unseen_wordings if unseen_wordings else puzzles.seen_wordings
    return puzzles.make_problem(task, puzzle, language, rng.choice(wordings(task, language)))


def problems(
    tasks: Sequence[PuzzleTask],
    split: str,
    seed: int,
    count: int,
    levels: Sequence[int] | None = None,
    unseen_wordings: bool = False,
    languages: Sequence[str] = (),
) -> list[Problem]:
    """Return the first `count` problems of a stream; arguments as in `generate_problem`."""
    return [generate_problem(tasks, split, seed, index, levels, unseen_wordings, languages) for index in range(count)]


class ProblemStream:
    """Problems 0, 1, 2, ... of one stream. Its only state is its position."""

    def __init__(
        self,
        tasks: Sequence[PuzzleTask],
        split: str,
        seed: int,
        levels: Sequence[int] | None = None,
        unseen_wordings: bool = False,
        languages: Sequence[str] = (),
    ):
        """Arguments as in `generate_problem`."""
        self.tasks, self.split, self.seed = list(tasks), split, seed
        self.levels, self.unseen_wordings, self.languages = levels, unseen_wordings, languages
        self.position = 0
        """Index of the next problem."""

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems."""
        start, self.position = self.position, self.position + count
        return [
            generate_problem(
                self.tasks, self.split, self.seed, index, self.levels, self.unseen_wordings, self.languages
            )
            for index in range(start, self.position)
        ]

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` accepts."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.position = state["position"]
