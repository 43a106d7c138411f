"""Answers are compared strictly and rewards cannot be had for less."""

import inspect
from dataclasses import replace

import pytest

from thinkstack.tasks.reward import MAX_ANSWER_CHARACTERS, RewardConfig, accuracy, format_kept, score
from thinkstack.tasks.verify.answers import is_correct, normalize, same_choice, same_numbers
from thinkstack.types import ConfigError, Problem

FOUR = Problem(question="2+2?", answer="4", task="chain", language="en", level=2, key="0" * 16, wording=0)
RIGHT, WRONG = "<think>2+2=4</think><answer>4</answer>", "<think>2+2=5</think><answer>5</answer>"
BARE = "<answer>4</answer>"


@pytest.mark.parametrize("answer", ["4", " 4 ", "4.", "+4", "04", "４", "4。"])
def test_the_same_integer_is_right_however_written(answer):
    assert is_correct("4", answer)


@pytest.mark.parametrize("answer", ["2+2", "4%", "4.0", "4 or 5", "3,4", "x=4", "-4", "", "four", "40", "4/1", "$4$"])
def test_nothing_is_evaluated_or_guessed(answer):
    """E2.53: a checker that evaluates lets the model answer with the question."""
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
def test_only_full_width_digits_are_made_plain(reference, answer):
    """Compatibility normalization once read a square as a second digit."""
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
def test_numbers_and_choices_are_compared_by_what_they_say(same, reference, answer, expected):
    assert same(reference, answer) is expected


def test_no_answer_is_wrong():
    assert not is_correct("4", None)
    assert not is_correct("None", None)


def test_the_reference_comes_first():
    """E2.52: verifiers whose arguments are swapped accept what they should not; the order is part of the interface."""
    assert list(inspect.signature(is_correct).parameters) == ["reference", "answer"]


def test_accuracy_reads_the_answer_block_only():
    """E2.54: the number standing in the thinking, or somewhere in the text, earns nothing."""
    assert accuracy(FOUR, RIGHT) == 1.0
    assert accuracy(FOUR, BARE) == 1.0
    assert accuracy(FOUR, "<think>4</think>") == 0.0
    assert accuracy(FOUR, "<think>4</think><answer>5</answer>") == 0.0
    assert accuracy(FOUR, "4") == 0.0


def test_two_answers_are_none():
    """E2.54: naming every candidate must not win."""
    assert accuracy(FOUR, "<think>x</think><answer>4</answer><answer>5</answer>") == 0.0
    assert accuracy(FOUR, "<think>x</think><answer>4 5</answer>") == 0.0


def test_a_long_answer_is_none():
    padded = "0" * MAX_ANSWER_CHARACTERS + "4"
    assert accuracy(FOUR, f"<think>x</think><answer>{padded}</answer>") == 0.0
    assert accuracy(FOUR, f"<think>x</think><answer>{padded[1:]}</answer>") == 1.0


def test_the_limit_holds_for_the_answer_and_not_for_the_text_around_it():
    """In the open form any answer of more than 64 characters earned 0, box or not."""
    prose = "The ducks lay 16 eggs. She eats 3 and bakes with 4, so that 9 are left, at 2 dollars each. " * 3
    ducks = replace(FOUR, answer="18", task="gsm8k")
    for form, opening in (("think_then_answer", "<think>\n9*2=18\n</think>\n\n"), ("flexible_extract", "")):
        assert accuracy(ducks, f"{opening}{prose}**Answer:** \\boxed{{18}}", form) == 1.0
        assert accuracy(ducks, f"{opening}{prose}**Answer:** \\boxed{{9}}", form) == 0.0
        assert accuracy(ducks, f"{opening}{prose}\\boxed{{18}} or \\boxed{{9}}", form) == 0.0
        assert accuracy(ducks, f"{opening}{prose}\\boxed{{{'0' * MAX_ANSWER_CHARACTERS}18}}", form) == 0.0
    assert accuracy(ducks, f"<think>x</think><answer>{prose}\\boxed{{18}}</answer>") == 0.0


def test_stock_answers_are_judged_by_the_rule_of_their_task():
    ducks, kin = replace(FOUR, answer="22", task="gsm8k"), replace(FOUR, answer="uncle", task="kin")
    for text in ("#### 22", "The answer is 22", "She has $22.", "4 + 18 = 22", "**Answer:** 22 dollars"):
        assert score(ducks, text, RewardConfig(form="flexible_extract")).total == 1.0
        assert score(ducks, text, RewardConfig()).total == 0.0
    assert accuracy(kin, "He is the brother, so the answer is **uncle**.", "flexible_extract") == 1.0


def test_a_reference_that_is_longer_may_be_answered_at_its_length():
    rows = replace(FOUR, answer="12 " * 40 + "7", task="grid")
    assert accuracy(rows, f"<think>x</think><answer>{rows.answer}</answer>") == 1.0
    assert accuracy(rows, f"<think>x</think><answer>{rows.answer} {rows.answer}</answer>") == 0.0


def test_the_rule_of_the_family_decides():
    made = replace(FOUR, answer="-3, -2", task="quadratic")
    assert accuracy(made, "<think>x</think><answer>x=-2 or x=-3</answer>") == 1.0
    assert accuracy(made, "<think>x</think><answer>-3</answer>") == 0.0
    assert accuracy(replace(made, task="chain"), "<think>x</think><answer>x=-2 or x=-3</answer>") == 0.0


def test_the_questions_own_text_is_not_an_answer():
    """E2.54: copying the prompt, or its reference, outside the tags scores nothing."""
    assert accuracy(FOUR, f"{FOUR.question} {FOUR.answer}") == 0.0


@pytest.mark.parametrize(
    ("combine", "right", "bare", "wrong"),
    [("gated", 1.0, 0.0, 0.0), ("additive", 1.5, 1.0, 0.5), ("format_only", 1.0, 0.0, 1.0)],
)
def test_how_accuracy_and_format_are_combined(combine, right, bare, wrong):
    """E2.51: by default the format only gates; an additive bonus pays for empty form."""
    cfg = RewardConfig(combine=combine, format_weight=0.5)
    assert [score(FOUR, text, cfg).total for text in (RIGHT, BARE, WRONG)] == [right, bare, wrong]


def test_the_format_is_not_additive_unless_asked_for():
    assert RewardConfig().combine == "gated"


def test_parts_are_reported_whatever_the_combination():
    for combine in ("gated", "additive", "format_only", "random"):
        parts = score(FOUR, WRONG, RewardConfig(combine=combine)).parts
        assert parts == {"accuracy": 0.0, "format": 1.0}
    assert format_kept(BARE) == 0.0


def test_the_random_control_is_a_fair_coin_that_cannot_see_the_answer():
    cfg = RewardConfig(combine="random")
    texts = [f"<think>{index}</think><answer>4</answer>" for index in range(1000)]
    totals = [score(FOUR, text, cfg).total for text in texts]
    assert sum(totals) / 1000 == pytest.approx(0.5, abs=0.05)
    assert totals == [score(FOUR, text, cfg).total for text in texts]


def test_a_negative_format_weight_is_refused():
    with pytest.raises(ConfigError, match="punish"):
        RewardConfig(format_weight=-0.1)
