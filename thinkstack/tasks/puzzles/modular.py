"""Modular arithmetic: additions and multiplications of a residue."""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle

MODULI = (7, 11, 13)
"""Primes, so that no multiplication loses information about the residue."""


class Modular:
    """5, then +8, *3, ...: left to right, reduced modulo a prime at every step. The state is (residue, modulus)."""

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

    def generate(self, rng: random.Random, level: int) -> Puzzle:
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

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        start, modulus = puzzle.start
        steps = ",".join(f"{sign}{number}" for sign, number in puzzle.ops)
        return {"start": str(start), "modulus": str(modulus), "steps": steps}

    def line(self, state: tuple[int, int], op: tuple[str, int], result: tuple[int, int], language: str) -> str:
        return f"{state[0]}{op[0]}{op[1]} mod {state[1]} = {result[0]}"

    def answer(self, puzzle: Puzzle, state: tuple[int, int], language: str) -> str:
        return str(state[0])
