"""Lists: sorting numbers by picking the least or the greatest, and counting a letter."""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.answers import same_list
from thinkstack.tasks.puzzles import Puzzle, digest
from thinkstack.types import Problem


class Sorting:
    """Selection: the state is (numbers left, numbers picked), an operation picks the "least" or the "greatest" left."""

    name = "sorting"
    levels = (4, 5, 6, 7)
    chance = 0.015
    ORDER: ClassVar[dict[str, dict[str, str]]] = {
        "least": {"en": "from small to large", "zh": "从小到大"},
        "greatest": {"en": "from large to small", "zh": "从大到小"},
    }
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Sort {numbers} {order}.",
            "Put these numbers in order, {order}: {numbers}",
            "{numbers}: write them {order}.",
            "Arrange {order}: {numbers}",
            "Which order do {numbers} have {order}?",
            "List {numbers} again, {order}.",
        ),
        "zh": (
            "把{numbers}{order}排列。",
            "请{order}排序:{numbers}",
            "{numbers},{order}写出来。",
            "按{order}的顺序排:{numbers}",
            "{numbers}{order}是什么顺序?",
            "将{numbers}重新{order}列出。",
        ),
    }

    def draw(self, rng: random.Random, level: int) -> Puzzle:
        """Numbers out of order, so that copying the question is never right."""
        pick = rng.choice(("least", "greatest"))
        numbers = rng.sample(range(10, 100), level)
        while numbers in (sorted(numbers), sorted(numbers)[::-1]):
            rng.shuffle(numbers)
        return Puzzle(tuple(numbers), (pick,) * level)

    def key(self, puzzle: Puzzle) -> str:
        """The same numbers in another order are the same problem."""
        return f"{digest(self.name, puzzle.ops[0], sorted(puzzle.start)):016x}"

    def accepts(self, problem: Problem, answer: str) -> bool:
        """Spaces after commas do not matter."""
        return same_list(problem.answer, answer)

    def first_state(self, puzzle: Puzzle) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return puzzle.start, ()

    def advance(self, state: tuple, op: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        left, picked = state
        if not left:
            return state
        number = min(left) if op == "least" else max(left)
        return tuple(other for other in left if other != number), (*picked, number)

    def other_states(self, state: tuple) -> Sequence[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Another number picked; the last one left can only be forgotten or misread."""
        left, picked = state
        newest = picked[-1]
        if not left:
            return [((), (*picked[:-1], newest + slip)) for slip in (-1, 1)] + [((), picked[:-1])]
        swaps = []
        for place, number in enumerate(left):
            swaps.append(((*left[:place], newest, *left[place + 1 :]), (*picked[:-1], number)))
        return swaps

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"numbers": _listed(puzzle.start), "order": self.ORDER[puzzle.ops[0]][language]}

    def line(self, state: tuple, op: str, result: tuple, language: str) -> str:
        return f"{_listed(state[0])} > {_listed(result[1])}"

    def answer(self, puzzle: Puzzle, state: tuple, language: str) -> str:
        return _listed(state[1])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """How often is a letter in a word? The state is the count, an operation (letter read, letter counted).

    Words are made up: of a real one the count may be remembered.
    """

    name = "letters"
    levels = (4, 6, 8, 10)
    chance = 0.14
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            'How often is the letter "{letter}" in "{word}"?',
            'Count the "{letter}" in "{word}".',
            '"{word}": how many times does "{letter}" occur?',
            'How many "{letter}" are there in the word "{word}"?',
            'In "{word}", what is the number of "{letter}"?',
            'Look at "{word}" and tell how many of its letters are "{letter}".',
        ),
        "zh": (
            "“{word}”里有几个“{letter}”?",
            "数一数“{word}”中字母“{letter}”出现了几次。",
            "字母“{letter}”在“{word}”里出现几次?",
            "单词“{word}”含有多少个“{letter}”?",
            "看“{word}”,其中“{letter}”的个数是多少?",
            "“{letter}”这个字母,“{word}”里一共有多少?",
        ),
    }

    def draw(self, rng: random.Random, level: int) -> Puzzle:
        """The count is drawn first, evenly from 0 to the length: no count is a good guess."""
        letter, count = rng.choice(ALPHABET), rng.randrange(level + 1)
        others = rng.sample([other for other in ALPHABET if other != letter], 4)
        word = [letter] * count + [rng.choice(others) for _ in range(level - count)]
        rng.shuffle(word)
        return Puzzle(letter, tuple((read, letter) for read in word))

    def first_state(self, puzzle: Puzzle) -> int:
        return 0

    def advance(self, state: int, op: tuple[str, str]) -> int:
        return state + (op[0] == op[1])

    def other_states(self, state: int) -> Sequence[int]:
        return [slip for slip in (state - 1, state + 1) if slip >= 0]

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"letter": puzzle.start, "word": "".join(read for read, _ in puzzle.ops)}

    def line(self, state: int, op: tuple[str, str], result: int, language: str) -> str:
        return f"{op[0]} {op[1]}: {state} > {result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)
