"""Language consistency: how much of a reasoning is in the language it was asked for (R1 paper, arXiv:2501.12948).

Chinese is counted by characters, English and everything else by words. What belongs to no language is left out first:
code, maths, identifiers, names and acronyms, and foreign words that the question itself uses. Languages that share
the Latin alphabet cannot be told apart here.
"""

import re
import unicodedata

MIN_WORDS = 4
"""A text with fewer words than this says nothing about its language."""
MAX_NAME = 3
"""Capitalised words in a row that may be a name; more are a sentence that pretends to be one."""
MATHS = re.compile(
    r"\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\boxed\s*\{[^{}]*\}|\\[a-zA-Z]+|\\.",
    re.DOTALL,
)
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://[!-~]+|</?[a-zA-Z_]+>", re.DOTALL)
IDENTIFIER = re.compile(
    r"(?:(?<![A-Za-z])[A-Za-z]\w*(?:\.[A-Za-z_]\w*)+(?=\()"  # module.function(
    r"|\b[A-Za-z_]\w*(?=\()"  # function(
    r"|\b\w*(?:_|(?<=[a-z])(?=[A-Z]))\w*"  # snake_case, camelCase
    r"|\b(?=[A-Za-z0-9]*[0-9])(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]+)",  # x1, 3a
    re.ASCII,
)
LATIN_RUN = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['\u2019-][A-Za-z\u00c0-\u024f]+)*")
OPERATORS = frozenset(
    ("sin", "cos", "tan", "log", "ln", "exp", "lim", "max", "min", "mod", "gcd", "lcm", "sqrt", "abs")
)
"""Names of functions; words of mathematics, not of English."""


def language_share(text: str, language: str, quoted: str = "") -> float | None:
    """Share of the words of `text` that are in `language` ("en" or "zh"); None if it has fewer than MIN_WORDS.

    quoted: text, such as the question, whose foreign words may be used freely: they are names and quotations.
    """
    assert language in ("en", "zh"), language
    words = words_of(text)
    known = set(words_of(quoted))
    mine = [word for word in words if is_in(word, language)]
    others = [word for word in words if not is_in(word, language) and word not in known]
    total = len(mine) + len(others)
    return len(mine) / total if total >= MIN_WORDS else None


def words_of(text: str) -> list[str]:
    """What counts as a word: Chinese characters one by one, all else in lower case; in the order of the text."""
    for left_out in (CODE, MATHS, IDENTIFIER):
        text = left_out.sub(" | ", text)
    words: list[str] = []
    for run in re.findall(r"[^\W\d_]+(?:['\u2019 -]+[^\W\d_]+)*", text):
        words += _words_of_run(run)
    return words


def _words_of_run(run: str) -> list[str]:
    """Words of a stretch of letters with blanks between them."""
    found: list[str] = []
    for part in re.findall(r"[A-Za-z\u00c0-\u024f'\u2019 -]+|[^A-Za-z\u00c0-\u024f'\u2019 -]+", run):
        if LATIN_RUN.search(part):
            latin = LATIN_RUN.findall(part)
            if len(latin) > MAX_NAME and all(word[0].isupper() for word in latin):
                found += [word.lower() for word in latin]
            elif not all(word[0].isupper() for word in latin):
                found += [word.lower() for word in latin if not _is_symbol(word)]
        else:
            found += _words_of_script(part)
    return found


def _is_symbol(word: str) -> bool:
    """Variables, acronyms and names of functions; the one-letter words of English count for neither side."""
    return len(word) == 1 or word.isupper() or word.lower() in OPERATORS


def _words_of_script(part: str) -> list[str]:
    """Characters of scripts without blanks, whole words of others; single letters (Greek symbols) are none."""
    if any(unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL")) for letter in part):
        return list(part)
    return [part.lower()] if len(part) > 1 else []


def is_in(word: str, language: str) -> bool:
    """Whether a word of `words_of` belongs to the language."""
    first = unicodedata.name(word[0], "")
    return first.startswith("CJK UNIFIED" if language == "zh" else "LATIN")
