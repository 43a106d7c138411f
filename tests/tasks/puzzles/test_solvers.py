"""Reference answers, recomputed from the text of the question alone."""

import math
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from tests.problems import make_problem as problem_of
from tests.problems import verify
from thinkstack.tasks.puzzles.puzzle import Puzzle, generate_puzzle, make_problem, problem_key, solve
from thinkstack.tasks.table import PUZZLES

BOTH = pytest.mark.parametrize("language", ["en", "zh"])


def sampled(name, language, count=120):
    """Yield problems with solutions at all levels, splits and wordings."""
    task = PUZZLES[name]
    for seed in range(count):
        level, split = task.levels[seed % len(task.levels)], ("train", "test")[seed % 2]
        puzzle = generate_puzzle(task, split, level, seed)
        yield make_problem(task, puzzle, language, seed % 6), solve(task, puzzle, language)


def numbers(text):
    return [int(found) for found in re.findall(r"\d+", text)]


MODULUS_FIRST = {"en": (1, 2, 4), "zh": (1, 2)}
"""Wordings that state the modulus before the start."""


@BOTH
def test_modular_answers_are_pythons(language):
    for problem, solution in sampled("modular", language):
        (steps,) = re.findall(r"[+*]\d+(?:,[+*]\d+)*", problem.question)
        start, modulus = numbers(problem.question.replace(steps, ""))
        if problem.wording in MODULUS_FIRST[language]:
            start, modulus = modulus, start
        for sign, number in re.findall(r"([+*])(\d+)", steps):
            start = start + int(number) if sign == "+" else start * int(number)
        assert int(problem.answer) == start % modulus
        for line in solution.lines:
            left, modulus, right = re.fullmatch(r"(\d+[+*]\d+) mod (\d+) = (\d+)", line).groups()
            assert eval(left) % int(modulus) == int(right)


def value_at(text, x):
    """Evaluate one side of an equation at x."""
    text = re.sub(r"\^2", "**2", re.sub(r"(\d|\))(?=[x(])", r"\1*", text))
    assert re.fullmatch(r"[-+*()\dx]+", text), text
    return eval(text, {"x": x})


def equation_of(question):
    return max(re.findall(r"[-+()\dx^]+=[-+()\dx^]+", question), key=len).split("=")


@BOTH
def test_both_solutions_of_a_quadratic_equation_solve_it(language):
    for problem, _ in sampled("quadratic", language):
        left, right = equation_of(problem.question)
        solutions = [Fraction(text) for text in problem.answer.split(", ")]
        assert len(set(solutions)) == 2
        assert all(value_at(left, x) == value_at(right, x) for x in solutions)


def test_a_quadratic_equation_with_large_factors_has_a_wrong_state():
    """Regression: if no constant within 30 gave a square discriminant, there was no wrong state, and the corpus stopped
    with an IndexError (2 in 100 equations of level 5)."""
    (slip,) = PUZZLES["quadratic"].other_states((12, -84, -216, 0, None, None, None))
    a, b, c = slip[:3]
    assert c != -216 and math.isqrt(b * b - 4 * a * c) ** 2 == b * b - 4 * a * c > 0


def test_solutions_of_an_equation_are_accepted_in_any_order():
    """x^2 + 5x + 6 = 0."""
    problem = problem_of("", "-3, -2", "quadratic")
    for answer in ("-3, -2", "-2,-3", "x=-2 or x=-3", "x1 = -2, x2 = -3", "-2 and -3", "-4/2, -3", "-2、-3", "-2或-3"):
        assert verify(problem, answer), answer
    for answer in ("-2", "-3, -2, 1", "-3, -3", "-3, -2, -2", "2, 3", "(x+2)(x+3)", "-3,", "x^2+5x+6=0", "-3 -2", ""):
        assert not verify(problem, answer), answer


@BOTH
def test_table_answers_are_sums_of_the_cells_named(language):
    for problem, _ in sampled("table", language):
        rows = [line.split(" | ") for line in problem.question.split("\n") if " | " in line]
        cells = {(row[0], name): int(cell) for row in rows[1:] for name, cell in zip(rows[0][1:], row[1:], strict=True)}
        words = " ".join(line for line in problem.question.split("\n") if " | " not in line)
        link = "'s " if language == "en" else "的"
        named = [cell for cell in cells if re.search(re.escape(link.join(cell)) + r"(?![a-z])", words)]
        assert len(named) == problem.level
        assert int(problem.answer) == sum(cells[cell] for cell in named)


