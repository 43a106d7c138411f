"""Terminal input and output of a chat: questions, commands, streamed answers."""

import sys
from collections.abc import Callable, Iterable, Iterator

from thinkstack.text.stream_parser import StreamEvent

NEW = "/new"
EXIT = ("/exit", "/quit")
HELP = "/help"
COMMANDS = "/new starts a new conversation, /exit or an empty line quits, Ctrl-C stops an answer"
STYLES = {"reasoning": "2", "content": "1", "note": "2", "warning": "33"}
"""ANSI codes of dim, bold, dim and yellow text."""
Write = Callable[[str, str], None]
"""Function (text, style) that prints a text; style: a key of `STYLES`, or "" for none."""


def write(text: str, style: str = "") -> None:
    """Print without a newline, in color on a terminal."""
    code = STYLES.get(style) if sys.stdout.isatty() else None
    print(f"\033[{code}m{text}\033[0m" if code else text, end="", flush=True)


def discard(text: str, style: str = "") -> None:
    """Print nothing: the output function of ranks other than 0."""


def styled(events: Iterable[StreamEvent]) -> Iterator[tuple[str, str]]:
    """The texts of a turn with their styles; reasoning and content are on lines of their own."""
    before = ""
    for event in events:
        if event.text:
            yield event.kind, event.text if before in ("", event.kind) else f"\n{event.text}"
            before = event.kind


def write_answer(parts: Iterable[tuple[str, str]], end_token: Callable[[], str], write: Write = write) -> str:
    """Print an answer as it is sampled and return the text; for an empty answer, print the token that ended it.

    parts: pairs (style, text).
    """
    answer = ""
    for style, text in parts:
        write(text, style)
        answer += text
    if not answer.strip():
        write(f"(empty answer: the first token was {end_token()})", "warning")
    write("\n", "")
    return answer


def read_question(prompt: str = "> ") -> str | None:
    """Read the next question; returns NEW for a new conversation, None if the user quits. Handles other input
    itself."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if line in ("", *EXIT):
            return None
        if line in (NEW, "/clear"):
            return NEW
        if line == HELP:
            write(f"{COMMANDS}\n", "note")
        elif line.startswith("/") and line[1:].isalpha():
            write(f"{line} is not a command: {COMMANDS}\n", "warning")
        elif "\ufffd" in line or any("\ud800" <= character <= "\udfff" for character in line):
            write("the input is not UTF-8 text and was ignored; type it again\n", "warning")
        else:
            return line
