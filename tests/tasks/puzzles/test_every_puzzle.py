"""Properties of every puzzle task: levels, wordings, solutions, mistakes, keys, the chance of a blind guess."""

import random
import re
from collections import Counter
from itertools import combinations

import pytest

from tests.problems import verify
from thinkstack.tasks.puzzles import puzzle as puzzles
from thinkstack.tasks.puzzles.puzzle import (
    Verifier,
    generate_puzzle,
    make_problem,
    problem_key,
    reference_answer,
    solve,
)
from thinkstack.tasks.table import PUZZLES
from thinkstack.tasks.task import MAX_ANSWER_CHARACTERS

EACH = pytest.mark.parametrize("task", PUZZLES.values(), ids=PUZZLES)
EACH_LANGUAGE = pytest.mark.parametrize(
    ("task", "language"),
    [(task, language) for task in PUZZLES.values() for language in task.wordings],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


def puzzle_at(task, seed, split="train"):
    """Return puzzle number `seed`; levels alternate."""
    return generate_puzzle(task, split, task.levels[seed % len(task.levels)], seed)


def operands(template):
    return set(re.findall(r"{(\w+)}", template))


@EACH
def test_a_task_has_three_levels_and_six_wordings_per_language(task):
    assert len(task.levels) >= 3 and list(task.levels) == sorted(set(task.levels))
    assert set(task.wordings) == ({"en"} if task.name == "kinship" else {"en", "zh"})
    for templates in task.wordings.values():
        assert len(set(templates)) == len(templates) >= 5
        assert len({frozenset(operands(template)) for template in templates}) == 1


def test_at_least_ten_tasks_have_both_languages():
    assert sum(set(task.wordings) == {"en", "zh"} for task in PUZZLES.values()) >= 10


@EACH_LANGUAGE
def test_the_level_is_the_number_of_operations_and_of_solution_lines(task, language):
    for seed, level in enumerate(task.levels * 5):
        puzzle = generate_puzzle(task, "train", level, seed)
        assert len(puzzle.ops) == level == make_problem(task, puzzle, language, 0).level
        lines = solve(task, puzzle, language).lines
        assert len(lines) == level
        assert all(("=" in line or ">" in line) and "\n" not in line for line in lines)


@EACH_LANGUAGE
def test_the_reference_answer_is_accepted_and_short(task, language):
    for seed in range(60):
        problem = make_problem(task, puzzle_at(task, seed), language, 0)
        assert verify(problem, problem.answer) and verify(problem, f" {problem.answer}. ")
        assert len(problem.answer) <= MAX_ANSWER_CHARACTERS
        assert problem.answer == problem.answer.strip() != ""


@EACH_LANGUAGE
def test_a_solution_ends_in_the_reference_answer(task, language):
    for seed in range(60):
        puzzle = puzzle_at(task, seed)
        solution = solve(task, puzzle, language)
        assert solution.is_correct
        assert solution.answer == reference_answer(task, puzzle, language)
        if task.name != "program":  # its last line may show another variable
            assert solution.answer.strip(" .") in solution.lines[-1]


@EACH_LANGUAGE
def test_a_wrong_solution_has_one_wrong_step_whose_error_propagates(task, language):
    for seed in range(60):
        puzzle = puzzle_at(task, seed)
        solution, state, wrong = solve(task, puzzle, language, random.Random(seed)), task.first_state(puzzle), 0
        for line, op in zip(solution.lines, puzzle.ops, strict=True):
            right = task.advance(state, op)
            if line == task.line(state, op, right, language):
                state = right
                continue
            wrong += 1
            others = task.other_states(right)
            state = next(other for other in others if line == task.line(state, op, other, language))
        assert wrong == 1
        assert solution.answer == task.answer(puzzle, state, language)


@EACH_LANGUAGE
def test_mistakes_are_refused(task, language):
    """The answer of a wrong solution is refused unless a later step happens to undo the error, which is rare."""
    refused = 0
    for seed in range(120):
        puzzle = puzzle_at(task, seed)
        problem, solution = make_problem(task, puzzle, language, 0), solve(task, puzzle, language, random.Random(seed))
        assert verify(problem, solution.answer) == solution.is_correct
        assert solution.is_correct or solution.answer != problem.answer
        refused += not solution.is_correct
    assert refused >= 80


@EACH_LANGUAGE
def test_more_than_one_answer_is_refused(task, language):
    for seed in range(30):
        problem, other = (make_problem(task, puzzle_at(task, s), language, 0) for s in (seed, seed + 1000))
        if verify(problem, other.answer):
            continue
        for answer in (f"{problem.answer} {other.answer}", f"{problem.answer} or {other.answer}", problem.question, ""):
            assert not verify(problem, answer)
        assert not verify(problem, None)


@EACH
def test_the_key_is_the_same_in_all_wordings_and_languages(task):
    for seed in range(20):
        puzzle = puzzle_at(task, seed, "test")
        worded = [
            make_problem(task, puzzle, language, wording)
            for language, templates in task.wordings.items()
            for wording in range(len(templates))
        ]
        assert {problem.key for problem in worded} == {problem_key(task, puzzle)}
        assert len({problem.question for problem in worded}) == len(worded)


@EACH
def test_the_same_question_has_the_same_key(task):
    """Otherwise one problem could be in both splits. Sampled without a split, at the level with the fewest problems."""
    keys = {}
    for seed in range(1500):
        puzzle = task.generate(random.Random(seed), task.levels[0])
        keys.setdefault(make_problem(task, puzzle, "en", 0).question, set()).add(problem_key(task, puzzle))
    assert {len(found) for found in keys.values()} == {1}


@EACH
def test_no_problem_is_in_both_splits_and_one_in_eight_is_in_test(task):
    train, test = ({problem_key(task, puzzle_at(task, s, split)) for s in range(400)} for split in puzzles.SPLITS)
    assert not train & test
    sampled = {problem_key(task, task.generate(random.Random(seed), task.levels[-1])) for seed in range(1500)}
    share = sum(puzzles.split_of(key) == "test" for key in sampled) / len(sampled)
    assert share == pytest.approx(1 / 8, abs=0.03)


@EACH_LANGUAGE
def test_the_stated_chance_is_that_of_the_best_blind_guess(task, language):
    """The best blind guess is the most common answer of the level."""
    hits, count = 0, 1000
    for level in task.levels:
        answers = [
            reference_answer(task, generate_puzzle(task, "train", level, seed), language) for seed in range(count)
        ]
        commonest = Counter(answers[: count // 2]).most_common(1)[0][0]
        hits += answers[count // 2 :].count(commonest)
    rate = hits / (count // 2 * len(task.levels))
    assert rate < task.chance * 1.2 + 0.01
    if task.chance > 0.02 and language == "en":
        assert rate > task.chance * 0.5


@EACH_LANGUAGE
def test_the_question_does_not_contain_the_answer_at_a_fixed_place(task, language):
    """Copying the word at any fixed place, counted from the start or the end, is no better than guessing."""
    hits, count = Counter(), 400
    for seed in range(count):
        problem = make_problem(task, puzzle_at(task, seed), language, 0)
        words = re.findall(r"-?[0-9]+|[a-z]+(?:-[a-z]+)?|[A-D]\b|[\u4e00-\u9fff]", problem.question)
        for place in range(-min(len(words), 25), min(len(words), 25)):
            hits[place] += verify(problem, words[place])
    assert max(hits.values()) / count < task.chance * 1.5 + 0.03


@EACH
def test_verifying_any_answer_raises_no_error(task):
    """For any model output the verifier returns a bool and does not raise."""
    problem = make_problem(task, puzzle_at(task, 0), "en", 0)
    rng = random.Random(0)
    texts = [
        "(" * 60,
        "1/0",
        "((1)",
        "9" * 60,
        "--1",
        "1e9",
        "²",
        "½",
        "x=",
        ",",
        "、",
        "[",
        "[]",
        "x=1,x=1",
        "٣",
        "\n",
    ]
    texts += [
        "".join(rng.choice("0123456789+-*/()=, x.ABand") for _ in range(rng.randrange(1, 30))) for _ in range(300)
    ]
    for text in texts:
        assert verify(problem, text) in (True, False)


def test_the_verifiers_are_the_tasks_whose_answers_have_several_spellings():
    verifiers = {name for name, task in PUZZLES.items() if isinstance(task, Verifier)}
    assert verifiers == {"quadratic", "choice"}


def test_no_two_tasks_share_a_question():
    questions = {
        name: {make_problem(f, puzzle_at(f, s), "en", s % 6).question for s in range(100)}
        for name, f in PUZZLES.items()
    }
    for first, second in combinations(questions, 2):
        assert not questions[first] & questions[second]
