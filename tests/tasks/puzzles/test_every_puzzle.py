"""What every family of the table promises: levels, wordings, workings, mistakes, keys, nothing for a blind guess."""

import random
import re
from collections import Counter
from itertools import combinations

import pytest

from thinkstack.tasks.puzzles import puzzle as puzzles
from thinkstack.tasks.puzzles.puzzle import Verifier, generate_puzzle, key_of, pose, right_answer, work
from thinkstack.tasks.reward import MAX_ANSWER_CHARACTERS
from thinkstack.tasks.table import PUZZLES, verify

EACH = pytest.mark.parametrize("task", PUZZLES.values(), ids=PUZZLES)
SPOKEN = pytest.mark.parametrize(
    ("task", "language"),
    [(task, language) for task in PUZZLES.values() for language in task.wordings],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


def puzzle_at(task, seed, split="train"):
    """Puzzle number `seed`, levels in turn."""
    return generate_puzzle(task, split, task.levels[seed % len(task.levels)], seed)


def operands(template):
    return set(re.findall(r"{(\w+)}", template))


@EACH
def test_a_family_has_three_levels_and_six_wordings_of_each_language(task):
    assert len(task.levels) >= 3 and list(task.levels) == sorted(set(task.levels))
    assert set(task.wordings) == ({"en"} if task.name == "kinship" else {"en", "zh"})
    for templates in task.wordings.values():
        assert len(set(templates)) == len(templates) >= 5
        assert len({frozenset(operands(template)) for template in templates}) == 1


def test_ten_families_and_more_speak_both_languages():
    assert sum(set(task.wordings) == {"en", "zh"} for task in PUZZLES.values()) >= 10


@SPOKEN
def test_a_level_is_the_number_of_operations_and_of_worked_lines(task, language):
    for seed, level in enumerate(task.levels * 5):
        puzzle = generate_puzzle(task, "train", level, seed)
        assert len(puzzle.ops) == level == pose(task, puzzle, language, 0).level
        lines = work(task, puzzle, language).lines
        assert len(lines) == level
        assert all(("=" in line or ">" in line) and "\n" not in line for line in lines)


@SPOKEN
def test_the_reference_answer_is_accepted_and_short(task, language):
    for seed in range(60):
        problem = pose(task, puzzle_at(task, seed), language, 0)
        assert verify(problem, problem.answer) and verify(problem, f" {problem.answer}. ")
        assert len(problem.answer) <= MAX_ANSWER_CHARACTERS
        assert problem.answer == problem.answer.strip() != ""


@SPOKEN
def test_a_working_ends_in_the_reference_answer(task, language):
    for seed in range(60):
        puzzle = puzzle_at(task, seed)
        working = work(task, puzzle, language)
        assert working.is_right
        assert working.answer == right_answer(task, puzzle, language)
        if task.name != "program":  # its last line may show another variable
            assert working.answer.strip(" .") in working.lines[-1]


@SPOKEN
def test_one_step_of_a_wrong_working_is_wrong_and_its_error_is_carried_on(task, language):
    for seed in range(60):
        puzzle = puzzle_at(task, seed)
        working, state, wrong = work(task, puzzle, language, random.Random(seed)), task.first_state(puzzle), 0
        for line, op in zip(working.lines, puzzle.ops, strict=True):
            right = task.advance(state, op)
            if line == task.line(state, op, right, language):
                state = right
                continue
            wrong += 1
            others = task.other_states(right)
            state = next(other for other in others if line == task.line(state, op, other, language))
        assert wrong == 1
        assert working.answer == task.answer(puzzle, state, language)


@SPOKEN
def test_mistakes_are_refused(task, language):
    """A wrong working's answer is refused unless its error was undone, which is rare."""
    refused = 0
    for seed in range(120):
        puzzle = puzzle_at(task, seed)
        problem, working = pose(task, puzzle, language, 0), work(task, puzzle, language, random.Random(seed))
        assert verify(problem, working.answer) == working.is_right
        assert working.is_right or working.answer != problem.answer
        refused += not working.is_right
    assert refused >= 80


@SPOKEN
def test_naming_more_than_the_answer_is_refused(task, language):
    for seed in range(30):
        problem, other = (pose(task, puzzle_at(task, s), language, 0) for s in (seed, seed + 1000))
        if verify(problem, other.answer):
            continue
        for answer in (f"{problem.answer} {other.answer}", f"{problem.answer} or {other.answer}", problem.question, ""):
            assert not verify(problem, answer)
        assert not verify(problem, None)


@EACH
def test_the_key_is_the_same_in_all_wordings_and_languages(task):
    for seed in range(20):
        puzzle = puzzle_at(task, seed, "test")
        spoken = [
            pose(task, puzzle, language, wording)
            for language, templates in task.wordings.items()
            for wording in range(len(templates))
        ]
        assert {problem.key for problem in spoken} == {key_of(task, puzzle)}
        assert len({problem.question for problem in spoken}) == len(spoken)


@EACH
def test_the_same_question_has_the_same_key(task):
    """Otherwise one problem could stand in both splits; drawn freely, at the level with the fewest problems."""
    keys = {}
    for seed in range(1500):
        puzzle = task.generate(random.Random(seed), task.levels[0])
        keys.setdefault(pose(task, puzzle, "en", 0).question, set()).add(key_of(task, puzzle))
    assert {len(found) for found in keys.values()} == {1}


@EACH
def test_no_problem_is_in_both_splits_and_one_in_eight_is_for_test(task):
    train, test = ({key_of(task, puzzle_at(task, s, split)) for s in range(400)} for split in puzzles.SPLITS)
    assert not train & test
    drawn = {key_of(task, task.generate(random.Random(seed), task.levels[-1])) for seed in range(1500)}
    share = sum(puzzles.split_of(key) == "test" for key in drawn) / len(drawn)
    assert share == pytest.approx(1 / 8, abs=0.03)


@SPOKEN
def test_the_stated_chance_is_that_of_the_best_blind_guess(task, language):
    """The answer that was commonest at its level."""
    hits, count = 0, 1000
    for level in task.levels:
        answers = [right_answer(task, generate_puzzle(task, "train", level, seed), language) for seed in range(count)]
        commonest = Counter(answers[: count // 2]).most_common(1)[0][0]
        hits += answers[count // 2 :].count(commonest)
    rate = hits / (count // 2 * len(task.levels))
    assert rate < task.chance * 1.2 + 0.01
    if task.chance > 0.02 and language == "en":
        assert rate > task.chance * 0.5


@SPOKEN
def test_the_question_does_not_give_the_answer_away(task, language):
    """Copying the word at any fixed place, from the front or from the back, is no better than guessing."""
    hits, count = Counter(), 400
    for seed in range(count):
        problem = pose(task, puzzle_at(task, seed), language, 0)
        words = re.findall(r"-?[0-9]+|[a-z]+(?:-[a-z]+)?|[A-D]\b|[\u4e00-\u9fff]", problem.question)
        for place in range(-min(len(words), 25), min(len(words), 25)):
            hits[place] += verify(problem, words[place])
    assert max(hits.values()) / count < task.chance * 1.5 + 0.03


@EACH
def test_every_answer_of_a_judging_family_is_judged_without_an_error(task):
    """Whatever a model writes: the checker says no and does not raise."""
    problem = pose(task, puzzle_at(task, 0), "en", 0)
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


def test_the_families_that_judge_are_those_whose_answers_have_more_than_one_form():
    judging = {name for name, task in PUZZLES.items() if isinstance(task, Verifier)}
    assert judging == {"quadratic", "choice"}


def test_no_two_families_ask_the_same_question():
    asked = {name: {pose(f, puzzle_at(f, s), "en", s % 6).question for s in range(100)} for name, f in PUZZLES.items()}
    for first, second in combinations(asked, 2):
        assert not asked[first] & asked[second]
