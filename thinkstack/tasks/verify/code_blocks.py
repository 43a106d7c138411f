"""Finds the program in what a model wrote."""

import re

from thinkstack.text.parse import split_thinking
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import Response

_FENCE = re.compile(r"^[ \t]*(?P<marks>`{3,}|~{3,})[ \t]*(?P<language>[^\n`]*)$", re.MULTILINE)
CONTINUATION_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```", "\nassert ")
"""Where the continuation of a function ends: at the next statement of the module (Codex paper, arXiv:2107.03374)."""


def visible_text(response: Response) -> str:
    """Return the turn without its thinking; what follows an unclosed opening tag is thinking."""
    thinking, text = split_thinking(response.text)
    if thinking is None:
        text = text.rpartition(THINK_CLOSE)[2]
    return text.partition(THINK_OPEN)[0]


def last_code_block(text: str) -> str | None:
    """Return the content of the last complete fenced block; None if there is none.

    A block ends at a line that consists of the marks which opened it; a block without an end is not complete.
    """
    found, opening = None, None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence["marks"].startswith(opening["marks"]) and not fence["language"].strip():
            found, opening = text[opening.end() + 1 : fence.start()], None
    return found


def continuation(text: str) -> str:
    """Return the text up to the first statement outside the function that it continues."""
    ends = [place for stop in CONTINUATION_STOPS if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
