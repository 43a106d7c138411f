"""Decoded tokens equal the text of all of them, for every kind of tokenizer, with constant work per token."""

import random
from collections.abc import Sequence

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from tests.text.test_stream import CALL, CALLS_BEGIN, ids_of_bytes, tokenizer
from thinkstack.text.chat import chat_format
from thinkstack.text.decode import TextDecoder
from thinkstack.text.stream import TurnStream
from thinkstack.text.stream_parser import StreamParser
from thinkstack.text.tokenizer import Tokenizer

SPACE = "▁"
PIECES = ["a", "b", f"{SPACE}a", SPACE, f"{SPACE}{SPACE}", "从", "\ufffd", ".", "##b", "b</w>", "n't"]
DECODERS = {
    "sentencepiece": decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "bpe": decoders.BPEDecoder(),
    "none": None,
}


def other_tokenizer(name: str) -> Tokenizer:
    """A vocabulary with the pieces, the 256 bytes and two control tokens."""
    vocabulary = {piece: place for place, piece in enumerate([*PIECES, *(f"<0x{byte:02X}>" for byte in range(256))])}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    if DECODERS[name] is not None:
        model.decoder = DECODERS[name]
    model.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return Tokenizer(model.to_str())


def check_decoder(given: Tokenizer, ids: Sequence[int], rng: random.Random) -> None:
    decoder, text, at = TextDecoder(given), "", 0
    while at < len(ids):
        size = rng.choice((1, 1, 2, 9))
        text += decoder.feed(ids[at : at + size])
        at += size
    assert text + decoder.finish() == given.decode(ids)


@pytest.mark.parametrize("name", ["byte-level", *DECODERS])
def test_decoded_tokens_equal_the_text_of_all(name):
    """Random tokens: invalid and cut bytes, runs of fallback bytes, control tokens, ids without a token."""
    given, rng = tokenizer() if name == "byte-level" else other_tokenizer(name), random.Random(0)
    size = given.vocab_size
    for _ in range(1000):
        frequent = rng.choices(range(size + 3), k=5)
        ids = rng.choices([*range(size + 3), *frequent * 60, *range(min(size, 20))], k=rng.randrange(30))
        check_decoder(given, ids, rng)


def test_bytes_of_characters_decode_in_other_tokenizers_too():
    given, rng = other_tokenizer("sentencepiece"), random.Random(0)
    for text in ("从左", "😀😀", "é"):
        ids = [len(PIECES) + byte for byte in text.encode()]
        assert given.decode([0, *ids, 1]) == f"a{text}b"
        for _ in range(20):
            check_decoder(given, [0, *ids, *rng.choices(range(20), k=3), *ids[:-1], 1], rng)


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("kind", ["words", "bytes that are no text"])
def test_work_per_token_does_not_grow(name, kind, monkeypatch):
    """32,768 tokens: a few tokens are decoded and a few characters searched for each. The whole text was decoded."""
    is_byte_level, rng, num_tokens = name == "byte-level", random.Random(0), 32_768
    given, work = tokenizer() if is_byte_level else other_tokenizer(name), list[int]()
    decode, bytes_of = Tokenizer.decode, Tokenizer.bytes_of
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: (work.append(len(ids)), decode(self, ids))[1])
    monkeypatch.setattr(Tokenizer, "bytes_of", lambda self, token: (work.append(1), bytes_of(self, token))[1])
    if kind == "words":
        ids = rng.choices(range(20, 60) if is_byte_level else range(4), k=num_tokens)
    else:
        ids = [(ids_of_bytes()[b"\xe4"] if is_byte_level else len(PIECES) + 0xE4)] * num_tokens
    decoder, parser = TextDecoder(given), StreamParser(stop=("STOP",))
    for token in ids:
        text = decoder.feed([token])
        work.append(len(text))
        parser.feed(text)
        assert len(parser._buffer) + len(parser._content) < 25
    assert num_tokens <= sum(work) < 16 * num_tokens or (not is_byte_level and kind != "words")
    decoder.finish()
    assert sum(work) < 16 * num_tokens


def test_work_per_token_of_a_call_does_not_grow():
    stream = TurnStream(chat_format("v3", tokenizer()), stop=("STOP",))
    start = f"{CALLS_BEGIN}{CALL[:24]}function<｜tool▁sep｜>f\n```json\n"
    stream.feed(tokenizer().encode_pieces(tokenizer().split_controls(start)))
    parser, text = stream._parser, tokenizer().encode('{"a": "``\n``')
    for token in text * 2_000:
        stream.feed([token])
        assert len(parser._buffer) + len(parser._tail) + len(parser._name) + len(parser._held) < 25
    assert parser.state == "arguments" and len(stream.token_kinds) > 20_000
