"""Generated problems with worked solutions: the code that all puzzle tasks share.

A puzzle task is a small state machine: a start state, a sequence of operations, and a transition function. Each line of
a worked solution repeats all it needs, so a single step is a local look-up, while the complete puzzle is too hard to
answer directly. A task's file contains only its transitions and its wordings; sampling, splitting, wording and
mistakes are in this file.

The key of a problem is the hash of its operands, independent of wording and language. The key alone decides whether the
problem belongs to the train or the test split, so no generator, seed or index can mix them.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from thinkstack.types import ConfigError, Message, Problem

SPLITS = ("train", "test")
TEST_SHARE = 8
"""One problem in this many belongs to the test split."""
UNSEEN_WORDINGS = 2
"""Number of wordings, the last ones of each task and language, that training never uses."""


@dataclass(frozen=True)
class Puzzle:
    """The operands of one problem: a start state and the operations on it."""

    start: Any
    ops: tuple[Any, ...]
    names: tuple[str, ...] = ()
    """Names in the question. They do not change the problem, so the key leaves them out."""


class PuzzleTask(Protocol):
    """Interface of a puzzle task."""

    @property
    def name(self) -> str:
        """Name in the task table."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Difficulty levels; the level is the number of operations."""

    @property
    def chance(self) -> float:
        """Probability that a blind guess is correct."""

    wordings: ClassVar[dict[str, tuple[str, ...]]]
    """Question templates by language; the fields in braces are the keys of `operands`."""

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        """Generate a random puzzle with `level` operations."""

    def advance(self, state: Any, op: Any) -> Any:
        """Return the state after one operation."""

    def other_states(self, state: Any) -> Sequence[Any]:
        """Return plausible wrong states in place of `state`."""

    def first_state(self, puzzle: Puzzle) -> Any:
        """Return the state before the first operation."""

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        """Return the operands in words or symbols, by the field names of the wordings."""

    def line(self, state: Any, op: Any, result: Any, language: str) -> str:
        """Return the text of one step, with everything that the step needs."""

    def answer(self, puzzle: Puzzle, state: Any, language: str) -> str:
        """Return the text of the answer for the final state."""


@runtime_checkable
class Verifier(Protocol):
    """Optional method of a task whose correct answers can differ in spelling from the reference."""

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is correct. It never raises, evaluates nothing, and rejects several answers."""


@runtime_checkable
class ForeignVerifier(Verifier, Protocol):
    """Optional methods of a task whose `verify` runs code of another package on the answer."""

    def may_hang(self, problem: Problem, answer: str) -> bool:
        """Whether `verify` runs that code for this answer."""

    def prepare(self) -> None:
        """Import that package."""


@runtime_checkable
class CustomKey(Protocol):
    """Optional method of a task in which puzzles with different operands can be the same problem."""

    def key(self, puzzle: Puzzle) -> str:
        """Return 16 hexadecimal digits, equal for two puzzles exactly if they are the same problem to a solver."""


@dataclass(frozen=True)
class Solution:
    """A worked solution: its lines and its final answer."""

    lines: tuple[str, ...]
    answer: str
    is_correct: bool


def digest(*parts: object) -> int:
    """Return a 64-bit hash of the text of `parts`: the only source of seeds and splits."""
    text = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def problem_key(task: PuzzleTask, puzzle: Puzzle) -> str:
    """Return the hash of the canonical problem as 16 hexadecimal digits."""
    if isinstance(task, CustomKey):
        return task.key(puzzle)
    return f"{digest(task.name, puzzle.start, *puzzle.ops):016x}"


def split_of(key: str) -> str:
    """Return the split of the problem with this key."""
    return "test" if int(key, 16) % TEST_SHARE == 0 else "train"


def generate_puzzle(task: PuzzleTask, split: str, level: int, seed: object) -> Puzzle:
    """Generate the puzzle of (task, split, level, seed), deterministically.

    Raises ConfigError for an unknown split or level, or if 1,000 attempts give no puzzle of the split.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if level not in task.levels:
        raise ConfigError(f"{task.name} has no level {level}; its levels are {', '.join(map(str, task.levels))}")
    for attempt in range(1000):
        puzzle = task.generate(random.Random(digest(task.name, split, level, seed, attempt)), level)
        if split_of(problem_key(task, puzzle)) == split:
            return puzzle
    raise ConfigError(f"{task.name} level {level} has no {split} problem in 1,000 samples; choose other levels")


def solve(task: PuzzleTask, puzzle: Puzzle, language: str, rng: random.Random | None = None) -> Solution:
    """Solve `puzzle` step by step; with `rng`, make one random step wrong and continue from its wrong result."""
    wrong_step = rng.randrange(len(puzzle.ops)) if rng else -1
    state, lines = task.first_state(puzzle), []
    for index, op in enumerate(puzzle.ops):
        result = task.advance(state, op)
        if rng and index == wrong_step:
            result = rng.choice(task.other_states(result))
        lines.append(task.line(state, op, result, language))
        state = result
    answer = task.answer(puzzle, state, language)
    return Solution(tuple(lines), answer, _is_correct(task, puzzle, language, answer))


def _is_correct(task: PuzzleTask, puzzle: Puzzle, language: str, answer: str) -> bool:
    if isinstance(task, Verifier):
        return task.verify(make_problem(task, puzzle, language, 0), answer)
    return answer == reference_answer(task, puzzle, language)


def reference_answer(task: PuzzleTask, puzzle: Puzzle, language: str) -> str:
    """Return the reference answer."""
    state = task.first_state(puzzle)
    for op in puzzle.ops:
        state = task.advance(state, op)
    return task.answer(puzzle, state, language)


def make_problem(task: PuzzleTask, puzzle: Puzzle, language: str, wording: int) -> Problem:
    """Build the Problem of `puzzle` in one language and wording. Raises ConfigError for an unknown language."""
    templates = task.wordings.get(language)
    if templates is None:
        raise ConfigError(f"{task.name} has no wording in {language!r}; it has {', '.join(task.wordings)}")
    return Problem(
        messages=(Message(role="user", content=templates[wording].format(**task.operands(puzzle, language))),),
        answer=reference_answer(task, puzzle, language),
        task=task.name,
        language=language,
        key=problem_key(task, puzzle),
        metadata={"level": len(puzzle.ops), "wording": wording},
    )


def seen_wordings(task: PuzzleTask, language: str) -> range:
    """Return indices of the wordings for training; a task with a single wording uses it for everything."""
    return range(max(len(task.wordings[language]) - UNSEEN_WORDINGS, 1))


def unseen_wordings(task: PuzzleTask, language: str) -> range:
    """Return indices of the wordings that training never uses."""
    count = len(task.wordings[language])
    return range(max(count - UNSEEN_WORDINGS, 0), count)
