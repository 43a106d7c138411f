"""Comparing an answer with the reference: strict, without evaluating anything."""

import re
import unicodedata

_INTEGER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)")


def normalise(answer: str) -> str | int:
    """An integer if the whole answer is one, else its text without outer space, case or a final full stop.

    Nothing is computed: "2+2" stays the text "2+2", and "50%" is not 50.
    """
    text = unicodedata.normalize("NFKC", answer).strip().rstrip(".。").strip()
    if _INTEGER.fullmatch(text):
        return int(text.replace(",", ""))
    return text.casefold()


def is_correct(reference: str, answer: str | None) -> bool:
    """Whether `answer` says the same as `reference`; no answer is wrong. The reference comes first."""
    return answer is not None and normalise(reference) == normalise(answer)
