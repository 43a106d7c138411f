"""Grammars: sampled tokens follow the schema, whatever the tokens; thinking passes; what cannot compile is refused."""

import ipaddress
import json
import random
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jsonschema_rs
import numpy
import pytest

from tests.text.test_decode import other_tokenizer
from tests.text.test_deepseek import chat
from thinkstack.text.chat import PlainText
from thinkstack.text.grammar import CompiledGrammar, GrammarCompiler, json_object, json_schema, tool_calls
from thinkstack.text.parse import parse_tool_calls
from thinkstack.text.tokenizer import Control
from thinkstack.types import RequestError, Tool

STRICT = {"type": "object", "additionalProperties": False}
NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
SCHEMAS = {
    "object": {"type": "object"},
    "anything": {},
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["string", "null"]},
    "enum": {"enum": ["red", "green", 3, None, [1], {"a": 1}]},
    "const": {"const": {"a": [1, "从"]}},
    "range": {"type": "integer", "minimum": -3, "maximum": 17},
    "exclusive range": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    "pattern within": {"type": "string", "pattern": "x[0-9]"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email"},
    "array": {"type": "array", "items": {"type": "boolean"}},
    "array sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    "nested arrays": {"type": "array", "items": {"type": "array", "items": {"type": "null"}, "maxItems": 2}},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False, "minItems": 2},
    "properties": {**STRICT, "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    "escaped names": {**STRICT, "properties": {'"\\\n从': {"type": "null"}}, "required": ['"\\\n从']},
    "more properties": {"type": "object", "additionalProperties": {"type": "integer"}},
    "pattern properties": {**STRICT, "patternProperties": {"^x_": {"type": "boolean"}}},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
    "all of": {"allOf": [{"properties": {"a": {"type": "null"}}, "required": ["a"]}, {"type": "object"}]},
    "one of": {"oneOf": [{"type": "null"}, {"type": "string"}]},
    "recursion": {"$ref": "#/$defs/node", "$defs": {"node": NODE | {"required": ["next"]}}},
    "root recursion": {"type": "array", "items": {"$ref": "#"}},
}
FORMATS = {"uuid": uuid.UUID, "ipv4": ipaddress.IPv4Address, "date": lambda text: time.strptime(text, "%Y-%m-%d")}


@cache
def compiler(name: str = "v3_1") -> GrammarCompiler:
    return GrammarCompiler(chat(name))


def allowed(state, vocab_size: int) -> list[int]:
    bitmask = numpy.zeros((2, -(-vocab_size // 32)), dtype=numpy.int32)
    state.fill_bitmask(bitmask, 1)
    assert not bitmask[0].any(), "only its own row"
    return numpy.unpackbits(bitmask[1:].view(numpy.uint8), bitorder="little")[:vocab_size].nonzero()[0].tolist()


def sample(grammar: CompiledGrammar, tokenizer, rng: random.Random, opening=(6,), num_tokens: int = 4000) -> list[int]:
    """Random tokens up to the first end token, after `</think>`; after a while, tokens that close something are
    preferred."""
    state, ids = grammar.factory(opening)(), []
    stops = set(grammar.tokens.stop)
    while len(ids) < num_tokens:
        choices = allowed(state, tokenizer.vocab_size)
        assert choices, tokenizer.decode(ids)
        if stops & set(choices) and rng.random() < 0.3:
            return ids
        choices = [token for token in choices if token not in stops]
        if not choices:
            return ids
        closing = [token for token in choices if tokenizer.decode([token])[:1] in tuple('"}]n,x5@.a')]
        token = rng.choice(closing if closing and rng.random() < len(ids) / 60 else choices)
        if rng.random() < 0.2:  # drafts that are not accepted
            drafts = rng.choices(choices, k=1)
            state.advance(drafts)
            follow = [each for each in allowed(state, tokenizer.vocab_size) if each not in stops][:1]
            state.advance(follow)
            state.rollback(1 + len(follow))
        state.advance([token])
        ids.append(token)
    pytest.fail("no end")


def control_tokens(ids, tokenizer) -> list[int]:
    return [token for token in ids if token in tokenizer.control.values()]


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_under_the_mask_are_json_of_the_schema(name):
    """Checked by an independent validator, and formats by Python's parsers."""
    schema, rng, tokenizer = SCHEMAS[name], random.Random(name), chat("v3_1").tokenizer
    grammar = compiler().compile(json_schema(schema))
    texts = set()
    for _ in range(12):
        ids = sample(grammar, tokenizer, rng)
        text = tokenizer.decode(ids)
        value = json.loads(text)
        if value in (float("inf"), float("-inf")):
            continue  # 1e999 is a JSON number, which the validator cannot read
        jsonschema_rs.validate({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema, value)
        FORMATS.get(schema.get("format"), str)(value)
        assert not control_tokens(ids, tokenizer)
        assert not re.search(r"\s{34}|\n\s*\n", re.sub(r'"(\\.|[^"\\])*"', '""', text.lstrip("\n")))
        texts.add(text)
    assert len(texts) > 1 or name in ("null", "const")


def test_json_mode_is_any_object():
    rng, tokenizer = random.Random(0), chat("v3_1").tokenizer
    for _ in range(20):
        assert isinstance(json.loads(tokenizer.decode(sample(compiler().compile(json_object()), tokenizer, rng))), dict)


def test_tokenizers_with_fallback_bytes_are_supported_and_others_refused():
    tokenizer, rng = other_tokenizer("sentencepiece"), random.Random(0)
    grammar = GrammarCompiler(PlainText(tokenizer, (tokenizer.control["</s>"],))).compile(
        json_schema(SCHEMAS["length"])
    )
    for _ in range(5):
        text = tokenizer.decode(sample(grammar, tokenizer, rng, ()))
        assert 2 <= len(json.loads(text)) <= 4
    with pytest.raises(RequestError, match="no end token"):
        GrammarCompiler(PlainText(tokenizer)).compile(json_object())
    other = PlainText(other_tokenizer("wordpiece"), (1,))
    with pytest.raises(RequestError, match="tokenizer does not support grammars"):
        GrammarCompiler(other).compile(json_object())


# -- thinking


def opened(*pieces):
    tokenizer = chat("v3_1").tokenizer
    return tokenizer.encode_pieces([Control(piece) if piece in tokenizer.control else piece for piece in pieces])


def test_thinking_passes_and_the_grammar_starts_after_its_end():
    tokenizer = chat("r1").tokenizer
    stop, think_open, think_close = opened("<｜end▁of▁sentence｜>", "<think>", "</think>")
    grammar = compiler("r1").compile(json_schema({"const": 7}))
    state = grammar.factory(opened("<think>", "\n"))()
    everything = [token for token in range(tokenizer.vocab_size) if token != stop]
    assert allowed(state, tokenizer.vocab_size) == everything, "thinking cannot end the turn"
    state.advance([*tokenizer.encode("7 {"), think_open, think_close])
    newline = tokenizer.encode("\n")
    content = sorted([*tokenizer.encode("7"), *newline])
    assert [t for t in allowed(state, tokenizer.vocab_size) if tokenizer.decode([t]).strip("\n")] == content[1:] or (
        set(content) <= set(allowed(state, tokenizer.vocab_size))
    )
    state.advance(newline)
    state.advance(newline)
    assert not set(newline) & set(allowed(state, tokenizer.vocab_size)), "no endless line breaks"
    state.advance(tokenizer.encode("7"))
    assert allowed(state, tokenizer.vocab_size) == [stop]
    state.rollback(4)
    assert allowed(state, tokenizer.vocab_size) == everything, "rolled back into the thinking"
    state.advance([think_close, *tokenizer.encode("7")])
    assert allowed(state, tokenizer.vocab_size) == [stop]


def test_the_model_may_begin_its_thinking_itself():
    """R1-0528: the prompt ends in the assistant token."""
    tokenizer, (think_open, think_close) = chat("r1_0528").tokenizer, opened("<think>", "</think>")
    grammar = compiler("r1_0528").compile(json_schema({"const": 7}))
    state = grammar.factory()()
    first = allowed(state, tokenizer.vocab_size)
    assert think_open not in allowed(compiler("v3").compile(json_schema({})).factory()(), tokenizer.vocab_size)
    assert think_open in first and tokenizer.encode("7")[0] in first and think_close not in first
    state.advance([think_open, *tokenizer.encode("1}"), think_close, *tokenizer.encode("7")])
    state.rollback(2)
    state.advance([think_close])
    assert think_open not in allowed(state, tokenizer.vocab_size)


def test_a_grammar_goes_on_from_the_start_of_the_content():
    grammar = compiler().compile(json_schema(SCHEMAS["properties"]))
    tokenizer, opening = chat("v3_1").tokenizer, opened("</think>", '{"a": 1')
    ids = sample(grammar, tokenizer, random.Random(0), opening)
    assert str(json.loads('{"a": 1' + tokenizer.decode(ids))["a"]).startswith("1")
    with pytest.raises(RequestError, match="does not allow the start of the last message"):
        grammar.factory(opened("</think>", "```json\n"))


def test_thinking_tags_that_are_spelled_count_where_the_vocabulary_has_none():
    tokenizer = other_tokenizer("sentencepiece")
    text = PlainText(tokenizer, (tokenizer.control["</s>"],))
    grammar = GrammarCompiler(text).compile(json_schema({"const": 7}))
    state = grammar.factory(tokenizer.encode("<think>\n"))()
    state.advance(tokenizer.encode("7 {</think>"))
    seven = tokenizer.encode("7")[-1:]
    assert set(seven) <= set(allowed(state, tokenizer.vocab_size))
    assert len(allowed(state, tokenizer.vocab_size)) <= 3
    state.rollback(1)
    assert len(allowed(state, tokenizer.vocab_size)) > 200


# -- tools

ADD = Tool(
    name="add",
    description="",
    parameters={**STRICT, "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    strict=True,
)
ADDER = Tool(name='add"er', description="", parameters={"not": {}})


def parsed(name: str, ids) -> tuple:
    return parse_tool_calls(chat(name).text_of(ids, opening=""))


@pytest.mark.parametrize("name", ["v3", "r1", "r1_0528", "v3_1"])
def test_required_calls_are_calls_of_the_tools(name):
    """A strict tool's arguments follow its schema; others are objects. Names may be the start of others."""
    rng, found = random.Random(0), set()
    grammar = compiler(name).compile(tool_calls(chat(name), [ADD, ADDER], "required"))
    for _ in range(15):
        ids = sample(grammar, chat(name).tokenizer, rng)
        content, calls = parsed(name, ids)
        assert not content.strip() and calls
        for call in calls:
            arguments = json.loads(call.arguments)
            assert isinstance(arguments, dict)
            assert call.name != "add" or (list(arguments) == ["a"] and isinstance(arguments["a"], int))
            found.add(call.name)
        found.add(len(calls) > 1)
    assert found == {"add", 'add"er', True, False}


@pytest.mark.parametrize("name", ["r1_0528", "v3_1"])
def test_a_forced_function_is_called_once(name):
    grammar = compiler(name).compile(tool_calls(chat(name), [ADD, ADDER], 'function:add"er'))
    for seed in range(5):
        ids = sample(grammar, chat(name).tokenizer, random.Random(seed))
        assert [call.name for call in parsed(name, ids)[1]] == ['add"er']


@pytest.mark.parametrize("tool_name", ["auto", "required", "none"])
def test_a_tool_with_the_name_of_a_choice_can_be_forced(tool_name):
    """A tool called "auto" could not be forced: the choice "auto" was taken for that of no tool."""
    tools = [ADDER, Tool(name=tool_name, description="", parameters={"type": "object"})]
    grammar = compiler("v3_1").compile(tool_calls(chat("v3_1"), tools, f"function:{tool_name}"))
    ids = sample(grammar, chat("v3_1").tokenizer, random.Random(0))
    assert [call.name for call in parsed("v3_1", ids)[1]] == [tool_name]


def test_strict_calls_may_follow_free_text():
    source, tokenizer = tool_calls(chat("v3_1"), [ADD]), chat("v3_1").tokenizer
    assert tool_calls(chat("v3_1"), [ADDER]) is None, "no strict tool, no grammar"
    state = compiler().compile(source).factory(opened("<think>"))()
    begin, think_close = opened("<｜tool▁calls▁begin｜>", "</think>")
    everything = list(range(tokenizer.vocab_size))
    for ids in ([], [begin], [think_close], tokenizer.encode('{"a"')):
        state.advance(ids)
        assert allowed(state, tokenizer.vocab_size) == everything
    state.advance([begin])
    assert allowed(state, tokenizer.vocab_size) == opened("<｜tool▁call▁begin｜>")
    state.rollback(1)
    assert allowed(state, tokenizer.vocab_size) == everything


def test_what_tool_choice_cannot_have_is_refused_by_name():
    with pytest.raises(RequestError, match=r"tool_choice='ad' is none of the tools; did you mean 'add'"):
        tool_calls(chat("v3_1"), [ADD], "function:ad")
    with pytest.raises(RequestError, match="tool_choice='required' needs tools; add tools"):
        tool_calls(chat("v3_1"), [], "required")
    with pytest.raises(RequestError, match="chat format 'r1_zero'"):
        tool_calls(chat("r1_zero"), [ADD])


# -- schemas that do not compile


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "(("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "string", "pattern": "^(\\p{L}{1,500}|\\w{3,700}|.{1,900}){50}$"}, "lexer"),
        ({"not": {"type": "string"}}, "Unimplemented keys.*not"),
        ({"type": "strnig"}, "strnig"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "http://localhost/schema"}, "not present"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"enum": ["a"], "type": "integer"}, "nsatisfiable"),
        ({"type": "array", "minItems": 10**9}, "minItems=1000000000"),
        ({"enum": [str(number) * 3 for number in range(20_000)]}, "at most 131,072"),
        ({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}, "oo many items"),
        ({"allOf": [{"oneOf": [{"const": n * m} for m in range(9)]} for n in range(9)]}, "cannot be compiled"),
        ({"allOf": [{"anyOf": [{"properties": {f"{n}{m}": {}}} for m in range(9)]} for n in range(9)]}, "too large"),
        ([], "is a list"),
        ({"const": float("nan")}, "cannot be compiled|is not JSON"),
        ({"const": {1, 2}}, "is not JSON"),
    ],
)
def test_a_schema_that_cannot_compile_is_refused_with_its_field(schema, reason):
    with pytest.raises(RequestError, match=rf"^response_format\.json_schema.*(?:{reason})") as caught:
        compiler().compile(json_schema(schema))
    assert caught.value.field == "response_format.json_schema"


