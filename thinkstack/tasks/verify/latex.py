"""Answers in LaTeX: boxes, spelling, and (with an extra) whether two formulas mean the same.

`plain` removes differences of spelling and computes nothing. What means the same and is spelt otherwise, say
1+\\sqrt{2} and \\sqrt{2}+1, is judged by math-verify, which may hang for ever and therefore runs in processes that are
killed: use `verdicts` with a CheckerPool. A reference that is a number never gets there: math-verify would take 2+2
for 4, 50\\% for 50 and 18:30 for 18.
"""

import re
from collections.abc import Sequence
from typing import Any

from thinkstack.tasks.verify.answers import SEPARATOR, WORD_MACROS, undressed
from thinkstack.tasks.verify.pool import CheckerPool
from thinkstack.tasks.verify.quantities import quantity_of, units_agree, without_unit
from thinkstack.text.final_answer import boxes, closing_brace, last_boxed
from thinkstack.types import ConfigError, Problem, Score

__all__ = ["boxes", "installed", "is_number", "last_boxed", "plain", "same_spelling", "unwrapped", "verdicts"]

LONGEST_FORMULA = 200
"""Characters; a longer answer is not given to math-verify."""
_SIGNS = str.maketrans(
    {
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{UNION}": r"\cup ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{ELEMENT OF}": r"\in ",
    }
)
"""Signs as they are typed outside of TeX."""
_SYNONYMS: tuple[tuple[str, str], ...] = (
    (r"\u221A\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])\.?", ""),
    (r"\\(?:display|text|script)style(?![A-Za-z])", ""),
    (r"\\leq(?![a-z])", r"\\le"),
    (r"\\geq(?![a-z])", r"\\ge"),
    (r"\\neq(?![a-z])", r"\\ne"),
    (r"\\[lc]dots(?![a-z])", r"\\dots"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\u00B0|\\degree(?![a-z])|\\?%|\\?\$", " "),  # a blank: they must not join digits
    (r"(\\\\)\s*\[[^\[\]]*(?:pt|em|ex|mm|cm)\]", r"\1"),  # the gap below a row
    (r"\\\\\s*(?=\\end(?![a-z]))", ""),  # a row break behind the last row
    (rf"(?<=[0-9]){SEPARATOR}(?=[0-9]{{3}}(?![0-9]))", ""),  # thousands
)
_BLANKS = re.compile(r"(\\\\)|(?:\\[!,;: ]|~|\\q?quad(?![a-z])|\s)+")
_WORDS = re.compile(rf"\\(?:{WORD_MACROS})\s*\{{([^{{}}]*)\}}")
_NAME = re.compile(r"([A-Za-z])\s*(?:=(?!.*=)|\\in(?![a-z]))\s*")
_ARGUMENT = re.compile(r"\s*(?:(\{)|(\\[A-Za-z]+|[0-9A-Za-z]))")
_BRACKETS = re.compile(r"(?P<open>[(\[]|\\\{)(?P<inside>.*)(?P<close>[)\]]|\\\})", re.DOTALL)
_SEPARATORS = re.compile(r"(?<!\\),|\\cup(?![a-z])|\\[{}]|\\.|[()\[\]{}]")
_ATOM = r"(?:[A-Za-z]|\\(?:pi|theta|alpha|beta|phi)(?![a-z])|\\sqrt\{[^{}]*\})"
_SLASH = re.compile(
    rf"(?<![\w)}}\]^_.])(?P<top>[0-9]+{_ATOM}*|{_ATOM}+)/(?P<bottom>[0-9]+|{_ATOM})(?![\w({{\[^_.!])(?!\\(?!end)[A-Za-z])"
)
_SIGNED_FRACTION = re.compile(rf"(?<![\w)}}\]])\\frac\{{-([0-9]*{_ATOM}*)\}}")
_SUM_OVER = re.compile(r"(-?)\(([^()/]+)\)/([0-9]+)")
_PRODUCT = re.compile(r"\s*(?:\\(?:cdot|times)(?![a-z])|(?<![*])\*(?![*]))\s*(?=[A-Za-z(\\])(?!\\frac)")
"""A product sign that may be left out: not before a digit, and not before a fraction, which would make it mixed."""


def unwrapped(answer: str) -> str | None:
    """The answer without one box, or what stands around all of it; None if it holds several boxes, or a broken one."""
    found = boxes(answer)
    if len(found) > 1 or found == [None]:
        return None
    return undressed(found[0] or "") if found else undressed(answer)


def plain(text: str) -> str:
    """LaTeX in one spelling: no blanks, one kind of fraction, no unit, percent, degree or dollar sign.

    The differences are those that the published comparison of MATH ignores (arXiv:2103.03874, appendix), and how people
    write: "x=5" and "5 cm" become "5"; 1/2, .5 and \\frac12 are numbers and become "1/2"; x/2 becomes \\frac{x}{2},
    and 3\\cdot\\sqrt{13} becomes 3\\sqrt{13}. Nothing is computed. Two numbers stay two: a blank between digits is
    kept, and a comma with a blank behind it separates.
    """
    value = quantity_of(text, may_be_percent=True)
    if value is not None:
        return str(value)
    text = undressed(text).translate(_SIGNS)
    for pattern, spelling in _SYNONYMS:
        text = re.sub(pattern, spelling, text)
    named = _NAME.match(text)
    if named:
        return plain(text[named.end() :])
    return _plain_parts(text) or _plain_formula(text)


def _plain_parts(text: str) -> str | None:
    """A list, a tuple, a set, an interval or a union, each part in one spelling; None if `text` is none of these."""
    parts, bracketed = _parts(text), _BRACKETS.fullmatch(text.strip())
    if len(parts) > 1:
        return _joined(parts)
    inner = _parts(bracketed["inside"]) if bracketed else []
    return bracketed["open"] + _joined(inner) + bracketed["close"] if bracketed and len(inner) > 1 else None


def _parts(text: str) -> list[str]:
    """`text` cut at its outermost commas and unions, which are parts themselves."""
    parts, start, depth = [], 0, 0
    for found in _SEPARATORS.finditer(text):
        depth += (found[0][-1] in "([{") - (found[0][-1] in ")]}")
        if depth == 0 and found[0] in (",", r"\cup"):
            parts += [text[start : found.start()], found[0]]
            start = found.end()
    return [*parts, text[start:]]


def _joined(parts: Sequence[str]) -> str:
    """The parts in one spelling; digits stay as they are, for 000 in 1,000 is not 0."""
    return "".join(part.strip() if part.strip().isdigit() or part in (",", r"\cup") else plain(part) for part in parts)


def _plain_formula(text: str) -> str:
    if over := _SUM_OVER.fullmatch(text.strip()):
        text = rf"{over[1]}\frac{{{over[2]}}}{{{over[3]}}}"
    text = _WORDS.sub(r"\1", without_unit(text))
    text = _braced(_braced(text, r"\frac", 2), r"\sqrt", 1)
    text = _BLANKS.sub(_needed_blank, _PRODUCT.sub("", text))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(?<![\w)}\]])\+(?=[0-9A-Za-z\\.])", "", text)
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = _SIGNED_FRACTION.sub(r"-\\frac{\1}", _SLASH.sub(r"\\frac{\g<top>}{\g<bottom>}", text))
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


