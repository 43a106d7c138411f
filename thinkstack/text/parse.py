"""Parsing of an assistant turn: thinking, answer, tool calls, and whether the turn is well-formed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from thinkstack.text.final_answer import boxed_answer, boxes, flexible_extract, last_number
from thinkstack.text.tokenizer import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    THINK_CLOSE,
    THINK_OPEN,
)
from thinkstack.types import Completion, Message, Response, ToolCall

if TYPE_CHECKING:
    from thinkstack.text.chat import ChatFormat

ThinkingFormat = Literal["think_answer_tags", "think_then_answer", "flexible_extract", "last_number"]
"""The expected format of a turn and the position of its answer; see `parse_turn`."""
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
_THINK_ANSWER_TAGS = re.compile(r"\s*<think>(?P<thinking>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
MAX_NAME = 256
"""Maximum number of characters of the name of a function."""
FENCE = "\n```"
"""The end of the code block with the arguments of a call in the format of V3 and R1."""
OLD_NAME = re.compile(rf"([^\n]{{1,{MAX_NAME}}})\n```json\n")
_CALL = re.compile(
    rf"\s*{CALL_BEGIN}(?:"
    rf"function{CALL_SEP}(?P<old_name>(?:(?!{CALL_END})[^\n]){{1,{MAX_NAME}}})\n```json\n(?P<old>.*?)(?:\n```)?"
    rf"|(?!\s*{CALL_SEP})(?P<name>(?:(?!{CALL_SEP})[^\n]){{1,{MAX_NAME}}}){CALL_SEP}(?P<arguments>.*?)){CALL_END}",
    re.DOTALL,
)
_CUT_OFF_CALL = re.compile(
    rf"\s*{CALL_BEGIN}(?!\s*{CALL_SEP})(?P<name>(?:(?!{CALL_SEP})[^\n]){{1,{MAX_NAME}}}){CALL_SEP}(?P<arguments>.*)",
    re.DOTALL,
)


def parse_response(
    chat: ChatFormat, completion: Completion, thinking_format: ThinkingFormat = "think_answer_tags"
) -> Response:
    """Parse a completion of a prompt of `chat`. Training and evaluation use this function."""
    response = parse_sampled(chat.text_of(completion.token_ids), thinking_format, completion.finish_reason == "length")
    return replace(response, completion=completion)


def parse_sampled(text: str, thinking_format: ThinkingFormat, is_truncated: bool) -> Response:
    """Parse a sampled turn. A truncated turn is not well-formed; with "think_answer_tags" the closing tag decides."""
    response = parse_turn(text, thinking_format)
    is_cut_off = is_truncated and thinking_format != "think_answer_tags"
    return replace(response, is_truncated=is_truncated, is_well_formed=response.is_well_formed and not is_cut_off)


def parse_turn(text: str, thinking_format: ThinkingFormat = "think_answer_tags") -> Response:
    """Parse a complete turn. An answer inside unclosed thinking never counts.

    thinking_format: "think_answer_tags" (R1-Zero): one think block and one answer between tags, and nothing else;
    several answers count as none. "think_then_answer" (R1): one think block, then text of any length; the answer is the
    content of the last box, or all of the text if there is no box, or None if the last box is unfinished or one of
    several side by side.
    "flexible_extract": any format; the first rule of text/final_answer.py that matches finds the answer, and the turn
    is well-formed if there is one. "last_number": any format; the answer is the last number, as where a benchmark's
    protocol says so.
    """
    response = _PARSERS[thinking_format](text)
    return replace(response, tool_calls=parse_tool_calls(text)[1]) if CALLS_BEGIN in text else response


def _parse_think_answer_tags(text: str) -> Response:
    """Parse one think block and one answer block; an answer block after the last think block counts as an answer."""
    tagged = _THINK_ANSWER_TAGS.fullmatch(text)
    if tagged and all(text.count(tag) == 1 for tag in TAGS):
        thinking, answer = tagged["thinking"].strip(), tagged["answer"].strip()
        return Response(text=text, thinking=thinking, answer=answer, is_well_formed=True)
    before, _, after = text.rpartition(THINK_CLOSE)
    thinking = before.rpartition(THINK_OPEN)[2].strip()
    visible = after if THINK_OPEN not in after else ""
    if visible.count(ANSWER_OPEN) == visible.count(ANSWER_CLOSE) == 1:
        answer, closed, _ = visible.partition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)
        return Response(text=text, thinking=thinking, answer=answer.strip() if closed else None)
    return Response(text=text, thinking=thinking)


def _parse_think_then_answer(text: str) -> Response:
    """Parse one closed think block at the start, with text in it and after it."""
    before, _, rest = text.partition(THINK_OPEN)
    thinking, closed, answer = rest.partition(THINK_CLOSE)
    is_single = not before.strip() and bool(closed) and THINK_OPEN not in rest and THINK_CLOSE not in answer
    if not is_single:
        return Response(text=text, thinking=thinking.strip() if closed else rest.strip())
    visible_text, thinking = answer.strip(), thinking.strip()
    final = boxed_answer(visible_text) if boxes(visible_text) else visible_text or None
    return Response(text=text, thinking=thinking, answer=final, is_well_formed=bool(thinking and visible_text))


def _parse_any(extract: Callable[[str], tuple[str | None, str | None]], text: str) -> Response:
    """Parse a turn of any format: the text before the last closing tag is thinking, the answer is searched after it.

    Without a closing tag, the complete text is both the thinking and the text that is searched.
    """
    before, closed, visible_text = text.rpartition(THINK_CLOSE)
    if THINK_OPEN in visible_text:
        return Response(text=text, thinking=visible_text.rpartition(THINK_OPEN)[2].strip())
    answer, rule = extract(visible_text)
    thinking = before.rpartition(THINK_OPEN)[2].strip() if closed else visible_text.strip()
    return Response(text=text, thinking=thinking, answer=answer, is_well_formed=answer is not None, rule=rule)


def _extract_last_number(text: str) -> tuple[str | None, str | None]:
    """Return (the last number, the name of the rule); (None, None) without a number."""
    answer = last_number(text)
    return answer, None if answer is None else "last_number"


_PARSERS: dict[ThinkingFormat, Callable[[str], Response]] = {
    "think_answer_tags": _parse_think_answer_tags,
    "think_then_answer": _parse_think_then_answer,
    "flexible_extract": partial(_parse_any, flexible_extract),
    "last_number": partial(_parse_any, _extract_last_number),
}


def split_thinking(text: str) -> tuple[str | None, str]:
    """Split a turn into (content of its leading think block, the rest), both unchanged.

    An unclosed block extends to the end. The first part is None if there is no block; a lone closing tag, with which
    prompts without thinking start the turn, is dropped.
    """
    head = text.lstrip()
    if head.startswith(THINK_CLOSE):
        return None, head.removeprefix(THINK_CLOSE)
    if not head.startswith(THINK_OPEN):
        return None, text
    thinking, _, rest = head.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return thinking, rest


def parse_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Split a turn into (text before and after the calls, complete calls), in the format of V3 and R1 or of V3.1.

    Malformed markup and the text after it are text. A call that is cut off after its name is neither text nor a call.
    Source: chat templates of DeepSeek-V3-0324, R1-0528 and V3.1.
    """
    before, calls, after = split_tool_calls(text)
    return before + after, calls


