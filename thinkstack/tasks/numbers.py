"""Whole numbers: residues carried through operations, multiplication by parts, divisors and multiples by Euclid."""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles import Puzzle, digest

MODULI = (7, 11, 13)
"""Primes, so that no factor forgets part of the state."""


def other_numbers(number: int) -> Sequence[int]:
    """Numbers that a slip of a digit or a carry would give; never negative."""
    slips = (number + step for step in (-10, -2, -1, 1, 2, 10))
    return [slip for slip in slips if slip >= 0]


class Modular:
    """5, then +8, *3, ...: from left to right, reduced modulo a prime at every step. State: (residue, modulus)."""

    name = "modular"
    levels = (2, 3, 4, 5, 6)
    chance = 0.12
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Start with {start} and do {steps} in this order, modulo {modulus}. What is the result?",
            "Modulo {modulus}: take {start}, then {steps}. What remains?",
            "All numbers are modulo {modulus}. Begin at {start} and apply {steps}. Where do you end?",
            "Take {start}. One after the other: {steps}. What is the remainder by {modulus}?",
            "Working modulo {modulus}, apply {steps} to {start}. What comes out?",
            "Apply {steps} to {start}, one by one, and give the remainder by {modulus}.",
        ),
        "zh": (
            "从{start}开始,依次{steps},结果对{modulus}取余是多少?",
            "模{modulus}运算:{start},然后{steps},余数是几?",
            "在模{modulus}下,从{start}出发,依次做{steps},最后得几?",
            "先取{start},再依次{steps}。除以{modulus}余几?",
            "对{start}依次做{steps},模{modulus}等于几?",
            "请把{start}依次{steps},写出除以{modulus}的余数。",
        ),
    }

    def draw(self, rng: random.Random, level: int) -> Puzzle:
        modulus = rng.choice(MODULI)
        ops = []
        for _ in range(level):
            sign = rng.choice("+*")
            ops.append((sign, rng.randrange(1, 30) if sign == "+" else rng.randrange(2, 7)))
        return Puzzle((rng.randrange(modulus), modulus), tuple(ops))

    def first_state(self, puzzle: Puzzle) -> tuple[int, int]:
        return puzzle.start

    def advance(self, state: tuple[int, int], op: tuple[str, int]) -> tuple[int, int]:
        residue, modulus = state
        sign, number = op
        return (residue + number if sign == "+" else residue * number) % modulus, modulus

    def other_states(self, state: tuple[int, int]) -> Sequence[tuple[int, int]]:
        return [(other, state[1]) for other in range(state[1]) if other != state[0]]

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        start, modulus = puzzle.start
        steps = ",".join(f"{sign}{number}" for sign, number in puzzle.ops)
        return {"start": str(start), "modulus": str(modulus), "steps": steps}

    def line(self, state: tuple[int, int], op: tuple[str, int], result: tuple[int, int], language: str) -> str:
        return f"{state[0]}{op[0]}{op[1]} mod {state[1]} = {result[0]}"

    def answer(self, puzzle: Puzzle, state: tuple[int, int], language: str) -> str:
        return str(state[0])


class Multiply:
    """47*6 as 40*6 + 7*6: the partial products are added up. An operation is one partial product, the state the sum.

    No digit is 0, so the level is the product of the numbers of digits.
    """

    name = "multiply"
    levels = (2, 3, 4, 6)
    chance = 0.01
    DIGITS: ClassVar[dict[int, tuple[int, int]]] = {2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2)}
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "Work out {a}*{b} by parts.",
            "{a} rows of {b} chairs: how many chairs?",
            "Find the product of {a} and {b}.",
            "{a} boxes hold {b} pens each. How many pens is that?",
        ),
        "zh": (
            "{a}乘以{b}等于多少?",
            "计算{a}*{b}。",
            "用分步乘法算{a}乘{b}。",
            "{a}排椅子,每排{b}把,一共几把?",
            "求{a}与{b}的积。",
            "{a}个盒子,每盒{b}支笔,共有多少支笔?",
        ),
    }

    def draw(self, rng: random.Random, level: int) -> Puzzle:
        left, right = (int("".join(str(rng.randrange(1, 10)) for _ in range(size))) for size in self.DIGITS[level])
        right = right if right > 1 else 2 + rng.randrange(8)
        parts = [(a, b) for b in _places(right) for a in _places(left)]
        return Puzzle((left, right), tuple(parts))

    def key(self, puzzle: Puzzle) -> str:
        """3*7 and 7*3 are one problem."""
        return f"{digest(self.name, *sorted(puzzle.start)):016x}"

    def first_state(self, puzzle: Puzzle) -> int:
        return 0

    def advance(self, state: int, op: tuple[int, int]) -> int:
        return state + op[0] * op[1]

    def other_states(self, state: int) -> Sequence[int]:
        return other_numbers(state)

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        return {"a": str(puzzle.start[0]), "b": str(puzzle.start[1])}

    def line(self, state: int, op: tuple[int, int], result: int, language: str) -> str:
        return f"{state}+{op[0]}*{op[1]}={result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)


