"""Last-digit arithmetic: operations on a digit, written as a chain or as nested brackets.

Factors are only 3, 7 and 9. They permute the ten digits, so no operation loses information about the state, and the
result depends on every operation.
"""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle

FACTORS = (3, 7, 9)


def random_operation(rng: random.Random) -> tuple[str, int]:
    """Return + or * with a digit. Subtraction is left out: the last digit of a negative number is ambiguous."""
    sign = rng.choice("+*")
    return sign, rng.choice(FACTORS) if sign == "*" else rng.randrange(10)


def apply(left: int, sign: str, right: int) -> int:
    """Return the last digit of `left sign right`."""
    return {"+": left + right, "*": left * right}[sign] % 10


def other_digits(digit: int) -> Sequence[int]:
    """Return the nine other digits."""
    return [other for other in range(10) if other != digit]


class Chain:
    """6+4*7+5: evaluated left to right, reduced to the last digit at every step."""

    name = "chain"
    levels = (2, 3, 4, 5, 6)
    chance = 0.1
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Work from left to right and keep only the last digit: {puzzle}",
            "Keep the last digit at every step, left to right. {puzzle} = ?",
            "From left to right, last digit only, what is {puzzle}?",
            "{puzzle}: go from left to right. What is the last digit?",
            "What is the last digit of {puzzle}, from left to right?",
            "Go left to right: {puzzle}. Keep only the last digit.",
        ),
        "zh": (
            "从左到右计算,每步只保留个位:{puzzle}",
            "每步只保留个位,从左到右:{puzzle}等于几?",
            "{puzzle},从左到右计算,个位是几?",
            "从左到右,只看个位,{puzzle}等于几?",
            "{puzzle}的个位是几?从左到右计算。",
            "请从左到右计算{puzzle},只保留个位。",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        return Puzzle(rng.randrange(10), tuple(random_operation(rng) for _ in range(level)))

    def first_state(self, puzzle: Puzzle) -> int:
        return puzzle.start

    def advance(self, state: int, op: tuple[str, int]) -> int:
        return apply(state, *op)

    def other_states(self, state: int) -> Sequence[int]:
        return other_digits(state)

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"puzzle": str(puzzle.start) + "".join(f"{sign}{digit}" for sign, digit in puzzle.ops)}

    def line(self, state: int, op: tuple[str, int], result: int, language: str) -> str:
        return f"{state}{op[0]}{op[1]}={result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)


class Nested:
    """3*(4+(2*7)): evaluated from the inside out, reduced to the last digit at every step."""

    name = "nested"
    levels = (2, 3, 4, 5, 6)
    chance = 0.1
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Start inside the brackets and keep only the last digit: {puzzle}",
            "Keep the last digit at every step, from the inside out. {puzzle} = ?",
            "From the inside out, last digit only, what is {puzzle}?",
            "{puzzle}: start inside. What is the last digit?",
            "What is the last digit of {puzzle}, from the inside out?",
            "Start inside: {puzzle}. Keep only the last digit.",
        ),
        "zh": (
            "从里到外计算,每步只保留个位:{puzzle}",
            "每步只保留个位,从里到外:{puzzle}等于几?",
            "{puzzle},从里到外计算,个位是几?",
            "从里到外,只看个位,{puzzle}等于几?",
            "{puzzle}的个位是几?从里到外计算。",
            "请从里到外计算{puzzle},只保留个位。",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        """Generate a puzzle. The start is innermost; each operation (sign, digit) wraps it, with its digit on the
        left."""
        start = rng.randrange(10)
        return Puzzle(start, tuple(random_operation(rng) for _ in range(level)))

    def first_state(self, puzzle: Puzzle) -> int:
        return puzzle.start

    def advance(self, state: int, op: tuple[str, int]) -> int:
        sign, digit = op
        return apply(digit, sign, state)

    def other_states(self, state: int) -> Sequence[int]:
        return other_digits(state)

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        inside = str(puzzle.start)
        for index, (sign, digit) in enumerate(puzzle.ops):
            inside = f"{digit}{sign}({inside})" if index else f"{digit}{sign}{inside}"
        return {"puzzle": inside}

    def line(self, state: int, op: tuple[str, int], result: int, language: str) -> str:
        sign, digit = op
        return f"{digit}{sign}{state}={result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)
