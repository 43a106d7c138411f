"""Overlap of text with test problems by runs of words: contamination of training data, and its filter.

Words are compared without case, punctuation, line breaks, width or accents; each Chinese character is a word. A run of
10 words is that of the R1 paper's filter (arXiv:2501.12948, v2, appendix on decontamination). Paraphrases and
translations are not found.
"""

import re
import unicodedata
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

RUN_WORDS = 10
"""Words of a run."""
MIN_WORDS = 5
"""Texts with fewer words are not searched: they occur by chance."""
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What of a test problem occurs in a text."""

    share: float
    """Share of the problem's runs that occur."""
    run: str
    """The first one that occurs."""


class OverlapIndex:
    """The runs of words of test problems. A problem of MIN_WORDS to RUN_WORDS words is one run, of all its words."""

    def __init__(self, texts: Mapping[Hashable, str]):
        """texts: the text of each problem, by its key."""
        self._owners: dict[tuple[str, ...], list[Hashable]] = {}
        self._counts: dict[Hashable, int] = {}
        self.too_short: list[Hashable] = []
        """Keys of the problems with fewer than MIN_WORDS words, which are never found."""
        for key, text in texts.items():
            words = split_words(text)
            if len(words) < MIN_WORDS:
                self.too_short.append(key)
                continue
            found = set(_runs(words, min(len(words), RUN_WORDS)))
            self._counts[key] = len(found)
            for run in found:
                self._owners.setdefault(run, []).append(key)
        self._sizes = sorted({len(run) for run in self._owners})

    def find(self, text: str) -> dict[Hashable, Overlap]:
        """Return the overlap of `text` with each problem that shares a run with it."""
        words = split_words(text)
        found: dict[Hashable, list[tuple[str, ...]]] = {}
        for size in self._sizes:
            for run in dict.fromkeys(_runs(words, size)):
                for key in self._owners.get(run, ()):
                    found.setdefault(key, []).append(run)
        return {key: Overlap(share=len(runs) / self._counts[key], run=" ".join(runs[0])) for key, runs in found.items()}


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and accents; hyphens at line ends are joined."""
    text = re.sub(r"(?<=\w)-\s*\n\s*(?=\w)", "", text)
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return _WORD.findall(plain.casefold())


def _runs(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))
