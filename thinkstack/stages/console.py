"""A conversation at the terminal: lines read, commands understood, answers printed as they come."""

import sys
from collections.abc import Callable, Iterable

NEW = "/new"
EXIT = ("/exit", "/quit")
HELP = "/help"
COMMANDS = "/new starts a new conversation, /exit or an empty line quits, Ctrl-C stops an answer"
STYLES = {"thinking": "2", "answer": "1", "note": "2", "warning": "33"}
"""Terminal codes: dim, bold, dim, yellow."""
Say = Callable[[str, str], None]
"""Prints a text in a style, of `STYLES` or none."""


def say(text: str, style: str = "") -> None:
    """Print without a line end, in color where a terminal shows it."""
    code = STYLES.get(style) if sys.stdout.isatty() else None
    print(f"\033[{code}m{text}\033[0m" if code else text, end="", flush=True)


def say_nothing(text: str, style: str = "") -> None:
    """What the other ranks say."""


def say_answer(pieces: Iterable[tuple[str, str]], end_token: Callable[[], str], say: Say = say) -> str:
    """Print an answer as it is sampled, (style, text) by (style, text); of an empty one, which token ended it.

    Returns its text.
    """
    whole = ""
    for style, text in pieces:
        say(text, style)
        whole += text
    if not whole.strip():
        say(f"(empty: the model ended at once, with {end_token()})", "warning")
    say("\n", "")
    return whole


def read_question(prompt: str = "> ") -> str | None:
    """The next question, or NEW; None where the person wants to quit. Other commands are answered here."""
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
            say(f"{COMMANDS}\n", "note")
        elif line.startswith("/") and line[1:].isalpha():
            say(f"{line} is not a command: {COMMANDS}\n", "warning")
        elif "\ufffd" in line or any("\ud800" <= character <= "\udfff" for character in line):
            say("this line is not UTF-8 text and was left out; type it again\n", "warning")
        else:
            return line
