"""Parse the turns of published conversations into Messages: roles, reasoning, tool calls, tools and loss masks.

docs/guides/sft.md lists the supported keys. An unknown key of a turn raises ConfigError, because it may have content.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from thinkstack.files import as_json, kind_of, parse_json
from thinkstack.text.tokenizer import THINK_OPEN
from thinkstack.types import ConfigError, Message, Role, Tool, ToolCall

ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
"""Role of a Message for each role name in published files, in lower case."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles whose content is a tool call or a list of tool calls in JSON (LLaMA-Factory's ShareGPT format, ms-swift)."""
REASONING = ("reasoning_content", "reasoning", "thinking")
TRAINED = ("weight", "train", "training", "trainable", "loss", "loss_mask", "step_loss_mask")
"""Keys of a turn with its loss mask: `weight` of OpenAI and Mistral, `train` and `training` of axolotl, `loss` of
ms-swift, `step_loss_mask` of slime."""
UNUSED_TURN_KEYS = ("id", "index", "message_id", "timestamp", "language", "model")
"""Metadata keys of a turn; they are logged as unused and do not raise ConfigError."""
CORRECT = "correct it"


class Fields:
    """The non-empty keys of a JSON object. `take` removes a key from `left`."""

    def __init__(self, values: Any, where: str):
        """where: address of the object in error messages. Raises ConfigError if it is not an object."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where} is {kind_of(values)}, not an object with keys; correct it")
        self.values, self.where = values, where
        self.left = {key: value for key, value in values.items() if value is not None and value not in ("", [], {})}

    def take(self, names: Sequence[str]) -> Any:
        """Remove and return the value under one of `names`, or None. Raises ConfigError if two have different
        values."""
        taken = {name: self.left.pop(name) for name in names if name in self.left}
        if not taken:
            return None
        first = next(iter(taken))
        other = next((name for name in taken if taken[name] != taken[first]), None)
        if other is not None:
            raise ConfigError(f"{self.where} has {first} and {other} with different values; keep one of them")
        return taken[first]

    def take_text(self, names: Sequence[str]) -> str | None:
        """Like `take`, for text; a list of text parts is joined."""
        value = self.take(names)
        return None if value is None else self.as_text(value, " or ".join(names))

    def as_text(self, value: Any, name: str) -> str:
        """Return text, or the joined text of a list of parts. Raises ConfigError for other values."""
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ConfigError(f"{self.where}: {name} is {kind_of(value)}, not text; correct it")
        parts = [Fields(part, f"{self.where}: {name}, part {number}") for number, part in enumerate(value, start=1)]
        for part in parts:
            if part.take(("type",)) != "text":
                raise ConfigError(f"{part.where} has type={part.values.get('type')}; only type=text is supported")
        texts = [part.take_text(("text",)) or "" for part in parts]
        for part in parts:
            part.refuse(part.left)
        return "".join(texts)

    def refuse(self, keys: Iterable[str]) -> None:
        """Raise ConfigError for the first of `keys`, if there is one."""
        for key in keys:
            raise ConfigError(
                f"{self.where} has the key {key!r}, which is not supported and would be lost; remove the key"
            )


def read_turns(values: Any, where: str, unused: set[str], trains: bool = True) -> list[Message]:
    """The turns of a list of objects with role and content, or from and value.

    unused: names of unused keys are added to this set. trains: whether assistant turns without a mask are trained on.
    Raises ConfigError with the address of the turn.
    """
    if not isinstance(values, list):
        raise ConfigError(f"{where}: its turns are {kind_of(values)}, not a list of objects; correct it")
    messages: list[Message] = []
    for number, value in enumerate(values, start=1):
        fields = Fields(value, f"{where}, turn {number}")
        message, is_call = _turn(fields, trains)
        unused.update(f"turn's {key}" for key in fields.left if key in UNUSED_TURN_KEYS)
        fields.refuse(key for key in fields.left if key not in UNUSED_TURN_KEYS)
        if is_call and messages and messages[-1].role == "assistant":  # text, or another call, of the same turn
            message = _merge(messages.pop(), message, fields.where)
        if message.role == "tool" and (not messages or messages[-1].role not in ("assistant", "tool")):
            raise ConfigError(
                f"{fields.where} (role {as_json(value.get('role', value.get('from')))}) is the result of a tool call, "
                "but no assistant turn precedes it; use role function_call for the call"
            )
        messages.append(message)
    return messages


def _turn(fields: Fields, trains: bool) -> tuple[Message, bool]:
    """Returns (the turn; whether its role is one of CALL_ROLES)."""
    spelled = fields.take(("role", "from"))
    if spelled is None:
        raise ConfigError(f"{fields.where} has no role (key role or from); use one of {', '.join(ROLES)}")
    role = ROLES.get(str(spelled).lower())
    if role is None:
        raise ConfigError(f"{fields.where}: role {as_json(spelled)} is not supported; use one of {', '.join(ROLES)}")
    has_content = any(fields.values.get(key) is not None for key in ("content", "value"))
    content = fields.take_text(("content", "value")) or ""
    if str(spelled).lower() in CALL_ROLES:
        calls = _calls(parse_json(content, f"{fields.where}: the content of a call", CORRECT), fields.where)
        return Message(role=role, content="", tool_calls=calls, is_trained=_is_trained(fields, role, trains)), True
    if role == "assistant":
        calls = _calls(fields.take(("tool_calls", "function_call")), fields.where)
        if not content.strip() and not calls:  # the content may be under an unsupported key, such as refusal
            fields.refuse(key for key in fields.left if key not in (*UNUSED_TURN_KEYS, *REASONING, *TRAINED))
        if not has_content and not calls:
            raise ConfigError(f"{fields.where} has neither content nor tool calls; remove the row")
        return answer(content, fields, calls, _is_trained(fields, role, trains)), False
    if not has_content:
        raise ConfigError(f"{fields.where} has no content (key content or value); remove the row")
    _is_trained(fields, role, trains)
    call_id, name = (fields.take_text((key,)) if role == "tool" else None for key in ("tool_call_id", "name"))
    return Message(role=role, content=content, tool_call_id=call_id, name=name), False


def answer(content: str, fields: Fields, calls: tuple[ToolCall, ...] = (), is_trained: bool = True) -> Message:
    """An assistant turn, with the reasoning from `fields`. Raises ConfigError if reasoning is in both `fields` and
    `content`, and for an empty turn that would be trained on.
    """
    reasoning = fields.take_text(REASONING)
    if reasoning in ("on", "off"):
        raise ConfigError(
            f"{fields.where}: reasoning={reasoning!r} is a switch, not the text of the reasoning; remove it"
        )
    if reasoning is not None and content.lstrip().startswith(THINK_OPEN):
        raise ConfigError(f"{fields.where} has reasoning twice: under a key and as {THINK_OPEN} in the text; keep one")
    if is_trained and not (content.strip() or calls or reasoning):
        raise ConfigError(f"{fields.where}: the assistant turn is empty and would be trained on; remove the row")
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls, is_trained=is_trained)


def _merge(text: Message, call: Message, where: str) -> Message:
    if text.is_trained != call.is_trained:
        raise ConfigError(
            f"{where} and the previous turn are merged into one assistant turn but have different masks; use one mask"
        )
    return replace(text, tool_calls=text.tool_calls + call.tool_calls)


def _is_trained(fields: Fields, role: Role, trains: bool) -> bool:
    """Whether a turn is trained on, according to its loss masks. Raises ConfigError for values other than 0 and 1."""
    masks = {name: fields.left[name] for name in TRAINED if name in fields.left}
    fields.left = {name: value for name, value in fields.left.items() if name not in masks}
    for name, value in masks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ConfigError(
                f"{fields.where}: {name}={as_json(value)} is not supported; use 1 or true to train on the turn, "
                "0 or false to mask it"
            )
        if value and role != "assistant":
            raise ConfigError(
                f"{fields.where}: {name}={as_json(value)} would train on a {role} turn, but only "
                "assistant turns are trained on; remove the key"
            )
    if len({bool(value) for value in masks.values()}) > 1:
        raise ConfigError(f"{fields.where} has {' and '.join(masks)} with different values; keep one of them")
    return all(masks.values()) if masks else trains


def _calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """Tool calls in OpenAI's format, {"function": {"name", "arguments"}}, or only the inner object of each."""
    calls = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_call(call, f"{where}, call {number}") for number, call in enumerate(calls, start=1))


