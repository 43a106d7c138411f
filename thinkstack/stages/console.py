"""Terminal input and output of a chat: questions, commands, streamed answers."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

from thinkstack.config import did_you_mean
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.types import RequestError

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  # input() then edits the line and recalls earlier ones

NEW = "/new"
COMMANDS = {NEW: "start a new conversation", "/help": "list the commands", "/exit": "quit; an empty line quits too"}
"""Meaning of each command by its usage, as in "/save FILE" or "/model [NAME]"; those of every chat."""
ALIASES = {"/clear": NEW, "/quit": "/exit", "/bye": "/exit", "/?": "/help"}
STYLES = {"reasoning": "2", "content": "1", "note": "2", "warning": "33"}
"""ANSI codes of dim, bold, dim and yellow text."""
Write = Callable[[str, str], None]
"""Function (text, style) that prints a text; style: a key of `STYLES`, or "" for none."""
_COMMAND = re.compile(r"/[A-Za-z?][A-Za-z_-]*(?=\s|$)")
_UNPRINTABLE = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")
"""Control characters, with which the text of a model could change the terminal."""


class Command(str):
    """A line that is a command, such as "/save chat.json", and not a question."""

    @property
    def name(self) -> str:
        """The word with the slash."""
        return self.partition(" ")[0]

    @property
    def argument(self) -> str:
        """The text after the name."""
        return self.partition(" ")[2]


def write(text: str, style: str = "") -> None:
    """Print without a newline; on a terminal in color and without control characters."""
    if sys.stdout.isatty():
        code, text = STYLES.get(style), text.translate(_UNPRINTABLE)
        text = f"\033[{code}m{text}\033[0m" if code else text
    print(text, end="", flush=True)


def discard(text: str, style: str = "") -> None:
    """Print nothing: the output function of ranks other than 0."""


def styled(events: Iterable[StreamEvent]) -> Iterator[tuple[str, str]]:
    """The texts of a turn with their styles; reasoning and content are on lines of their own."""
    before = ""
    for event in events:
        if event.text:
            yield event.kind, event.text if before in ("", event.kind) else f"\n{event.text}"
            before = event.kind


def write_answer(parts: Iterable[tuple[str, str]], explain_empty: Callable[[], str], write: Write = write) -> str:
    """Print an answer as it is sampled and return the text.

    parts: pairs (style, text). explain_empty: returns the reason for an empty answer, which is printed then.
    """
    answer = ""
    try:
        for style, text in parts:
            write(text, style)
            answer += text
    except RequestError:
        write("\n" if answer else "", "")
        raise
    if not answer.strip():
        write(f"(empty answer: {explain_empty()})", "warning")
    write("\n", "")
    return answer


def read_question(prompt: str = "> ", commands: Mapping[str, str] = COMMANDS) -> str | None:
    """Read the next question or `Command`; returns None if the user quits. Handles other input itself.

    A line that starts with a blank is a question even if a slash follows.
    """
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        question = line.strip()
        if not question:
            return None
        if "\ufffd" in question or any("\ud800" <= character <= "\udfff" for character in question):
            write("the input is not UTF-8 text and was ignored; type it again\n", "warning")
            continue
        if not _COMMAND.match(line):
            return question
        try:
            command = parse_command(question, commands)
        except RequestError as error:
            write(f"{error}\n", "warning")
            continue
        if command.name == "/exit":
            return None
        if command.name != "/help":
            return command
        write("".join(f"{usage:<15} {meaning}\n" for usage, meaning in commands.items()), "note")
        write("Ctrl-C stops an answer; a question may start with a slash after a blank\n", "note")


def parse_command(line: str, commands: Mapping[str, str]) -> Command:
    """A line as one of `commands`. Raises RequestError for an unknown one, and for a missing or needless argument."""
    name, *rest = line.split(maxsplit=1)
    name, argument = name.lower().replace("_", "-"), "".join(rest)
    name, usages = ALIASES.get(name, name), {usage.split()[0]: usage for usage in commands}
    if name not in usages:
        raise RequestError(f"{name} is not a command{did_you_mean(name, usages)}")
    _, _, wanted = usages[name].partition(" ")
    if argument and not wanted:
        raise RequestError(f"{name} takes nothing after it; type the question on a line of its own")
    if not argument and wanted and not wanted.startswith("["):
        raise RequestError(f"{name} needs a name: {usages[name]}")
    return Command(f"{name} {argument}".strip())
