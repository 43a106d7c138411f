"""Streams of tokens equal the whole text and its parse, however they are cut, with constant work per token."""

import random
import re
from collections.abc import Sequence
from functools import cache

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from thinkstack.text.chat import chat_format
from thinkstack.text.parse import find_stop, parse_message, parse_tool_calls, parse_turn, split_thinking
from thinkstack.text.stream import StreamEvent, StreamParser, TextDecoder, TurnStream, stream_text, stream_turn
from thinkstack.text.tokenizer import CONTROL, TOOLS, Tokenizer, train_tokenizer
from thinkstack.types import ToolCall

STOPS = ("STOP", "\n\n\n", "TOP5", "再见")
CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
CALLS = (
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '{}')}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '{}')}\n{CALL.format('查', '[1]')}<｜tool▁calls▁end｜>\n ",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '{}')}<｜tool▁calls▁end｜> and more STOP it",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', 'STOP')} text <｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('cut', '{')[:-4]}",
    "<｜tool▁calls▁begin｜>",
)
WORDS = (
    *("one", "two ", " three", "\n", "\n\n", " ", "\t", "从左到右", "é", "😀", "👩‍👩‍👧", "答案", "1+2=3", "\\boxed{3}"),
    *("<", "</", "<thi", "</thin", "<answ", "<｜tool", "STO", "TOP", "再", "\ufffd", "<b>"),
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMATS = ("think_answer_tags", "think_then_answer", "flexible_extract")


def words(rng: random.Random, count: int, extra: Sequence[str] = ()) -> str:
    return "".join(rng.choice((*WORDS, *extra)) for _ in range(rng.randrange(count)))


def random_turn(rng: random.Random) -> str:
    """Thinking that is closed, left open, opened twice or absent; content with tags, stop strings and calls."""
    start = rng.choice(("", "", "\n", " \n", "  <", words(rng, 3)))
    thinking = rng.choice(
        ("<think>{}</think>", "<think>{}</think>", "<think>\n{}\n</think>\n\n", "<think>{}", "{}</think>", "")
    )
    content = words(rng, 15, rng.choice(((), STOPS, TAGS, (*TAGS, *STOPS, *CALLS))))
    return (
        start + thinking.format(words(rng, 10, rng.choice(((), STOPS, TAGS[2:])))) + content + rng.choice(("", *CALLS))
    )


@cache
def turns() -> list[str]:
    rng = random.Random(0)
    return [random_turn(rng) for _ in range(200)]


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(turns(), 600, control=(*CONTROL, *TOOLS))


@cache
def ids_of_bytes() -> dict[bytes, int]:
    return {tokenizer().bytes_of(token): token for token in range(tokenizer().vocab_size)}


def random_ids(rng: random.Random, text: str) -> list[int]:
    """Tokens of a text, cut at any byte: half characters, halves of tags, and tags that are one token."""
    data, ids, at = text.encode(), [], 0
    known = ids_of_bytes()
    while at < len(data):
        size = rng.choice((1, 1, 2, 3, 4, 8, 30))
        while data[at : at + size] not in known:
            size -= 1
        ids.append(known[data[at : at + size]])
        at += size
    return ids


Parts = tuple[str, str, tuple[ToolCall, ...], str | None]
"""Reasoning, content, calls, and the finish reason."""


def joined(events: Sequence[StreamEvent]) -> Parts:
    texts = ["".join(event.text for event in events if event.kind == kind) for kind in ("reasoning", "content")]
    assert [event.kind for event in events].index("finish") == len(events) - 1
    assert all(event.text for event in events if event.kind in ("reasoning", "content"))
    calls = tuple(event.tool_call for event in events if event.tool_call is not None)
    return texts[0], texts[1], calls, events[-1].finish_reason


def parse_whole(text: str, thinking_format: str, stop: Sequence[str]) -> Parts:
    """The whole parse: `parse_message`, or with tags everywhere a split at the tags."""
    if thinking_format != "think_answer_tags":
        message, visible = parse_message(text, stop), parse_tool_calls(split_thinking(text)[1])[0]
        end = find_stop(visible.lstrip("\n"), stop)
        return message.reasoning or "", message.content, message.tool_calls, "length" if end is None else "stop"
    reasoning, content = "", ""
    for part in re.findall("<think>.*?(?:</think>|$)|(?:(?!<think>).)+", text, re.DOTALL):
        if part.startswith("<think>"):
            reasoning += part.removeprefix("<think>").removesuffix("</think>")
            continue
        content = (content + re.sub("</think>|</?answer>", "", part)).lstrip("\n")
        end = find_stop(content, stop)
        if end is not None:
            return reasoning.strip("\n"), content[:end].strip("\n"), (), "stop"
    return reasoning.strip("\n"), content.strip("\n"), (), "length"


def stream_in_chunks(rng: random.Random, text: str, thinking_format: str, stop: Sequence[str]) -> Parts:
    """Through tokens, after a random part of the text that the prompt contains."""
    opening = text[: rng.choice((0, 0, 0, 7, 8, 9))]
    ids, end = random_ids(rng, text[len(opening) :]), []
    if rng.random() < 0.5:
        end = [tokenizer().control["<｜end▁of▁sentence｜>"]]
    stream = TurnStream(chat_format("v3", tokenizer()), opening, thinking_format, stop)
    events, at, ids = [], 0, [*ids, *end]
    while at < len(ids) and not stream.is_stopped:
        size = rng.choice((1, 1, 1, 2, 5, 50))
        events += stream.feed(ids[at : at + size])
        at += size
    return joined([*events, *stream.finish("length")])


def check_chunkings(count: int) -> None:
    rng = random.Random(1)
    stops = ((), STOPS[:1], STOPS)
    for number, text in enumerate(turns()):
        cases = [(each, stop) for each in FORMATS for stop in stops]
        expected = {case: parse_whole(text, *case) for case in cases}
        for place in range(count):
            case = cases[(number + place) % len(cases)]
            assert stream_in_chunks(rng, text, *case) == expected[case], (text, case)


def test_ten_thousand_chunkings_of_two_hundred_turns_equal_the_whole_parse():
    check_chunkings(50)


@pytest.mark.slow
def test_a_hundred_thousand_chunkings_of_two_hundred_turns_equal_the_whole_parse():
    check_chunkings(500)


@pytest.mark.parametrize("thinking_format", ["think_answer_tags", "think_then_answer"])
def test_the_parts_of_well_formed_turns_are_those_of_parse_turn(thinking_format):
    rng, num_well_formed = random.Random(2), 0
    written = [f"<think>\n{words(rng, 9)}\n</think>\n<answer>{words(rng, 5)}</answer>" for _ in range(50)]
    for text in (*turns(), *written):
        turn = parse_turn(text, thinking_format)
        reasoning, content, calls, _ = stream_in_chunks(rng, text, thinking_format, ())
        if turn.is_well_formed and not calls:
            num_well_formed += 1
            assert reasoning.strip() == turn.thinking
            assert turn.answer in (content.strip(), parse_turn(f"<think>x</think>{content}", thinking_format).answer)
    assert num_well_formed > 20


def test_text_is_released_as_soon_as_it_is_certain():
    parser = StreamParser(stop=("STOP",))
    assert parser.feed(" <thi") == []
    assert parser.feed("nk>\n\na") == [StreamEvent("reasoning", "a")]
    assert parser.feed("\n") == [], "the thinking may end here"
    assert parser.feed("b STOP </thi") == [StreamEvent("reasoning", "\nb STOP ")], "no stop string in thinking"
    assert parser.feed("nk>\n\nThe") == [StreamEvent("content", "The")]
    assert parser.feed(" S") == [StreamEvent("content", " ")]
    assert parser.feed("TAR") == [StreamEvent("content", "STAR")]
    assert parser.feed("T STOP it") == [StreamEvent("content", "T ")] and parser.is_stopped
    assert parser.feed("more") == [] and parser.finish("length") == [StreamEvent("finish", finish_reason="stop")]


def test_calls_wait_for_the_end_of_the_turn_and_malformed_ones_are_text():
    parser = StreamParser()
    assert parser.feed(f"Look.{CALLS[0]}") == [StreamEvent("content", "Look.")]
    call, end = parser.finish("stop")
    assert (call.kind, call.tool_call, end.kind) == ("tool_call", ToolCall(name="add", arguments="{}"), "finish")
    parser = StreamParser()
    parser.feed(CALLS[0])
    assert parser.feed(" ") == []
    assert parser.feed("and") == [StreamEvent("content", f"{CALLS[0]} and")], "nothing may follow calls"


def test_half_a_character_waits_for_its_other_half():
    chat = chat_format("r1_zero_short", train_tokenizer(["hello"], 300))
    ids = chat.tokenizer.encode("从a")
    assert len(ids) == 4, "three bytes and a letter"
    assert [event.text for event in stream_turn(chat, ids)] == ["从", "a", ""]
    assert "".join(stream_text(chat, ids[:2])) == chat.text_of(ids[:2]) == "\ufffd"


def test_the_end_token_is_no_text_but_a_stop():
    chat = chat_format("r1", tokenizer())
    ids = [*tokenizer().encode("one"), chat.stop_token_ids[0]]
    assert "".join(stream_text(chat, ids)) == chat.text_of(ids) == "<think>\none"
    assert [event.finish_reason for event in stream_turn(chat, ids)][-1] == "stop"
    assert [event.finish_reason for event in stream_turn(chat, ids[:-1])][-1] == "length"


# -- tokenizers

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
