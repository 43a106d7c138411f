"""What an assistant's turn contains: thinking, answer, and whether it keeps the format."""

import re
from dataclasses import dataclass
from typing import Literal

from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN

Form = Literal["tagged", "open"]
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
_FORM = re.compile(r"\s*<think>(?P<thinking>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """A parsed assistant turn."""

    thinking: str
    """What stands in the think block; empty if there is none."""
    answer: str | None
    """What stands in the one answer block after the thinking; None if there is none or more than one."""
    is_well_formed: bool
    """One think block, then one answer block, and nothing else."""


def parse_turn(text: str, form: Form = "tagged") -> Turn:
    """Parse a whole turn. An answer inside unclosed thinking does not count, nor does one of several.

    form: "tagged" is R1-Zero's, with the answer between tags; "open" is R1's, where all behind the thinking is the
    answer.
    """
    if form == "open":
        return _parse_open(text)
    tagged = _FORM.fullmatch(text)
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


def _parse_open(text: str) -> Turn:
    """One think block at the beginning, closed, with something in it and something behind it."""
    before, _, rest = text.partition(THINK_OPEN)
    thinking, closed, answer = rest.partition(THINK_CLOSE)
    is_single = not before.strip() and bool(closed) and THINK_OPEN not in rest and THINK_CLOSE not in answer
    if not is_single:
        return Turn(thinking.strip() if closed else rest.strip(), None, False)
    answer, thinking = answer.strip(), thinking.strip()
    return Turn(thinking, answer or None, bool(thinking and answer))
