"""Random splitting of tokens that join punctuation with line breaks, for training.

A prompt that ends just before such a line break ends in a token that training never has there. DeepSeek-V3 (report,
arXiv:2412.19437, section 4.1) therefore splits a share of these tokens; the report does not give the share.
"""

import random
import unicodedata
from collections.abc import Sequence

from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError


class BoundarySplitter:
    """The tokens of a vocabulary that join punctuation with line breaks, and the ids that each is split into.

    The text of such a token is punctuation or symbols (Unicode categories P and S, spaces allowed between them),
    followed by one or more of CR and LF. It is split before the first CR or LF; both parts are encoded separately.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Raises ConfigError if the tokenizer has no such tokens."""
        controls = set(tokenizer.control.values())
        self.pieces_by_token: dict[int, list[int]] = {}
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode([token])
            head = text.rstrip("\r\n")
            if token not in controls and is_joined(head, text[len(head) :]):
                self.pieces_by_token[token] = tokenizer.encode(head) + tokenizer.encode(text[len(head) :])
        if not self.pieces_by_token:
            raise ConfigError(
                "boundary_split_share is above 0, but no token of this tokenizer joins punctuation with line breaks; "
                "set boundary_split_share=0"
            )

    def split(self, ids: Sequence[int], share: float, rng: random.Random) -> list[int]:
        """Return ids with each joined token split with probability `share`; the text is unchanged."""
        split_ids: list[int] = []
        for token in ids:
            pieces = self.pieces_by_token.get(token)
            split_ids += pieces if pieces and rng.random() < share else [token]
        return split_ids


def is_joined(head: str, breaks: str) -> bool:
    """Whether head + breaks is punctuation followed by line breaks."""
    categories = [unicodedata.category(character)[0] for character in head if character != " "]
    return bool(breaks) and bool(categories) and set(categories) <= {"P", "S"} and "\ufffd" not in head
