"""Streams of tokens equal the whole text and its parse, however they are cut, with constant work per token."""

import random
import re
from collections.abc import Sequence
from functools import cache

import pytest

from thinkstack.text.chat import chat_format
from thinkstack.text.parse import find_stop, parse_message, parse_turn, split_thinking, split_tool_calls
from thinkstack.text.stream import TextStream, TurnStream, stream_text, stream_turn
from thinkstack.text.stream_parser import StreamEvent, StreamParser
from thinkstack.text.tokenizer import CALLS_BEGIN, CONTROL, EOS, TOOLS, Control, Tokenizer, train_tokenizer
from thinkstack.types import ToolCall

STOPS = ("STOP", "\n\n\n", "TOP5", "再见")
CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
LINES, JSON_FENCE = "a\nb", "add\n```json"
OLD_CALL = CALL.format("function", "{}\n```json\n{}\n```")
CALLS = (
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '{}')}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '{}')}\n{CALL.format('查', '[1]')}<｜tool▁calls▁end｜>\n ",
    f"<｜tool▁calls▁begin｜>{OLD_CALL.format('f', '{}')}\n{OLD_CALL.format('g', '`` ```')}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('function', 'f')}{CALL.format('function', 'STOP')}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('function', JSON_FENCE)}{CALL.format('function', '{')[:-30]}",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '{}')}<｜tool▁calls▁end｜> and more STOP it",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', 'STOP')} text <｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format(LINES, '{}')}{CALL.format(' ', '{}')}",
    f"<｜tool▁calls▁begin｜>{CALL.format(' ', '{}')}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('x' * 300, '{}')}<｜tool▁calls▁end｜>",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '{')[:-4]}",
    f"<｜tool▁calls▁begin｜>{CALL.format('add', '<｜tool▁calls▁end｜>')}<｜tool▁call▁begin｜>fun",
    f"<｜tool▁calls▁begin｜>{OLD_CALL.format('f', '{')[:-20]}",
    "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
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
def tokenizer(has_tags: bool = True) -> Tokenizer:
    """has_tags: whether think tags and the markup of calls are control tokens."""
    return train_tokenizer(turns(), 600, control=(*CONTROL, *TOOLS) if has_tags else CONTROL[:5])


@cache
def ids_of_bytes(has_tags: bool = True) -> dict[bytes, int]:
    given = tokenizer(has_tags)
    return {given.bytes_of(token): token for token in range(given.vocab_size)}


TAG_BYTES = re.compile("|".join((*CONTROL, *TOOLS)).encode())


def random_ids(rng: random.Random, text: str, has_tags: bool = True) -> list[int]:
    """Tokens of a text, cut at any byte: half characters, halves of tags, and tags that are one token."""
    data, ids, at = text.encode(), [], 0
    known = ids_of_bytes(has_tags)
    is_spelling = rng.random() < 0.2
    while at < len(data):
        tag = None if is_spelling or not has_tags else TAG_BYTES.match(data, at)
        size = len(tag[0]) if tag else rng.choice((1, 1, 2, 3, 4, 8, 30))
        while data[at : at + size] not in known:
            size -= 1
        ids.append(known[data[at : at + size]])
        at += size
    return ids


MASK = "\ue000"
SPELLINGS = re.compile("|".join((*CONTROL, *TOOLS)))


def masked(opening: str, ids: Sequence[int], has_tags: bool) -> str:
    """The text of a turn, with a mask for the "<" of control tokens that ordinary tokens spell: they are no tags."""
    given, parts = tokenizer(has_tags), [b""]
    for piece in (*given.split_controls(opening), *ids):
        if isinstance(piece, Control) or piece in given.control.values():
            parts += [piece.encode() if isinstance(piece, Control) else given.bytes_of(piece), b""]
        else:
            parts[-1] += piece.encode() if isinstance(piece, str) else given.bytes_of(piece)
    texts = [part.decode(errors="replace") for part in parts]
    if has_tags:
        texts[::2] = [SPELLINGS.sub(lambda tag: f"{MASK}{tag[0][1:]}", text) for text in texts[::2]]
    return "".join(texts)


