"""Answers in LaTeX: boxes, normalization, and (with an extra) equivalence of formulas.

`normalize_latex` removes differences of spelling and computes nothing. Equivalent formulas with different spellings,
for example 1+\\sqrt{2} and \\sqrt{2}+1, are compared by math-verify (`are_equivalent`). It may hang, so it runs in
processes that can be killed (pool.py). A reference that is a number is never passed to math-verify, which would accept
2+2 for 4, 50\\% for 50 and 18:30 for 18.
"""

import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from typing import Any

from thinkstack.tasks.verify.answers import SEPARATOR, WORD_MACROS, strip_wrappers
from thinkstack.tasks.verify.quantities import parse_quantity, strip_unit, units_agree
from thinkstack.text.final_answer import boxes, closing_brace
from thinkstack.types import Score

log = logging.getLogger(__name__)
MAX_FORMULA_CHARACTERS = 200
"""Longest answer, in characters, that is passed to math-verify."""
_UNICODE_SIGNS = str.maketrans(
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
"""Unicode signs and their TeX macros."""
_SYNONYMS: tuple[tuple[str, str], ...] = (
    (r"\u221A\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])\.?", ""),
    (r"\\(?:display|text|script)style(?![A-Za-z])", ""),
    (r"\\leq(?![a-z])", r"\\le"),
    (r"\\geq(?![a-z])", r"\\ge"),
    (r"\\neq(?![a-z])", r"\\ne"),
    (r"\\[lc]dots(?![a-z])", r"\\dots"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\u00B0|\\degree(?![a-z])|\\?%|\\?\$", " "),  # a blank, so that digits are not joined
    (r"(\\\\)\s*\[[^\[\]]*(?:pt|em|ex|mm|cm)\]", r"\1"),  # the optional gap after a row break
    (r"\\\\\s*(?=\\end(?![a-z]))", ""),  # a row break after the last row
    (rf"(?<=[0-9]){SEPARATOR}(?=[0-9]{{3}}(?![0-9]))", ""),  # thousands
    (r"(?<![A-Za-z}\]^_])\{(\\pi)\}", r"\1 "),
    (r",?\s*(?:\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ", "),
    (r"^(-?)\s*[({]\s*(?:\\text\s*\{)?([0-9A-Z.]+)\s*\}?[)}]?\s*_", r"\1\2_"),  # (52)_8
)
_BLANKS = re.compile(r"(\\\\)|(?:\\[!,;: ]|~|\\q?quad(?![a-z])|\s)+")
_WORDS = re.compile(rf"\\(?:{WORD_MACROS})\s*\{{([^{{}}]*)\}}")
_NAME = re.compile(r"([A-Za-z])\s*(?:=(?!.*=)|\\in(?![a-z]))\s*")
_ARGUMENT = re.compile(r"\s*(?:(\{)|(\\[A-Za-z]+|[0-9A-Za-z]))")
_BRACKETS = re.compile(r"(?P<open>[(\[]|\\\{)(?P<inside>.*)(?P<close>[)\]]|\\\})", re.DOTALL)
_SEPARATORS = re.compile(r"(?<!\\)[,;]|\\cup(?![a-z])|\\[{}]|\\.|[()\[\]{}]")
_MATRIX = re.compile(
    r"(?:\\begin\{(?P<name>[pb]matrix)\}|(?P<open>[(\[])\s*\\begin\{(?:matrix|array)\}(?:\{[^{}]*\})?)(?P<rows>.*)"
    r"\\end\{(?(name)(?P=name)|(?:matrix|array))\}(?(open)\s*[)\]])",
    re.DOTALL,
)
"""A matrix in round or square brackets; that in bars is a determinant."""
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
}
_BASE_WORD = re.compile(rf"_\{{({'|'.join(_BASES)})\}}$")
_ATOM = r"(?:[A-Za-z]|\\(?:pi|theta|alpha|beta|phi)(?![a-z])|\\sqrt\{[^{}]*\})"
_SLASH = re.compile(
    rf"(?<![\w)}}\]^_.])(?P<top>[0-9]+{_ATOM}*|{_ATOM}+)/(?P<bottom>[0-9]+|{_ATOM})(?![\w({{\[^_.!])(?!\\(?!end)[A-Za-z])"
)
_SIGNED_FRACTION = re.compile(rf"(?<![\w)}}\]])\\frac\{{-([0-9]*{_ATOM}*)\}}")
_SUM_OVER = re.compile(r"(-?)\(([^()/]+)\)/([0-9]+)")
_PRODUCT = re.compile(r"\s*(?:\\(?:cdot|times)(?![a-z])|(?<![*])\*(?![*]))\s*(?=[A-Za-z(\\])(?!\\frac)")
"""A redundant multiplication sign, except before a digit, and before a fraction, which would become part of a mixed
number."""


def unbox(answer: str) -> str | None:
    """Return the content of the only box, or the answer without wrappers if there is no box.

    None if the answer has several boxes or an unfinished one.
    """
    found = boxes(answer)
    if len(found) > 1 or found == [None]:
        return None
    return strip_wrappers(found[0] or "") if found else strip_wrappers(answer)


def normalize_latex(text: str) -> str:
    """Return LaTeX in one spelling: no blanks, one kind of fraction, no unit, percent, degree or dollar sign.

    Differences are ignored as in the published comparison of MATH (arXiv:2103.03874, appendix) and in common notation:
    "x=5" and "5 cm" become "5"; 1/2, .5 and \\frac12 are numbers and become "1/2"; x/2 becomes \\frac{x}{2}, and
    3\\cdot\\sqrt{13} becomes 3\\sqrt{13}. Nothing is computed. Two numbers stay separate: a blank between digits
    is kept, and a comma followed by a blank is a separator.
    """
    value = parse_quantity(text, may_be_percent=True)
    if value is not None:
        return str(value)
    text = strip_wrappers(text).translate(_UNICODE_SIGNS)
    for pattern, spelling in _SYNONYMS:
        text = re.sub(pattern, spelling, text)
    named = _NAME.match(text)
    if named:
        return normalize_latex(text[named.end() :])
    return _normalize_parts(text) or _normalize_formula(text)


def _normalize_parts(text: str) -> str | None:
    """Normalize each part of a list, tuple, set, interval, union or matrix; None if `text` is none of these.

    The parts of a union, of a set and of a list without brackets are sorted.
    """
    if matrix := _MATRIX.fullmatch(text.strip()):
        rows = [[normalize_latex(cell) for cell in row.split("&")] for row in matrix["rows"].strip().split("\\\\")]
        return rf"\matrix{{{'; '.join(', '.join(row) for row in rows)}}}"
    for separator in (r"\cup", ","):
        if len(parts := _split(text, separator)) > 1:
            return separator.join(sorted(_normalize_each(parts)))
    bracketed = _BRACKETS.fullmatch(text.strip())
    parts = _split(bracketed["inside"], ",") if bracketed else []
    if bracketed is None or len(parts) < 2:
        return None
    parts = _normalize_each(parts)
    inside = ",".join(sorted(parts) if bracketed["open"] == r"\{" else parts)
    return bracketed["open"] + inside + bracketed["close"]


def _split(text: str, separator: str) -> list[str]:
    """Split `text` at its outermost separators; a semicolon counts as a comma."""
    parts, start, depth = [], 0, 0
    for found in _SEPARATORS.finditer(text):
        depth += (found[0][-1] in "([{") - (found[0][-1] in ")]}")
        if depth == 0 and found[0].replace(";", ",") == separator:
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def _normalize_each(parts: Sequence[str]) -> list[str]:
    """Normalize the parts; digits stay unchanged, since the 000 of 1,000 is not 0.

    The name of x=1, x=2 is dropped as that of x=1 is; x=1, y=2 keeps its names.
    """
    names = [found[1] if (found := _NAME.match(part.strip())) else "" for part in parts]
    kept = names if len(set(names) - {""}) > 1 else [""] * len(names)
    return [
        (f"{name}=" if name else "") + (part.strip() if part.strip().isdigit() else normalize_latex(part))
        for name, part in zip(kept, parts, strict=True)
    ]


def _normalize_formula(text: str) -> str:
    if over := _SUM_OVER.fullmatch(text.strip()):
        text = rf"{over[1]}\frac{{{over[2]}}}{{{over[3]}}}"
    text = _WORDS.sub(r"\1", strip_unit(text))
    text = _brace_arguments(_brace_arguments(text, r"\frac", 2), r"\sqrt", 1)
    text = _BLANKS.sub(_required_blank, _PRODUCT.sub("", text))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = _BASE_WORD.sub(lambda found: f"_{_BASES[found[1]]}", text)
    text = re.sub(r"(?<![\w)}\]])\+(?=[0-9A-Za-z\\.])", "", text)
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = _SIGNED_FRACTION.sub(r"-\\frac{\1}", _SLASH.sub(r"\\frac{\g<top>}{\g<bottom>}", text))
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


def _required_blank(blank: re.Match[str]) -> str:
    """Return a row break unchanged, a blank between two digits, and "" for any other blank."""
    if blank[1]:
        return blank[1]
    before, after = blank.string[: blank.start()][-1:], blank.string[blank.end() :][:1]
    return " " if before.isdigit() and after.isdigit() else ""


def _brace_arguments(text: str, macro: str, count: int) -> str:
    """Put braces around every argument of `macro`; as in TeX, an argument is the next token or group."""
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
    """Whether both are the same number, or the same LaTeX up to spelling; words are compared ignoring case.

    A unit or a leading "x=" may be missing on one side but must not differ: 5 cm is not 5 m, x=3 is not y=3.
    """
    inside, expected = unbox(answer), unbox(reference) or reference
    if inside is None:
        return False
    names = {found[1] for text in (expected, inside) if (found := _NAME.match(text))}
    if len(names) > 1 or not units_agree(expected, inside):
        return False
    first, second = normalize_latex(expected), normalize_latex(inside)
    is_word = len(first) > 1 and first.isalpha()
    return first == second != "" or (is_word and first.casefold() == second.casefold())


def is_number(reference: str) -> bool:
    """Whether a reference is a number; numbers are compared by value and never as formulas."""
    return parse_quantity(reference, may_be_percent=True) is not None


@functools.cache
def has_math_verify() -> bool:
    """Whether math-verify is installed. If not, a warning is logged once."""
    if importlib.util.find_spec("math_verify") is None:
        log.warning(
            "math-verify is not installed, so formulas are compared by their spelling: 1+x and x+1 count as different; "
            "pip install 'thinkstack[math]'"
        )
        return False
    return True


def needs_math_verify(reference: str, answer: str) -> bool:
    """Whether math-verify can decide if two answers of different spelling are equal, and is installed."""
    inside = unbox(answer)
    return inside is not None and _is_comparable(unbox(reference) or reference, inside) and has_math_verify()


def are_equivalent(reference: str, answer: str) -> Score:
    """Compare two formulas with math-verify; total is 1 or 0. Run it in a VerifierPool: it may never return.

    The timeouts of math-verify are off: they need the main thread and do not stop everything. `_is_comparable` first
    requires brackets of the same kind, which math-verify ignores, and a single formula as the answer.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    texts = (unbox(reference) or reference, unbox(answer))
    parse_options: dict[str, Any] = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}
    gold, found = (parse(f"${text}$", **parse_options) for text in texts)
    if not gold:
        return Score(total=0.0, unscorable=f"math-verify cannot read the reference {reference!r}")
    return Score(total=float(bool(found) and verify(gold, found, timeout_seconds=None)))


def _is_comparable(reference: str, answer: str) -> bool:
    """Whether the pair may go to math-verify: not a number, one formula, not too long, brackets of the same kind."""
    if is_number(reference) or not answer or len(answer) > MAX_FORMULA_CHARACTERS or re.search(r"[:$]|\\boxed", answer):
        return False
    first, second = normalize_latex(reference), normalize_latex(answer)
    if re.search(r"_\{?[0-9]|\^\{?-?[0-9]{2}", first + " " + second):  # math-verify drops bases and rounds large powers
        return False
    kinds = [
        (text[:1], text[-1:]) if text[:1] in "([" or text.startswith("\\{") else ("", "") for text in (first, second)
    ]
    kinds = [("\\{", "\\}") if kind[0] == "\\" else kind for kind in kinds]
    return kinds[0] == kinds[1] and first.count("=") == second.count("=")
