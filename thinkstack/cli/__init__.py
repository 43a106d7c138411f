"""Train, evaluate, convert and chat with DeepSeek-style models. Start with `thinkstack demo`."""

# Heavy imports are inside the commands, so that `thinkstack --help` is fast.

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

from thinkstack.cli import accounts, evaluation, judged, models, serving, training
from thinkstack.config import did_you_mean
from thinkstack.server.errors import DatabaseUnavailable
from thinkstack.types import ConfigError, Interrupted, RequestError, TrainingError

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": training.demo,
    "run": training.run,
    "sft": training.sft,
    "eval": evaluation.evaluate,
    "recipes": training.recipes,
    "chat": models.chat,
    "generate": models.generate,
    "serve": serving.serve,
    "rollouts": training.rollouts,
    "replay": training.replay,
    "inspect": models.inspect,
    "convert": models.convert,
    "merge": models.merge,
    "usage": accounts.usage,
}
EVALUATIONS: dict[str, Callable[..., None]] = {
    "regrade": evaluation.regrade,
    "compare": evaluation.compare,
    "sensitivity": evaluation.sensitivity,
    "contamination": evaluation.contamination,
    "bits-per-byte": evaluation.bits_per_byte,
    "export": evaluation.export,
    "import": evaluation.import_log,
    "swe-bench": judged.swe_bench,
    "codeforces": judged.codeforces,
}
"""Commands that begin with `eval`, which is also a command by itself; a model of such a name is given as ./NAME."""
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "accounts": ("Users of a server: add, list, change, disable.", accounts.ACCOUNTS),
    "keys": ("API keys of a server: new, list, revoke.", accounts.KEYS),
}
"""Commands of two words: the meaning of the first, and the functions for the second."""


def main() -> None:
    """Entry point of the command `thinkstack`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # input that is not UTF-8 must not end a conversation
    try:
        _parse(sys.argv[1:])()
    except (ConfigError, RequestError) as error:
        _exit(2, str(error))
    except (TrainingError, DatabaseUnavailable) as error:
        _exit(1, str(error))
    except Interrupted:
        _exit(130, "stopped; run the same command again to resume")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe: `thinkstack recipes demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _parse(words: list[str]) -> Callable[[], None]:
    """Parse the arguments and return the command as a function. Raises ConfigError for arguments that cannot be parsed.

    tyro prints errors in a box; the ConfigError has the message on one line.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"the argument {word.encode(errors='backslashreplace').decode()} is not UTF-8 text")
    if words == ["--version"]:
        return _print_version
    if words[:1] == ["eval"] and words[1:2] and words[1] in EVALUATIONS:
        return _parse_in(
            "thinkstack eval",
            "Work on stored completions, and further measurements of a model.",
            EVALUATIONS,
            words[1:],
        )
    commands = COMMANDS | {name: _group(meaning) for name, (meaning, _) in GROUPS.items()}
    if words and words[0] in GROUPS:
        return _parse_in(f"thinkstack {words[0]}", *GROUPS[words[0]], words[1:])
    return _parse_in("thinkstack", str(__doc__), commands, words)


def _parse_in(
    program: str, meaning: str, commands: dict[str, Callable[..., None]], words: list[str]
) -> Callable[[], None]:
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise ConfigError(f"unknown command {words[0]!r}{did_you_mean(words[0], commands)}")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            delayed = {name: _delayed(command) for name, command in commands.items()}
            call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                delayed, prog=program, description=meaning, args=words
            )
            return call
    except SystemExit as error:
        if not error.code:
            raise
    command = f" {words[0]}" if words and words[0] in commands else ""
    raise ConfigError(f"{_in_one_line(stderr.getvalue())}; see {program}{command} --help")


def _group(meaning: str) -> Callable[..., None]:
    """A command that only has a line in the help: `_parse` reads the words after it."""

    def group() -> None:
        pass

    group.__doc__ = meaning
    return group


def _delayed(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function that takes the arguments of `command` and returns a call without arguments."""

    @functools.wraps(command)
    def make(*arguments: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **named)

    return make


def _in_one_line(box: str) -> str:
    """The text of an error box of tyro: its first paragraph and the suggested option."""
    inside = [re.sub(r"^[|\u2502]|[|\u2502]$", "", line.strip()).strip() for line in box.splitlines()[1:]]
    lines = [re.sub(r"^[-+\u2500-\u257f]+$", "", line) for line in inside]  # horizontal rules become empty
    lines = lines[next((index for index, line in enumerate(lines) if line), 0) :]
    end = lines.index("") if "" in lines else len(lines)
    message, rest = lines[:end], lines[end:]
    suggested = [line.split()[0] for line in rest if line.startswith("--")]
    hint = f"; did you mean {suggested[0]}?" if suggested else ""
    return f"{' '.join(message).rstrip('.')}{hint}"


def _print_version() -> None:
    from importlib.metadata import version

    print(f"thinkstack {version('thinkstack')}")


def _exit(code: int, reason: str) -> NoReturn:
    """Exit with one line on stderr. code: 1 for a failure, 2 for a user error, 130 for a stop."""
    print(f"thinkstack: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(code)