def _places(number: int) -> list[int]:
    """347 as [300, 40, 7]."""
    text = str(number)
    return [int(digit) * 10 ** (len(text) - 1 - place) for place, digit in enumerate(text)]


DONE = -1
"""Second of the pair once the multiple is found."""


class Divisors:
    """The greatest common divisor by Euclid's divisions, or the least common multiple from it.

    The state is the pair of numbers left; each division takes (a, b) to (b, a mod b). The multiple takes one more
    operation, which divides the product of the first two numbers by the divisor. Level 2 starts with two divisions, so
    the divisor is never one of the two numbers.
    """

    name = "divisors"
    levels = (2, 3, 4, 5)
    chance = 0.05
    WORDS: ClassVar[dict[str, dict[str, str]]] = {
        "gcd": {"en": "greatest common divisor", "zh": "最大公约数"},
        "lcm": {"en": "least common multiple", "zh": "最小公倍数"},
    }
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "What is the {what} of {a} and {b}?",
            "Find the {what} of {a} and {b}.",
            "{a} and {b}: what is their {what}?",
            "Two numbers are {a} and {b}. Give their {what}.",
            "Given {a} and {b}, compute the {what}.",
            "Which number is the {what} of {a} and {b}?",
        ),
        "zh": (
            "{a}和{b}的{what}是多少?",
            "求{a}和{b}的{what}。",
            "有两个数{a}和{b},它们的{what}是几?",
            "请算出{a}与{b}的{what}。",
            "已知{a}和{b},计算{what}。",
            "哪个数是{a}和{b}的{what}?",
        ),
    }

    def draw(self, rng: random.Random, level: int) -> Puzzle:
        """Backwards: from the divisor up, one quotient a division; the last is at least 2, or it is no step."""
        what = rng.choice(("gcd", "lcm")) if level > 2 else "gcd"
        divisions = level - (what == "lcm")
        divisor = rng.randrange(2, 16)
        larger, smaller = divisor, 0
        for step in range(divisions):
            larger, smaller = larger * rng.randrange(2 if step == 0 else 1, 5) + smaller, larger
        ops: tuple[tuple, ...] = (("mod",),) * divisions
        return Puzzle((what, larger, smaller), ops if what == "gcd" else (*ops, ("lcm", larger, smaller)))

    def first_state(self, puzzle: Puzzle) -> tuple[int, int]:
        return puzzle.start[1:]

    def advance(self, state: tuple[int, int], op: tuple) -> tuple[int, int]:
        larger, smaller = state
        if op[0] == "lcm":
            return op[1] * op[2] // (smaller or larger), DONE
        return (smaller, larger % smaller) if smaller else state

    def other_states(self, state: tuple[int, int]) -> Sequence[tuple[int, int]]:
        """Another remainder below the divisor; of a finished multiple, a slip."""
        larger, smaller = state
        if smaller == DONE:
            return [(other, DONE) for other in other_numbers(larger)]
        return [(larger, other) for other in range(1, min(larger, smaller + 5)) if other != smaller]

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        what, larger, smaller = puzzle.start
        return {"what": self.WORDS[what][language], "a": str(larger), "b": str(smaller)}

    def line(self, state: tuple[int, int], op: tuple, result: tuple[int, int], language: str) -> str:
        if op[0] == "lcm":
            return f"{op[1]}*{op[2]}/{state[1] or state[0]} = {result[0]}"
        return f"{state[0]} mod {state[1]} = {result[1]}" if state[1] else f"gcd({state[0]},0) = {result[0]}"

    def answer(self, puzzle: Puzzle, state: tuple[int, int], language: str) -> str:
        """The last remainder that is not 0."""
        return str(state[1] if state[1] > 0 else state[0])