def _needed_blank(blank: re.Match[str]) -> str:
    """A row break, which is no blank; a blank between two digits; else nothing."""
    if blank[1]:
        return blank[1]
    before, after = blank.string[: blank.start()][-1:], blank.string[blank.end() :][:1]
    return " " if before.isdigit() and after.isdigit() else ""


def _braced(text: str, macro: str, count: int) -> str:
    """`text` with braces around every argument of `macro`, as TeX finds it: the next token or group."""
    place = 0
    while (start := text.find(macro, place)) >= 0:
        place = end = start + len(macro)
        if text[end : end + 1].isalpha():
            continue
        arguments = []
        for _ in range(count):
            found = _ARGUMENT.match(text, end)
            close = closing_brace(text, found.end()) if found and found[1] else None
            if found is None or (found[1] and close is None):
                break
            arguments.append(text[found.end() : close] if found[1] else found[2])
            end = found.end() if close is None else close + 1
        if len(arguments) == count:
            text = text[:place] + "".join(f"{{{argument.strip()}}}" for argument in arguments) + text[end:]
    return text


def same_spelling(reference: str, answer: str) -> bool:
    """Whether both are the same number, or the same LaTeX up to spelling; words are compared without case.

    A unit, or the "x=" before a value, may be left out, but not be another: 5 cm is not 5 m, x=3 is not y=3.
    """
    inside, expected = unwrapped(answer), unwrapped(reference) or reference
    if inside is None:
        return False
    names = {found[1] for text in (expected, inside) if (found := _NAME.match(text))}
    if len(names) > 1 or not units_agree(expected, inside):
        return False
    first, second = plain(expected), plain(inside)
    is_word = len(first) > 1 and first.isalpha()
    return first == second != "" or (is_word and first.casefold() == second.casefold())


def is_number(reference: str) -> bool:
    """Whether a reference is one number, which is compared by value and never as a formula."""
    return quantity_of(reference, may_be_percent=True) is not None


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
        is_same = same_spelling(problem.answer, answer)
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
    if re.search(r"_\{?[0-9]|\^\{?-?[0-9]{2}", first + " " + second):  # it drops bases, and rounds large powers
        return False
    kinds = [
        (text[:1], text[-1:]) if text[:1] in "([" or text.startswith("\\{") else ("", "") for text in (first, second)
    ]
    kinds = [("\\{", "\\}") if kind[0] == "\\" else kind for kind in kinds]
    return kinds[0] == kinds[1] and first.count("=") == second.count("=")
