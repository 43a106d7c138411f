"""Table look-up: sum some cells of a small table."""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle, digest

PEOPLE = {
    "en": ("Ann", "Ben", "Kate", "Leo", "Mia", "Jack", "Sue", "Tom"),
    "zh": ("小安", "小本", "小凯", "小李", "小美", "小杰", "小苏", "小汤"),
}
THINGS = {
    "en": ("apples", "pears", "plums", "books", "pens", "eggs"),
    "zh": ("苹果", "梨", "李子", "书", "笔", "鸡蛋"),
}
COLUMNS = 3
"""Columns of a table that contain numbers."""


class Table:
    """Add some cells of a table. The state is the sum; an operation is (person, thing, number in that cell).

    People and things are word indices, the same in both languages; the key covers only the numbers and the positions.
    """

    name = "table"
    levels = (2, 3, 4, 5)
    chance = 0.03
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "{table}\nHow much is this together: {cells}?",
            "Read the table.\n{table}\nAdd {cells}.",
            "Here is who has what.\n{table}\nWhat is the sum of {cells}?",
            "Add up {cells}:\n{table}",
            "{table}\nFind the total of {cells}.",
            "Take {cells} from this table and give the sum.\n{table}",
        ),
        "zh": (
            "{table}\n{cells}一共是多少?",
            "看表格。\n{table}\n把{cells}加起来。",
            "每人有的东西如下。\n{table}\n{cells}的和是几?",
            "求{cells}之和:\n{table}",
            "{table}\n算出{cells}的总数。",
            "从表中取{cells},写出它们的和。\n{table}",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        people = tuple(rng.sample(range(len(PEOPLE["en"])), rng.randrange(3, 6)))
        things = tuple(rng.sample(range(len(THINGS["en"])), COLUMNS))
        rows = tuple(tuple(rng.randrange(1, 30) for _ in things) for _ in people)
        cells = rng.sample([(row, column) for row in range(len(people)) for column in range(COLUMNS)], level)
        ops = tuple((people[row], things[column], rows[row][column]) for row, column in cells)
        return Puzzle((people, things, rows), ops)

    def key(self, puzzle: Puzzle) -> str:
        """Return the hash of numbers and cell positions: people, things and the order do not change the problem."""
        people, things, rows = puzzle.start
        places = sorted((people.index(person), things.index(thing)) for person, thing, _ in puzzle.ops)
        return f"{digest(self.name, rows, places):016x}"

    def first_state(self, puzzle: Puzzle) -> int:
        return 0

    def advance(self, state: int, op: tuple[int, int, int]) -> int:
        return state + op[2]

    def other_states(self, state: int) -> Sequence[int]:
        """Return sums with an error in a digit or a carry; never negative."""
        return [state + slip for slip in (-10, -2, -1, 1, 2, 10) if state + slip >= 0]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        people, things, rows = puzzle.start
        names, words = PEOPLE[language], THINGS[language]
        lines = [" | ".join(("name" if language == "en" else "姓名", *(words[thing] for thing in things)))]
        lines += [" | ".join((names[who], *map(str, row))) for who, row in zip(people, rows, strict=True)]
        cells = [self._cell(op, language) for op in puzzle.ops]
        return {"table": "\n".join(lines), "cells": (", " if language == "en" else "、").join(cells)}

    def _cell(self, op: tuple[int, int, int], language: str) -> str:
        person, thing = PEOPLE[language][op[0]], THINGS[language][op[1]]
        return f"{person}'s {thing}" if language == "en" else f"{person}的{thing}"

    def line(self, state: int, op: tuple[int, int, int], result: int, language: str) -> str:
        return f"{self._cell(op, language)} {op[2]}: {state}+{op[2]}={result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)
