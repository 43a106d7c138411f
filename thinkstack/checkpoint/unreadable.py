"""Error messages for weight files with unexpected content; the messages for text and JSON are in files.py."""

from pathlib import Path

from thinkstack.files import IS_LFS_POINTER, LFS_POINTER
from thinkstack.types import ConfigError


def unreadable_file(path: Path, kind: str, error: object) -> ConfigError:
    """Return the error for a `path` that cannot be read as `kind` ("a GGUF file"). error: the message of the reader."""
    try:
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError:
        return ConfigError(f"cannot read {path} ({error}); give {kind}")
    if begin.startswith(LFS_POINTER):
        return ConfigError(f"{path} {IS_LFS_POINTER}")
    if not begin:
        return ConfigError(f"{path} is empty; fetch it again")
    if begin.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return ConfigError(
            f"{path} is a web page, not {kind}; fetch the file itself (on the hub, its URL has /resolve/)"
        )
    return ConfigError(f"{path} is truncated or not {kind} ({error}); fetch it again")
