"""The final answer within what a model says: in a box, behind a mark, or the last number. Nothing is judged here."""

import re
from collections.abc import Callable

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?P<brace>\{)?")
_BARE_BOX = re.compile(r"[^\s$.,{}]+(?:[.,][0-9]+)*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_VALUE = r"(?:[-+\u2212]?\s?[\\$\u20ac\u00a3\u00a5]?\s?[-+\u2212]?\.?[0-9]|[\\$])"
"""How a value begins that is no word: a number, with its sign and currency, or a formula."""
_HASHES = re.compile(rf"####[ \t]*+(?![0-9]+[.):][ \t]+\S)(?={_VALUE})([^\n]*)")
_ANSWER_IS = re.compile(
    r"(?:\banswer\b(?:\s+(?:is|was)\b|\s*[:=])|\u7b54\u6848\s*[\u662f\u4e3a:\uff1a])[\s:\uff1a*]*(?=(?P<value>[^\n]*))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\u3002|(?<=\S)\*\*|,\s+(?!and\b|or\b)(?=[A-Za-z]{2})")
_NUMBER = re.compile(
    r"(?<![\w.,])(?:(?<![)\]}])[-\u2212])?\\?[$\u20ac\u00a3\u00a5]?[-\u2212]?"
    r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?(?<=[0-9])(?:/[0-9]+)?"
)
_PROSE = re.compile(r"\s+[A-Za-z]+\s+\S")
"""Two words behind a number: "22 eggs in 3 boxes", "22 because 3+19=22"."""
_DENIAL = re.compile(r"(?:not|unclear|unknown)\b", re.IGNORECASE)
MOST_WORDS = 3
"""Words of an answer in words behind "the answer is"; more are a sentence, in which another rule looks."""


def closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`; escaped braces do not count."""
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def boxes(text: str) -> list[str | None]:
    """What each outermost \\boxed{} or \\fbox{} of `text` holds, in order; None for one that is not finished."""
    found: list[str | None] = []
    place = 0
    while match := _BOX.search(text, place):
        if match["brace"] is None:  # \boxed 5, as some solutions write
            word = _BARE_BOX.match(text, match.end())
            found.append(word[0] if word else None)
            place = word.end() if word else match.end()
            continue
        end = closing_brace(text, match.end())
        if end is None:
            return [*found, None]
        found.append(text[match.end() : end])
        place = end
    return found


def last_boxed(text: str) -> str | None:
    """What the last box holds; None without a box, and if the last one is empty or not finished."""
    found = boxes(text)
    return (found[-1] or "").strip() or None if found else None


def after_hashes(text: str) -> str | None:
    """What follows the last #### on its line, as GSM8K's solutions end; a heading of Markdown is none."""
    found = _HASHES.findall(text)
    return found[-1].strip() if found else None


def after_answer_is(text: str) -> str | None:
    """The rest of the last sentence that says "the answer is" or "Answer:", if it is a value or at most three words."""
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        value = _SENTENCE_END.split(match["value"], maxsplit=1)[0].strip(" \t*:")
        number = _NUMBER.match(value)
        if number and _PROSE.match(value, number.end()):
            return number[0]
        value = value.rpartition("=")[2].strip() if re.match(_VALUE, value) else value
        if _DENIAL.match(value):
            continue
        if value and (re.match(_VALUE, value) or len(value.split()) <= MOST_WORDS):
            return value
    return None


def last_number(text: str) -> str | None:
    """The last number, with its sign, currency and thousands."""
    found = [match[0] for match in _NUMBER.finditer(text) if match[0]]
    return found[-1] if found else None


EXTRACTION_RULES: dict[str, Callable[[str], str | None]] = {
    "last_box": last_boxed,
    "hashes": after_hashes,
    "answer_is": after_answer_is,
    "last_number": last_number,
}
"""How the answer of a model without a format of its own is found: the first rule that finds something decides."""


def flexible_extract(text: str) -> tuple[str | None, str | None]:
    """(the answer, the name of the rule that found it); (None, None) if no rule does.

    A box that is not finished, or empty, says that the answer was about to come: then there is none.
    Source: lm-evaluation-harness calls its filter for such answers flexible-extract; it takes the last number.
    """
    if boxes(text) and last_boxed(text) is None:
        return None, None
    for name, rule in EXTRACTION_RULES.items():
        answer = rule(text)
        if answer is not None:
            return answer, name
    return None, None
