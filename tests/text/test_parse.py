"""Parsing of answers and formats."""

import pytest

from thinkstack.text.chat import chat_format
from thinkstack.text.final_answer import EXTRACTION_RULES
from thinkstack.text.parse import parse_message, parse_response, parse_tool_calls, parse_turn, split_thinking
from thinkstack.text.tokenizer import CONTROL, TOOLS, train_tokenizer
from thinkstack.types import Completion, Message, Response, ToolCall

GOOD = "<think>\n1+2=3\n</think>\n<answer>3</answer>"


def test_a_well_formed_turn():
    assert parse_turn(GOOD) == Response(text=GOOD, thinking="1+2=3", answer="3", is_well_formed=True)


def test_outer_white_space_is_allowed():
    found = parse_turn(f"\n {GOOD} \n")
    assert (found.thinking, found.answer, found.is_well_formed) == ("1+2=3", "3", True)


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
def test_a_malformed_turn_may_still_have_an_answer(text, answer):
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
    """An answer inside unclosed thinking, or one of several answers, must not be rewarded."""
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
def test_every_tag_occurs_exactly_once_and_nothing_else_is_allowed(text):
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
def test_think_then_answer_is_one_closed_think_block_and_an_answer(text, answer, is_well_formed):
    turn = parse_turn(text, "think_then_answer")
    assert (turn.answer, turn.is_well_formed) == (answer, is_well_formed)


PROSE = "The ducks lay 16 eggs and she eats 3, bakes with 4 and sells the other 9 at 2 dollars each, every day. "


@pytest.mark.parametrize(
    ("visible_text", "answer"),
    [
        (f"{PROSE}**Answer:** \\boxed{{18}}", "18"),
        (f"{PROSE}Thus \\(\\boxed{{\\frac{{14}}{{3}}}}\\).", "\\frac{14}{3}"),
        (f"\\boxed{{9}} are left. {PROSE}\\[\n\\boxed{{18}}\n\\]\n\nShe earns that.", "18"),
        (f"{PROSE}$\\fbox{{18}}$", "18"),
        (f"{PROSE}\\boxed{{\\text{{Evelyn}}}}", "\\text{Evelyn}"),
        (f"{PROSE}\\boxed 18.", "18"),
        (f"{PROSE}\\boxed{{\\{{1, 2\\}}}}", "\\{1, 2\\}"),
        (f"\\boxed{{3}} {PROSE} \\boxed{{", None),
        (f"\\boxed{{3}} {PROSE} \\boxed{{\\frac{{1}}{{2", None),
        (f"\\boxed{{3}} {PROSE} \\boxed", None),
        (f"\\boxed{{3}} {PROSE} \\boxed{{}}", None),
        ("\\boxed{18\\}", None),
    ],
)
def test_in_think_then_answer_the_last_complete_box_is_the_answer(visible_text, answer):
    """Regression: of ten real answers of R1-family models, all with a final box, none was found: the text around the
    box was too long."""
    assert (
        parse_turn(f"<think>\n16-3-4=9, \\boxed{{7}}\n</think>\n\n{visible_text}", "think_then_answer").answer == answer
    )
    assert parse_turn(f"<think>\nnever closed {visible_text}", "think_then_answer").answer is None


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        (f"{PROSE}\\boxed{{18}} #### 9", "18", "last_box"),
        (f"{PROSE}The answer is \\boxed{{9}} or \\boxed{{18}}.", None, None),
        (f"{PROSE}First \\boxed{{9}}, then twice that, \\boxed{{18}}.", "18", "last_box"),
        (f"{PROSE}So \\boxed{{18}}, $\\boxed{{18}}$.", "18", "last_box"),
        (f"{PROSE}\n#### 18", "18", "hashes"),
        (f"{PROSE}\n#### $1,800.50\nThe answer is 7.", "$1,800.50", "hashes"),
        ("#### 2\n#### -3 dollars", "-3 dollars", "hashes"),
        (f"#### 1. Count the eggs\n{PROSE}The answer is 18.", "18", "answer_is"),
        (f"### Solution\n{PROSE}**The final answer is: $18**", "$18", "answer_is"),
        ("The answer is 9. No: the answer is 18.", "18", "answer_is"),
        (f"{PROSE}Answer: 18", "18", "answer_is"),
        ("Answer: (C)", "(C)", "answer_is"),
        ("The answer is 1,800.5 dollars. 7 are left.", "1,800.5 dollars", "answer_is"),
        ("The answer is 22, because 4 and 18 make it.", "22", "answer_is"),
        ("The answer is 3, 4.", "3, 4", "answer_is"),
        ("\u7b54\u6848\u662f18\u3002", "18", "answer_is"),
        ("The answer is uncle.", "uncle", "answer_is"),
        ("The answer is 3 + 19 = 22.", "22", "answer_is"),
        ("The answer is 22 eggs in 3 boxes.", "22", "answer_is"),
        ("The answer is 22 because 3+18=21", "22", "answer_is"),
        ("The answer is not clear. So 22", "22", "last_number"),
        ("The answer is that she earns 9 * 2 = $18 every day.", "$18", "last_number"),
        ("She earns 9 * 2 = 18.", "18", "last_number"),
        ("So 25-3 = 22 are left.", "22", "last_number"),
        ("10-3", "3", "last_number"),
        ("It falls to -3 degrees", "-3", "last_number"),
        ("She pays $1,250.75, tax included.", "$1,250.75", "last_number"),
        ("It is 3/4", "3/4", "last_number"),
        ("<think>1+1=2, or 7</think>It is 2.", "2", "last_number"),
        ("I do not know.", None, None),
        ("", None, None),
        ("\\boxed{3} and then 5, so \\boxed{", None, None),
        ("<think>it is 3, but", None, None),
    ],
)
def test_in_flexible_extract_the_first_matching_rule_decides(text, answer, rule):
    """Regression: an evaluation of a stock model scored 0.0 and found no answer, even in "#### 22" and "The answer is
    22"."""
    turn = parse_turn(text, "flexible_extract")
    assert (turn.answer, turn.rule, turn.is_well_formed) == (answer, rule, answer is not None)


