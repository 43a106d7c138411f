"""What is to be said of a file that is not what its name promises."""

from pathlib import Path

from thinkstack.types import ConfigError

LFS = b"version https://git-lfs.github.com/spec/"
"""How a pointer of Git LFS begins, which lies in a clone in place of a file that was not fetched."""


def unreadable(path: Path, kind: str, error: object) -> ConfigError:
    """The error to raise where `path` cannot be read as `kind` ("a GGUF file"). error: what its reader says."""
    return substitute(path) or ConfigError(f"{path} is cut off or not {kind} ({error}); fetch it again")


def substitute(path: Path) -> ConfigError | None:
    """What stands in a file's place: a pointer of Git LFS, a page of the web, or nothing; None if it is none of these
    or there is no such file.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError:
        return None
    if begin.startswith(LFS):
        return ConfigError(
            f"{path} is a pointer of Git LFS, not the file itself; fetch it there: git lfs install && git lfs pull"
        )
    if not begin:
        return ConfigError(f"{path} is empty; fetch it again")
    if begin.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return ConfigError(f"{path} is a page of the web, not the file itself; fetch the raw file (hub: /resolve/)")
    return None
