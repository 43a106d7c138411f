"""What an assistant's turn contains: thinking, answer, tool calls, and whether it keeps the format."""

import re
from dataclasses import dataclass
from typing import Literal

from thinkstack.text.final_answer import boxes, flexible_extract, last_boxed
from thinkstack.text.tokenizer import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    THINK_CLOSE,
    THINK_OPEN,
)
from thinkstack.types import Message, ToolCall

ThinkingFormat = Literal["think_answer_tags", "think_then_answer", "flexible_extract"]
"""How a turn is to look and where its answer stands: `parse_turn`."""
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
_THINK_ANSWER_TAGS = re.compile(r"\s*<think>(?P<thinking>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_CALL = re.compile(
    rf"\s*{CALL_BEGIN}(?:function{CALL_SEP}(?P<old_name>[^\n]*?)\n```json\n(?P<old>.*?)\n```"
    rf"|(?P<name>.*?){CALL_SEP}(?P<arguments>.*?)){CALL_END}",
    re.DOTALL,
)


@dataclass(frozen=True)
class Turn:
    """A parsed assistant turn."""

    thinking: str
    """What stands in the think block; empty if there is none."""
    answer: str | None
    """The final answer, as the form finds it after the thinking; None if there is none."""
    is_well_formed: bool
    """Whether the turn keeps its form."""
    rule: str | None = None
    """The name of the rule that found the answer, in the form "flexible_extract": text/final_answer.py."""


def parse_turn(text: str, form: ThinkingFormat = "think_answer_tags") -> Turn:
    """Parse a whole turn. An answer inside unclosed thinking never counts.

    form: "think_answer_tags" is R1-Zero's, one think block and one answer between tags, and nothing else; one of
    several answers is none. "think_then_answer" is R1's, one think block and then prose of any length: the answer is
    what its last box holds, or all of it if there is no box; if the last box is not finished there is none.
    "flexible_extract" asks for no form: the answer is found by the first rule of text/final_answer.py that finds one,
    and it is well-formed if there is one.
    """
    if form == "think_then_answer":
        return _parse_think_then_answer(text)
    if form == "flexible_extract":
        return _parse_flexible(text)
    tagged = _THINK_ANSWER_TAGS.fullmatch(text)
    if tagged and all(text.count(tag) == 1 for tag in TAGS):
        return Turn(tagged["thinking"].strip(), tagged["answer"].strip(), True)
    before, _, after = text.rpartition(THINK_CLOSE)
    thinking = before.rpartition(THINK_OPEN)[2].strip()
    visible = after if THINK_OPEN not in after else ""
    if visible.count(ANSWER_OPEN) == visible.count(ANSWER_CLOSE) == 1:
        answer = visible.partition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)
        if answer[1]:
            return Turn(thinking, answer[0].strip(), False)
    return Turn(thinking, None, False)


def _parse_think_then_answer(text: str) -> Turn:
    """One think block at the beginning, closed, with something in it and something behind it."""
    before, _, rest = text.partition(THINK_OPEN)
    thinking, closed, answer = rest.partition(THINK_CLOSE)
    is_single = not before.strip() and bool(closed) and THINK_OPEN not in rest and THINK_CLOSE not in answer
    if not is_single:
        return Turn(thinking.strip() if closed else rest.strip(), None, False)
    said, thinking = answer.strip(), thinking.strip()
    final = last_boxed(said) if boxes(said) else said or None
    return Turn(thinking, final, bool(thinking and said))


def _parse_flexible(text: str) -> Turn:
    """Thinking is what stands before the last closing tag, if there is any; without a closing tag, all is said."""
    before, closed, said = text.rpartition(THINK_CLOSE)
    if THINK_OPEN in said:
        return Turn(said.rpartition(THINK_OPEN)[2].strip(), None, False)
    answer, rule = flexible_extract(said)
    thinking = before.rpartition(THINK_OPEN)[2].strip() if closed else said.strip()
    return Turn(thinking, answer, answer is not None, rule)


def split_thinking(text: str) -> tuple[str | None, str]:
    """(what stands in the think block that a turn begins with, what follows it), both as they are written.

    A block that the turn leaves open reaches to its end. None without a block; a closing tag alone, which a prompt
    that asks for no thinking writes, is dropped.
    """
    head = text.lstrip()
    if head.startswith(THINK_CLOSE):
        return None, head.removeprefix(THINK_CLOSE)
    if not head.startswith(THINK_OPEN):
        return None, text
    thinking, _, rest = head.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return thinking, rest


def parse_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """(what is said before the calls, the calls) of a turn in the spelling of V3 and R1 or of V3.1.

    Calls that are not written to their end, or with something else between them, are no calls: the whole text is then
    what is said. Source: chat templates of DeepSeek-V3-0324, R1-0528 and V3.1.
    """
    said, begin, rest = text.partition(CALLS_BEGIN)
    body, end, after = rest.partition(CALLS_END)
    found = list(_CALL.finditer(body))
    if not begin or not end or after.strip() or "".join(call[0] for call in found).strip() != body.strip() or not found:
        return text, ()
    names = (
        (call["old_name"], call["old"]) if call["name"] is None else (call["name"], call["arguments"]) for call in found
    )
    return said, tuple(ToolCall(name=name, arguments=arguments) for name, arguments in names)


def read_reply(text: str) -> Message:
    """The message that a turn of an assistant is: its thinking, what it says and what it calls.

    text: what ChatFormat.text_of returns. Line breaks around thinking and answer are left out.
    """
    thinking, rest = split_thinking(text)
    said, calls = parse_calls(rest)
    reasoning = None if thinking is None else thinking.strip("\n")
    return Message(role="assistant", content=said.strip("\n"), reasoning=reasoning, tool_calls=calls)
