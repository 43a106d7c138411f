"""The chat formats of DeepSeek-V3, R1, R1-0528 and V3.1: turns, thinking, tools.

A reimplementation of the chat templates in the tokenizer_config.json of DeepSeek-V3-0324, DeepSeek-R1 (revision
56d4cbb), DeepSeek-R1-0528 and DeepSeek-V3.1; docs/formats/templates.md lists the differences.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from thinkstack.text.formats import TurnFormat, check_thinking_switch, think_block
from thinkstack.text.parse import split_thinking
from thinkstack.text.tokenizer import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK_CLOSE,
    THINK_OPEN,
    TOOLS,
    USER,
    Control,
)
from thinkstack.types import Message, RequestError, Tool, ToolCall


@dataclass(frozen=True, kw_only=True)
class Style:
    """The differences between the formats."""

    header: Literal["after users", "before answers", "before first answers"]
    """Position of the assistant token: after each user turn; before each assistant turn except those that follow tool
    results; or only before assistant turns that follow a user turn."""
    thinking: Literal["written by the model", "begun by the prompt", "switched by the prompt"]
    """Where the opening think tag comes from."""
    drops_thinking: bool = True
    """Whether a leading think block is removed from earlier assistant content."""
    gap: str = "\n"
    """Line break after the opening think tag and before the closing tag; twice after the closing tag."""
    fenced: bool = True
    """True: calls are a function name with a JSON code block, and results share one pair of tokens. False: no
    fences."""
    between_outputs: str = "\n"
    """Text between several call results, if fenced."""


STYLES = {
    "v3": Style(header="after users", thinking="written by the model", drops_thinking=False),
    "r1": Style(header="before answers", thinking="begun by the prompt", between_outputs=""),
    "r1_0528": Style(header="after users", thinking="written by the model"),
    "v3_1": Style(header="before first answers", thinking="switched by the prompt", gap="", fenced=False),
}
"""Styles by format name; "v3_1_think" is "v3_1" with thinking on by default."""

TOOLS_HEADING = "## Tools\nYou have access to these tools:\n"
TOOLS_RULES = (
    "\n\nThe name in a call is the name of one of these tools. Its arguments are JSON that keeps to the schema of the "
    "tool's parameters. Write several calls one after the other. A call looks exactly like this:\n"
)
"""Text around the list of tools in the system text; a paraphrase of the model card of DeepSeek-V3.1."""


@dataclass(frozen=True)
class DeepSeekFormat(TurnFormat):
    """A prompt is BOS, system text without a marker, then turns with role tokens; earlier thinking is left out."""

    kind: str
    """One of STYLES, or "v3_1_think"."""

    @property
    def name(self) -> str:
        return self.kind

    @property
    def style(self) -> Style:
        return STYLES[self.kind.removesuffix("_think")]

    @property
    def can_switch(self) -> bool:
        return self.style.thinking == "switched by the prompt"

    @property
    def prefill(self) -> str:
        return "".join(self._opening_pieces(None))

    def opening(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        return "" if messages and messages[-1].role == "tool" else "".join(self._opening_pieces(thinking))

    def _opening_pieces(self, thinking: bool | None) -> list[str]:
        """Return the start of an assistant turn that the prompt contains after a user turn."""
        if not self.can_switch:
            in_prompt = self.style.thinking == "begun by the prompt"
            check_thinking_switch(self.name, thinking, self.kind != "v3")
            return [Control(THINK_OPEN), self.style.gap] if in_prompt else []
        is_thinking = self.kind.endswith("_think") if thinking is None else thinking
        return [Control(THINK_OPEN if is_thinking else THINK_CLOSE)]

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        if not messages or messages[-1].role not in ("user", "tool"):
            raise RequestError("the last message must come from the user or a tool; add a user message")
        self.check_tools(tools, messages)
        opening = self._opening_pieces(thinking)
        pieces = [*self._system_pieces(messages, tools), *self._history_pieces(messages)]
        if messages[-1].role == "tool":
            pieces += [Control(OUTPUTS_END)] if self.style.fenced else []
        else:
            pieces += [*([] if self.style.header == "after users" else [Control(ASSISTANT)]), *opening]
        return self.tokenizer.encode_pieces(pieces)

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        message = messages[-1]
        block = self._think_block(messages, thinking)
        return self.close([*block, message.content, *self._call_pieces(message.tool_calls)])

    def continuation(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[str]:
        message = messages[-1]
        block = self._think_block(messages, thinking)
        if message.reasoning is not None and not message.content:
            is_opened = len(block) == 3  # by the prompt
            return [message.reasoning] if is_opened else [block[0], f"{self.style.gap}{message.reasoning}"]
        return [*block, message.content]

    def _think_block(self, messages: Sequence[Message], thinking: bool | None) -> list[str]:
        """Return the think block of the last message, without what the prompt of the earlier messages contains."""
        *before, message = messages
        reasoning = None if thinking is False else message.reasoning
        opening = [] if before[-1].role == "tool" else self._opening_pieces(thinking)
        block = think_block(reasoning, self.style.gap)
        if opening == [Control(THINK_CLOSE)] or (reasoning is None and not opening):
            return []
        return [f"{reasoning or ''}{self.style.gap}", *block[2:]] if opening else block

    def check_tools(self, tools: Sequence[Tool] = (), messages: Sequence[Message] = ()) -> None:
        """Raise RequestError for tools, calls or results if the vocabulary has no tokens for them."""
        missing = [token for token in TOOLS if token not in self.tokenizer.control]
        if missing and (tools or any(message.tool_calls or message.role == "tool" for message in messages)):
            raise RequestError(
                f"this model does not support tools: its tokenizer has no token {missing[0]}; remove tools, tool calls "
                "and tool messages",
                "tools",
            )

    def _system_pieces(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[str]:
        texts = [message.content for message in messages if message.role == "system"]
        pieces: list[str] = [Control(BOS), "\n\n".join(texts)]
        if not tools:
            return pieces
        pieces += ["\n\n" if texts else "", TOOLS_HEADING]
        for tool in tools:
            schema = json.dumps(tool.parameters, ensure_ascii=False)
            pieces.append(f"\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {schema}\n")
        return [*pieces, TOOLS_RULES, *self._call_pieces([ToolCall(name="NAME", arguments="ARGUMENTS")])]

    def _history_pieces(self, messages: Sequence[Message]) -> list[str]:
        pieces: list[str] = []
        last = ""
        for message in messages:
            if message.role == "user":
                pieces += [Control(USER), message.content]
                pieces += [Control(ASSISTANT)] if self.style.header == "after users" else []
            elif message.role == "assistant":
                pieces += self._turn_header(last)
                pieces += [
                    *self._history_content(message.content),
                    *self._call_pieces(message.tool_calls),
                    Control(EOS),
                ]
            elif message.role == "tool":
                pieces += self._output_pieces(message.content, is_first=last != "tool")
            last = last if message.role == "system" else message.role
        return pieces

    def _turn_header(self, last: str) -> list[str]:
        """Return the pieces before an earlier assistant turn. last: the role of the message before it."""
        if last == "tool":
            return [Control(OUTPUTS_END)] if self.style.fenced else []
        if self.style.header == "before answers":
            return [Control(ASSISTANT)]
        is_first = self.style.header == "before first answers" and last == "user"
        return [Control(ASSISTANT), Control(THINK_CLOSE)] if is_first else []

    def _history_content(self, content: str) -> list[str]:
        """Return the content of an earlier turn, with or without its leading think block."""
        thinking, rest = split_thinking(content)
        if THINK_CLOSE not in content or (thinking is None and rest == content):
            return [content]
        if self.style.drops_thinking:
            return [rest]
        block = [Control(THINK_OPEN), thinking or "", Control(THINK_CLOSE)]
        return [
            content[: content.index("<")],
            *self.missing_as_text(block if thinking is not None else block[2:]),
            rest,
        ]

    def _call_pieces(self, calls: Sequence[ToolCall]) -> list[str]:
        pieces: list[str] = [Control(CALLS_BEGIN)] if calls else []
        for index, call in enumerate(calls):
            if self.style.fenced:
                pieces += ["\n" if index else "", Control(CALL_BEGIN), "function", Control(CALL_SEP)]
                pieces += [f"{call.name}\n```json\n{call.arguments}\n```", Control(CALL_END)]
            else:
                pieces += [Control(CALL_BEGIN), call.name, Control(CALL_SEP), call.arguments, Control(CALL_END)]
        return [*pieces, Control(CALLS_END)] if calls else []

    def _output_pieces(self, content: str, is_first: bool) -> list[str]:
        output = [Control(OUTPUT_BEGIN), content, Control(OUTPUT_END)]
        if not self.style.fenced:
            return output
        return [Control(OUTPUTS_BEGIN) if is_first else self.style.between_outputs, *output]
