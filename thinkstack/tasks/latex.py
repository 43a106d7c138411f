"""Answers in LaTeX: boxes, spelling, and (with an extra) whether two formulas mean the same.

`plain` removes differences of spelling and computes nothing. What means the same and is spelt otherwise, say
1+\\sqrt{2} and \\sqrt{2}+1, is judged by math-verify, which may hang for ever and therefore runs in processes that are
killed: use `verdicts` with a CheckerPool. A reference that is a number never gets there: math-verify would take 2+2
for 4, 50\\% for 50 and 18:30 for 18.
"""

import re
from collections.abc import Sequence
from typing import Any

from thinkstack.tasks.answers import clean, number_of
from thinkstack.tasks.pool import CheckerPool
from thinkstack.types import ConfigError, Problem, Score

LONGEST_FORMULA = 200
"""Characters; a longer answer is not given to math-verify."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")
_SPACES = re.compile(r"\\[!,;: ]|~|\\quad|\\qquad|\s+")
_WORDS = re.compile(r"\\(?:text|mbox|textbf|textrm|mathrm)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)")
_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{(\d+)\}")


def boxes(text: str) -> list[str]:
    """What each outermost \\boxed{} or \\fbox{} of `text` holds, in order; an unclosed one is none."""
    found, place = [], 0
    while match := _BOX.search(text, place):
        if match["brace"] is None:  # \boxed 5, as some solutions write
            word = re.match(r"[^\s$.,]+", text[match.end() :])
            found += [word[0]] if word else []
            place = match.end() + (len(word[0]) if word else 0)
            continue
        end = _closing(text, match.end())
        if end is None:
            break
        found.append(text[match.end() : end])
        place = end
    return found


def _closing(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
        if depth == 0:
            return place
    return None


def last_boxed(text: str) -> str | None:
    """What the last box holds, the published rule for the reference of MATH; None without a box."""
    found = boxes(text)
    return found[-1] if found else None


def unwrapped(answer: str) -> str | None:
    """The answer without one box, or one pair of dollar signs, around it; None if it holds several boxes."""
    found = boxes(answer)
    if len(found) > 1:
        return None
    text = found[0] if found else clean(answer)
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            return text[len(left) : -len(right)].strip()
    return text


def plain(text: str) -> str:
    """LaTeX in one spelling: no spaces, one kind of fraction, no unit, percent, degree or dollar sign.

    The differences are those that the published comparison of MATH ignores (arXiv:2103.03874, appendix). "x=5" becomes
    "5"; 1/2 and \\frac12 become \\frac{1}{2} and then, being numbers, "1/2".
    """
    text = re.sub(r"\\[dt]frac", r"\\frac", clean(text))
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"\^\{?\\circ\}?|\\?%|\\?\$", "", text)
    text = re.sub(r"(?<=\S)\s*\\(?:text|mbox)\s*\{\s*(?!and|or)[^{}]*\}$", "", text)  # a unit
    text = _SPACES.sub("", _WORDS.sub(r"\1", text)).replace("{,}", ",")
    text = re.sub(r"^[A-Za-z]=", "", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text))
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}".replace("--", "").replace("+-", "-").replace("-+", "-")
    value = number_of(f"0{text}" if text.startswith(".") else text)
    return text if value is None else str(value)


def is_number(reference: str) -> bool:
    """Whether a reference is one number, which is compared by value and never as a formula."""
    return number_of(plain(reference)) is not None


def installed() -> bool:
    """Whether math-verify can be imported."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return False
    return True


def means_the_same(reference: str, answer: str) -> Score:
    """Whether math-verify finds two formulas equal; total is 1 or 0. To be run in a CheckerPool: it may never end.

    Its own clocks are off, for they need the main thread and do not stop everything. Brackets must be of the same kind,
    which it would not mind, and an answer must be one formula.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    parse_options: dict[str, Any] = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}
    gold, found = (parse(f"${text}$", **parse_options) for text in (reference, answer))
    if not gold:
        return Score(total=0.0, unscorable=f"math-verify cannot read the reference {reference!r}")
    return Score(total=float(bool(found) and verify(gold, found, timeout_seconds=None)))


def verdicts(pairs: Sequence[tuple[Problem, str]], pool: CheckerPool) -> list[Score]:
    """Judge answers to MATH problems: by spelling first, then those that are left by math-verify in `pool`.

    A formula that ran out of time is unscorable. Raises ConfigError if math-verify is not installed.
    """
    if not installed():
        raise ConfigError(
            "comparing formulas needs math-verify; pip install 'thinkstack[math]', or compare by spelling"
        )
    scores, left = [], []
    for place, (problem, answer) in enumerate(pairs):
        reference, inside = unwrapped(problem.answer) or problem.answer, unwrapped(answer)
        is_same = inside is not None and plain(reference) == plain(inside) != ""
        scores.append(Score(total=float(is_same)))
        if not is_same and inside is not None and _is_comparable(reference, inside):
            left.append((place, (reference, inside)))
    for (place, _), score in zip(left, pool.run(means_the_same, [pair for _, pair in left]), strict=True):
        scores[place] = score
    return scores


def _is_comparable(reference: str, answer: str) -> bool:
    """Whether math-verify may see the pair: no number, one formula, not too long, brackets of the same kind."""
    if is_number(reference) or not answer or len(answer) > LONGEST_FORMULA or re.search(r"[:$]|\\boxed", answer):
        return False
    first, second = plain(reference), plain(answer)
    kinds = [
        (text[:1], text[-1:]) if text[:1] in "([" or text.startswith("\\{") else ("", "") for text in (first, second)
    ]
    kinds = [("\\{", "\\}") if kind[0] == "\\" else kind for kind in kinds]
    return kinds[0] == kinds[1] and first.count("=") == second.count("=")
