"""The shell game: a ball under one of five cups, and pairs of cups are swapped."""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle

CUPS = range(1, 6)


class Cups:
    """The ball moves with its cup. Swaps do not commute, so the order matters."""

    name = "cups"
    levels = (2, 3, 4, 5, 6)
    chance = 0.2
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Five cups, the ball is under cup {cup}. Swap {swaps}. Where is the ball?",
            "The ball is under cup {cup}. Swap {swaps}. Which cup has the ball?",
            "A ball is under cup {cup}. Swap {swaps}. Find the ball.",
            "There is a ball under cup {cup}. Swap {swaps}. Which cup is it under now?",
            "Five cups and a ball under cup {cup}. Swap {swaps}. Which cup has the ball now?",
            "The ball is under cup {cup}. Swap {swaps}. Where is it now?",
        ),
        "zh": (
            "五个杯子,球在{cup}号杯。交换{swaps}。球在几号杯?",
            "球在{cup}号杯。交换{swaps}。现在球在几号杯?",
            "一个球在{cup}号杯。交换{swaps}。找到球。",
            "有五个杯子,球在{cup}号杯。交换{swaps}。哪个杯子有球?",
            "五个杯子和一个球,球在{cup}号杯。交换{swaps}。现在哪个杯子有球?",
            "球在{cup}号杯。交换{swaps}。球现在在哪里?",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        swaps = tuple(tuple(sorted(rng.sample(CUPS, 2))) for _ in range(level))
        return Puzzle(rng.choice(CUPS), swaps)

    def first_state(self, puzzle: Puzzle) -> int:
        return puzzle.start

    def advance(self, state: int, op: tuple[int, int]) -> int:
        first, second = op
        return {first: second, second: first}.get(state, state)

    def other_states(self, state: int) -> Sequence[int]:
        return [cup for cup in CUPS if cup != state]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"cup": str(puzzle.start), "swaps": ",".join(f"{first}-{second}" for first, second in puzzle.ops)}

    def line(self, state: int, op: tuple[int, int], result: int, language: str) -> str:
        return f"{op[0]}-{op[1]}:{state}>{result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)
