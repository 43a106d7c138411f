"""Grammars of an assistant's content: a JSON object, a JSON schema, or tool calls, compiled by llguidance.

A grammar applies from the first token of the content; text/turn_grammar.py lets the thinking before it pass. Control
tokens are never part of a text: JSON strings cannot contain them, and the markup of tool calls is given by token id.
"""

import difflib
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from thinkstack.text.chat import ChatFormat, DeepSeekFormat
from thinkstack.text.tokenizer import CALL_BEGIN, CALL_END, CALL_SEP, CALLS_BEGIN, CALLS_END, Tokenizer
from thinkstack.text.turn_grammar import Phase, TurnGrammar, TurnTokens
from thinkstack.types import RequestError, Tool

WHITESPACE = r" |\n {0,32}"
"""Whitespace between the tokens of JSON: a blank, or a line break with its indent. Endless whitespace is a known
failure of JSON modes."""
MAX_SCHEMA_CHARACTERS, MAX_DEPTH, MAX_COUNT = 131_072, 64, 100_000
"""Maximum size of a schema as compact JSON, of its nesting, and of minItems, minLength and minProperties."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 250_000,
    "max_grammar_size": 500_000,
}
"""llguidance's limits on the work of compiling and of one token (LLParserLimits)."""
MAX_PROCESSES = 2
"""Number of schemas that are tried out at a time."""
WORKER = Path(__file__).with_name("grammar_worker.py")


@dataclass(frozen=True)
class GrammarSource:
    """A grammar that is not compiled."""

    text: str
    """In llguidance's format."""
    schemas: tuple[tuple[str, str], ...] = ()
    """The schemas from the request in it: (field of the request, grammar of the schema)."""
    trigger: int | None = None
    """The grammar starts with this token, after free content; None: at the first token of the content."""


def json_object() -> GrammarSource:
    """Any JSON object."""
    return GrammarSource(_schema_grammar({"type": "object"}))


def json_schema(schema: Any, field: str = "response_format.json_schema") -> GrammarSource:
    """JSON that follows a schema. field: the place of the schema in the request.

    Raises RequestError for a schema that is no JSON object or too large; other faults are found by compiling.
    """
    grammar = _schema_grammar(_checked(schema, field))
    return GrammarSource(grammar, ((field, grammar),))


