"""Generated problems with worked solutions: what every family shares.

A family is a small state machine: a start state, a sequence of operations, and a rule that carries the state through
them. Each worked line repeats what it needs, so a step is a local look-up, while the whole lies beyond a direct answer.
A family file holds only its rule and its words; drawing, splitting, wording and mistakes live here.

A problem is identified by the hash of its operands, whatever its wording or language; the hash alone decides whether it
belongs to training or to test, so no generator, seed or index can mix the two.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from thinkstack.types import ConfigError, Problem

SPLITS = ("train", "test")
TEST_SHARE = 8
"""One problem in this many belongs to test."""
UNSEEN_WORDINGS = 2
"""The last wordings of each family and language are never trained on."""


@dataclass(frozen=True)
class Puzzle:
    """The operands of one problem: a start state and the operations on it."""

    start: Any
    ops: tuple[Any, ...]
    names: tuple[str, ...] = ()
    """What the question calls things; other names make the same problem, so the key leaves them out."""


class PuzzleTask(Protocol):
    """What a family file defines."""

    @property
    def name(self) -> str:
        """Name in the task table."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Difficulties; the level is the number of operations."""

    @property
    def chance(self) -> float:
        """Probability of a blind guess being right."""

    wordings: ClassVar[dict[str, tuple[str, ...]]]
    """Per language, templates of the question; names in braces stand for what `parts` gives."""

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        """A random puzzle with `level` operations."""

    def advance(self, state: Any, op: Any) -> Any:
        """The state after one operation."""

    def other_states(self, state: Any) -> Sequence[Any]:
        """States a careless solver could have written instead of `state`."""

    def first_state(self, puzzle: Puzzle) -> Any:
        """The state before the first operation."""

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        """The operands in words or symbols, by the names that the wordings use."""

    def line(self, state: Any, op: Any, result: Any, language: str) -> str:
        """One worked step, with everything it needs repeated."""

    def answer(self, puzzle: Puzzle, state: Any, language: str) -> str:
        """The final state as the answer is written."""


@runtime_checkable
class Verifier(Protocol):
    """What a family adds when an answer can be right without being spelt like the reference."""

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is right. Strict: it never raises, evaluates nothing, and refuses more than one answer."""


@runtime_checkable
class Keyed(Protocol):
    """What a family adds when puzzles with other operands can be the same problem."""

    def key(self, puzzle: Puzzle) -> str:
        """16 hexadecimal digits that are the same for two puzzles exactly when a solver would see the same problem."""


@dataclass(frozen=True)
class Working:
    """A worked solution: its lines and the answer it arrives at."""

    lines: tuple[str, ...]
    answer: str
    is_right: bool


def digest(*parts: object) -> int:
    """A 64-bit number from the text of `parts`: the only source of seeds and splits."""
    text = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def key_of(task: PuzzleTask, puzzle: Puzzle) -> str:
    """Hash of the canonical problem as 16 hexadecimal digits."""
    if isinstance(task, Keyed):
        return task.key(puzzle)
    return f"{digest(task.name, puzzle.start, *puzzle.ops):016x}"


def split_of(key: str) -> str:
    """The split that a problem with this key belongs to."""
    return "test" if int(key, 16) % TEST_SHARE == 0 else "train"


def generate_puzzle(task: PuzzleTask, split: str, level: int, seed: object) -> Puzzle:
    """The puzzle that (family, split, level, seed) names; always the same one."""
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if level not in task.levels:
        raise ConfigError(f"{task.name} has no level {level}; its levels are {', '.join(map(str, task.levels))}")
    for attempt in range(1000):
        puzzle = task.generate(random.Random(digest(task.name, split, level, seed, attempt)), level)
        if split_of(key_of(task, puzzle)) == split:
            return puzzle
    raise ConfigError(f"{task.name} level {level} has no {split} problem in 1,000 draws; ask for other levels")


def work(task: PuzzleTask, puzzle: Puzzle, language: str, rng: random.Random | None = None) -> Working:
    """Solve `puzzle` step by step; with `rng`, make one wrong step at a random place and carry the error on."""
    wrong_step = rng.randrange(len(puzzle.ops)) if rng else -1
    state, lines = task.first_state(puzzle), []
    for index, op in enumerate(puzzle.ops):
        result = task.advance(state, op)
        if rng and index == wrong_step:
            result = rng.choice(task.other_states(result))
        lines.append(task.line(state, op, result, language))
        state = result
    answer = task.answer(puzzle, state, language)
    return Working(tuple(lines), answer, _is_right(task, puzzle, language, answer))


def _is_right(task: PuzzleTask, puzzle: Puzzle, language: str, answer: str) -> bool:
    if isinstance(task, Verifier):
        return task.verify(pose(task, puzzle, language, 0), answer)
    return answer == right_answer(task, puzzle, language)


def right_answer(task: PuzzleTask, puzzle: Puzzle, language: str) -> str:
    """The reference answer."""
    state = task.first_state(puzzle)
    for op in puzzle.ops:
        state = task.advance(state, op)
    return task.answer(puzzle, state, language)


def pose(task: PuzzleTask, puzzle: Puzzle, language: str, wording: int) -> Problem:
    """Put `puzzle` into words."""
    templates = task.wordings.get(language)
    if templates is None:
        raise ConfigError(f"{task.name} has no wording in {language!r}; it speaks {', '.join(task.wordings)}")
    return Problem(
        question=templates[wording].format(**task.parts(puzzle, language)),
        answer=right_answer(task, puzzle, language),
        task=task.name,
        language=language,
        level=len(puzzle.ops),
        key=key_of(task, puzzle),
        wording=wording,
    )


def seen_wordings(task: PuzzleTask, language: str) -> range:
    """Indices of the wordings that training may use; the only wording of a foreign family is used for everything."""
    return range(max(len(task.wordings[language]) - UNSEEN_WORDINGS, 1))


def unseen_wordings(task: PuzzleTask, language: str) -> range:
    """Indices of the wordings that training never uses."""
    count = len(task.wordings[language])
    return range(max(count - UNSEEN_WORDINGS, 0), count)
