"""Strict comparison of an answer with the reference; nothing is evaluated."""

import re
from fractions import Fraction

from thinkstack.text.final_answer import closing_brace

_FULL_WIDTH: dict[int, int | str] = {0x3000: 0x20, 0x2212: "-", 0x2044: "/", 0x2215: "/"}
_FULL_WIDTH |= {0xFF01 + place: 0x21 + place for place in range(94)}
"""Maps full-width characters (Chinese keyboards) and typographic minus and slash to ASCII. Nothing else is mapped: NFKC
would read 5² as 52."""
_INTEGER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)")
SEPARATOR = r"(?:,\\!|\{,\}(?:\\!)?|\\(?:mathord|text)\{,\}|\{?\\[,:;! ]\}?|~|[\u2009\u202F])"
"""Thousands separators of TeX and typesetters, without the plain comma: 10{,}000, 10,\\!000, 10\\,000."""
_UNSIGNED = rf"[0-9]{{1,3}}(?:(?:,|{SEPARATOR})[0-9]{{3}})+|[0-9]{{1,30}}"
_TEX_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*([+-]?(?:{_UNSIGNED}))\s*\}}|([0-9]))\s*(?:\{{\s*([+-]?(?:{_UNSIGNED}))\s*\}}|([0-9]))"
)
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<decimal>(?:{_UNSIGNED})(?:\.[0-9]{{1,30}})?|\.[0-9]{{1,30}})"
    rf"|(?:(?P<integer>[0-9]{{1,30}})(?:\s|~|\\[,;:! ])+)?(?P<top>[+-]?(?:{_UNSIGNED}))\s*/\s*"
    rf"(?P<bottom>[+-]?(?:{_UNSIGNED})))"
)
_MAX_NUMBER_CHARACTERS = 100
DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("__", "__"), ("`", "`"))
WORD_MACROS = (
    r"text|mbox|hbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|boldsymbol|bm|operatorname|underline"
)
"""Macros that change only the look of their argument."""
_STYLE = re.compile(r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:bf|rm|it)(?![A-Za-z])")
_OUTER_BLANKS = re.compile(
    r"^(?:\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\s)+|(?:(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\s)+$"
)
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_WRAPPER = re.compile(rf"(?:\\(?:{WORD_MACROS}))?\s*\{{")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_ROOT_NAME = re.compile(r"^[a-z](?:_?\{?\d\}?)?=")
_ROOT_BREAK = re.compile(r"[,;、]|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b|和|或")


def strip_answer(answer: str) -> str:
    """Return the answer without outer white space and final full stop, full-width characters mapped to ASCII."""
    return answer.translate(_FULL_WIDTH).strip().rstrip(".。").strip()


def strip_wrappers(answer: str) -> str:
    """Return the answer without wrappers around the entire answer: math delimiters, bold, text macros, braces, style
    declarations, TeX's blanks."""
    text, before = strip_answer(_BOLD.sub(r"\1", answer)), ""
    while text != before:
        before, text = text, _OUTER_BLANKS.sub("", _STYLE.sub("", text))
        for left, right in DELIMITERS:
            inside = text[len(left) : -len(right)]
            is_whole = text == left + inside + right and inside.strip() and not inside.endswith("\\")
            if is_whole and not re.search(rf"(?<!\\){re.escape(left)}", inside):
                text = strip_answer(inside)
        opening = _WRAPPER.match(text)
        if opening and closing_brace(text, opening.end()) == len(text) - 1:
            text = strip_answer(text[opening.end() : -1])
    return text


def normalize(answer: str) -> str | int:
    """Return an int if the answer is an integer, else its casefolded text without outer space and final full stop.

    Nothing is computed: "2+2" stays the text "2+2", and "50%" is not 50.
    """
    text = strip_answer(answer)
    if _INTEGER.fullmatch(text):
        return int(text.replace(",", ""))
    return text.casefold()


def is_correct(reference: str, answer: str | None) -> bool:
    """Whether `answer` equals `reference` after `normalize`; None is wrong. The reference comes first."""
    return answer is not None and normalize(reference) == normalize(answer)


def parse_number(answer: str) -> Fraction | None:
    """Return the value of an integer, a decimal, a fraction of two integers or a mixed number; None for anything else.

    Values are exact: 0.5 is 1/2, 0.333 is not 1/3. Thousands separators may be commas or TeX separators; fractions may
    be TeX. Mixed numbers are read: 2\\frac{1}{2} and 2 1/2 are 5/2. With an improper fraction, as in 2\\frac{3}{2}, the
    text is a product, and the result is None.
    """
    # blanks around a TeX fraction: 2\frac12 and 2 1/2 become one spelling, and 21/2 stays different
    text = _TEX_FRACTION.sub(
        lambda found: f" {found[1] or found[2]}/{found[3] or found[4]} ", strip_answer(answer)
    ).strip()
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    if match["decimal"]:
        size = Fraction(_digits(match["decimal"]))
    else:
        top, bottom, integer = int(_digits(match["top"])), int(_digits(match["bottom"])), match["integer"]
        if bottom == 0 or (integer and not (0 < top < bottom and match["top"][0] not in "+-")):
            return None
        size = int(integer or 0) + Fraction(top, bottom)
    return -size if match["sign"] == "-" else size


def _digits(number: str) -> str:
    """Return the number without thousands separators."""
    return re.sub(r"[^0-9.+-]", "", number)


def same_choice(reference: str, answer: str) -> bool:
    """Whether the answer is the letter of the reference, alone or in brackets."""
    match = _CHOICE.fullmatch(strip_wrappers(answer))
    return match is not None and match[1].upper() == reference.upper()


def parse_numbers(answer: str) -> list[Fraction] | None:
    """Parse a list of solutions: "-3, -2", "x=-3 or x=-2", "x1=-3、x2=-2"; None if a part is not a number."""
    values = []
    for part in _ROOT_BREAK.split(strip_wrappers(answer).casefold()):
        value = parse_number(_ROOT_NAME.sub("", re.sub(r"\s*=\s*", "=", part.strip())))
        if value is None:
            return None
        values.append(value)
    return values


def same_numbers(reference: str, answer: str) -> bool:
    """Whether both list the same numbers in any order, without duplicates or omissions."""
    values = parse_numbers(answer)
    return values is not None and len(values) == len(set(values)) and set(values) == set(parse_numbers(reference) or ())