def tool_calls(chat: ChatFormat, tools: Sequence[Tool], choice: str = "auto") -> GrammarSource | None:
    """Tool calls in the format of `chat`. The arguments of strict tools follow their schemas, other arguments are any
    JSON object.

    choice: "required": the content is one or more calls; "function:NAME": it is one call of this tool; "auto": the
    model may call tools after free content, and then the calls follow the grammar; None if no tool is strict.
    Raises RequestError for an unknown name, for a schema as in `json_schema`, and for a format whose call syntax is
    unknown.
    """
    if choice == "auto" and not any(tool.strict for tool in tools):
        return None
    if not isinstance(chat, DeepSeekFormat):
        raise RequestError(
            f"tool_choice={choice!r} and strict tools are not supported by the chat format {chat.name!r}: only the "
            "call syntax of the DeepSeek formats is known; remove them",
            "tools" if choice == "auto" else "tool_choice",
        )
    chat.check_tools(tools)
    if not tools:
        raise RequestError(f"tool_choice={choice!r} needs tools; add tools", "tools")
    name = choice.removeprefix("function:")
    is_single = name != choice
    chosen = [(index, tool) for index, tool in enumerate(tools) if not is_single or tool.name == name]
    if not chosen:
        names = [tool.name for tool in tools]
        close = difflib.get_close_matches(name, names, n=1) or names
        raise RequestError(f"tool_choice={name!r} is none of the tools; did you mean {close[0]!r}?", "tool_choice")
    calls_begin, call_begin, sep, call_end, calls_end = (
        f"<[{chat.tokenizer.control_id(token)}]>" for token in (CALLS_BEGIN, CALL_BEGIN, CALL_SEP, CALL_END, CALLS_END)
    )
    more = "" if is_single else '("\\n" call)*' if chat.style.fenced else "call*"
    lines = [f"start: {calls_begin} call {more} {calls_end}"]
    lines += ["call: " + " | ".join(f"call_{index}" for index, _ in chosen)]
    schemas: list[tuple[str, str]] = []
    for index, tool in chosen:
        schema: Mapping[str, Any] = {"type": "object"}
        if tool.strict:
            field = f"tools[{index}].function.parameters"
            schema = {"type": "object", **_checked(tool.parameters, field)}
            schemas.append((field, _schema_grammar(schema)))
        before, after = f"{_text(tool.name)} {sep}", ""
        if chat.style.fenced:
            fence = _text(f"{tool.name}\n```json\n")
            before, after = f'"function" {sep} {fence}', _text("\n```")
        lines += [f"call_{index}: {call_begin} {before} arguments_{index} {after} {call_end}"]
        lines += [f"arguments_{index}: %json {_compact(_with_whitespace(schema))}"]
    trigger = chat.tokenizer.control_id(CALLS_BEGIN) if choice == "auto" else None
    return GrammarSource(LLMatcher.grammar_from_lark("\n".join(lines)), tuple(schemas), trigger)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _compact(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _with_whitespace(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with our options; those of a request ("x-guidance") would change the whitespace and the separators."""
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _schema_grammar(schema: Mapping[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(_compact(_with_whitespace(schema)))


def _checked(schema: Any, field: str) -> Mapping[str, Any]:
    """The schema. Raises RequestError if it is no JSON object, too large, too deep, or asks for too many items."""
    if not isinstance(schema, Mapping):
        raise RequestError(f"{field} is a {type(schema).__name__}; it must be a JSON schema, an object", field)
    for depth, key, value in _walk(schema):
        if depth > MAX_DEPTH:
            raise RequestError(f"{field} is nested deeper than {MAX_DEPTH}; use $defs and $ref, or fewer levels", field)
        is_count = key in ("minItems", "minLength", "minProperties") and isinstance(value, int | float)
        if is_count and value > MAX_COUNT:
            raise RequestError(
                f"{field} has {key}={value}; no completion is that long; use at most {MAX_COUNT:,}", field
            )
    try:
        size = len(_compact(schema))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{field} is not JSON ({error}); use objects, lists, strings and numbers", field) from error
    if size > MAX_SCHEMA_CHARACTERS:
        raise RequestError(f"{field} has {size:,} characters; at most {MAX_SCHEMA_CHARACTERS:,} are supported", field)
    return schema


def _walk(schema: Any) -> Iterator[tuple[int, str, Any]]:
    """All (depth, key, value) of nested objects and lists, without recursion; keys of lists are ""."""
    waiting: list[tuple[int, Any]] = [(1, schema)]
    while waiting:
        depth, value = waiting.pop()
        items = value.items() if isinstance(value, Mapping) else [("", part) for part in value]
        for key, part in items:
            yield depth, key, part
            if isinstance(part, Mapping | list | tuple):
                waiting.append((depth + 1, part))


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar for one vocabulary."""

    matcher: LLMatcher
    tokens: TurnTokens
    source: GrammarSource

    def factory(self, opening_ids: Sequence[int] = ()) -> "TurnGrammarFactory":
        """What `Engine.submit` takes as `grammar`. opening_ids: the tokens of the assistant's turn that the prompt
        contains (`ChatFormat.opening_pieces`), such as an opening think tag or the start of the content.

        Raises RequestError if the grammar does not allow a content that starts in this way.
        """
        factory = TurnGrammarFactory(self, tuple(opening_ids))
        try:
            factory()
        except RequestError as error:
            message = f"the grammar does not allow the start of the last message ({error})"
            raise RequestError(message, "messages") from error
        return factory


@dataclass(frozen=True)
class TurnGrammarFactory:
    """Makes the grammars of the completions of one request. It is a `StructuredOutputs` of engine/grammar.py."""

    compiled: CompiledGrammar
    opening_ids: tuple[int, ...]

    def __call__(self) -> TurnGrammar:
        compiled = self.compiled
        grammar = TurnGrammar(compiled.matcher.deep_copy(), compiled.tokens, compiled.source.trigger)
        grammar.begin(self.opening_ids)
        return grammar

    @property
    def params(self) -> Mapping[str, Any]:
        """vLLM's structured_outputs: a JSON schema, or a grammar in llguidance's form of Lark."""
        text = self.compiled.source.text
        if not text.startswith("{"):
            return {"grammar": text}
        return {"json": json.loads(text)["grammars"][0]["json_schema"]}

    @property
    def trigger(self) -> int | None:
        return self.compiled.source.trigger

    @property
    def think_open(self) -> int | None:
        tokens = self.compiled.tokens
        return tokens.think_open if tokens.may_think else None

    @property
    def phase(self) -> Phase:
        return self().phase


class Refusal(NamedTuple):
    """Why a grammar is refused."""

    field: str
    message: str


class GrammarCompiler:
    """Compiles grammars for the vocabulary and the end tokens of a chat format, and caches them. Threads may share it.

    A schema from a request is first compiled and tried out by a process of its own (text/grammar_worker.py) that is
    killed after a time limit: llguidance's limits do not cover all of its work, such as that of a large multipleOf.
    """

    def __init__(self, chat: ChatFormat, max_cached: int = 256):
        """max_cached: number of grammars in the cache, least recently used first out."""
        self._chat, self._max_cached, self._lock = chat, max_cached, Lock()
        self._cache: OrderedDict[GrammarSource, CompiledGrammar | Refusal] = OrderedDict()
        """Compiled and refused grammars."""
        self._tokenizer: LLTokenizer | None = None
        self._processes = BoundedSemaphore(MAX_PROCESSES)

    def compile(self, source: GrammarSource, timeout_seconds: float = 5.0) -> CompiledGrammar:
        """Compile a grammar, or return it from the cache. It takes milliseconds to seconds: call it outside the thread
        of an engine.

        Raises RequestError with the field of a schema that is invalid, has unsupported keywords, is satisfied by no
        text, takes longer than timeout_seconds or exceeds llguidance's limits.
        """
        with self._lock:
            found = self._cache.get(source)
            if found is not None:
                self._cache.move_to_end(source)
        if found is None:
            with self._processes:
                refusal = _try_out(source.schemas, timeout_seconds)
            found = refusal or self._compile(source)
            with self._lock:
                self._cache[source] = found
                while len(self._cache) > self._max_cached:
                    self._cache.popitem(last=False)
        if isinstance(found, Refusal):
            raise RequestError(f"{found.field} {found.message}", found.field)
        return found

    def _compile(self, source: GrammarSource) -> CompiledGrammar | Refusal:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _ll_tokenizer(self._chat.tokenizer, self._chat.stop_token_ids)
        matcher = LLMatcher(self._tokenizer, source.text, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            field = source.schemas[0][0] if len(source.schemas) == 1 else "tools"
            return _refusal(field, matcher.get_error().partition("\n<state>")[0])
        tokens = TurnTokens.of(self._chat, self._tokenizer.vocab_size)
        return CompiledGrammar(matcher, tokens, source)


def _ll_tokenizer(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> LLTokenizer:
    """llguidance's tokenizer, in which all control tokens are special tokens: no text contains them. For a vocabulary
    of 129,000 tokens this takes about a second."""
    if not stop_token_ids:
        raise RequestError("this model has no end token, which a grammar needs; set eos_token in tokenizer_config.json")
    data = json.loads(tokenizer.spec)
    for token in data["added_tokens"]:
        token["special"] = token["special"] or token["content"] in tokenizer.control
    try:
        return LLTokenizer(json.dumps(data, ensure_ascii=False), eos_token=list(stop_token_ids))
    except ValueError as error:
        message = f"this model's tokenizer does not support grammars ({error}); use response_format=text"
        raise RequestError(message, "response_format") from error


def _try_out(schemas: Sequence[tuple[str, str]], timeout_seconds: float) -> Refusal | None:
    """Why one of the schemas is refused; None if none is."""
    if not schemas:
        return None
    work = json.dumps({"grammars": [grammar for _, grammar in schemas], "limits": LIMITS})
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(WORKER)], input=work.encode(), capture_output=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired as error:
        return _refusal(schemas[_last_number(error.stdout)][0], f"compiling takes longer than {timeout_seconds:g} s")
    if not done.stdout:
        raise RuntimeError(f"the process that compiles grammars does not start: {done.stderr.decode()[-500:]}")
    last = done.stdout.splitlines()[-1:]
    if last[0].startswith(b'"'):
        return _refusal(schemas[_last_number(done.stdout)][0], json.loads(last[0]))
    if done.returncode:
        return _refusal(schemas[_last_number(done.stdout)][0], "compiling takes too much memory")
    return None


def _last_number(stdout: bytes | None) -> int:
    """The number of the last grammar that the worker began."""
    numbers = [int(line) for line in (stdout or b"").splitlines() if line.isdigit()]
    return numbers[-1] if numbers else 0


def _refusal(field: str, reason: str) -> Refusal:
    shown = " ".join(reason.split())
    return Refusal(field, f"cannot be compiled to a grammar: {shown}; simplify the schema, or remove the keyword")
