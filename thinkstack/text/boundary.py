"""Tokens that join punctuation with line breaks, and splitting a share of them in training.

A prompt that ends right before such a break shows the model a token that it never saw there. DeepSeek-V3 (report,
arXiv:2412.19437, section 4.1) therefore splits a share of these tokens; it does not say how many.
"""

import random
import unicodedata
from collections.abc import Sequence

from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError


class BoundarySplitter:
    """Which tokens of a vocabulary join punctuation with line breaks, and what each is split into.

    Such a token's text is punctuation or symbols (Unicode categories P and S, spaces among them allowed), then one or
    more of CR and LF. It is split before the first of these; both parts are encoded by themselves.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Raises ConfigError for a tokenizer without such tokens."""
        controls = set(tokenizer.control.values())
        self.parts: dict[int, list[int]] = {}
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode([token])
            head = text.rstrip("\r\n")
            if token not in controls and is_joined(head, text[len(head) :]):
                self.parts[token] = tokenizer.encode(head) + tokenizer.encode(text[len(head) :])
        if not self.parts:
            raise ConfigError(
                "boundary_split_share is above 0, and this tokenizer joins no punctuation with line breaks; set it to 0"
            )

    def split(self, ids: Sequence[int], share: float, rng: random.Random) -> list[int]:
        """ids with each joined token split with probability `share`; the text stays the same."""
        out: list[int] = []
        for token in ids:
            parts = self.parts.get(token)
            out += parts if parts and rng.random() < share else [token]
        return out


def is_joined(head: str, breaks: str) -> bool:
    """Whether head + breaks is punctuation followed by line breaks."""
    kinds = [unicodedata.category(character)[0] for character in head if character != " "]
    return bool(breaks) and bool(kinds) and set(kinds) <= {"P", "S"} and "\ufffd" not in head
