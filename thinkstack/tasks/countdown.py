"""Countdown: reach a target with given numbers, each used at most once. Every expression that does so is right."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from thinkstack.tasks.answers import clean
from thinkstack.tasks.puzzles import Puzzle, digest
from thinkstack.types import Problem

LONGEST_EXPRESSION = 200
"""Characters; a longer one is not read. Bounds the depth of the parser."""
TARGETS = range(10, 200)
_TOKEN = re.compile(r"\s*(?:([0-9]{1,9})|([-+*/()]))")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*"})


class _Refused(ValueError):
    """The text is no expression of whole numbers, + - * / and brackets, or divides by 0."""


def value_of(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """The exact value of an expression and how often each number stands in it; None if it is no expression.

    Whole numbers, + - * / and round brackets only; no sign before a number, no equation, no name. Nothing is run.
    """
    text = clean(expression).translate(_SIGNS)
    if len(text) > LONGEST_EXPRESSION:
        return None
    try:
        tokens = _tokens(text)
        value = _sum(tokens)
        if tokens:
            return None
    except _Refused:
        return None
    return value, Counter(int(number) for number in re.findall(r"\d+", text))


def _tokens(text: str) -> list[str]:
    """The tokens, last one first."""
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _Refused
        tokens.append(match[1] or match[2])
        place = match.end()
    return tokens[::-1]


def _sum(tokens: list[str]) -> Fraction:
    value = _product(tokens)
    while tokens and tokens[-1] in "+-":
        value += _product(tokens) if tokens.pop() == "+" else -_product(tokens)
    return value


def _product(tokens: list[str]) -> Fraction:
    value = _factor(tokens)
    while tokens and tokens[-1] in "*/":
        sign, factor = tokens.pop(), _factor(tokens)
        if sign == "/" and factor == 0:
            raise _Refused
        value = value * factor if sign == "*" else value / factor
    return value


def _factor(tokens: list[str]) -> Fraction:
    token = tokens.pop() if tokens else ""
    if token == "(":
        value = _sum(tokens)
        if not tokens or tokens.pop() != ")":
            raise _Refused
        return value
    if not token.isdecimal():
        raise _Refused
    return Fraction(int(token))


@dataclass(frozen=True)
class Piece:
    """A number that is left: a given one, or two pieces taken together by `sign`."""

    value: int
    text: str
    sign: str = ""
    left: "Piece | None" = None
    right: "Piece | None" = None


def together(left: Piece, sign: str, right: Piece) -> Piece | None:
    """The two pieces as one; None unless its value is a whole number above 0 and the step does something."""
    values = {"+": left.value + right.value, "-": left.value - right.value, "*": left.value * right.value}
    if sign == "/":
        if right.value < 2 or left.value % right.value:
            return None
        values["/"] = left.value // right.value
    if values[sign] < 1 or (sign == "*" and 1 in (left.value, right.value)):
        return None
    texts = [f"({piece.text})" if piece.sign else piece.text for piece in (left, right)]
    return Piece(values[sign], sign.join(texts), sign, left, right)


class Countdown:
    """The state is the pieces left, the newest last; an operation (i, sign, j) takes pieces i and j together.

    The operations are a solution and no part of the question, so the key is made of the numbers and the target. A wrong
    step is a sign that leads elsewhere. The reference uses all the numbers, which is how `accepts` knows them.
    """

    name = "countdown"
    levels = (2, 3, 4)
    chance = 0.015
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Use the numbers {numbers}, each at most once, to make {target}. Give the expression.",
            "Make {target} from {numbers} with + - * / and brackets, each number at most once.",
            "Numbers: {numbers}. Target: {target}. Which expression reaches it?",
            "With {numbers} you may use each number once. Write an expression equal to {target}.",
            "Combine {numbers} (none twice) into {target}.",
            "Reach {target}! You have {numbers}, each for one use. Write your expression.",
        ),
        "zh": (
            "用{numbers}凑出{target},每个数最多用一次。写出算式。",
            "用加减乘除和括号,由{numbers}得到{target},每个数至多用一次。",
            "数字:{numbers}。目标:{target}。哪个算式能得到它?",
            "有{numbers},每个数只能用一次。写一个等于{target}的算式。",
            "把{numbers}(不重复使用)组合成{target}。",
            "目标是{target}!你有{numbers},各用一次,写出算式。",
        ),
    }

    def draw(self, rng: random.Random, level: int) -> Puzzle:
        """Take random pieces together until one is left; begin again if it is no target or is given."""
        while True:
            numbers = tuple(rng.randrange(1, 26) for _ in range(level + 1))
            pieces, ops = _given(numbers), []
            while len(pieces) > 1:
                i, j = rng.sample(range(len(pieces)), 2)
                sign = rng.choice("+-*/")
                piece = together(pieces[i], sign, pieces[j])
                if piece is None or not _others(piece):
                    if rng.random() < 0.1:
                        break
                    continue
                ops.append((i, sign, j))
                pieces = _without(pieces, i, j, piece)
            if len(pieces) == 1 and pieces[0].value in TARGETS and pieces[0].value not in numbers:
                return Puzzle((numbers, pieces[0].value), tuple(ops))

    def key(self, puzzle: Puzzle) -> str:
        numbers, target = puzzle.start
        return f"{digest(self.name, sorted(numbers), target):016x}"

    def accepts(self, problem: Problem, answer: str) -> bool:
        """Whether the expression has the target's value and takes each number at most as often as it is given."""
        found, reference = value_of(answer), value_of(problem.answer)
        assert reference is not None, "a reference answer is an expression"
        return found is not None and found[0] == reference[0] and found[1] <= reference[1]

    def first_state(self, puzzle: Puzzle) -> tuple[Piece, ...]:
        return _given(puzzle.start[0])

    def advance(self, state: tuple[Piece, ...], op: tuple[int, str, int]) -> tuple[Piece, ...]:
        """A step that a wrong one before it made impossible becomes a sum."""
        i, sign, j = op
        piece = together(state[i], sign, state[j]) or together(state[i], "+", state[j])
        assert piece is not None, "the sum of two positive numbers is positive"
        return _without(state, i, j, piece)

    def other_states(self, state: tuple[Piece, ...]) -> Sequence[tuple[Piece, ...]]:
        """The newest piece made by another sign, of another value."""
        return [(*state[:-1], other) for other in _others(state[-1])]

    def parts(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        numbers, target = puzzle.start
        return {"numbers": ", ".join(map(str, numbers)), "target": str(target)}

    def line(self, state: tuple[Piece, ...], op: tuple[int, str, int], result: tuple[Piece, ...], language: str) -> str:
        newest = result[-1]
        assert newest.left is not None and newest.right is not None, "a step has been made"
        step = f"{newest.left.value}{newest.sign}{newest.right.value}"
        return f"{newest.text}={newest.value}" if newest.text == step else f"{newest.text}={step}={newest.value}"

    def answer(self, puzzle: Puzzle, state: tuple[Piece, ...], language: str) -> str:
        return state[-1].text


def _given(numbers: Sequence[int]) -> tuple[Piece, ...]:
    return tuple(Piece(number, str(number)) for number in numbers)


def _others(piece: Piece) -> list[Piece]:
    """What its two parts give otherwise: another value."""
    left, right = piece.left, piece.right
    assert left is not None and right is not None, "a step has been made"
    ways = [together(*pair) for sign in "+-*/" for pair in ((left, sign, right), (right, sign, left))]
    return [way for way in ways if way is not None and way.value != piece.value]


def _without(pieces: Sequence[Piece], i: int, j: int, newest: Piece) -> tuple[Piece, ...]:
    """The pieces except i and j, then the newest."""
    return (*(piece for place, piece in enumerate(pieces) if place not in (i, j)), newest)
