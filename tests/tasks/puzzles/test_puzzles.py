"""Puzzle tasks against independent solvers; separation of splits and wordings."""

import random
import re

import pytest

from tests.problems import rows
from thinkstack.tasks.puzzles import puzzle as puzzles
from thinkstack.tasks.puzzles.kinship import COMPOSE, RELATION, TERMS
from thinkstack.tasks.puzzles.puzzle import (
    Puzzle,
    digest,
    generate_puzzle,
    make_problem,
    problem_key,
    reference_answer,
    solve,
)
from thinkstack.tasks.table import PUZZLES, puzzle_tasks
from thinkstack.types import ConfigError

DEMO = ("chain", "nested", "cups", "kinship")
"""The tasks of the measured demo; tests/tasks/puzzles/test_every_puzzle.py tests all tasks."""
EACH = pytest.mark.parametrize("task", puzzle_tasks(rows(*DEMO)), ids=DEMO)


def last_digit(text: str) -> int:
    """Evaluate a bracketed expression with Python; reducing at the end gives the same last digit."""
    assert re.fullmatch(r"[-+*()\d]+", text)
    return eval(text) % 10


def left_to_right(text: str) -> int:
    """Evaluate a chain with Python, with brackets that force left-to-right order."""
    tokens = re.findall(r"[-+*]|\d", text)
    expression = tokens[0]
    for sign, digit in zip(tokens[1::2], tokens[2::2], strict=True):
        expression = f"({expression}){sign}{digit}"
    return last_digit(expression)


def solve_cups(question: str) -> int:
    """Simulate the swaps on a row of cups."""
    start = int(re.search(r"cup (\d)|在(\d)号杯", question).group(0).strip("cup 在号杯"))
    row = [place == start for place in range(6)]
    for first, second in re.findall(r"(\d)-(\d)", question):
        row[int(first)], row[int(second)] = row[int(second)], row[int(first)]
    return row.index(True)


GENERATION = {"parent": 1, "child": -1, "sibling": 0, "grandparent": 2, "grandchild": -2, "pibling": 1, "nibling": -1}
GENERATION |= {"great-grandparent": 3, "great-grandchild": -3, "great-pibling": 2, "great-nibling": -2, "cousin": 0}


def relatives() -> dict[str, set[tuple[str, str]]]:
    """Return all pairs of each relation in a family of five generations in which everybody has three children."""
    parent = {"": None}
    line = [""]
    for _ in range(4):
        line = [person + child for person in line for child in "abc"]
        parent |= {person: person[:-1] for person in line}

    def up(person: str | None, steps: int) -> str | None:
        for _ in range(steps):
            person = None if person is None else parent[person]
        return person

    pairs: dict[str, set[tuple[str, str]]] = {relation: set() for relation in TERMS}
    for a in parent:
        for b in parent:
            if a == b:
                continue
            rules = {
                "parent": up(b, 1) == a,
                "child": up(a, 1) == b,
                "sibling": parent[a] is not None and up(a, 1) == up(b, 1),
                "grandparent": up(b, 2) == a,
                "grandchild": up(a, 2) == b,
                "great-grandparent": up(b, 3) == a,
                "great-grandchild": up(a, 3) == b,
                "pibling": up(b, 2) is not None and up(a, 1) == up(b, 2) and up(b, 1) != a,
                "nibling": up(a, 2) is not None and up(b, 1) == up(a, 2) and up(a, 1) != b,
                "great-pibling": up(b, 3) is not None and up(a, 1) == up(b, 3) and up(b, 2) != a,
                "great-nibling": up(a, 3) is not None and up(b, 1) == up(a, 3) and up(a, 2) != b,
                "cousin": up(a, 2) is not None and up(a, 2) == up(b, 2) and up(a, 1) != up(b, 1),
            }
            for relation, holds in rules.items():
                if holds:
                    pairs[relation].add((a, b))
    return pairs


def test_the_table_of_relations_holds_in_a_real_family_tree():
    """For all distinct X, Y, Z where X is the r of Y and Y is the s of Z, X is the COMPOSE[r][s] of Z; at least one
    such triple exists."""
    pairs = relatives()
    of = {relation: {} for relation in pairs}
    for relation, members in pairs.items():
        for a, b in members:
            of[relation].setdefault(a, set()).add(b)
    for first, row in COMPOSE.items():
        for second, result in row.items():
            chains = {(x, z) for x, y in pairs[first] for z in of[second].get(y, ()) if z != x}
            assert chains, (first, second)
            assert chains <= pairs[result], (first, second, result)