@BOTH
def test_programs_print_what_python_prints(language):
    for problem, _ in sampled("program", language):
        lines = [line for line in problem.question.split("\n") if re.match(r"[ab] = |if |for |print\(", line)]
        printed = []
        exec("\n".join(lines), {"range": range, "print": printed.append, "__builtins__": {}})
        assert printed == [int(problem.answer)]


def code_of(step):
    """Return the line of code for an English step of a plan."""
    shapes = {
        r"start with (\d+)": "x = {0}",
        r"add (\d+)": "x = x + {0}",
        r"subtract (\d+)": "x = x - {0}",
        r"multiply by (\d+)": "x = x * {0}",
        r"repeat (\d+) times: add (\d+)": "for i in range({0}): x = x + {1}",
        r"print x": "print(x)",
    }
    (found,) = [
        shape.format(*match.groups()) for words, shape in shapes.items() if (match := re.fullmatch(words, step))
    ]
    return found


def test_exactly_one_line_of_a_buggy_program_differs_from_the_plan():
    for problem, _ in sampled("bug", "en"):
        (plan,) = re.findall(r"start with .*print x", problem.question)
        lines = re.findall(r"^\d: (.*)$", problem.question, re.MULTILINE)
        wrong = [place for place, step in enumerate(plan.split(", "), start=1) if code_of(step) != lines[place - 1]]
        assert wrong == [int(problem.answer)]
        assert len(lines) == problem.level


@BOTH
def test_the_chosen_option_is_the_value(language):
    words = {"add ": "+", "subtract ": "-", "multiply by ": "*", "加": "+", "减": "-", "乘以": "*"}
    for problem, _ in sampled("choice", language):
        steps = re.findall(rf"({'|'.join(words)})(\d+)", problem.question)
        value = int(re.search(r"\d+", problem.question)[0])
        for word, number in steps:
            value = {"+": value + int(number), "-": value - int(number), "*": value * int(number)}[words[word]]
        options = dict(re.findall(r"^([A-D])\. (-?\d+)$", problem.question, re.MULTILINE))
        assert [letter for letter, shown in options.items() if int(shown) == value] == [problem.answer]
        assert len(set(options.values())) == 4
        assert verify(problem, f"({problem.answer.lower()})")
        assert not verify(problem, str(value)) and not verify(problem, "ABCD") and not verify(problem, "A or B")


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("choice", Puzzle(5, (("+", 2), ("pick", (7, 8, 9, 10)))), Puzzle(5, (("+", 2), ("pick", (10, 4, 7, 1))))),
        (
            "table",
            Puzzle(((0, 1), (2, 3), ((5, 6), (7, 8))), ((0, 2, 5), (1, 3, 8))),
            Puzzle(((4, 2), (0, 1), ((5, 6), (7, 8))), ((2, 1, 8), (4, 0, 5))),
        ),
    ],
)
def test_equivalent_puzzles_have_the_same_key(name, first, second):
    """Train and test problems must not differ only in options, people or the order of addends."""
    assert problem_key(PUZZLES[name], first) == problem_key(PUZZLES[name], second)


def test_neither_letter_nor_size_reveals_the_correct_option():
    letters, ranks = Counter(), Counter()
    for problem, _ in sampled("choice", "en", 1200):
        options = dict(re.findall(r"^([A-D])\. (-?\d+)$", problem.question, re.MULTILINE))
        letters[problem.answer] += 1
        ranks[sorted(map(int, options.values())).index(int(options[problem.answer]))] += 1
        gaps = {b - a for a, b in pairwise(sorted(map(int, options.values())))}
        assert len(gaps) == 1
    both = [*letters.values(), *ranks.values()]
    assert len(both) == 8 and max(both) < 1200 * 0.25 * 1.2
    shown = [re.findall(r"^[A-D]\. (-?\d+)$", p.question, re.MULTILINE) for p, _ in sampled("choice", "en", 60)]
    assert sum(sorted(map(int, values)) == list(map(int, values)) for values in shown) < 15
