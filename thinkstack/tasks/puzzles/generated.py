"""Puzzle tasks as tasks: problems by index, verification, and the measure of worked solutions."""

import copy
import random
from collections.abc import Mapping, Sequence
from functools import partial

from thinkstack.tasks.puzzles import puzzle as puzzles
from thinkstack.tasks.puzzles.puzzle import ForeignVerifier, PuzzleTask, Verifier, digest
from thinkstack.tasks.task import Problems, Task, TaskConfig, final_answer
from thinkstack.tasks.verify.answers import is_correct
from thinkstack.types import ConfigError, Problem, Response, Score


class GeneratedTask(Task):
    """A puzzle task with the settings of a row of a recipe."""

    def __init__(self, puzzle: PuzzleTask, cfg: TaskConfig):
        """Raises ConfigError if the puzzle has none of the levels or languages of `cfg`."""
        self.name, self.cfg, self.puzzle = puzzle.name, cfg, restrict(puzzle, cfg)
        self.verifier = self.puzzle if isinstance(self.puzzle, Verifier) else None
        self.foreign = self.puzzle if isinstance(self.puzzle, ForeignVerifier) else None

    @property
    def chance(self) -> float:
        return self.puzzle.chance

    def problems(self, split: str, seed: int) -> Problems:
        return Problems(partial(self.generate, split, seed))

    def generate(self, split: str, seed: int, index: int) -> Problem:
        """Generate problem `index`: level, language and wording are sampled.

        Raises ConfigError for an unknown split.
        """
        rng = random.Random(digest("problem", seed, split, index))
        puzzle = puzzles.generate_puzzle(self.puzzle, split, rng.choice(self.puzzle.levels), ("problem", seed, index))
        language = rng.choice(tuple(self.puzzle.wordings))
        wordings = puzzles.unseen_wordings if self.cfg.unseen_wordings else puzzles.seen_wordings
        return puzzles.make_problem(self.puzzle, puzzle, language, rng.choice(wordings(self.puzzle, language)))

    def verify(self, problem: Problem, response: Response) -> Score:
        """Compare the answer by the puzzle's own rule, if it has one, or up to `normalize`."""
        answer = final_answer(problem, response)
        if answer is not None and self.verifier is not None:
            return Score(total=float(self.verifier.verify(problem, answer)))
        return Score(total=float(is_correct(problem.answer, answer)))

    def may_hang(self, problem: Problem, response: Response) -> bool:
        if self.foreign is None or (answer := final_answer(problem, response)) is None:
            return False
        return self.foreign.may_hang(problem, answer)

    def prepare(self) -> None:
        if self.foreign is not None:
            self.foreign.prepare()

    def measures(self, problem: Problem, response: Response) -> Mapping[str, float]:
        """Return `worked`: whether the thinking contains worked steps; nothing for puzzles of another package."""
        if self.foreign is not None:
            return {}
        return {"worked": float(is_worked(problem, response.thinking))}


def restrict(puzzle: PuzzleTask, cfg: TaskConfig) -> PuzzleTask:
    """Return a copy of a puzzle task with only the levels and languages of `cfg`. Raises ConfigError if none is
    left."""
    levels = tuple(level for level in puzzle.levels if not cfg.levels or level in cfg.levels)
    if not levels:
        known = ", ".join(map(str, puzzle.levels))
        raise ConfigError(f"{puzzle.name} has none of the levels {list(cfg.levels)}; its levels are {known}")
    wordings = {name: part for name, part in puzzle.wordings.items() if not cfg.languages or name in cfg.languages}
    if not wordings:
        raise ConfigError(
            f"{puzzle.name} has none of the languages {list(cfg.languages)}; it has {list(puzzle.wordings)}"
        )
    restricted = copy.copy(puzzle)
    vars(restricted).update(levels=levels, wordings=wordings)
    return restricted


def alternate(tasks: Sequence[Task], split: str, seed: int) -> Problems:
    """Return the problems of several generated tasks in turn: problem i is problem i of task i modulo their number."""
    parts = [task.problems(split, seed) for task in tasks]
    return Problems(lambda index: parts[index % len(parts)][index])


def is_worked(problem: Problem, thinking: str) -> bool:
    """Whether the thinking contains worked steps: at least max(1, level - 1) of its lines contain "=" or ">".

    A worked solution has one step per line, "... = result" or "...>result", and the level is the number of steps. One
    step may be missing, since the last step may be the answer itself; lines without a step do not count.
    """
    steps = sum("=" in line or ">" in line for line in thinking.split("\n"))
    return steps >= max(1, problem.level - 1)
