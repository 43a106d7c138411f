"""Chat formats from the Jinja template of a checkpoint.

The template gets the message text, so that it can trim, split or quote it. Before rendering, a mark (a character that
occurs nowhere in the messages) is inserted into every spelling of a control token in the messages; afterwards the mark
is removed. Control token spellings without a mark in the result therefore come from the template. Text between control
tokens is encoded as one piece, as in transformers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from thinkstack.text.formats import TurnFormat, check_thinking_switch, think_block
from thinkstack.text.parse import split_thinking
from thinkstack.text.template_sandbox import render, template_variables
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN, Control
from thinkstack.types import Message, RequestError, Tool, ToolCall

SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn thinking on or off."""
_PROBE = "thinkstackprobe"
_PROBE_ID = "probe0001"
"""Id of a probe call; Mistral's templates reject calls without an id of at least nine characters."""
_PROBE_QUESTION = Message(role="user", content=_PROBE)

_NO_CONTINUATION = "this model's chat template cannot continue the last message"


@dataclass(frozen=True)
class TemplateFormat(TurnFormat):
    """The Jinja template of a checkpoint, rendered in a sandbox."""

    template: str
    bos: str
    eos: str
    tool_template: str = ""
    """Template for conversations with tools; empty means `template`."""
    end_token_ids: tuple[int, ...] = ()
    """Additional tokens that end a turn, from the checkpoint's generation_config.json."""
    name = "template"

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        eos = [self.tokenizer.control_id(self.eos)] if self.eos else []
        found = [*self._end_of_turn(), *eos, *self.end_token_ids]
        return tuple(dict.fromkeys(found))

    def _end_of_turn(self) -> list[int]:
        """Return the id of the control token that the template writes after assistant content, if any."""
        answer = Message(role="assistant", content=f"{_PROBE}{_PROBE}")
        try:
            text = self._render([_PROBE_QUESTION, answer], (), None, False, "")
        except RequestError:
            return []
        after = self.tokenizer.split_controls(text.partition(answer.content)[2])
        return [self.tokenizer.control_id(piece) for piece in after if isinstance(piece, Control)][:1]

    @cached_property
    def prefill(self) -> str:  # type: ignore[override]
        try:
            return self.opening([_PROBE_QUESTION])
        except RequestError:
            return ""

    @cached_property
    def can_switch(self) -> bool:  # type: ignore[override]
        return any(switch in template_variables(self.template) for switch in SWITCHES)

    def opening(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        return self._split_prompt(messages, (), thinking, _unused_character(messages))[1]

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        mark = _unused_character((messages, tools))
        return self._encode(self._render(messages, tools, thinking, True, mark), mark)

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        *before, message = messages
        mark = _unused_character((messages, tools))
        header, opening = self._split_prompt(before, tools, thinking, mark)
        if thinking is False:
            message = replace(message, reasoning=None)
        full_text = self._render([*before, message], tools, thinking, False, mark)
        content = _break_controls(message.content, self.tokenizer.control, mark).strip()
        body = full_text.removeprefix(header)
        if not full_text.startswith(header) or content not in body:
            raise RequestError(
                "with the model's chat template, the text of a conversation is not its prompt followed by the "
                "assistant message, so the template cannot be used for training; use one of the chat formats of this "
                "package"
            )
        reasoning = _break_controls(message.reasoning or "", self.tokenizer.control, mark)
        has_block = body.startswith(opening) and (
            message.reasoning is None or (THINK_OPEN in body and reasoning.strip() in body)
        )
        if (opening or message.reasoning is not None) and not has_block:
            gap = "" if body.startswith(THINK_CLOSE) else "\n"
            body = "".join(think_block(reasoning, gap)) + body.removeprefix(THINK_CLOSE)
        pieces = self.tokenizer.split_controls(body.removeprefix(opening))
        stops = [index for index, piece in enumerate(pieces) if self._ends(piece)]
        if stops:
            return self.tokenizer.encode_pieces(_remove_mark(pieces[: stops[0] + 1], mark))
        return self.close([*_remove_mark(pieces, mark)])

    def continue_final_message(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        thinking, mark = self._continued_thinking(messages, thinking), _unused_character((messages, tools))
        return self._encode(self._unfinished(messages, tools, thinking, mark), mark)

    def continuation(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[str]:
        mark = _unused_character((messages, tools))
        header, opening = self._split_prompt(messages[:-1], tools, thinking, mark)
        added = self._unfinished(messages, tools, thinking, mark).removeprefix(header)
        pieces = self.tokenizer.split_controls(added.removeprefix(opening))
        return [*_remove_mark(pieces, mark)]

    def _unfinished(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None, mark: str) -> str:
        """Render a conversation up to the end of the content of its last message, or of its reasoning."""
        *before, message = messages
        header, opening = self._split_prompt(before, tools, thinking, mark)
        reasoning = _break_controls(message.reasoning or "", self.tokenizer.control, mark)
        if message.reasoning is not None and not message.content:
            if THINK_OPEN not in opening or THINK_CLOSE in opening:
                if THINK_OPEN not in self.tokenizer.control:
                    raise RequestError(f"{_NO_CONTINUATION} from its reasoning: the model has no think tags")
                opening = f"{THINK_OPEN}\n"
            return header + opening + reasoning
        end, end_of_reasoning = f"{mark}{_PROBE}{mark}", f"{mark}{_PROBE}7{mark}"
        message = replace(message, content=message.content + end)
        if message.reasoning is not None:
            message = replace(message, reasoning=message.reasoning + end_of_reasoning)
        text = self._render([*before, message], tools, thinking, False, mark)
        if end not in text:
            raise RequestError(f"{_NO_CONTINUATION}: it changes the content of the last message")
        text = text[: text.rindex(end)]
        if not text.startswith(header):
            raise RequestError(f"{_NO_CONTINUATION}: it renders the earlier messages differently then")
        body = text.removeprefix(header)
        if message.reasoning is not None and end_of_reasoning not in body:  # the template leaves it out
            gap = "" if body.startswith(THINK_CLOSE) else "\n"
            body = "".join(think_block(reasoning, gap)) + body.removeprefix(THINK_CLOSE)
        return header + body.replace(end_of_reasoning, "")

    def _ends(self, piece: str) -> bool:
        return isinstance(piece, Control) and self.tokenizer.control[piece] in self.stop_token_ids

    def _split_prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None, mark: str
    ) -> tuple[str, str]:
        """Return (the text of the prompt without its opening, the opening). The opening is the start of a think block,
        an empty think block, or ""."""
        prompt_text = self._render(messages, tools, thinking, True, mark)
        history = self._render(messages, tools, thinking, False, mark)
        added = prompt_text.removeprefix(history) if prompt_text.startswith(history) else ""
        places = [added.index(tag) for tag in (THINK_OPEN, THINK_CLOSE) if tag in added]
        opening = added[min(places) :] if places else ""
        return prompt_text.removesuffix(opening), opening

    def _encode(self, text: str, mark: str) -> list[int]:
        return self.tokenizer.encode_pieces(_remove_mark(self.tokenizer.split_controls(text), mark))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        thinking: bool | None,
        add_generation_prompt: bool,
        mark: str,
    ) -> str:
        """Render the template with `mark` inserted into control token spellings in the messages."""
        template = self.tool_template if tools and self.tool_template else self.template
        names = template_variables(template)
        if tools and "tools" not in names:
            raise RequestError("this model's chat template does not support tools; describe them in the system message")
        dropped = next((message.role for message in messages if message.role in self._dropped_roles[bool(tools)]), None)
        if dropped is not None:
            raise RequestError(f"this model's chat template drops messages of the role {dropped!r}; remove them")
        switches = {name: thinking for name in SWITCHES if name in names and thinking is not None}
        if not switches:
            check_thinking_switch(self.name, thinking, None)
        fields = [self._as_dict(message, mark) for message in messages]
        return render(
            template,
            messages=_break_controls(fields, self.tokenizer.control, mark),
            tools=_break_controls([_schema(tool) for tool in tools], self.tokenizer.control, mark) or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos,
            eos_token=self.eos,
            **switches,
        )

    def _as_dict(self, message: Message, mark: str) -> dict[str, Any]:
        """Return the message as the dict that templates expect."""
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        fields |= {key: getattr(message, key) for key in ("tool_call_id", "name") if getattr(message, key) is not None}
        if message.role == "assistant":
            fields |= self._thinking_fields(message)
        if message.tool_calls:
            as_text, empty, takes_content = self._call_format
            if message.content and not takes_content:
                raise RequestError(
                    "this model's chat template drops the content before a tool call; split it into two turns"
                )
            fields["tool_calls"] = [_call(call, as_text) for call in message.tool_calls]
            fields["content"] = fields["content"] or empty
        return fields

    def _thinking_fields(self, message: Message) -> dict[str, Any]:
        """Return `reasoning_content` if the template uses it, or content with think tags; a leading think block in the
        content is passed to the template unchanged."""
        if message.reasoning is not None and "reasoning_content" in self.template:
            return {"reasoning_content": message.reasoning}
        thinking, rest = split_thinking(message.content)
        if thinking is None or THINK_CLOSE not in message.content:
            return {}
        start = message.content[: message.content.index(THINK_OPEN)]
        return {"content": _TaggedText((f"{start}{THINK_OPEN}", thinking, THINK_CLOSE, rest))}

    @cached_property
    def _call_format(self) -> tuple[bool, str | None, bool]:
        """Return (arguments are text, value for empty content, content before a call is written) for this template.

        Found by rendering probes. Raises RequestError if the template writes no calls at all.
        """
        for empty in ("", None):
            for as_text in (False, True):
                if self._writes_call(as_text, empty):
                    return as_text, empty, self._writes_call(as_text, f"{_PROBE}4")
        raise RequestError("this model's chat template does not support tool calls; remove them")

    @cached_property
    def _dropped_roles(self) -> dict[bool, frozenset[str]]:
        """Return the roles whose messages the template silently drops, without tools (False) and with tools (True).

        Found by rendering probes. Roles that make the template raise are not included.
        """
        content = f"{_PROBE}5"
        question, answer = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": f"{_PROBE}6"}
        call = _call(ToolCall(name=_PROBE, arguments="{}", id=_PROBE_ID), as_text=False)
        result = {"role": "tool", "name": _PROBE, "tool_call_id": _PROBE_ID, "content": content}
        attempts: dict[str, list[list[dict[str, Any]]]] = {
            "system": [[{"role": "system", "content": content}, question]],
            # some templates require a call before the result
            "tool": [[question, turn, result] for turn in (answer, answer | {"tool_calls": [call]})],
        }
        return {
            has_tools: frozenset(
                role
                for role, conversations in attempts.items()
                if not any(self._writes(content, conversation, has_tools) for conversation in conversations)
            )
            for has_tools in (False, True)
        }

    def _writes(self, content: str, messages: list[dict[str, Any]], has_tools: bool) -> bool:
        names: dict[str, Any] = {"bos_token": self.bos, "eos_token": self.eos, "add_generation_prompt": True}
        names["tools"] = [_schema(Tool(name=_PROBE, description=_PROBE))] if has_tools else None
        template = self.tool_template if has_tools and self.tool_template else self.template
        try:
            return content in render(template, messages=messages, **names)
        except RequestError:
            return True

    def _writes_call(self, as_text: bool, content: str | None) -> bool:
        call = ToolCall(name=f"{_PROBE}1", arguments=f'{{"{_PROBE}2": "{_PROBE}3"}}', id=_PROBE_ID)
        answer = {"role": "assistant", "content": content, "tool_calls": [_call(call, as_text)]}
        names = {"bos_token": self.bos, "eos_token": self.eos, "tools": None, "add_generation_prompt": False}
        question = {"role": "user", "content": _PROBE}
        try:
            text = render(self.tool_template or self.template, messages=[question, answer], **names)
        except RequestError:
            return False
        return all(part in text for part in (call.name, call.arguments.strip("{}"), content or ""))


class _TaggedText(tuple[str, ...]):
    """Text in parts; parts that are think tags are control tokens, not text."""


def _call(call: ToolCall, as_text: bool) -> dict[str, Any]:
    arguments: Any = call.arguments
    if not as_text:
        try:
            arguments = json.loads(call.arguments)
        except ValueError as error:
            raise RequestError(f"the arguments of the call of {call.name!r} are not valid JSON ({error})") from error
    fields = {} if call.id is None else {"id": call.id}
    return fields | {"type": "function", "function": {"name": call.name, "arguments": arguments}}


def _schema(tool: Tool) -> dict[str, Any]:
    described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": described}


def _unused_character(content: object) -> str:
    """Return a private-use character that does not occur in `content`."""
    text = repr(content)
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text and f"\\u{code:04x}" not in text)


def _break_controls(value: Any, control: Mapping[str, int], mark: str) -> Any:
    """Insert `mark` into every spelling of a control token in a value, and before a possible start of one at its
    end."""
    if isinstance(value, _TaggedText):
        return "".join(
            part if part.lstrip() in (THINK_OPEN, THINK_CLOSE) else _break_controls(part, control, mark)
            for part in value
        )
    if isinstance(value, Mapping):
        return {
            _break_controls(key, control, mark): _break_controls(part, control, mark) for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_break_controls(part, control, mark) for part in value]
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


def _remove_mark(pieces: Sequence[str], mark: str) -> Iterator[str]:
    """Yield the pieces without the mark, also where a template wrote it as a JSON escape."""
    for piece in pieces:
        if not isinstance(piece, Control):
            piece = piece.replace(mark, "").replace(f"\\u{ord(mark):04x}", "")
        yield piece