def test_extraction_rules_are_ordered():
    assert list(EXTRACTION_RULES) == ["last_box", "hashes", "answer_is", "last_number"]


@pytest.mark.parametrize(
    ("text", "thinking", "rest"),
    [
        ("<think>\na\n</think>\n\nb", "\na\n", "\n\nb"),
        (" <think>a</think>b</think>c", "a", "b</think>c"),
        ("<think>cut off", "cut off", ""),
        ("</think>b", None, "b"),
        ("b</think>c", None, "b</think>c"),
        ("b", None, "b"),
    ],
    ids=["whole", "closed twice", "left open", "told not to think", "never opened", "none"],
)
def test_a_turn_splits_into_thinking_and_the_rest(text, thinking, rest):
    assert split_thinking(text) == (thinking, rest)


CALLS = (ToolCall(name="add", arguments='{"a": 1}'), ToolCall(name="sub", arguments='{\n  "b": "```"\n}'))
OPEN, SHUT = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
OLD = "\n".join(
    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{call.arguments}\n```<｜tool▁call▁end｜>"
    for call in CALLS
)
NEW = "".join(f"<｜tool▁call▁begin｜>{call.name}<｜tool▁sep｜>{call.arguments}<｜tool▁call▁end｜>" for call in CALLS)


@pytest.mark.parametrize("calls", [OLD, NEW], ids=["V3 and R1", "V3.1"])
def test_calls_are_parsed_in_both_formats(calls):
    assert parse_tool_calls(f"I will look.{OPEN}{calls}{SHUT}") == ("I will look.", CALLS)


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        ("no call", "no call", ()),
        (f"a{OPEN}{NEW}", "a", CALLS),
        (f"a{OPEN}{SHUT}", f"a{OPEN}{SHUT}", ()),
        (f"a{OPEN}{NEW}x{SHUT}", f"ax{SHUT}", CALLS),
        (f"a{OPEN}{NEW}{SHUT} and more", "a and more", CALLS),
        (f"a{OPEN}{NEW[:-3]}{SHUT}", "a", CALLS[:1]),
        (f"a{OPEN}{NEW[:-45]}", "a<｜tool▁call▁begin｜>sub", CALLS[:1]),
        (f"a{OPEN}{NEW[:24]}", f"a{OPEN}{NEW[:24]}", ()),
    ],
    ids=["none", "cut off", "empty", "text between", "text after", "call cut off", "in the name", "in the first name"],
)
def test_only_complete_calls_are_calls(text, visible, calls):
    """A call that is cut off after its name is left out; other malformed markup is text."""
    assert parse_tool_calls(text) == (visible, calls)


def test_a_turn_is_parsed_into_a_message():
    reply = parse_message(f"<think>\nWhich?\n</think>\n\nI will look.{OPEN}{NEW}{SHUT}")
    assert reply == Message(role="assistant", content="I will look.", reasoning="Which?", tool_calls=CALLS)
    assert parse_message("</think>4") == Message(role="assistant", content="4")


@pytest.mark.parametrize("name", ["v3", "r1_0528", "v3_1"])
def test_trained_turns_parse_back_to_their_messages(name):
    chat = chat_format(name, train_tokenizer(["a few words"], 330, control=(*CONTROL, *TOOLS)))
    visible_text = Message(role="assistant", content="I will look.", reasoning=None, tool_calls=CALLS)
    ids, loss_mask = chat.example([Message(role="user", content="?"), visible_text])[0]
    assert (
        parse_message(chat.text_of([token for token, is_trained in zip(ids, loss_mask, strict=True) if is_trained]))
        == visible_text
    )


class Echo:
    """A chat format that reads a completion as this text."""

    def __init__(self, text):
        self.text = text

    def text_of(self, token_ids):
        return self.text


@pytest.mark.parametrize(
    ("thinking_format", "text", "expected"),
    [
        ("think_then_answer", "<think>\n1+2=3\n</think>\n\nThe answer is \\boxed{3} and", False),
        ("flexible_extract", "The answer is 3", False),
        ("think_answer_tags", GOOD, True),
    ],
)
def test_a_truncated_turn_is_not_well_formed_unless_its_closing_tag_is_there(thinking_format, text, expected):
    """Regression: a truncated turn earned the format reward in training and not in evaluation."""
    parts = {"token_ids": (1,), "logprobs": (0.0,), "weights_version": 0}
    cut_off = parse_response(Echo(text), Completion(finish_reason="length", **parts), thinking_format)
    assert (cut_off.is_truncated, cut_off.is_well_formed, cut_off.answer) == (True, expected, "3")
    assert parse_response(Echo(text), Completion(finish_reason="stop", **parts), thinking_format).is_well_formed


def test_a_response_has_the_tool_calls_of_its_turn():
    turn = f"<think>\nlook it up\n</think>\n\n{OPEN}{NEW}{SHUT}"
    assert parse_turn(turn, "think_then_answer").tool_calls == CALLS
    assert parse_turn(GOOD).tool_calls == ()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 72, in total, so 18 * 4 = 72 clips in 2 months are 72.", "72"),
        ("<think>9</think>\\boxed{5}, which are 1,250 cents", "1,250"),
        ("<think>it is 3, but", None),
        ("None.", None),
    ],
)
def test_in_last_number_the_last_number_after_the_thinking_is_the_answer(text, answer):
    turn = parse_turn(text, "last_number")
    assert (turn.answer, turn.rule) == (answer, None if answer is None else "last_number")
