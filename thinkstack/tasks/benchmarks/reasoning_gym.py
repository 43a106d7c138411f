"""Problems of the reasoning-gym package (Apache-2.0; an extra) as families called gym/NAME, for example gym/chain_sum.

Three habits of the package are kept out. Item i of a data set is drawn from seed + i, so neighboring seeds share
nearly all items: here each problem has a data set of one item, whose seed comes from our digest. Its scorers give
partial credit for substrings: here only exactly 1.0 counts, and an answer that holds more than an answer is refused
first. Some of its scorers evaluate what the model wrote: those are not called, the reference is compared instead.
"""

import inspect
import random
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from typing import Any, ClassVar

from thinkstack.config import did_you_mean
from thinkstack.tasks.puzzles.puzzle import Puzzle, digest
from thinkstack.tasks.verify.answers import clean, number_of
from thinkstack.types import ConfigError, Problem

PREFIX = "gym/"
EVALUATING = ("eval(", "exec(", "parse_expr", "sympify")
"""A data set whose module holds one of these is judged by its reference alone."""
LEFT_OUT = {
    "boxnet": "it cannot be made with its default settings",
    "composite": "it is a mixture; name its parts",
    "coin_flip": "its answer is nearly always the same",
    "game_of_life_halting": "its answer is nearly always the same",
}
PROBES = 48
"""Problems from which the chance of a blind guess is measured."""


def package() -> Any:
    """The reasoning_gym module. Raises ConfigError if it is not installed."""
    try:
        import reasoning_gym
    except ImportError as error:
        way_out = "pip install 'thinkstack[gym]', or choose families without the prefix gym/"
        raise ConfigError(f"tasks called gym/... need the package reasoning-gym ({error}); {way_out}") from error
    return reasoning_gym


@cache
def puzzle_task(name: str) -> "ReasoningGymTask":
    """The family called `name`, which starts with gym/. Raises ConfigError if there is no such data set to be used."""
    return ReasoningGymTask(name)


class ReasoningGymTask:
    """A data set of reasoning-gym. It has questions and a checker, but no worked solutions: `line` refuses.

    A level is a step of the data set's curriculum. The key is the seed of the item, then a hash of its question, which
    alone decides the split: the same question is never in both, and the item can be made again from the key.
    """

    wordings: ClassVar[dict[str, tuple[str, ...]]] = {"en": ("{question}",)}

    def __init__(self, name: str):
        self.name, self.data_set = name, name.removeprefix(PREFIX)
        known = sorted(set(package().factory.BENCHMARKS) - set(LEFT_OUT))
        if self.data_set in LEFT_OUT:
            raise ConfigError(f"{name} is left out: {LEFT_OUT[self.data_set]}")
        if self.data_set not in known:
            raise ConfigError(f"unknown task {name!r}{did_you_mean(self.data_set, known)}")
        self.levels: tuple[int, ...] = (1, 2, 3) if self.data_set in package().factory.CURRICULA else (1,)
        self._refuse_unusable()

    def _refuse_unusable(self) -> None:
        """Two items made alike must be alike, and have a reference that its own scorer finds right."""
        items = [self._make(1, 1)[1] for _ in range(2)]
        if items[0]["question"] != items[1]["question"] or items[0]["answer"] != items[1]["answer"]:
            raise ConfigError(f"{self.name} cannot be used: it draws other problems from the same seed")
        if not isinstance(items[0]["answer"], str) or not items[0]["answer"].strip():
            raise ConfigError(f"{self.name} cannot be used: it gives no reference answer")

    def _make(self, level: int, seed: int) -> tuple[Any, dict[str, Any]]:
        """A data set of one item, and that item."""
        factory, settings = package().factory, {"seed": seed, "size": 1}
        if self.data_set in factory.CURRICULA:
            curriculum = factory.create_curriculum(self.data_set)
            curriculum.set_global_level(level - 1)
            settings = vars(curriculum.generate_configuration(settings))
        made = factory.create_dataset(self.data_set, **settings)
        return made, made[0]

    @cached_property
    def is_evaluating(self) -> bool:
        """Whether the module of the data set runs text as code or as a formula somewhere."""
        source = inspect.getsource(sys.modules[package().factory.BENCHMARKS[self.data_set][0].__module__])
        return any(word in source for word in EVALUATING)

    @cached_property
    def chance(self) -> float:
        """Share of the commonest answer at a level, over levels; measured, for the package states none."""
        answers = {level: Counter[str]() for level in self.levels}
        for seed in range(PROBES):
            level = self.levels[seed % len(self.levels)]
            answers[level][self._make(level, digest("chance", seed) % 2**32)[1]["answer"]] += 1
        shares = [counts.most_common(1)[0][1] / counts.total() for counts in answers.values()]
        return sum(shares) / len(shares) if max(shares) > 1.5 * len(self.levels) / PROBES else 0.0

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        seed = rng.getrandbits(32)
        item = self._make(level, seed)[1]
        return Puzzle((seed, item["question"], str(item["answer"])), (None,) * level)

    def key(self, puzzle: Puzzle) -> str:
        seed, question, _ = puzzle.start
        return f"{seed:08x}{digest(self.name, question) & 0xFFFFFFFF:08x}"

    def verify(self, problem: Problem, answer: str) -> bool:
        """Spelt like the reference, or exactly 1.0 by the package and no longer than an answer."""
        if clean(answer) == clean(problem.answer):
            return True
        if self.is_evaluating or not _is_as_short(problem.answer, answer):
            return False
        made, item = _made_again(self, problem.level, int(problem.key[:8], 16))
        if item["question"] != problem.question:
            raise ConfigError(
                f"{self.name} gives another question for {problem.key}; use the version it was drawn with"
            )
        try:
            return bool(made.score_answer(clean(answer), item) == 1.0)
        except Exception:  # foreign scorers parse what a model wrote; one that fails on it has not found it right
            return False

    def first_state(self, puzzle: Puzzle) -> str:
        return puzzle.start[2]

    def advance(self, state: str, op: None) -> str:
        return state

    def other_states(self, state: str) -> Sequence[str]:
        raise self._unworked()

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"question": puzzle.start[1]}

    def line(self, state: str, op: None, result: str, language: str) -> str:
        raise self._unworked()

    def answer(self, puzzle: Puzzle, state: str, language: str) -> str:
        return state

    def _unworked(self) -> ConfigError:
        return ConfigError(f"{self.name} has no worked solutions; use it for RL or evaluation, not in a corpus")


@lru_cache(maxsize=512)
def _made_again(of: ReasoningGymTask, level: int, seed: int) -> tuple[Any, dict[str, Any]]:
    return of._make(level, seed)


def _is_as_short(reference: str, answer: str) -> bool:
    """Whether `answer` could be one answer of the kind of the reference: a number for a number, no more words or lines,
    and at most twice the characters."""
    if number_of(reference) is not None and number_of(answer) is None:
        return False
    lines, words = len(answer.strip().split("\n")), len(answer.split())
    length, most = len("".join(answer.split())), 2 * len("".join(reference.split()))
    return lines <= len(reference.split("\n")) and words <= 2 * len(reference.split()) and length <= max(most, 8)