def test_deep_nesting_is_refused_without_a_recursion_error():
    schema: dict = {"type": "string"}
    for _ in range(50_000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested deeper than 64"):
        json_schema(schema)
    while schema:  # freed without recursion
        schema = schema.get("items", {})


def test_a_schema_that_never_compiles_ends_at_the_time_limit():
    """llguidance 1.9 computes over minutes for a large multipleOf."""
    endless = Tool(
        name="b",
        description="",
        parameters={"properties": {"a": {"multipleOf": 10**7 + 19, "type": "integer"}}},
        strict=True,
    )
    source, start = tool_calls(chat("v3_1"), [ADD, endless], "required"), time.monotonic()
    compiler().compile(json_schema(SCHEMAS["object"]))
    for _ in range(2):
        with pytest.raises(RequestError, match=r"tools\[1\].function.parameters.*longer than 1 s"):
            compiler().compile(source, timeout_seconds=1.0)
    assert time.monotonic() - start < 10


def test_a_schema_that_never_compiles_does_not_block_others():
    shared, endless = GrammarCompiler(chat("v3_1")), json_schema({"type": "integer", "multipleOf": 10**7 + 19})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shared.compile, endless, 2.0)
        shared.compile(json_schema(SCHEMAS["properties"]))
        assert not waiting.done()
        assert isinstance(waiting.exception(), RequestError)


def test_compiled_grammars_are_cached_and_the_oldest_dropped(monkeypatch):
    small, num_tried = GrammarCompiler(chat("v3_1"), max_cached=2), []
    monkeypatch.setattr("thinkstack.text.grammar._try_out", lambda *args: num_tried.append(args))
    first = small.compile(json_schema({"const": 1}))
    assert small.compile(json_schema({"const": 1})) is first and len(num_tried) == 1
    small.compile(json_schema({"const": 2}))
    small.compile(json_schema({"const": 1}))
    small.compile(json_schema({"const": 3}))
    assert small.compile(json_schema({"const": 1})) is first and len(num_tried) == 3
    small.compile(json_schema({"const": 2}))
    assert len(num_tried) == 4, "dropped"


def test_options_in_a_schema_do_not_change_the_separators():
    schema = {**STRICT, "properties": {"a": {"const": 1}}, "required": ["a"], "x-guidance": {"item_separator": "%"}}
    ids = sample(compiler().compile(json_schema(schema)), chat("v3_1").tokenizer, random.Random(0))
    assert json.loads(chat("v3_1").tokenizer.decode(ids)) == {"a": 1}
