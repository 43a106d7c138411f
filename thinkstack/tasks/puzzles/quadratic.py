"""Quadratic equations: each operation is one line of the standard solution."""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle
from thinkstack.tasks.verify.answers import same_numbers
from thinkstack.types import Problem


def term(factor: int, power: int) -> str:
    """Return a term such as 3x^2, -x or 5, without a leading plus."""
    name = {0: "", 1: "x", 2: "x^2"}[power]
    if name and abs(factor) == 1:
        return name if factor > 0 else f"-{name}"
    return f"{factor}{name}"


def polynomial(*factors: int) -> str:
    """Return the polynomial with these coefficients, highest power first: (1, -5, 6) is x^2-5x+6."""
    text = ""
    for power, factor in zip(range(len(factors) - 1, -1, -1), factors, strict=True):
        if factor:
            text += ("+" if text and factor > 0 else "") + term(factor, power)
    return text or "0"


def nonzero(rng: random.Random, most: int) -> int:
    """Return an integer from -most to most, not 0."""
    return rng.choice((-1, 1)) * rng.randrange(1, most + 1)


class Quadratic:
    """ax^2+bx+c = d with two rational solutions, solved with the discriminant.

    The state is (a, b, c, d, D, s, solutions), with None for values not computed yet. Operations: "collect" moves d to
    the left side, "shorten" divides by the common factor, "discriminant" computes D = b^2-4ac, "root" computes s, its
    square root, "solve" computes x = (-b-s)/2a and (-b+s)/2a.
    """

    name = "quadratic"
    levels = (3, 4, 5)
    chance = 0.02
    STEPS: ClassVar[dict[int, tuple[str, ...]]] = {
        3: ("discriminant", "root", "solve"),
        4: ("collect", "discriminant", "root", "solve"),
        5: ("collect", "shorten", "discriminant", "root", "solve"),
    }
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Solve {equation}. Give all solutions.",
            "Which numbers x satisfy {equation}?",
            "{equation}. Find both solutions.",
            "Find the roots: {equation}.",
            "What are the solutions of {equation}?",
            "List each x with {equation}.",
        ),
        "zh": (
            "解方程{equation},写出所有解。",
            "哪些数x满足{equation}?",
            "{equation},求两个解。",
            "求根:{equation}。",
            "{equation}的解是什么?",
            "列出所有使{equation}的x。",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        lead = rng.choice((1, 2, 3)) if level > 3 else 1
        first, second = nonzero(rng, 9), nonzero(rng, 9)
        while first == lead * second:
            first, second = nonzero(rng, 9), nonzero(rng, 9)
        a, b, c = lead, -(first + lead * second), first * second  # (lead x - first)(x - second)
        d = nonzero(rng, 20) if level > 3 else 0
        factor = rng.choice((2, 3, 4)) if level > 4 else 1
        return Puzzle((a * factor, b * factor, (c + d) * factor, d * factor), self.STEPS[level])

    def verify(self, problem: Problem, answer: str) -> bool:
        """Accept the solutions in any order, with or without "x="."""
        return same_numbers(problem.answer, answer)

    def first_state(self, puzzle: Puzzle) -> tuple:
        return (*puzzle.start, None, None, None)

    def advance(self, state: tuple, op: str) -> tuple:
        a, b, c, d, square, root, _ = state
        if op == "collect":
            return a, b, c - d, 0, None, None, None
        if op == "shorten":
            factor = math.gcd(a, b, c)
            return a // factor, b // factor, c // factor, d, None, None, None
        if op == "discriminant":
            return a, b, c, d, b * b - 4 * a * c, None, None
        if op == "root":
            return a, b, c, d, square, math.isqrt(max(square, 0)), None
        return a, b, c, d, square, root, tuple(sorted({Fraction(-b + sign * root, 2 * a) for sign in (-1, 1)}))

    def other_states(self, state: tuple) -> Sequence[tuple]:
        """Return states with an error in the last computed value, such that the discriminant stays a positive
        square."""
        a, b, c, d, square, root, solutions = state
        if solutions:
            flipped = tuple(sorted(-x for x in solutions))
            slips = [tuple(x + 1 for x in solutions), tuple(x - 1 for x in solutions), flipped]
            return [(a, b, c, d, square, root, slip) for slip in slips if slip != solutions]
        if root is not None:
            return [(a, b, c, d, square, root + slip, None) for slip in (-2, -1, 1, 2) if root + slip > 0]
        if square is not None:
            near = math.isqrt(max(square, 0))
            return [(a, b, c, d, (near + slip) ** 2, None, None) for slip in (-2, -1, 1, 2) if near + slip > 0]
        constants = [other for other in range(c - 30, c + 31) if other != c and _is_square(b * b - 4 * a * other)]
        wider = c - a - math.isqrt(b * b - 4 * a * c)  # its discriminant's root is larger by 2a
        return [(a, b, other, d, None, None, None) for other in constants or [wider]]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        a, b, c, d = puzzle.start
        return {"equation": f"{polynomial(a, b, c)}={d}"}

    def line(self, state: tuple, op: str, result: tuple, language: str) -> str:
        a, b, c, d, square, root, _ = state
        if op in ("collect", "shorten"):
            return f"{polynomial(a, b, c)}={d} > {polynomial(*result[:3])}=0"
        if op == "discriminant":
            return f"{polynomial(a, b, c)}=0: D={_bracketed(b)}^2-4*{_bracketed(a)}*{_bracketed(c)}={result[4]}"
        if op == "root":
            return f"s^2={square}: s={result[5]}"
        return f"x=({-b}-{root})/{2 * a}, ({-b}+{root})/{2 * a} = {_join_solutions(result[6])}"

    def answer(self, puzzle: Puzzle, state: tuple, language: str) -> str:
        return _join_solutions(state[6])


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _bracketed(number: int) -> str:
    return f"({number})" if number < 0 else str(number)


def _join_solutions(solutions: Sequence[Any]) -> str:
    return ", ".join(str(x) for x in solutions)
