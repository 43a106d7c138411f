"""Fill in the middle: the parts join to the text, and the cuts are uniform."""

import random
from collections import Counter

import pytest

from tests.tiny import tiny_tokenizer
from thinkstack.text.fim import check_fim, fill_in_middle, fim_prompt
from thinkstack.text.tokenizer import BOS, CONTROL, EOS, FIM, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer, train_tokenizer
from thinkstack.types import ConfigError, RequestError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "从左到右计算",
    "é \U0001f600 x",
    "a",
    "<｜fim▁hole｜> is only text",
    " \n",
]


def fim_tokenizer() -> Tokenizer:
    return train_tokenizer(["def add(a, b):", "return a + b"] * 3, 300, control=(*CONTROL, *FIM))


def parts(ids: list[int], tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Return prefix, suffix and middle, split at the control tokens."""
    begin, hole, end, eos = (tokenizer.control_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END, EOS))
    assert ids[0] == begin and ids[-1] == eos
    assert [token for token in ids if token in (begin, hole, end, eos)] == [begin, hole, end, eos]
    first, second = ids.index(hole), ids.index(end)
    return tuple(tokenizer.decode(piece) for piece in (ids[1:first], ids[first + 1 : second], ids[second + 1 : -1]))


@pytest.mark.parametrize("text", TEXTS)
def test_prefix_middle_and_suffix_join_to_the_text(text):
    tokenizer = fim_tokenizer()
    for seed in range(50):
        prefix, suffix, middle = parts(fill_in_middle(text, tokenizer, random.Random(seed)), tokenizer)
        assert prefix + middle + suffix == text


def test_cuts_are_uniform_over_all_positions():
    """Each cut falls on each of the 5 positions of "abcd" with probability 1/5, within 4 standard errors."""
    tokenizer, places = fim_tokenizer(), Counter()
    for seed in range(2000):
        prefix, _, middle = parts(fill_in_middle("abcd", tokenizer, random.Random(seed)), tokenizer)
        places.update((len(prefix), len(prefix) + len(middle)))
    assert set(places) == set(range(5))
    assert all(abs(count - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5 for count in places.values())


def test_the_same_seed_cuts_at_the_same_place():
    tokenizer = fim_tokenizer()
    first, again, other = (fill_in_middle(TEXTS[0], tokenizer, random.Random(seed)) for seed in (7, 7, 8))
    assert first == again != other


def test_fim_control_tokens_follow_the_others():
    """The ids of the other control tokens are the same with and without fim tokens."""
    assert [fim_tokenizer().control_id(token) for token in (*CONTROL, *FIM)] == list(range(10))


def test_a_tokenizer_without_the_control_tokens_is_refused():
    check_fim(fim_tokenizer())
    with pytest.raises(ConfigError, match=r"fim▁begin.*set fim_rate=0"):
        check_fim(tiny_tokenizer())


def test_a_prompt_is_the_start_of_a_training_document():
    tokenizer = fim_tokenizer()
    encode, bos = tokenizer.encode, tokenizer.control_id(BOS)
    begin, hole, end = (tokenizer.control_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END))
    assert fim_prompt(tokenizer, "def ", "(a)") == [bos, begin, *encode("def "), hole, *encode("(a)"), end]
    assert fim_prompt(tokenizer, "", "") == [bos, begin, hole, end]
    assert fim_prompt(tokenizer, "def ") == [bos, *encode("def ")]


@pytest.mark.parametrize("token", [*CONTROL, *FIM])
def test_prefix_and_suffix_add_no_control_token(token):
    tokenizer = fim_tokenizer()
    control = set(tokenizer.control.values())
    for prefix, suffix in ((token, "x"), ("x", token), (token, None), (f"{token}{token[:-1]}", token)):
        plain = fim_prompt(tokenizer, "x", None if suffix is None else "x")
        found = [each for each in fim_prompt(tokenizer, prefix, suffix) if each in control]
        assert found == [each for each in plain if each in control]


def test_a_suffix_needs_the_control_tokens():
    with pytest.raises(RequestError, match=r"suffix is not supported.*fim▁begin"):
        fim_prompt(tiny_tokenizer(), "a", "b")
