"""Retrieval from a long context: one needle, and one of many keys. Generated, so no text can be contaminated.

Source: needle in a haystack (Kamradt, 2023), multi-key retrieval of RULER (arXiv:2404.06654).
"""

import random
import re
from collections.abc import Callable

from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.task import Problems, Task, TaskConfig, final_answer
from thinkstack.types import ConfigError, Message, Problem, Response, Score

WORDS_PER_LEVEL = 256
"""Words of the context for each level; about 1.3 tokens each in English."""
DEPTHS = 11
"""Places of the needle, from the start of the context (0) to its end (10)."""
_SUBJECTS = (
    "the baker|a farmer|the old clock|my neighbor|the river|a student|the train|the garden|her cousin|the teacher"
)
_VERBS = "waited for|passed by|remembered|looked after|talked about|returned to|left|described|painted|found"
_OBJECTS = "the market|a small boat|the winter|an empty street|the letter|a quiet morning|the mountain|some bread"
_NAMES = (
    "amber birch cedar coral crimson ember fern granite harbor indigo ivory jade lunar maple marble meadow olive "
    "onyx opal pearl pine quartz raven river ruby saffron silver slate stone summer sunset teal timber tulip velvet "
    "violet walnut willow winter zinc"
)


def filler(rng: random.Random) -> str:
    """Return a sentence that has nothing to do with the question."""
    parts = [rng.choice(part.split("|")) for part in (_SUBJECTS, _VERBS, _OBJECTS)]
    return f"{' '.join(parts).capitalize()}."


class RetrievalTask(Task):
    """A number is hidden in a text; the level is the length of the text in units of WORDS_PER_LEVEL.

    The places of the needles are spread evenly over DEPTHS by the number of the problem; metadata has depth, 0 to 1.
    """

    num_keys = 1
    """Keys with values in the text, one of which is asked for."""

    def __init__(self, name: str, cfg: TaskConfig):
        self.name, self.cfg = name, cfg
        if any(level < 1 for level in cfg.levels):
            raise ConfigError(f"tasks.{name}.levels={list(cfg.levels)}: levels are at least 1")
        if set(cfg.languages) - {"en"}:
            raise ConfigError(f"tasks.{name}.languages={list(cfg.languages)}: {name} is English; leave it out")
        if cfg.unseen_wordings:
            raise ConfigError(f"tasks.{name}.unseen_wordings=true has no effect: {name} has one wording; leave it out")

    @property
    def chance(self) -> float:
        return 1 / self.num_keys if self.num_keys > 1 else 0.0

    def problems(self, split: str, seed: int) -> Problems:
        levels = self.cfg.levels or (1, 2, 4, 8)

        def problem_at(index: int) -> Problem:
            depth = (index // len(levels)) % DEPTHS / (DEPTHS - 1)
            return self.make(levels[index % len(levels)], depth, digest(self.name, split, seed, index))

        return Problems(problem_at)

    def make(self, level: int, depth: float, seed: int) -> Problem:
        """Return the problem of a level with its needle at `depth`, 0 (start) to 1 (end)."""
        rng = random.Random(seed)
        pairs = list(zip(self._keys(rng), rng.sample(range(1_000_000, 10_000_000), self.num_keys), strict=True))
        asked, value = pairs[0]
        sentences: list[str] = []
        num_words, needles = 0, [f"The secret number of {key} is {number}." for key, number in pairs]
        while num_words < level * WORDS_PER_LEVEL - 7 * len(needles):
            sentences.append(filler(rng))
            num_words += len(sentences[-1].split())
        size = len(sentences)
        for needle in needles[1:]:
            sentences.insert(rng.randrange(len(sentences) + 1), needle)
        sentences.insert(round(depth * len(sentences)), needles[0])
        haystack = " ".join(sentences)
        request = f"What is the secret number of {asked} in the text above? Answer with the number alone."
        return Problem(
            messages=(Message(role="user", content=f"{haystack}\n\n{request}"),),
            answer=str(value),
            task=self.name,
            language="en",
            key=f"{seed:016x}",
            metadata={"level": level, "depth": depth, "num_sentences": size},
        )

    def _keys(self, rng: random.Random) -> list[str]:
        words = _NAMES.split()
        names = [f"{first} {second}" for first in words for second in words if first != second]
        return rng.sample(names, self.num_keys)

    def verify(self, problem: Problem, response: Response) -> Score:
        answer = self.read_answer(problem, response)
        return Score(total=float(answer == problem.answer))

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        """The only number of seven digits in the answer, with or without thousands separators."""
        answer = final_answer(problem, response) or response.answer or ""
        found = set(re.findall(r"(?<!\d)\d{7}(?!\d)", answer.replace(",", "")))
        return found.pop() if len(found) == 1 else None


class NeedleRetrieval(RetrievalTask):
    """One needle in the haystack."""


class MultiKeyRetrieval(RetrievalTask):
    """One of 16 keys, whose sentences differ only in name and number."""

    num_keys = 16


def largest_level(task: RetrievalTask, count_tokens: Callable[[Problem], int], max_tokens: int) -> int:
    """Return the largest level whose prompt has at most `max_tokens` tokens; 0 if not even level 1 fits.

    count_tokens: number of prompt tokens of a problem.
    """
    fits, too_long = 0, 2
    while count_tokens(task.make(too_long, 0.5, too_long)) <= max_tokens:
        fits, too_long = too_long, too_long * 2
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count_tokens(task.make(middle, 0.5, middle)) <= max_tokens:
            fits = middle
        else:
            too_long = middle
    return fits
