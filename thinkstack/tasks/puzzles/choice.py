"""Multiple choice: pick the result of a short calculation from four values."""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle, digest
from thinkstack.tasks.verify.answers import same_choice
from thinkstack.types import Problem

LETTERS = "ABCD"


class Choice:
    """The state is the value; after the last operation it is the letter. Operations: (sign, number), then
    ("pick", the four values).

    The values are evenly spaced and the rank of the correct one is uniform, so neither size nor order reveals it.
    """

    name = "choice"
    levels = (3, 4, 5)
    chance = 0.25
    STEP_PHRASES: ClassVar[dict[str, dict[str, str]]] = {
        "+": {"en": "add {0}", "zh": "加{0}"},
        "-": {"en": "subtract {0}", "zh": "减{0}"},
        "*": {"en": "multiply by {0}", "zh": "乘以{0}"},
    }
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Take {start}, {steps}. Which is the result?\n{options}",
            "Start from {start}: {steps}. Choose A, B, C or D.\n{options}",
            "{start}, then {steps}. What comes out?\n{options}\nAnswer with the letter.",
            "Which letter is right? {start}: {steps}.\n{options}",
            "Begin with {start} and {steps}. Pick one.\n{options}",
            "I think of {start}; I {steps}. Where am I?\n{options}",
        ),
        "zh": (
            "取{start},{steps}。结果是哪个?\n{options}",
            "从{start}开始:{steps}。请选A、B、C或D。\n{options}",
            "先有{start},然后{steps},得多少?\n{options}\n请回答字母。",
            "哪个字母对?{start}:{steps}。\n{options}",
            "由{start}出发,{steps}。选一项。\n{options}",
            "我想着{start},再{steps},现在是几?\n{options}",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        start = rng.randrange(5, 50)
        state = start
        ops: list[tuple] = []
        for _ in range(level - 1):
            sign = rng.choice("+-*")
            ops.append((sign, rng.randrange(2, 10) if sign == "*" else rng.randrange(2, 30)))
            state = self.advance(state, ops[-1])
        gap, rank = rng.choice((1, 2, 3, 5, 10)), rng.randrange(4)
        options = [state + gap * (place - rank) for place in range(4)]
        rng.shuffle(options)
        return Puzzle(start, (*ops, ("pick", tuple(options))))

    def key(self, puzzle: Puzzle) -> str:
        """Return the hash of the calculation alone: the options do not change the problem."""
        return f"{digest(self.name, puzzle.start, *puzzle.ops[:-1]):016x}"

    def verify(self, problem: Problem, answer: str) -> bool:
        """Accept one letter, with or without brackets."""
        return same_choice(problem.answer, answer)

    def first_state(self, puzzle: Puzzle) -> int:
        return puzzle.start

    def advance(self, state: Any, op: tuple) -> Any:
        """For "pick", a value that is not an option maps to the nearest option."""
        sign, number = op
        if sign == "pick":
            return LETTERS[min(range(4), key=lambda place: abs(number[place] - state))]
        return {"+": state + number, "-": state - number, "*": state * number}[sign]

    def other_states(self, state: int | str) -> Sequence[int | str]:
        if isinstance(state, str):
            return [letter for letter in LETTERS if letter != state]
        return [state + slip for slip in (-30, -20, -10, 10, 20, 30)]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        *steps, (_, options) = puzzle.ops
        phrases = [self.STEP_PHRASES[sign][language].format(number) for sign, number in steps]
        shown = [f"{letter}. {value}" for letter, value in zip(LETTERS, options, strict=True)]
        joined = (", " if language == "en" else ",").join(phrases)
        return {"start": str(puzzle.start), "steps": joined, "options": "\n".join(shown)}

    def line(self, state: int, op: tuple, result: int | str, language: str) -> str:
        return f"{state} > {result}" if op[0] == "pick" else f"{state}{op[0]}{op[1]}={result}"

    def answer(self, puzzle: Puzzle, state: str, language: str) -> str:
        return state
