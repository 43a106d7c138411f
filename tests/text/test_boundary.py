"""Tokens that join punctuation with line breaks: detection, and splitting without a change of text."""

import random

import pytest

from tests.tiny import tiny_tokenizer
from thinkstack.text.boundary import BoundarySplitter, is_joined
from thinkstack.text.tokenizer import Tokenizer, train_tokenizer
from thinkstack.types import ConfigError

TEXT = "One.\nTwo?\n\nThree:\nfour!\nand.\n"


def joining_tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 20, 320, join_breaks=True)


@pytest.mark.parametrize(
    ("head", "breaks", "joined"),
    [
        (".", "\n", True),
        (" );", "\r\n\n", True),
        ("。", "\n", True),
        ("+", "\n", True),
        ("", "\n", False),
        (" ", "\n", False),
        ("a.", "\n", False),
        ("1", "\n", False),
        (".", "", False),
        (".\t", "\n", False),
        ("\ufffd", "\n", False),
    ],
)
def test_a_joined_token_is_punctuation_followed_by_line_breaks(head, breaks, joined):
    assert is_joined(head, breaks) == joined


def test_joined_tokens_of_a_vocabulary_are_found():
    tokenizer = joining_tokenizer()
    found = {tokenizer.decode([token]): parts for token, parts in BoundarySplitter(tokenizer).pieces_by_token.items()}
    assert {".\n", "?\n\n", ":\n"} <= set(found)
    assert [tokenizer.decode([part]) for part in found[".\n"]] == [".", "\n"]
    assert "".join(tokenizer.decode([part]) for part in found["?\n\n"]) == "?\n\n" and len(found["?\n\n"]) >= 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_text_stays_the_same(share):
    tokenizer = joining_tokenizer()
    splitter, ids = BoundarySplitter(tokenizer), tokenizer.encode(TEXT)
    for seed in range(20):
        assert tokenizer.decode(splitter.split(ids, share, random.Random(seed))) == TEXT


def test_the_share_applies_to_joined_tokens():
    tokenizer = joining_tokenizer()
    splitter, ids = BoundarySplitter(tokenizer), tokenizer.encode(".\n" * 2000)
    joined = tokenizer.encode(".\n")
    assert len(joined) == 1 and ids == joined * 2000
    split = splitter.split(ids, 0.25, random.Random(0))
    assert abs(split.count(joined[0]) - 1500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert splitter.split(ids, 0.0, random.Random(0)) == ids
    assert joined[0] not in splitter.split(ids, 1.0, random.Random(0))


def test_a_vocabulary_without_joined_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"joins punctuation with line breaks; set boundary_split_share=0"):
        BoundarySplitter(tiny_tokenizer())


def test_join_breaks_changes_only_punctuation_before_breaks():
    text = "12 three\n four, five(6)\t7.8"
    plain, joining = (train_tokenizer([TEXT, text] * 9, 320, join_breaks=join) for join in (False, True))
    for tokenizer in (plain, joining):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not any("\n" in plain.decode([i]) and plain.decode([i]).strip() for i in range(7, plain.vocab_size))
