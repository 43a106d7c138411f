"""Sums and products of small numbers, left to right: the easiest tasks, for small pre-trained models."""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle

WORDINGS: dict[str, tuple[str, ...]] = {
    "en": (
        "What is {puzzle}?",
        "Compute {puzzle}.",
        "How much is {puzzle}?",
        "Find the value of {puzzle}.",
        "Work the following out: {puzzle}",
        "Please tell me what {puzzle} is.",
    ),
    "zh": (
        "{puzzle}等于多少?",
        "计算{puzzle}。",
        "{puzzle}是多少?",
        "算一算:{puzzle}",
        "算式{puzzle}的结果是多少?",
        "请告诉我{puzzle}的结果。",
    ),
}


class Sums:
    """12+7-4: add and subtract numbers up to 20; no intermediate result is negative."""

    name = "sums"
    levels: tuple[int, ...] = (1, 2, 3, 4)
    chance = 0.07
    wordings: ClassVar[dict[str, tuple[str, ...]]] = WORDINGS

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        state = start = rng.randint(1, 20)
        ops = []
        for _ in range(level):
            sign = rng.choice("+-") if state else "+"
            number = rng.randint(1, 20 if sign == "+" else min(state, 20))
            ops.append((sign, number))
            state = self.advance(state, ops[-1])
        return Puzzle(start, tuple(ops))

    def first_state(self, puzzle: Puzzle) -> int:
        return puzzle.start

    def advance(self, state: int, op: tuple[str, int]) -> int:
        sign, number = op
        return {"+": state + number, "-": state - number, "*": state * number}[sign]

    def other_states(self, state: int) -> Sequence[int]:
        return [other for other in (state - 10, state - 2, state - 1, state + 1, state + 2, state + 10) if other >= 0]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"puzzle": str(puzzle.start) + "".join(f"{sign}{number}" for sign, number in puzzle.ops)}

    def line(self, state: int, op: tuple[str, int], result: int, language: str) -> str:
        return f"{state}{op[0]}{op[1]}={result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)


class Times(Sums):
    """7*8, 2*5*3: multiply one-digit factors."""

    name = "times"
    levels = (1, 2, 3)
    chance = 0.085

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        largest = 9 if level == 1 else 5
        return Puzzle(rng.randint(2, largest), tuple(("*", rng.randint(2, largest)) for _ in range(level)))