def split_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...], str]:
    """Split a turn into (text before the calls, complete calls, text after them); see `parse_tool_calls`."""
    before, begin, rest = text.partition(CALLS_BEGIN)
    body, calls = rest, list[ToolCall]()
    while (found := _CALL.match(body)) is not None:
        is_old = found["name"] is None
        name, arguments = (found["old_name"], found["old"]) if is_old else (found["name"], found["arguments"])
        calls.append(ToolCall(name=name, arguments=arguments))
        body = body[found.end() :]
    cut_off = _CUT_OFF_CALL.match(body)
    if cut_off and not (cut_off["name"] == "function" and may_become_fenced(cut_off["arguments"])):
        return before, tuple(calls), ""
    if calls:
        body = re.sub(rf"^\s*{CALLS_END}", "", body)
        return before, tuple(calls), body if body.strip() else ""
    return before, (), begin + rest


def may_become_fenced(text: str) -> bool:
    """Whether the text after the separator of a call of "function" may become a name and a code block."""
    name, line_break, rest = text.partition("\n")
    is_open = not line_break or (bool(name) and "```json\n".startswith(rest) and rest != "```json\n")
    return is_open and len(name) <= MAX_NAME


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string starts that is complete first, the longest if there are several; None if there is none."""
    found = [(at + len(each), at) for each in stop if (at := text.find(each)) >= 0]
    return min(found)[1] if found else None


def stop_at(text: str, start: int, stop: Sequence[str]) -> str:
    """The stop string that `find_stop` found."""
    return min((each for each in stop if text.startswith(each, start)), key=len)


def parse_message(text: str, stop: Sequence[str] = ()) -> Message:
    """Parse an assistant turn into a Message with reasoning, content and tool calls.

    text: the result of ChatFormat.text_of. Line breaks around reasoning and content are stripped. stop: strings that
    end the turn where they occur in the content. text/stream.py gives the same while the text is sampled.
    """
    thinking, rest = split_thinking(text)
    before, calls, after = split_tool_calls(rest)
    before = before.lstrip("\n")
    after = after if before else after.lstrip("\n")
    end = find_stop(before, stop) if calls or not after else find_stop(before + after, stop)
    if end is not None:
        before, calls, after = (before + after)[:end], (), ""
    elif (end := find_stop(after, stop)) is not None:
        after = after[:end]
    reasoning = None if thinking is None else thinking.strip("\n")
    return Message(role="assistant", content=(before + after).strip("\n"), reasoning=reasoning, tool_calls=calls)
