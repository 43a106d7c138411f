"""Chat formats that come with a checkpoint as a Jinja template.

The template sees what people wrote, so that it can trim, split or quote it; only the spellings of control tokens are
broken up by a mark that nobody used, which is taken out again afterwards. Whatever then spells a control token was
written by the template. Its text between control tokens is encoded as one piece, as transformers does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from thinkstack.text.formats import TurnFormat, refuse_switch, think_block
from thinkstack.text.parse import split_thinking
from thinkstack.text.template_sandbox import render, variables
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN, Control
from thinkstack.types import Message, RequestError, Tool, ToolCall

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates are told whether the model is to think."""
_PROBE = "thinkstackprobe"
_PROBE_ID = "probe0001"
"""Of a call; Mistral's templates refuse calls without an id of nine letters or more."""
_ASKED = Message(role="user", content=_PROBE)


@dataclass(frozen=True)
class TemplateFormat(TurnFormat):
    """A Jinja template shipped with somebody's checkpoint, run in a sandbox."""

    template: str
    bos: str
    eos: str
    tool_template: str = ""
    """The template to use where there are tools; empty uses the same."""
    ends: tuple[int, ...] = ()
    """More tokens that end a turn, from the checkpoint's generation_config.json."""
    name = "template"

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        eos = [self.tokenizer.control_id(self.eos)] if self.eos else []
        found = [*self._end_of_turn(), *eos, *self.ends]
        return tuple(dict.fromkeys(found))

    def _end_of_turn(self) -> list[int]:
        """The control token that the template writes after what an assistant says."""
        said = Message(role="assistant", content=f"{_PROBE}{_PROBE}")
        try:
            text = self._render([_ASKED, said], (), None, False, "")
        except RequestError:
            return []
        after = self.tokenizer.cut(text.partition(said.content)[2])
        return [self.tokenizer.control_id(piece) for piece in after if isinstance(piece, Control)][:1]

    @cached_property
    def prefill(self) -> str:  # type: ignore[override]
        try:
            return self.opening([_ASKED])
        except RequestError:
            return ""

    @cached_property
    def can_switch(self) -> bool:  # type: ignore[override]
        return any(switch in variables(self.template) for switch in SWITCHES)

    def opening(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        return self._asked(messages, (), thinking, _unused(messages))[1]

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        mark = _unused((messages, tools))
        return self._encode(self._render(messages, tools, thinking, True, mark), mark)

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        *before, message = messages
        mark = _unused((messages, tools))
        header, opening = self._asked(before, tools, thinking, mark)
        if thinking is False:
            message = replace(message, reasoning=None)
        whole = self._render([*before, message], tools, thinking, False, mark)
        said = _masked(message.content, self.tokenizer.control, mark).strip()
        body = whole.removeprefix(header)
        if not whole.startswith(header) or said not in body:
            raise RequestError(
                "the model's chat template writes an answer otherwise than it asks for one, so nothing can be learnt "
                "from it; use one of the chat formats of this package"
            )
        reasoning = _masked(message.reasoning or "", self.tokenizer.control, mark)
        has_block = body.startswith(opening) and (
            message.reasoning is None or (THINK_OPEN in body and reasoning.strip() in body)
        )
        if (opening or message.reasoning is not None) and not has_block:
            gap = "" if body.startswith(THINK_CLOSE) else "\n"
            body = "".join(think_block(reasoning, gap)) + body.removeprefix(THINK_CLOSE)
        pieces = self.tokenizer.cut(body.removeprefix(opening))
        stops = [index for index, piece in enumerate(pieces) if self._ends(piece)]
        if stops:
            return self.tokenizer.encode_pieces(_without(pieces[: stops[0] + 1], mark))
        return self.close([*_without(pieces, mark)])

    def _ends(self, piece: str) -> bool:
        return isinstance(piece, Control) and self.tokenizer.control[piece] in self.stop_token_ids

    def _asked(
        self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None, mark: str
    ) -> tuple[str, str]:
        """(the prompt in text, but for what it writes of the answer; that): a think block, begun or empty."""
        asked = self._render(messages, tools, thinking, True, mark)
        plain = self._render(messages, tools, thinking, False, mark)
        added = asked.removeprefix(plain) if asked.startswith(plain) else ""
        places = [added.index(tag) for tag in (THINK_OPEN, THINK_CLOSE) if tag in added]
        opening = added[min(places) :] if places else ""
        return asked.removesuffix(opening), opening

    def _encode(self, text: str, mark: str) -> list[int]:
        return self.tokenizer.encode_pieces(_without(self.tokenizer.cut(text), mark))

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None, ask: bool, mark: str
    ) -> str:
        """What the template writes, spellings of control tokens in it that are text broken up by `mark`."""
        template = self.tool_template if tools and self.tool_template else self.template
        names = variables(template)
        if tools and "tools" not in names:
            raise RequestError("this model's chat template has no place for tools; describe them in the system message")
        lost = next((message.role for message in messages if message.role in self._left_out[bool(tools)]), None)
        if lost is not None:
            raise RequestError(f"this model's chat template leaves out messages of the role {lost!r}; take them out")
        switches = {name: thinking for name in SWITCHES if name in names and thinking is not None}
        if not switches:
            refuse_switch(self.name, thinking, None)
        said = [self._as_dict(message, mark) for message in messages]
        return render(
            template,
            messages=_masked(said, self.tokenizer.control, mark),
            tools=_masked([_schema(tool) for tool in tools], self.tokenizer.control, mark) or None,
            documents=None,
            add_generation_prompt=ask,
            bos_token=self.bos,
            eos_token=self.eos,
            **switches,
        )

    def _as_dict(self, message: Message, mark: str) -> dict[str, Any]:
        """The message in the form that templates know."""
        read: dict[str, Any] = {"role": message.role, "content": message.content}
        read |= {key: getattr(message, key) for key in ("tool_call_id", "name") if getattr(message, key) is not None}
        if message.role == "assistant":
            read |= self._thought(message)
        if message.tool_calls:
            as_text, empty, takes_words = self._call_form
            if message.content and not takes_words:
                raise RequestError(
                    "this model's chat template leaves out what is said before a call; make two turns of it"
                )
            read["tool_calls"] = [_call(call, as_text) for call in message.tool_calls]
            read["content"] = read["content"] or empty
        return read

    def _thought(self, message: Message) -> dict[str, Any]:
        """Thinking goes where the template looks for it, if it does. A block that content begins with is left to it."""
        if message.reasoning is not None and "reasoning_content" in self.template:
            return {"reasoning_content": message.reasoning}
        thinking, rest = split_thinking(message.content)
        if thinking is None or THINK_CLOSE not in message.content:
            return {}
        start = message.content[: message.content.index(THINK_OPEN)]
        return {"content": _Written((f"{start}{THINK_OPEN}", thinking, THINK_CLOSE, rest))}

    @cached_property
    def _call_form(self) -> tuple[bool, str | None, bool]:
        """(arguments are text, what content is where nothing is said, words before a call are written): how this
        template is told of a call, found by trying. Raises RequestError if it writes no calls at all.
        """
        for empty in ("", None):
            for as_text in (False, True):
                if self._writes_call(as_text, empty):
                    return as_text, empty, self._writes_call(as_text, f"{_PROBE}4")
        raise RequestError("this model's chat template writes no tool calls; leave them out of the conversation")

    @cached_property
    def _left_out(self) -> dict[bool, frozenset[str]]:
        """Roles of whose messages the template writes nothing, without tools and with them, found by trying. Those that
        it refuses are not in it.
        """
        said = f"{_PROBE}5"
        asked, words = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": f"{_PROBE}6"}
        call = _call(ToolCall(name=_PROBE, arguments="{}", id=_PROBE_ID), as_text=False)
        result = {"role": "tool", "name": _PROBE, "tool_call_id": _PROBE_ID, "content": said}
        tried: dict[str, list[list[dict[str, Any]]]] = {
            "system": [[{"role": "system", "content": said}, asked]],
            "tool": [[asked, turn, result] for turn in (words, words | {"tool_calls": [call]})],  # some want a call
        }
        return {
            has_tools: frozenset(
                role for role, talks in tried.items() if not any(self._writes(said, talk, has_tools) for talk in talks)
            )
            for has_tools in (False, True)
        }

    def _writes(self, said: str, messages: list[dict[str, Any]], has_tools: bool) -> bool:
        names: dict[str, Any] = {"bos_token": self.bos, "eos_token": self.eos, "add_generation_prompt": True}
        names["tools"] = [_schema(Tool(name=_PROBE, description=_PROBE))] if has_tools else None
        template = self.tool_template if has_tools and self.tool_template else self.template
        try:
            return said in render(template, messages=messages, **names)
        except RequestError:
            return True

    def _writes_call(self, as_text: bool, content: str | None) -> bool:
        call = ToolCall(name=f"{_PROBE}1", arguments=f'{{"{_PROBE}2": "{_PROBE}3"}}', id=_PROBE_ID)
        said = {"role": "assistant", "content": content, "tool_calls": [_call(call, as_text)]}
        names = {"bos_token": self.bos, "eos_token": self.eos, "tools": None, "add_generation_prompt": False}
        asked = {"role": "user", "content": _PROBE}
        try:
            text = render(self.tool_template or self.template, messages=[asked, said], **names)
        except RequestError:
            return False
        return all(part in text for part in (call.name, call.arguments.strip("{}"), content or ""))


