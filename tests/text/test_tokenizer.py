"""Properties of our vocabularies: single digits, single-token strings, and control tokens that no text can spell."""

import json
import random

import pytest
import tokenizers

from tests.tiny import tiny_tokenizer
from thinkstack.text.tokenizer import ASSISTANT, CONTROL, EOS, PAD, USER, Control, Tokenizer, train_tokenizer
from thinkstack.types import ConfigError

TEXTS = [
    "",
    " ",
    "a",
    "12 345",
    "  two  spaces ",
    "line\nbreak\r\n\ttab",
    "从左到右 12",
    "é ü \u00a0 \U0001f600",
    "\ue000<0>",
]


def test_control_tokens_come_first_and_in_order():
    assert [tiny_tokenizer().control_id(token) for token in CONTROL] == list(range(7))


def test_each_digit_is_one_token():
    tokenizer = tiny_tokenizer()
    for text in ("2024", "12+34=46", "x1y22", "007"):
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
        assert len({tokenizer.encode(digit)[0] for digit in "0123456789"}) == 10


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_inverts_encoding(text):
    assert tiny_tokenizer().decode(tiny_tokenizer().encode(text)) == text


def test_decoding_inverts_encoding_of_any_characters():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xA0, 0xD7FF)))) for _ in range(20))
        assert tiny_tokenizer().decode(tiny_tokenizer().encode(text)) == text


def test_no_text_becomes_a_control_token():
    """A user who types the end-of-sentence token must not end the model's turn."""
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    forbidden = set(tokenizer.control.values())
    pieces = [*CONTROL, *(token[1:-1] for token in CONTROL), "<", ">", "|", "｜", " ", "think", "/", "x", "1", "\n"]
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(8))
        ids = tokenizer.encode(text)
        assert not forbidden & set(ids)
        assert tokenizer.decode(ids) == text


def test_a_single_token_string_is_one_ordinary_token():
    ids = tiny_tokenizer().encode("<answer>7</answer>")
    assert len(ids) == 3
    assert not set(ids) & set(tiny_tokenizer().control.values())


def test_control_tokens_are_spelt_out_when_decoded():
    assert tiny_tokenizer().decode([tiny_tokenizer().control_id(EOS)]) == EOS


def test_half_a_character_decodes_to_the_replacement_character():
    tokenizer = train_tokenizer(["abc"], 300)
    ids = tokenizer.encode("中")
    assert len(ids) == 3
    assert "\ufffd" in tokenizer.decode(ids[:2])


def test_saving_and_loading_changes_nothing(tmp_path):
    tiny_tokenizer().save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.spec == tiny_tokenizer().spec
    assert loaded.encode("the last digit of 12") == tiny_tokenizer().encode("the last digit of 12")
    assert loaded.vocab_size == tiny_tokenizer().vocab_size <= 360


def test_training_is_a_function_of_its_texts():
    texts = ["the ball is under cup 3", "what is the last digit"] * 3
    assert train_tokenizer(texts, 300).spec == train_tokenizer(texts, 300).spec


def test_a_missing_file_or_a_small_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="below 264"):
        train_tokenizer(["a"], 263, single_tokens=("<answer>",))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="no control token '<x>'"):
        tiny_tokenizer().control_id("<x>")


def test_pad_and_eos_differ():
    """If they were one token, a mask computed from the pad id would exclude every end token from training."""
    assert tiny_tokenizer().control_id(PAD) != tiny_tokenizer().control_id(EOS)


@pytest.mark.parametrize("changed", ["blanks beside a token", "a token of blanks"])
def test_splitting_at_control_tokens_equals_the_full_tokenizer(changed):
    """In some vocabularies a control token strips adjacent blanks; some have blanks among the added tokens."""
    spec = json.loads(tiny_tokenizer().spec)
    if changed == "blanks beside a token":
        flags = {USER: {"rstrip": True}, ASSISTANT: {"lstrip": True}}
        spec["added_tokens"] = [token | flags.get(token["content"], {}) for token in spec["added_tokens"]]
    else:
        spec["added_tokens"].append(spec["added_tokens"][0] | {"content": "\n\n", "id": tiny_tokenizer().vocab_size})
    tokenizer, rng = Tokenizer(json.dumps(spec)), random.Random(0)
    whole = tokenizers.Tokenizer.from_str(tokenizer.spec)
    for _ in range(300):
        text = "".join(rng.choice((*CONTROL, " ", "\n", "\n\n", "the", "<", "<think")) for _ in range(8))
        assert (
            tokenizer.encode_pieces(tokenizer.split_controls(text)) == whole.encode(text, add_special_tokens=False).ids
        ), text
    assert set(tokenizer.control) == set(CONTROL)


def test_text_between_control_tokens_is_encoded_as_one_piece():
    tokenizer = tiny_tokenizer()
    pieces = [Control(USER), "th", "e", " an", "swer", Control(EOS), EOS]
    assert tokenizer.encode_pieces(pieces) == [
        tokenizer.control_id(USER),
        *tokenizer.encode("the answer"),
        tokenizer.control_id(EOS),
        *tokenizer.encode(EOS),
    ]
