"""Extraction of the final answer from text: in a box, after an answer phrase, or the last number. No verification."""

import re
from collections.abc import Callable

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?P<brace>\{)?")
_BARE_BOX = re.compile(r"[^\s$.,{}]+(?:[.,][0-9]+)*")
_JOINED = re.compile(r"(?:[\s$,;*/]|\\[()\[\],;: !]|\\(?:text|mbox|q?quad)(?![A-Za-z])|[{}]|\b(?:and|or)\b)*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_VALUE = r"(?:[-+\u2212]?\s?[\\$\u20ac\u00a3\u00a5]?\s?[-+\u2212]?\.?[0-9]|[\\$])"
"""Start of a value that is not a word: a number with sign and currency, or a formula."""
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
"""Two words after a number: "22 eggs in 3 boxes", "22 because 3+19=22"."""
_DENIAL = re.compile(r"(?:not|unclear|unknown)\b", re.IGNORECASE)
MAX_ANSWER_WORDS = 3
"""Maximum words of a verbal answer after "the answer is"; longer text is a sentence, to which the other rules apply."""


def closing_brace(text: str, start: int) -> int | None:
    """Return the index of the brace that closes the one before `start`; escaped braces do not count."""
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def boxes(text: str) -> list[str | None]:
    """Return the content of each outermost \\boxed{} or \\fbox{} in order; None for an unfinished one."""
    return [content for content, _, _ in _box_spans(text)]


def _box_spans(text: str) -> list[tuple[str | None, int, int]]:
    """Return (content, start, end) of each box."""
    found: list[tuple[str | None, int, int]] = []
    place = 0
    while match := _BOX.search(text, place):
        if match["brace"] is None:  # \boxed 5, as some solutions write
            word = _BARE_BOX.match(text, match.end())
            place = word.end() if word else match.end()
            found.append((word[0] if word else None, match.start(), place))
            continue
        end = closing_brace(text, match.end())
        if end is None:
            return [*found, (None, match.start(), len(text))]
        place = end + 1
        found.append((text[match.end() : end], match.start(), place))
    return found


def last_boxed(text: str) -> str | None:
    """Return the content of the last box; None if there is no box or if the last one is empty or unfinished."""
    found = boxes(text)
    return (found[-1] or "").strip() or None if found else None


def boxed_answer(text: str) -> str | None:
    """Return the content of the last box of a model's answer, as `last_boxed`; None also if it is one of several.

    Boxes with different contents that only "and", "or", signs or blanks separate are several answers:
    \\boxed{3} or \\boxed{4} is none. A box in an earlier sentence is a step on the way.
    """
    spans = _box_spans(text)
    if len(spans) > 1:
        (before, _, end), (last, start, _) = spans[-2:]
        if before and last and before.strip() != last.strip() and _JOINED.fullmatch(text, end, start):
            return None
    return last_boxed(text)


def after_hashes(text: str) -> str | None:
    """Return the text after the last #### on its line (the format of GSM8K); Markdown headings do not count."""
    found = _HASHES.findall(text)
    return found[-1].strip() if found else None


def after_answer_is(text: str) -> str | None:
    """Return the rest of the last sentence with "the answer is" or "Answer:", if it is a value or at most three
    words."""
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        value = _SENTENCE_END.split(match["value"], maxsplit=1)[0].strip(" \t*:")
        number = _NUMBER.match(value)
        if number and _PROSE.match(value, number.end()):
            return number[0]
        value = value.rpartition("=")[2].strip() if re.match(_VALUE, value) else value
        if _DENIAL.match(value):
            continue
        if value and (re.match(_VALUE, value) or len(value.split()) <= MAX_ANSWER_WORDS):
            return value
    return None


def last_number(text: str) -> str | None:
    """Return the last number, with its sign, currency and thousands separators."""
    found = [match[0] for match in _NUMBER.finditer(text) if match[0]]
    return found[-1] if found else None


EXTRACTION_RULES: dict[str, Callable[[str], str | None]] = {
    "last_box": boxed_answer,
    "hashes": after_hashes,
    "answer_is": after_answer_is,
    "last_number": last_number,
}
"""Extraction rules for models without a known format, in order; the first rule that finds an answer decides."""


def flexible_extract(text: str) -> tuple[str | None, str | None]:
    """Return (answer, name of the rule that found it); (None, None) if no rule finds one.

    An unfinished or empty last box means that the answer was cut off, and several boxes side by side are no single
    answer: the result is (None, None).
    The name comes from a filter in lm-evaluation-harness, which extracts the last number.
    """
    if boxes(text) and boxed_answer(text) is None:
        return None, None
    for name, rule in EXTRACTION_RULES.items():
        answer = rule(text)
        if answer is not None:
            return answer, name
    return None, None
