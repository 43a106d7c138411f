"""Comparing an answer with the reference: strict, without evaluating anything."""

import re
from fractions import Fraction

_WIDE = {0xFF01 + place: 0x21 + place for place in range(94)} | {0x3000: 0x20}
"""Full-width characters as Chinese keyboards write them, to plain ones. No more: NFKC would read 5² as 52."""
_INTEGER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<top>[0-9]{1,30})/(?P<bottom>[0-9]{1,30})|(?P<decimal>[0-9]{1,30}(?:\.[0-9]{1,30})?))"
)
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_ROOT_NAME = re.compile(r"^[a-z](?:_?\d)?=")
_ROOT_BREAK = re.compile(r"[,;、]|\band\b|\bor\b|和|或")


def clean(answer: str) -> str:
    """The answer without outer space or a final full stop, full-width characters made plain."""
    return answer.translate(_WIDE).strip().rstrip(".。").strip()


def normalise(answer: str) -> str | int:
    """An integer if the whole answer is one, else its text without outer space, case or a final full stop.

    Nothing is computed: "2+2" stays the text "2+2", and "50%" is not 50.
    """
    text = clean(answer)
    if _INTEGER.fullmatch(text):
        return int(text.replace(",", ""))
    return text.casefold()


def is_correct(reference: str, answer: str | None) -> bool:
    """Whether `answer` says the same as `reference`; no answer is wrong. The reference comes first."""
    return answer is not None and normalise(reference) == normalise(answer)


def number_of(answer: str) -> Fraction | None:
    """The value of an integer, a decimal or a fraction of two integers; None if the answer is anything else.

    Exact: 0.5 is 1/2, 0.333 is not 1/3. Thousands may be marked by commas in an integer.
    """
    text = clean(answer)
    if _INTEGER.fullmatch(text):
        text = text.replace(",", "")
    match = _FRACTION.fullmatch(text)
    if match is None or len(text) > 64 or (match["bottom"] and int(match["bottom"]) == 0):
        return None
    size = Fraction(match["decimal"]) if match["decimal"] else Fraction(int(match["top"]), int(match["bottom"]))
    return -size if match["sign"] == "-" else size


def same_number(reference: str, answer: str) -> bool:
    """Whether both are numbers as `number_of` reads them, of the same value."""
    value = number_of(answer)
    return value is not None and value == number_of(reference)


def same_choice(reference: str, answer: str) -> bool:
    """Whether the answer is the one letter of the reference, alone or in brackets."""
    match = _CHOICE.fullmatch(clean(answer))
    return match is not None and match[1].upper() == reference.upper()


def list_of(answer: str) -> list[str] | None:
    """The items between commas; None if one is empty. Spaces and one pair of outer square brackets do not count."""
    text = clean(answer).replace("、", ",")
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    items = [item.strip().casefold() for item in text.split(",")]
    return items if all(items) else None


def same_list(reference: str, answer: str) -> bool:
    """Whether both hold the same items in the same order."""
    items = list_of(answer)
    return items is not None and items == list_of(reference)


def numbers_of(answer: str) -> list[Fraction] | None:
    """Numbers as solutions are listed: "-3, -2", "x=-3 or x=-2", "x1=-3、x2=-2"; None if a part is anything else."""
    values = []
    for part in _ROOT_BREAK.split(clean(answer).casefold()):
        value = number_of(_ROOT_NAME.sub("", re.sub(r"\s*=\s*", "=", part.strip())))
        if value is None:
            return None
        values.append(value)
    return values


def same_numbers(reference: str, answer: str) -> bool:
    """Whether both list the same numbers, in any order, none twice and none left out."""
    values = numbers_of(answer)
    return values is not None and len(values) == len(set(values)) and set(values) == set(numbers_of(reference) or ())