Parts = tuple[str, str, tuple[ToolCall, ...], str | None]
"""Reasoning, content, calls, and the finish reason."""


def joined(events: Sequence[StreamEvent]) -> Parts:
    texts = ["".join(event.text for event in events if event.kind == kind) for kind in ("reasoning", "content")]
    assert [event.kind for event in events].index("finish") == len(events) - 1
    assert all(event.text for event in events if event.kind in ("reasoning", "content", "tool_call_delta"))
    calls = check_calls([event for event in events if "tool" in event.kind], events[-1].is_call_cut_off)
    return texts[0], texts[1], calls, events[-1].finish_reason


def check_calls(events: Sequence[StreamEvent], is_cut_off: bool) -> tuple[ToolCall, ...]:
    """Calls come one after the other, each with its name first; the parts of its arguments add up."""
    calls, kinds = (
        [],
        "".join({"tool_call_start": "s", "tool_call_delta": "d", "tool_call": "c"}[e.kind] for e in events),
    )
    assert re.fullmatch("(sd*c)*sd*" if is_cut_off else "(sd*c)*", kinds)
    name, arguments = "", ""
    for event in events:
        assert event.index == len(calls)
        arguments += event.text
        if event.kind == "tool_call_start":
            name, arguments = event.tool_call.name, event.tool_call.arguments
        elif event.kind == "tool_call":
            assert event.tool_call == ToolCall(name=name, arguments=arguments)
            calls.append(event.tool_call)
    return tuple(calls)


def parse_whole(text: str, thinking_format: str, stop: Sequence[str]) -> Parts:
    """The whole parse: `parse_message`, or with tags everywhere a split at the tags."""
    if thinking_format != "think_answer_tags":
        message = parse_message(text, stop)
        before, calls, after = split_tool_calls(split_thinking(text)[1])
        parts = (before, after) if calls else (before + after, "")
        is_stopped = any(find_stop(part.lstrip("\n"), stop) is not None for part in parts)
        return message.reasoning or "", message.content, message.tool_calls, "stop" if is_stopped else "length"
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


def stream_in_chunks(
    rng: random.Random, text: str, thinking_format: str, stop: Sequence[str], has_tags: bool = True
) -> tuple[Parts, Parts]:
    """Through tokens, after a random part of the text that the prompt contains; the whole parse of the same."""
    opening = text[: rng.choice((0, 0, 0, 7, 8, 9))]
    ids, end = random_ids(rng, text[len(opening) :], has_tags), []
    if rng.random() < 0.5:
        end = [tokenizer(has_tags).control[EOS]]
    stream = TurnStream(chat_format("v3", tokenizer(has_tags)), opening, thinking_format, stop)
    whole = parse_whole(masked(opening, ids, has_tags), thinking_format, stop)
    events, at, ids = [], 0, [*ids, *end]
    while at < len(ids) and not stream.is_stopped:
        size = rng.choice((1, 1, 1, 2, 5, 50))
        events += stream.feed(ids[at : at + size])
        at += size
    found = joined([*events, *stream.finish("length")])
    assert len(stream.token_kinds) == min(at, len(ids)) or stream.is_stopped
    calls = tuple(ToolCall(name=c.name.replace(MASK, "<"), arguments=c.arguments.replace(MASK, "<")) for c in whole[2])
    return found, (whole[0].replace(MASK, "<"), whole[1].replace(MASK, "<"), calls, whole[3])


def check_chunkings(count: int) -> None:
    rng = random.Random(1)
    stops = ((), STOPS[:1], STOPS)
    for number, text in enumerate(turns()):
        cases = [(each, stop) for each in FORMATS for stop in stops]
        for place in range(count):
            case, has_tags = cases[(number + place) % len(cases)], place % 3 > 0
            found, whole = stream_in_chunks(rng, text, *case, has_tags)
            assert found == whole, (text, case)


def test_five_thousand_chunkings_of_two_hundred_turns_equal_the_whole_parse():
    check_chunkings(25)


