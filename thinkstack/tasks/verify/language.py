"""Language consistency: the share of the reasoning in the target language (R1 paper, arXiv:2501.12948).

Chinese is counted in characters, all other languages in words. Text that belongs to no language is removed
first: code, math, identifiers, names and acronyms, and foreign words that the question itself uses. Languages that
share the Latin alphabet are not distinguished.
"""

import re
import unicodedata

MIN_WORDS = 4
"""Minimum number of words for which the language of a text is measured."""
MAX_NAME = 3
"""Longest run of capitalized words that counts as a name; a longer run counts as a sentence."""
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
MATH_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "log", "ln", "exp", "lim", "max", "min", "mod", "gcd", "lcm", "sqrt", "abs")
)
"""Names of mathematical functions, which are not counted as English words."""


def language_share(text: str, language: str, quoted: str = "") -> float | None:
    """Return the share of the words of `text` in `language` ("en" or "zh"); None if there are fewer than MIN_WORDS.

    quoted: text, such as the question, whose foreign words do not count against `text`: they are names and quotations.
    """
    assert language in ("en", "zh"), language
    words = split_words(text)
    quoted_words = set(split_words(quoted))
    own = [word for word in words if is_word_of(word, language)]
    others = [word for word in words if not is_word_of(word, language) and word not in quoted_words]
    total = len(own) + len(others)
    return len(own) / total if total >= MIN_WORDS else None


def split_words(text: str) -> list[str]:
    """Split text into words, in order: single Chinese characters, all other words in lower case."""
    for pattern in (CODE, MATHS, IDENTIFIER):
        text = pattern.sub(" | ", text)
    words: list[str] = []
    for run in re.findall(r"[^\W\d_]+(?:['\u2019 -]+[^\W\d_]+)*", text):
        words += _split_run(run)
    return words


def _split_run(run: str) -> list[str]:
    """Split a run of letters and blanks into words."""
    found: list[str] = []
    for part in re.findall(r"[A-Za-z\u00c0-\u024f'\u2019 -]+|[^A-Za-z\u00c0-\u024f'\u2019 -]+", run):
        if LATIN_RUN.search(part):
            latin = LATIN_RUN.findall(part)
            if len(latin) > MAX_NAME and all(word[0].isupper() for word in latin):
                found += [word.lower() for word in latin]
            elif not all(word[0].isupper() for word in latin):
                found += [word.lower() for word in latin if not _is_symbol(word)]
        else:
            found += _split_script(part)
    return found


def _is_symbol(word: str) -> bool:
    """Whether a word is a variable, an acronym or a function name; one-letter English words count as variables."""
    return len(word) == 1 or word.isupper() or word.lower() in MATH_FUNCTIONS


def _split_script(part: str) -> list[str]:
    """Split scripts without blanks into characters; keep words of other scripts; drop single letters (Greek
    symbols)."""
    if any(unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL")) for letter in part):
        return list(part)
    return [part.lower()] if len(part) > 1 else []


def is_word_of(word: str, language: str) -> bool:
    """Whether a word from `split_words` belongs to the language."""
    first = unicodedata.name(word[0], "")
    return first.startswith("CJK UNIFIED" if language == "zh" else "LATIN")