def test_a_kinship_problem_states_its_facts_and_asks_for_the_ends():
    puzzle = Puzzle("mother", ("brother", "son"), ("Ann", "Ben", "Leo", "Sam"))
    problem = make_problem(PUZZLES["kinship"], puzzle, "en", 0)
    facts = "Ann is Ben's mother. Ben is Leo's brother. Leo is Sam's son."
    assert problem.question == f"{facts} What is Ann to Sam?"


@pytest.mark.parametrize("level", range(2, 7))
def test_chain_answers_are_pythons(level):
    for seed in range(200):
        puzzle = generate_puzzle(PUZZLES["chain"], "train", level, seed)
        text = PUZZLES["chain"].operands(puzzle, "en")["puzzle"]
        assert int(reference_answer(PUZZLES["chain"], puzzle, "en")) == left_to_right(text)


@pytest.mark.parametrize("level", range(2, 7))
def test_nested_answers_are_pythons(level):
    for seed in range(200):
        puzzle = generate_puzzle(PUZZLES["nested"], "train", level, seed)
        text = PUZZLES["nested"].operands(puzzle, "en")["puzzle"]
        assert int(reference_answer(PUZZLES["nested"], puzzle, "en")) == last_digit(text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_cups_answers_follow_a_real_ball(language):
    for seed in range(300):
        puzzle = generate_puzzle(PUZZLES["cups"], "train", 2 + seed % 5, seed)
        problem = make_problem(PUZZLES["cups"], puzzle, language, seed % 6)
        assert int(problem.answer) == solve_cups(problem.question)


def test_every_solution_line_of_arithmetic_is_true():
    for name in ("chain", "nested"):
        for seed in range(200):
            puzzle = generate_puzzle(PUZZLES[name], "train", 2 + seed % 5, seed)
            solution = solve(PUZZLES[name], puzzle, "en")
            for line in solution.lines:
                left, right = line.split("=")
                assert last_digit(left) == int(right)
            assert solution.lines[-1].endswith(f"={solution.answer}")


def test_every_solution_line_of_cups_is_true():
    for seed in range(200):
        solution = solve(PUZZLES["cups"], generate_puzzle(PUZZLES["cups"], "train", 4, seed), "zh")
        for line in solution.lines:
            first, second, before, after = re.fullmatch(r"(\d)-(\d):(\d)>(\d)", line).groups()
            assert after == {first: second, second: first}.get(before, before)


def test_every_solution_line_of_kinship_is_in_the_table():
    for seed in range(200):
        solution = solve(PUZZLES["kinship"], generate_puzzle(PUZZLES["kinship"], "train", 4, seed), "en")
        for line in solution.lines:
            before, op, after = re.fullmatch(r"(\S+) of (\S+) = (\S+)", line).groups()
            relation = COMPOSE[RELATION[before]][RELATION[op]]
            assert after in TERMS[relation]
            assert TERMS[relation].index(after) == TERMS[RELATION[before]].index(before) or relation == "cousin"


@EACH
def test_each_line_starts_from_the_result_of_the_one_before(task):
    """The error of a wrong step propagates, so every later line follows from the line before it."""
    for seed in range(100):
        puzzle = generate_puzzle(task, "train", 5, seed)
        solution = solve(task, puzzle, "en", random.Random(seed))
        state = task.first_state(puzzle)
        wrong = 0
        for line, op in zip(solution.lines, puzzle.ops, strict=True):
            right = task.line(state, op, task.advance(state, op), "en")
            wrong += line != right
            every_state = task.other_states(None)
            (state,) = [after for after in every_state if line == task.line(state, op, after, "en")]
        assert wrong == 1
        assert solution.answer == task.answer(puzzle, state, "en")


@EACH
def test_a_solution_without_mistakes_is_correct(task):
    for seed in range(50):
        puzzle = generate_puzzle(task, "test", 3, seed)
        solution = solve(task, puzzle, "en")
        assert solution.is_correct
        assert solution.answer == reference_answer(task, puzzle, "en")


def test_a_wrong_solution_reports_whether_its_answer_is_correct():
    """In cups a later swap may undo a wrong step; is_correct depends on the answer, not on the mistake."""
    task = PUZZLES["cups"]
    seen = set()
    for seed in range(500):
        puzzle = generate_puzzle(task, "train", 6, seed)
        solution = solve(task, puzzle, "en", random.Random(seed))
        assert solution.is_correct == (solution.answer == reference_answer(task, puzzle, "en"))
        seen.add(solution.is_correct)
    assert False in seen


@EACH
def test_no_problem_is_in_both_splits(task):
    """Overlapping seeds, all levels, 400 samples each: no common key, and each key belongs to its split."""
    keys = {
        split: {
            problem_key(task, generate_puzzle(task, split, level, seed)) for level in task.levels for seed in range(400)
        }
        for split in puzzles.SPLITS
    }
    assert not keys["train"] & keys["test"]
    for split, found in keys.items():
        assert {puzzles.split_of(key) for key in found} == {split}


@EACH
def test_the_key_does_not_depend_on_wording_or_language(task):
    for seed in range(20):
        puzzle = generate_puzzle(task, "test", 4, seed)
        worded = [
            make_problem(task, puzzle, language, wording)
            for language, wordings in task.wordings.items()
            for wording in range(len(wordings))
        ]
        assert len({problem.key for problem in worded}) == 1
        assert len({problem.question for problem in worded}) == len(worded)


def test_the_key_does_not_depend_on_peoples_names():
    """Regression: every kinship test problem of level 2 was a training problem with other names."""
    first = Puzzle("mother", ("brother",), ("Ann", "Ben", "Leo"))
    second = Puzzle("mother", ("brother",), ("Mia", "Tom", "Max"))
    assert problem_key(PUZZLES["kinship"], first) == problem_key(PUZZLES["kinship"], second)


@EACH
def test_the_key_depends_on_every_operand(task):
    puzzle = generate_puzzle(task, "train", 4, 0)
    shorter = Puzzle(puzzle.start, puzzle.ops[:-1], puzzle.names)
    turned = Puzzle(puzzle.start, puzzle.ops[::-1], puzzle.names)
    assert len({problem_key(task, p) for p in (puzzle, shorter, turned)}) == (3 if turned.ops != puzzle.ops else 2)


@EACH
def test_one_problem_in_eight_is_a_test_problem(task):
    sampled = [problem_key(task, task.generate(random.Random(seed), 6)) for seed in range(4000)]
    share = sum(puzzles.split_of(key) == "test" for key in sampled) / 4000
    assert share == pytest.approx(1 / 8, abs=0.03)


@EACH
def test_all_answers_occur_and_none_dominates(task):
    """If one answer is frequent, always giving it earns reward."""
    answers = [reference_answer(task, generate_puzzle(task, "train", 4, seed), "en") for seed in range(1500)]
    most = max(answers.count(answer) for answer in set(answers)) / len(answers)
    assert most < task.chance * 1.35


@EACH
def test_generation_is_a_function_of_its_arguments(task):
    assert generate_puzzle(task, "train", 3, 5) == generate_puzzle(task, "train", 3, 5)
    assert generate_puzzle(task, "train", 3, 5) != generate_puzzle(task, "train", 3, 6)


def test_neighboring_seeds_share_no_stream():
    """Seeds computed by addition overlap: item i of seed s + 1 is item i + 1 of seed s."""
    first = [generate_puzzle(PUZZLES["nested"], "train", 6, (1, index)) for index in range(100)]
    second = [generate_puzzle(PUZZLES["nested"], "train", 6, (2, index)) for index in range(100)]
    assert not set(first) & set(second)


def test_the_digest_keeps_its_value():
    """The digest determines every seed and split; a change would change all published splits."""
    assert digest("a", 1) == 0x178CFCCC04B3E5AE
    assert digest("a", 1) != digest("a1")


@pytest.mark.parametrize(
    ("split", "level", "part"), [("valid", 2, "unknown split 'valid'"), ("train", 9, "has no level 9")]
)
def test_unknown_splits_and_levels_are_refused(split, level, part):
    with pytest.raises(ConfigError, match=part):
        generate_puzzle(PUZZLES["chain"], split, level, 0)


def test_a_language_without_wordings_is_refused():
    puzzle = generate_puzzle(PUZZLES["kinship"], "train", 2, 0)
    with pytest.raises(ConfigError, match="it has en"):
        make_problem(PUZZLES["kinship"], puzzle, "zh", 0)
