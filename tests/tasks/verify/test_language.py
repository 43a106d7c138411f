"""The language of the reasoning: which words count, for which language, and which count for none."""

import pytest

from tests.problems import make_problem, scored
from thinkstack.tasks.verify.language import MIN_WORDS, language_share, split_words

ENGLISH = make_problem()
CHINESE = make_problem("小明有2个苹果,Alice有2个,一共几个?", language="zh")


@pytest.mark.parametrize(
    ("text", "english", "chinese"),
    [
        ("First we add three and four.", 1.0, 0.0),
        ("先算三加四,再乘以二。", 0.0, 1.0),
        ("先算 the sum 得到七 then stop here", 0.5, 0.5),  # 5 words, 5 characters
        ("we go on так далее", 0.6, 0.0),
        ("まず and then we go", 4 / 6, 0.0),
    ],
)
def test_shares_worked_out_by_hand(text, english, chinese):
    assert language_share(text, "en") == pytest.approx(english)
    assert language_share(text, "zh") == pytest.approx(chinese)


@pytest.mark.parametrize(
    "foreign",
    [
        "`for item in items: print(item)`",
        "```python\nfor item in items:\n    total += item\n```",
        "```python\nfor item in items:  # an answer cut off inside its code\n",
        "getValue(x, y) some_name module.call(x) x1",
        "$x = total \\text{ of all the parts}$ \\boxed{the total}",
        "\\[ \\frac{left}{right} \\] \\(left\\)",
        "x + y = z, 3a, 12, sin cos gcd mod",
        "Alice, Bob Smith, NASA, GCD, H, United States",
        "https://example.org/some/path",
        "<think> </think>",
        "α β",
    ],
)
def test_code_math_and_names_belong_to_no_language(foreign):
    """Counted as English, they would penalize Chinese reasoning for its formulas and code."""
    assert split_words(foreign) == []
    assert language_share(f"我们先算一下 {foreign}", "zh") == 1.0


def test_words_of_the_question_may_be_quoted():
    text = "小明 and the girl have four apples"
    assert language_share(text, "en") == pytest.approx(6 / 8)
    assert language_share(text, "en", quoted=CHINESE.question) == 1.0
    assert language_share("and the girl 有苹果", "zh", quoted="the girl") == pytest.approx(3 / 4)


@pytest.mark.parametrize("evasion", ["The Sum Of These Is Seven", "THE SUM OF THESE IS SEVEN"])
def test_capital_letters_do_not_hide_a_sentence(evasion):
    assert language_share(f"我们先算 {evasion}", "zh") == pytest.approx(4 / 10)


def test_too_few_words_say_nothing():
    assert language_share("6*4=24", "en") is None
    assert language_share("so " * (MIN_WORDS - 1), "zh") is None
    assert language_share("so " * MIN_WORDS, "zh") == 0.0


def language_of(problem, text):
    return scored(problem, text, parts={"language": 1.0}).total


def test_language_is_measured_in_unclosed_thinking_and_not_in_the_answer():
    working = "先算二加二得四"
    assert language_of(ENGLISH, f"<think>{working}</think><answer>4</answer>") == 0.0
    assert language_of(ENGLISH, f"<think>we add and get four</think><answer>{working}</answer>") == 1.0
    assert language_of(ENGLISH, f"<think>{working}") == 0.0
    assert language_of(ENGLISH, "<think>2+2=4</think><answer>4</answer>") == 1.0


def test_the_language_part_is_named_weighted_and_off_by_default():
    text = "<think>先算二加二 so we get four</think><answer>4</answer>"
    parts = {"accuracy_if_formatted": 1.0, "language": 0.5}
    assert scored(ENGLISH, text).parts == {"accuracy": 1.0, "format": 1.0}
    found = scored(ENGLISH, text, parts=parts)
    assert found.parts == {"accuracy": 1.0, "format": 1.0, "language": pytest.approx(4 / 9)}
    assert found.total == pytest.approx(1 + 0.5 * 4 / 9)
    wrong = scored(ENGLISH, text.replace(">4<", ">5<"), parts=parts)
    assert wrong.total == pytest.approx(0.5 * 4 / 9)