def _call(value: Any, where: str) -> ToolCall:
    outer = Fields(value, where)
    inner = Fields(outer.take(("function",)), where) if "function" in outer.left else outer
    call_id = outer.take_text(("id",))
    outer.left.pop("index", None)  # the position in the list; the order of the list is preserved
    if outer.take(("type",)) not in (None, "function"):
        raise ConfigError(f"{where} is not of type function; only function calls are supported")
    name, arguments = inner.take_text(("name",)), inner.take(("arguments", "parameters"))
    if name is None:
        raise ConfigError(f"{where} has no function name; correct it")
    text = arguments if isinstance(arguments, str) else _to_json({} if arguments is None else arguments, where)
    if not isinstance(parse_json(text, f"{where}: arguments", CORRECT), dict):
        raise ConfigError(f"{where}: arguments are not a JSON object; correct them")
    for fields in (inner, outer):
        fields.refuse(fields.left)
    return ToolCall(name=name, arguments=text, id=call_id)


def read_tools(value: Any, where: str, unused: set[str]) -> tuple[Tool, ...]:
    """Tools in OpenAI's format: a list, or its JSON text. Raises ConfigError with the address of the tool."""
    values = parse_json(value, f"{where}: tools", CORRECT) if isinstance(value, str) else value
    if values is None:
        return ()
    if not isinstance(values, list):
        raise ConfigError(f"{where}: tools is {kind_of(values)}, not a list; correct it")
    tools = []
    for number, entry in enumerate(values, start=1):
        address = f"{where}, tool {number}"
        if isinstance(entry, str):  # each tool as JSON text
            entry = parse_json(entry, address, CORRECT)
        outer = Fields(entry, address)
        inner = Fields(outer.take(("function",)), address) if "function" in outer.left else outer
        outer.take(("type",))
        if inner.left.pop("strict", None) is not None:
            unused.add("tool's strict")
        name, description = inner.take_text(("name",)), inner.take_text(("description",))
        parameters = Fields(inner.take(("parameters",)) or {}, f"{address}: parameters").values
        _to_json(parameters, address)
        if name is None:
            raise ConfigError(f"{address} has no name; correct it")
        for fields in (inner, outer):
            fields.refuse(fields.left)
        tools.append(Tool(name=name, description=description or "", parameters=parameters))
    return tuple(tools)


def _to_json(value: Any, where: str) -> str:
    """A value as JSON text. Raises ConfigError for dates and bytes from parquet, which JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ConfigError(f"{where} cannot be written as JSON ({error}); {CORRECT}") from error