@pytest.mark.slow
def test_a_hundred_thousand_chunkings_of_two_hundred_turns_equal_the_whole_parse():
    check_chunkings(500)


@pytest.mark.parametrize("thinking_format", ["think_answer_tags", "think_then_answer"])
def test_the_parts_of_well_formed_turns_are_those_of_parse_turn(thinking_format):
    rng, num_well_formed = random.Random(2), 0
    written = [f"<think>\n{words(rng, 9)}\n</think>\n<answer>{words(rng, 5)}</answer>" for _ in range(50)]
    for text in (*turns(), *written):
        turn = parse_turn(text, thinking_format)
        (reasoning, content, calls, _), _ = stream_in_chunks(rng, text, thinking_format, (), has_tags=False)
        if turn.is_well_formed and not calls and CALLS_BEGIN not in text:
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


def feed_all(parser: StreamParser, texts: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, text or name) of the events."""
    events = [event for text in texts for event in parser.feed(text)]
    return [(event.kind, event.text or (event.tool_call.name if event.tool_call else "")) for event in events]


def test_a_call_streams_its_name_and_then_its_arguments():
    parser = StreamParser()
    start = ["Look.\n", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>ad", "d<｜tool▁sep｜>"]
    assert feed_all(parser, start) == [("content", "Look."), ("tool_call_start", "add")]
    assert feed_all(parser, ['{"a"', ": 1}"]) == [("tool_call_delta", '{"a"'), ("tool_call_delta", ": 1}")]
    assert parser.feed("<｜tool▁call▁end｜>") == [
        StreamEvent("tool_call", tool_call=ToolCall(name="add", arguments='{"a": 1}'))
    ]
    assert feed_all(parser, ["\n<｜tool▁call▁begin｜>b<｜tool▁sep｜>"])[0] == ("tool_call_start", "b")
    assert parser.finish("length") == [StreamEvent("finish", finish_reason="length", is_call_cut_off=True)]


def test_a_fenced_call_streams_without_its_fence():
    parser = StreamParser()
    start = ["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", "add\n``", "`json\n{"]
    assert feed_all(parser, start) == [("tool_call_start", "add"), ("tool_call_delta", "{")]
    assert feed_all(parser, ["\n", "``x", "\n``", "`"]) == [("tool_call_delta", "\n``x")]
    assert feed_all(parser, ["<｜tool▁call▁end｜>"]) == [("tool_call", "add")]


def test_malformed_calls_are_text():
    parser = StreamParser()
    assert parser.feed("<｜tool▁calls▁begin｜> ") == []
    assert parser.feed("and") == [StreamEvent("content", "<｜tool▁calls▁begin｜> and")]
    parser = StreamParser()
    assert [kind for kind, _ in feed_all(parser, [CALLS[0]])] == ["tool_call_start", "tool_call_delta", "tool_call"]
    assert parser.feed(" ") == []
    assert parser.feed("and") == [StreamEvent("content", " and")]


def test_tags_spelled_with_ordinary_tokens_are_text_where_the_vocabulary_has_them():
    """A model that explains tool calls does not make one."""
    chat = chat_format("v3", tokenizer())
    text = f"<think>a</think>{CALLS[0]}"
    spelled = [event for event in stream_turn(chat, tokenizer().encode(text))]
    assert joined(spelled) == ("", text, (), "length")
    tags = tokenizer().encode_pieces(tokenizer().split_controls(text))
    assert joined([*stream_turn(chat, tags)]) == ("a", "", (ToolCall(name="add", arguments="{}"),), "length")


def kinds_of(chat, texts: Sequence[str], stop: Sequence[str] = (), opening: str = "") -> tuple[str, int]:
    """The first letters of the kinds of the tokens, and the number of reasoning tokens."""
    ids = [token for text in texts for token in tokenizer().encode_pieces(tokenizer().split_controls(text))]
    stream = TurnStream(chat, opening, stop=stop)
    for token in ids:
        stream.feed([token])
    stream.finish("stop")
    return "".join(kind[0] for kind in stream.token_kinds), stream.num_reasoning_tokens


def test_each_token_belongs_to_one_part_of_the_turn():
    """Reasoning tokens are counted with their tags, as they are billed."""
    r1 = chat_format("r1", tokenizer())
    calls = f"<｜tool▁calls▁begin｜>{CALL.format('1', '2')}<｜tool▁calls▁end｜>"
    assert kinds_of(r1, ["12", "</think>", "34", EOS], opening="<think>\n") == ("rrmccm", 3)
    assert kinds_of(r1, ["<think>", "12", "</think>", "34"]) == ("mrrmcc", 4)
    assert kinds_of(r1, [" ", "<think>", "1"]) == ("mmr", 3)
    assert kinds_of(r1, [" ", "1"]) == ("cc", 0)
    assert kinds_of(r1, ["1", calls, EOS]) == ("ct" + "t" * 6 + "m", 0)
    assert kinds_of(r1, ["1", "<｜tool▁calls▁begin｜>", "2"]) == ("ccc", 0)
    assert kinds_of(r1, ["1", "2", "3", "4"], stop=("23",)) == ("cmmm", 0)
    assert kinds_of(r1, ["1", "2", "4"], stop=("23",)) == ("ccc", 0)
    assert kinds_of(r1, ["1", "2"], stop=("23",)) == ("cc", 0)


@pytest.mark.parametrize(
    ("opening", "state"),
    [
        ("", "start"),
        ("<think>\n", "thinking"),
        ("</think>", "content"),
        ("<think>\n\n</think>\n\n", "content"),
        ("Paris", "content"),
        ([Control("<think>"), "I see </think>"], "thinking"),
        (["<think>"], "content"),
    ],
)
def test_the_state_at_the_start_is_that_after_the_opening(opening, state):
    assert TurnStream(chat_format("v3", tokenizer()), opening).state == state


def test_an_opening_can_be_left_out_of_the_events():
    """A server gives what was sampled; stop strings count from there, and line breaks are kept."""
    stream = TurnStream(chat_format("v3", tokenizer()), ["```python\n"], stop=("```",))
    stream.skip_opening()
    events = stream.feed(tokenizer().encode("\n1\n```"))
    assert "".join(event.text for event in events) == "\n1" and stream.is_stopped


@pytest.mark.parametrize("has_tags", [True, False])
@pytest.mark.parametrize("opening", [" ", "<", "\n<thi", "a <｜tool▁calls", "a STO", "</think>\n"])
def test_nothing_of_an_opening_that_is_left_out_comes_later(opening, has_tags):
    chat = chat_format("v3", tokenizer(has_tags))
    stream = TurnStream(chat, [opening], stop=("STOP",))
    stream.skip_opening()
    events = [*stream.feed(tokenizer(has_tags).encode("P nk>b")), *stream.finish("stop")]
    assert "".join(event.text for event in events) == "P nk>b"


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


@pytest.mark.parametrize("seed", range(200))
def test_plain_text_ends_at_the_first_stop_string_and_keeps_blanks_and_tags(seed):
    rng, chat = random.Random(seed), chat_format("r1", tokenizer())
    text, stream = words(rng, 30, (*STOPS, *TAGS)), TextStream(chat, STOPS)
    ids = chat.tokenizer.encode(text)
    events = [event for token in [*ids, chat.stop_token_ids[0]] for event in stream.feed([token])]
    *rest, last = stream.finish("stop")
    end = find_stop(text, STOPS)
    assert "".join(event.text for event in (*events, *rest)) == text[:end]
    assert (last.kind, stream.is_stopped) == ("finish", end is not None)
    assert len(stream.token_kinds) == len(ids) + 1


@pytest.mark.parametrize(
    ("text", "found"), [("a STOP", "STOP"), ("TOP5", "TOP5"), ("STO P", None), ("再见STOP", "再见")]
)
def test_the_stop_string_that_was_found_is_named(text, found):
    parser = StreamParser(stop=STOPS)
    parser.feed("<think>STOP</think>")
    for character in text:
        parser.feed(character)
    parser.finish("stop")
    assert parser.stop_string == found
