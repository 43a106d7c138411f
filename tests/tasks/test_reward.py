"""Strict comparison of answers, and the parts of the reward."""

import inspect
from dataclasses import replace

import pytest

from tests.problems import make_problem, scored
from thinkstack.config import build
from thinkstack.rl.config import RLConfig
from thinkstack.tasks.reward import RewardConfig
from thinkstack.tasks.task import MAX_ANSWER_CHARACTERS
from thinkstack.tasks.verify.answers import is_correct, normalize, same_choice, same_numbers
from thinkstack.types import ConfigError

FOUR = make_problem()
RIGHT, WRONG = "<think>2+2=4</think><answer>4</answer>", "<think>2+2=5</think><answer>5</answer>"
BARE = "<answer>4</answer>"


def accuracy(problem, text, thinking_format="think_answer_tags"):
    return scored(problem, text, thinking_format=thinking_format).parts["accuracy"]


@pytest.mark.parametrize("answer", ["4", " 4 ", "4.", "+4", "04", "４", "4。"])
def test_the_same_integer_is_correct_in_any_spelling(answer):
    assert is_correct("4", answer)


@pytest.mark.parametrize("answer", ["2+2", "4%", "4.0", "4 or 5", "3,4", "x=4", "-4", "", "four", "40", "4/1", "$4$"])
def test_answers_are_not_evaluated(answer):
    """A verifier that evaluates answers accepts the question itself as an answer."""
    assert not is_correct("4", answer)


def test_thousands_may_be_marked():
    assert is_correct("12345", "12,345")
    assert not is_correct("12345", "1,2345")
    assert normalize("1,2") == "1,2"


@pytest.mark.parametrize("answer", ["uncle", "Uncle", " uncle.", "UNCLE"])
def test_words_are_compared_without_case_or_full_stop(answer):
    assert is_correct("uncle", answer)
    assert not is_correct("aunt", answer)


@pytest.mark.parametrize(("reference", "answer"), [("52", "5²"), ("1", "①"), ("3", "٣")])
def test_only_full_width_digits_are_normalized(reference, answer):
    """Regression: compatibility normalization (NFKC) read a superscript 2 as a second digit."""
    assert not is_correct(reference, answer)


@pytest.mark.parametrize(
    ("same", "reference", "answer", "expected"),
    [
        (same_numbers, "1/2", "0.5", True),
        (same_numbers, "1/2", "2/4", True),
        (same_numbers, "-3", "-3.0", True),
        (same_numbers, "1/3", "0.333", False),
        (same_numbers, "2", "1+1", False),
        (same_numbers, "5", "1/0", False),
        (same_numbers, "5", "5 apples", False),
        (same_choice, "B", "(b)", True),
        (same_choice, "B", "B.", True),
        (same_choice, "B", "B or C", False),
        (same_choice, "B", "BB", False),
        (same_numbers, "-3, -2", "x=-2 or x=-3", True),
        (same_numbers, "1/2, 3", "3 和 0.5", True),
        (same_numbers, "-3, -2", "-3, -2, -2", False),
        (same_numbers, "-3, -2", "-3", False),
        (same_numbers, "5", "x = 5", True),
        (same_numbers, "5", "y=x=5", False),
    ],
)
def test_numbers_and_choices_are_compared_by_value(same, reference, answer, expected):
    assert same(reference, answer) is expected


def test_no_answer_is_wrong():
    assert not is_correct("4", None)
    assert not is_correct("None", None)


def test_the_reference_comes_first():
    """A verifier with swapped arguments accepts wrong answers; the order is part of the interface."""
    assert list(inspect.signature(is_correct).parameters) == ["reference", "answer"]


def test_accuracy_reads_the_answer_block_only():
    """A number in the thinking, or elsewhere in the text, earns no reward."""
    assert accuracy(FOUR, RIGHT) == 1.0
    assert accuracy(FOUR, BARE) == 1.0
    assert accuracy(FOUR, "<think>4</think>") == 0.0
    assert accuracy(FOUR, "<think>4</think><answer>5</answer>") == 0.0
    assert accuracy(FOUR, "4") == 0.0


def test_two_answers_count_as_none():
    """Listing every candidate earns no reward."""
    assert accuracy(FOUR, "<think>x</think><answer>4</answer><answer>5</answer>") == 0.0
    assert accuracy(FOUR, "<think>x</think><answer>4 5</answer>") == 0.0


def test_a_long_answer_counts_as_none():
    padded = "0" * MAX_ANSWER_CHARACTERS + "4"
    assert accuracy(FOUR, f"<think>x</think><answer>{padded}</answer>") == 0.0
    assert accuracy(FOUR, f"<think>x</think><answer>{padded[1:]}</answer>") == 1.0


