"""Train, evaluate, convert and chat with DeepSeek-style models. Start with `thinkstack demo`."""

# Heavy imports wait until a command needs them: `thinkstack --help` answers at once.

import contextlib
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import tyro

from thinkstack.cli import models, training
from thinkstack.config import did_you_mean
from thinkstack.types import ConfigError, Interrupted, RequestError, TrainingError

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": training.demo,
    "run": training.run,
    "sft": training.sft,
    "eval": models.evaluate,
    "recipes": training.recipes,
    "chat": models.chat,
    "generate": models.generate,
    "rollouts": training.rollouts,
    "replay": training.replay,
    "inspect": models.inspect,
    "convert": models.convert,
    "merge": models.merge,
}


def main() -> None:
    """Entry point of the command `thinkstack`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 must not end a conversation
    try:
        _parse(sys.argv[1:])()
    except (ConfigError, RequestError) as error:
        _end(2, str(error))
    except TrainingError as error:
        _end(1, str(error))
    except Interrupted:
        _end(130, "stopped; the same command goes on from here")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough: `thinkstack recipes demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _parse(words: list[str]) -> Callable[[], None]:
    """The command with its arguments, not called yet. Raises ConfigError for what cannot be read.

    tyro draws a box around what it refuses; here it becomes one line.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"the argument {word.encode(errors='backslashreplace').decode()} is not UTF-8 text")
    if words == ["--version"]:
        return _print_version
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise ConfigError(f"unknown command {words[0]!r}{did_you_mean(words[0], COMMANDS)}")
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            delayed = {name: _delayed(command) for name, command in COMMANDS.items()}
            found: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                delayed, prog="thinkstack", description=__doc__, args=words
            )
            return found
    except SystemExit as end:
        if not end.code:
            raise
    command = f" {words[0]}" if words and words[0] in COMMANDS else ""
    raise ConfigError(f"{_in_one_line(refused.getvalue())}; thinkstack{command} --help says more")


def _delayed(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function that takes the arguments of `command` and returns the call."""

    @functools.wraps(command)
    def make(*arguments: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **named)

    return make


def _in_one_line(box: str) -> str:
    """What a box of tyro says: its first paragraph, and the option that it proposes."""
    inside = [re.sub(r"^[|\u2502]|[|\u2502]$", "", line.strip()).strip() for line in box.splitlines()[1:]]
    lines = [re.sub(r"^[-+\u2500-\u257f]+$", "", line) for line in inside]  # rules become empty
    lines = lines[next((place for place, line in enumerate(lines) if line), 0) :]
    end = lines.index("") if "" in lines else len(lines)
    said, rest = lines[:end], lines[end:]
    proposed = [line.split()[0] for line in rest if line.startswith("--")]
    hint = f"; did you mean {proposed[0]}?" if proposed else ""
    return f"{' '.join(said).rstrip('.')}{hint}"


def _print_version() -> None:
    from importlib.metadata import version

    print(f"thinkstack {version('thinkstack')}")


def _end(code: int, reason: str) -> NoReturn:
    """Leave with one line on stderr: 1 for a failure, 2 for what a person asked wrongly, 130 for a stop."""
    print(f"thinkstack: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(code)
