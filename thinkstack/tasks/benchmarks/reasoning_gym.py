"""Data sets of the reasoning-gym package (Apache-2.0; an extra) as tasks named gym/NAME, for example gym/chain_sum.

Three properties of the package are worked around:

- It generates item i of a data set from seed + i, so neighboring seeds share nearly all items. Here each problem is a
  data set of one item, whose seed comes from `digest`.
- Its scorers give partial credit for substrings. Here only a score of exactly 1.0 counts, and text that is too long
  for a single answer is rejected before scoring.
- Some scorers evaluate the model's output as code. They are never called; the answer is compared with the reference.
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
from thinkstack.tasks.verify.answers import parse_number, strip_answer
from thinkstack.types import ConfigError, Problem

PREFIX = "gym/"
EVALUATION_CALLS = ("eval(", "exec(", "parse_expr", "sympify")
"""If the module of a data set contains one of these strings, its scorer is not called."""
EXCLUDED = {
    "boxnet": "it cannot be created with its default settings",
    "composite": "it is a mixture; name the data sets it combines",
    "coin_flip": "nearly all its answers are the same",
    "game_of_life_halting": "nearly all its answers are the same",
}
CHANCE_SAMPLES = 48
"""Number of problems from which `chance` is measured."""


def import_reasoning_gym() -> Any:
    """Return the reasoning_gym module. Raises ConfigError if it is not installed."""
    try:
        import reasoning_gym
    except ImportError as error:
        way_out = "pip install 'thinkstack[gym]', or choose tasks without the prefix gym/"
        raise ConfigError(f"tasks called gym/... need the package reasoning-gym ({error}); {way_out}") from error
    return reasoning_gym


@cache
def puzzle_task(name: str) -> "ReasoningGymTask":
    """Return the task `name`, which starts with gym/. Raises ConfigError if there is no usable data set of that
    name."""
    return ReasoningGymTask(name)


class ReasoningGymTask:
    """A data set of reasoning-gym: questions and a verifier, no worked solutions (`line` raises ConfigError).

    The level is a step of the data set's curriculum. The key is the seed of the item followed by a hash of its
    question. Only the hash decides the split, so a question is never in both splits; the seed regenerates the item.
    """

    wordings: ClassVar[dict[str, tuple[str, ...]]] = {"en": ("{question}",)}

    def __init__(self, name: str):
        self.name, self.data_set = name, name.removeprefix(PREFIX)
        available = sorted(set(import_reasoning_gym().factory.DATASETS) - set(EXCLUDED))
        if self.data_set in EXCLUDED:
            raise ConfigError(f"{name} is excluded: {EXCLUDED[self.data_set]}")
        if self.data_set not in available:
            raise ConfigError(f"unknown task {name!r}{did_you_mean(self.data_set, available)}")
        self.levels: tuple[int, ...] = (1, 2, 3) if self.data_set in import_reasoning_gym().factory.CURRICULA else (1,)
        self._check_usable()

    def _check_usable(self) -> None:
        """Raise ConfigError unless generation is deterministic and yields a reference answer."""
        items = [self._make_item(1, 1)[1] for _ in range(2)]
        if items[0]["question"] != items[1]["question"] or items[0]["answer"] != items[1]["answer"]:
            raise ConfigError(f"{self.name} cannot be used: the same seed generates different problems")
        if not isinstance(items[0]["answer"], str) or not items[0]["answer"].strip():
            raise ConfigError(f"{self.name} cannot be used: it has no reference answer")

    def _make_item(self, level: int, seed: int) -> tuple[Any, dict[str, Any]]:
        """Return a data set of one item, and that item."""
        factory, settings = import_reasoning_gym().factory, {"seed": seed, "size": 1}
        if self.data_set in factory.CURRICULA:
            curriculum = factory.create_curriculum(self.data_set)
            curriculum.set_global_level(level - 1)
            settings = vars(curriculum.generate_configuration(settings))
        dataset = factory.create_dataset(self.data_set, **settings)
        return dataset, dataset[0]

    @cached_property
    def evaluates_answers(self) -> bool:
        """Whether the module of the data set evaluates text as code or as a formula."""
        source = inspect.getsource(sys.modules[import_reasoning_gym().factory.DATASETS[self.data_set][0].__module__])
        return any(word in source for word in EVALUATION_CALLS)

    @cached_property
    def chance(self) -> float:
        """Mean over levels of the share of the most common answer; measured, since the package does not state it."""
        answers = {level: Counter[str]() for level in self.levels}
        for seed in range(CHANCE_SAMPLES):
            level = self.levels[seed % len(self.levels)]
            answers[level][self._make_item(level, digest("chance", seed) % 2**32)[1]["answer"]] += 1
        shares = [counts.most_common(1)[0][1] / counts.total() for counts in answers.values()]
        return sum(shares) / len(shares) if max(shares) > 1.5 * len(self.levels) / CHANCE_SAMPLES else 0.0

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        seed = rng.getrandbits(32)
        item = self._make_item(level, seed)[1]
        return Puzzle((seed, item["question"], str(item["answer"])), (None,) * level)

    def key(self, puzzle: Puzzle) -> str:
        seed, question, _ = puzzle.start
        return f"{seed:08x}{digest(self.name, question) & 0xFFFFFFFF:08x}"

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the answer equals the reference, or is short enough and scores exactly 1.0 in the package."""
        if not self.may_hang(problem, answer):
            return strip_answer(answer) == strip_answer(problem.answer)
        dataset, item = _remake_item(self.name, problem.level, int(problem.key[:8], 16))
        if item["question"] != problem.question:
            raise ConfigError(
                f"{self.name} generates another question for {problem.key}; use the package version that generated it"
            )
        try:
            return bool(dataset.score_answer(strip_answer(answer), item) == 1.0)
        except Exception:  # the package's scorers parse model output; an answer that makes one fail is wrong
            return False

    def may_hang(self, problem: Problem, answer: str) -> bool:
        """Whether the package's scorer is called: not for the reference itself, nor for answers that are too long."""
        is_reference = strip_answer(answer) == strip_answer(problem.answer)
        return not is_reference and not self.evaluates_answers and _is_short_enough(problem.answer, answer)

    def prepare(self) -> None:
        import_reasoning_gym()

    def first_state(self, puzzle: Puzzle) -> str:
        return puzzle.start[2]

    def advance(self, state: str, op: None) -> str:
        return state

    def other_states(self, state: str) -> Sequence[str]:
        raise self._no_solutions()

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"question": puzzle.start[1]}

    def line(self, state: str, op: None, result: str, language: str) -> str:
        raise self._no_solutions()

    def answer(self, puzzle: Puzzle, state: str, language: str) -> str:
        return state

    def _no_solutions(self) -> ConfigError:
        return ConfigError(f"{self.name} has no worked solutions; use it for RL or evaluation, not in a corpus")


@lru_cache(maxsize=512)
def _remake_item(name: str, level: int, seed: int) -> tuple[Any, dict[str, Any]]:
    return puzzle_task(name)._make_item(level, seed)


def _is_short_enough(reference: str, answer: str) -> bool:
    """Whether `answer` can be a single answer: a number if the reference is one, no more lines than the reference, and
    at most twice its words and twice its characters (8 characters are always allowed)."""
    if parse_number(reference) is not None and parse_number(answer) is None:
        return False
    lines, words = len(answer.strip().split("\n")), len(answer.split())
    length, most = len("".join(answer.split())), 2 * len("".join(reference.split()))
    return lines <= len(reference.split("\n")) and words <= 2 * len(reference.split()) and length <= max(most, 8)