def test_the_length_limit_applies_to_the_answer_and_not_to_the_text_around_it():
    """Regression: in "think_then_answer" any answer text of more than 64 characters earned 0, with or without a box."""
    prose = "The ducks lay 16 eggs. She eats 3 and bakes with 4, so that 9 are left, at 2 dollars each. " * 3
    ducks = replace(FOUR, answer="18", task="gsm8k")
    for thinking_format, opening in (("think_then_answer", "<think>\n9*2=18\n</think>\n\n"), ("flexible_extract", "")):
        assert accuracy(ducks, f"{opening}{prose}**Answer:** \\boxed{{18}}", thinking_format) == 1.0
        assert accuracy(ducks, f"{opening}{prose}**Answer:** \\boxed{{9}}", thinking_format) == 0.0
        assert accuracy(ducks, f"{opening}{prose}\\boxed{{18}} or \\boxed{{9}}", thinking_format) == 0.0
        assert accuracy(ducks, f"{opening}{prose}\\boxed{{{'0' * MAX_ANSWER_CHARACTERS}18}}", thinking_format) == 0.0
    assert accuracy(ducks, f"<think>x</think><answer>{prose}\\boxed{{18}}</answer>") == 0.0


def test_answers_of_stock_models_are_verified_by_their_task():
    ducks, kin = replace(FOUR, answer="22", task="gsm8k"), replace(FOUR, answer="uncle", task="kin")
    for text in ("#### 22", "The answer is 22", "She has $22.", "4 + 18 = 22", "**Answer:** 22 dollars"):
        assert scored(ducks, text, thinking_format="flexible_extract").total == 1.0
        assert scored(ducks, text).total == 0.0
    assert accuracy(kin, "He is the brother, so the answer is **uncle**.", "flexible_extract") == 1.0


def test_a_long_reference_allows_a_long_answer():
    rows = replace(FOUR, answer="12 " * 40 + "7", task="grid")
    assert accuracy(rows, f"<think>x</think><answer>{rows.answer}</answer>") == 1.0
    assert accuracy(rows, f"<think>x</think><answer>{rows.answer} {rows.answer}</answer>") == 0.0


def test_the_tasks_verifier_decides():
    made = replace(FOUR, answer="-3, -2", task="quadratic")
    assert accuracy(made, "<think>x</think><answer>x=-2 or x=-3</answer>") == 1.0
    assert accuracy(made, "<think>x</think><answer>-3</answer>") == 0.0
    assert accuracy(replace(made, task="chain"), "<think>x</think><answer>x=-2 or x=-3</answer>") == 0.0


def test_the_questions_own_text_is_not_an_answer():
    """Copying the prompt or the reference outside the tags earns no reward."""
    assert accuracy(FOUR, f"{FOUR.question} {FOUR.answer}") == 0.0


@pytest.mark.parametrize(
    ("parts", "right", "bare", "wrong"),
    [
        ({"accuracy_if_formatted": 1.0}, 1.0, 0.0, 0.0),
        ({"accuracy": 1.0, "format": 0.5}, 1.5, 1.0, 0.5),
        ({"accuracy": 1.0, "format": 1.0}, 2.0, 1.0, 1.0),
        ({"format": 1.0}, 1.0, 0.0, 1.0),
    ],
)
def test_the_reward_is_the_weighted_sum_of_its_parts(parts, right, bare, wrong):
    assert [scored(FOUR, text, parts=parts).total for text in (RIGHT, BARE, WRONG)] == [right, bare, wrong]


def test_the_format_alone_earns_nothing_by_default():
    """An additive format reward is paid for wrong answers."""
    assert RewardConfig().parts == {"accuracy_if_formatted": 1.0}


def test_the_parts_of_a_stage_replace_the_default():
    cfg = build(RLConfig, {"start": "x", "reward": {"parts": {"format": 1.0}}})
    assert cfg.reward == RewardConfig(parts={"format": 1.0})


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 1),
        ("one two three four five", 1),  # 5 words have no run of 6
        ("one two three four five six seven", 1),
        ("wait no " * 50, 2 / 95),  # 100 words, 95 runs, which start with "wait" or with "no"
        ("a b c d e f " * 2, 6 / 7),  # the first run occurs again at the end
        ("\u5c0f\u660e\u6709\u516d\u4e2a\u676f" * 2, 6 / 7),
    ],
)
def test_repetition_lowers_a_part_of_the_reward(text, share):
    assert scored(FOUR, text, parts={"no_repetition": 1.0}).total == pytest.approx(share, abs=0)


def test_accuracy_and_format_are_reported_whatever_the_parts():
    for name in ("accuracy_if_formatted", "accuracy", "format"):
        assert scored(FOUR, WRONG, parts={name: 1.0}).parts == {"accuracy": 0.0, "format": 1.0}
    assert scored(FOUR, BARE).parts["format"] == 0.0


def test_the_random_control_is_a_fair_coin_independent_of_correctness():
    texts = [f"<think>{index}</think><answer>4</answer>" for index in range(1000)]
    totals = [scored(FOUR, text, parts={"random": 1.0}).total for text in texts]
    assert sum(totals) / 1000 == pytest.approx(0.5, abs=0.05)
    assert totals == [scored(FOUR, text, parts={"random": 1.0}).total for text in texts]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"format": -0.1}, "would punish what format rewards"),
        ({"acuracy": 1.0}, "unknown part reward.parts.'acuracy'; did you mean accuracy"),
        ({}, "has no part; choose from accuracy, format"),
    ],
)
def test_parts_that_make_no_reward_are_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        RewardConfig(parts=parts)
