"""Comparing an answer with the reference: strict, without evaluating anything."""

import re
from fractions import Fraction

from thinkstack.text.final_answer import closing_brace

_WIDE: dict[int, int | str] = {0x3000: 0x20, 0x2212: "-", 0x2044: "/", 0x2215: "/"}
_WIDE |= {0xFF01 + place: 0x21 + place for place in range(94)}
"""Full-width characters as Chinese keyboards write them, minus and slash as typesetters do, to plain ones. No more:
NFKC would read 5² as 52."""
_INTEGER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)")
SEPARATOR = r"(?:,\\!|\{,\}(?:\\!)?|\\(?:mathord|text)\{,\}|\{?\\[,:;! ]\}?|~|[\u2009\u202F])"
"""What TeX and typesetters put between thousands, the plain comma aside: 10{,}000, 10,\\!000, 10\\,000."""
_WHOLE = rf"[0-9]{{1,3}}(?:(?:,|{SEPARATOR})[0-9]{{3}})+|[0-9]{{1,30}}"
_TEX_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*([+-]?(?:{_WHOLE}))\s*\}}|([0-9]))\s*(?:\{{\s*([+-]?(?:{_WHOLE}))\s*\}}|([0-9]))"
)
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<decimal>(?:{_WHOLE})(?:\.[0-9]{{1,30}})?|\.[0-9]{{1,30}})"
    rf"|(?:(?P<whole>[0-9]{{1,30}})(?:\s|~|\\[,;:! ])+)?(?P<top>[+-]?(?:{_WHOLE}))\s*/\s*(?P<bottom>[+-]?(?:{_WHOLE})))"
)
_LONGEST_NUMBER = 100
DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("__", "__"), ("`", "`"))
WORD_MACROS = (
    r"text|mbox|hbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|boldsymbol|bm|operatorname|underline"
)
"""Macros that change how their argument looks, and nothing else."""
_STYLE = re.compile(r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:bf|rm|it)(?![A-Za-z])")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_WRAPPER = re.compile(rf"(?:\\(?:{WORD_MACROS}))?\s*\{{")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_ROOT_NAME = re.compile(r"^[a-z](?:_?\{?\d\}?)?=")
_ROOT_BREAK = re.compile(r"[,;、]|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b|和|或")


def clean(answer: str) -> str:
    """The answer without outer space or a final full stop, full-width characters made plain."""
    return answer.translate(_WIDE).strip().rstrip(".。").strip()


def undressed(answer: str) -> str:
    """The answer without what stands around all of it: dollar signs and other delimiters, bold, a box of words, braces,
    a declaration of style."""
    text, before = clean(_BOLD.sub(r"\1", answer)), ""
    while text != before:
        before, text = text, _STYLE.sub("", text).strip()
        for left, right in DELIMITERS:
            inside = text[len(left) : -len(right)]
            is_whole = text == left + inside + right and inside.strip() and not inside.endswith("\\")
            if is_whole and not re.search(rf"(?<!\\){re.escape(left)}", inside):
                text = clean(inside)
        opening = _WRAPPER.match(text)
        if opening and closing_brace(text, opening.end()) == len(text) - 1:
            text = clean(text[opening.end() : -1])
    return text


def normalize(answer: str) -> str | int:
    """An integer if the whole answer is one, else its text without outer space, case or a final full stop.

    Nothing is computed: "2+2" stays the text "2+2", and "50%" is not 50.
    """
    text = clean(answer)
    if _INTEGER.fullmatch(text):
        return int(text.replace(",", ""))
    return text.casefold()


def is_correct(reference: str, answer: str | None) -> bool:
    """Whether `answer` says the same as `reference`; no answer is wrong. The reference comes first."""
    return answer is not None and normalize(reference) == normalize(answer)


def number_of(answer: str) -> Fraction | None:
    """The value of an integer, a decimal, a fraction of two integers or a mixed number; None of anything else.

    Exact: 0.5 is 1/2, 0.333 is not 1/3. Thousands may be marked by commas or as TeX does it, fractions may be written
    in TeX. A mixed number is one: 2\\frac{1}{2} and 2 1/2 are 5/2, but 2\\frac{3}{2}, with more than a whole behind it,
    is a product and none.
    """
    # a blank on either side of a TeX fraction, so that 2\frac12 and 2 1/2 are one spelling and 21/2 is another
    text = _TEX_FRACTION.sub(lambda found: f" {found[1] or found[2]}/{found[3] or found[4]} ", clean(answer)).strip()
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > _LONGEST_NUMBER:
        return None
    if match["decimal"]:
        size = Fraction(_digits(match["decimal"]))
    else:
        top, bottom, whole = int(_digits(match["top"])), int(_digits(match["bottom"])), match["whole"]
        if bottom == 0 or (whole and not (0 < top < bottom and match["top"][0] not in "+-")):
            return None
        size = int(whole or 0) + Fraction(top, bottom)
    return -size if match["sign"] == "-" else size


def _digits(number: str) -> str:
    """A number without marks of thousands."""
    return re.sub(r"[^0-9.+-]", "", number)


def same_choice(reference: str, answer: str) -> bool:
    """Whether the answer is the one letter of the reference, alone or in brackets."""
    match = _CHOICE.fullmatch(undressed(answer))
    return match is not None and match[1].upper() == reference.upper()


def numbers_of(answer: str) -> list[Fraction] | None:
    """Numbers as solutions are listed: "-3, -2", "x=-3 or x=-2", "x1=-3、x2=-2"; None if a part is no number."""
    values = []
    for part in _ROOT_BREAK.split(undressed(answer).casefold()):
        value = number_of(_ROOT_NAME.sub("", re.sub(r"\s*=\s*", "=", part.strip())))
        if value is None:
            return None
        values.append(value)
    return values


def same_numbers(reference: str, answer: str) -> bool:
    """Whether both list the same numbers, in any order, none twice and none left out."""
    values = numbers_of(answer)
    return values is not None and len(values) == len(set(values)) and set(values) == set(numbers_of(reference) or ())