class _Written(tuple[str, ...]):
    """Text in parts, of which those that are think tags are tags."""


def _call(call: ToolCall, as_text: bool) -> dict[str, Any]:
    arguments: Any = call.arguments
    if not as_text:
        try:
            arguments = json.loads(call.arguments)
        except ValueError as error:
            raise RequestError(f"the arguments of the call of {call.name!r} are no JSON ({error})") from error
    known = {} if call.id is None else {"id": call.id}
    return known | {"type": "function", "function": {"name": call.name, "arguments": arguments}}


def _schema(tool: Tool) -> dict[str, Any]:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": described}


def _unused(said: object) -> str:
    """A private-use character that stands nowhere in what people wrote."""
    text = repr(said)
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text and f"\\u{code:04x}" not in text)


def _masked(value: Any, control: Mapping[str, int], mark: str) -> Any:
    """The same value with the spelling of every control token broken up, also of one that could begin at its end."""
    if isinstance(value, _Written):
        return "".join(
            part if part.lstrip() in (THINK_OPEN, THINK_CLOSE) else _masked(part, control, mark) for part in value
        )
    if isinstance(value, Mapping):
        return {_masked(key, control, mark): _masked(part, control, mark) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(part, control, mark) for part in value]
    if not isinstance(value, str) or not mark:
        return value
    for token in control:
        if token in value:
            value = value.replace(token, f"{token[0]}{mark}{token[1:]}")
    text = value.rstrip()
    if any(
        text.endswith(token[:size])
        for token in control
        if token[0] in text[-len(token) :]
        for size in range(1, len(token))
    ):
        value = f"{text}{mark}{value[len(text) :]}"
    return value


def _without(pieces: Sequence[str], mark: str) -> Iterator[str]:
    """The pieces with the mark taken out, also where a template wrote it as an escape of JSON."""
    for piece in pieces:
        if not isinstance(piece, Control):
            piece = piece.replace(mark, "").replace(f"\\u{ord(mark):04x}", "")
        yield piece
