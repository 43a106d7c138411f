"""What counts as an answer and as the right format."""

import pytest

from thinkstack.text.parse import Turn, parse_turn

GOOD = "<think>\n1+2=3\n</think>\n<answer>3</answer>"


def test_a_well_formed_turn():
    assert parse_turn(GOOD) == Turn("1+2=3", "3", True)


def test_outer_space_is_no_fault():
    assert parse_turn(f"\n {GOOD} \n") == Turn("1+2=3", "3", True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>3</answer>", "3"),
        ("so <think>x</think> the answer: <answer> 3 </answer> ok", "3"),
        ("x</think><answer>3</answer>", "3"),
        ("<think>a</think>b<think>c</think><answer>3</answer>", "3"),
    ],
    ids=["no thinking", "words around", "never opened", "thinking twice"],
)
def test_a_wrong_form_may_still_hold_an_answer(text, answer):
    assert parse_turn(text).answer == answer
    assert not parse_turn(text).is_well_formed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "<think>it is <answer>3</answer>",
        "<think><answer>3</answer></think>",
        "<think>x</think><answer>3</answer><answer>4</answer>",
        "<think>x</think><answer>3",
        "<think>x</think></answer>3<answer>",
        "<think>x</think><answer>3</answer><think>y",
        "<think>x</think><answer>3<answer>4</answer></answer>",
    ],
    ids=[
        "nothing",
        "no tags",
        "inside unclosed thinking",
        "inside thinking",
        "two answers",
        "unclosed answer",
        "tags turned round",
        "thinking opened again",
        "nested answers",
    ],
)
def test_no_answer(text):
    """E2.53, E2.54: an answer inside unclosed thinking, or one of several, must not be rewarded."""
    assert parse_turn(text).answer is None
    assert not parse_turn(text).is_well_formed


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD} and more",
        f"Well. {GOOD}",
        "<think>a</think>then<answer>3</answer>",
        "<think>a<think>b</think><answer>3</answer>",
        "<think>a</think></think><answer>3</answer>",
        "<answer>3</answer><think>a</think>",
        "<think>a <answer> b</think><answer>3</answer>",
    ],
    ids=["text after", "text before", "text between", "opened twice", "closed twice", "answer first", "tag in thought"],
)
def test_every_tag_stands_once_and_nothing_else_does(text):
    assert not parse_turn(text).is_well_formed


def test_an_answer_before_thinking_does_not_count():
    assert parse_turn("<answer>3</answer><think>a</think>").answer is None


@pytest.mark.parametrize(
    ("text", "answer", "is_well_formed"),
    [
        ("<think>\n1+2=3\n</think>\n\n3", "3", True),
        ("<think>1+2=3</think>The answer is 3.", "The answer is 3.", True),
        ("<think>\n1+2=3\n</think>\n\n", None, False),
        ("<think></think>3", "3", False),
        ("<think>1+2=3", None, False),
        ("3", None, False),
        ("So: <think>1</think>3", None, False),
        ("<think>1</think>3<think>2</think>4", None, False),
    ],
)
def test_the_open_form_is_one_closed_think_block_and_something_behind_it(text, answer, is_well_formed):
    turn = parse_turn(text, "open")
    assert (turn.answer, turn.is_well_formed) == (answer, is_well_formed)
