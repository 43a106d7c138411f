"""What is to be said of a file of weights that is not what its name promises; text and JSON are files.py's."""

from pathlib import Path

from thinkstack.files import IS_LFS_POINTER, LFS_POINTER
from thinkstack.types import ConfigError


def unreadable(path: Path, kind: str, error: object) -> ConfigError:
    """The error to raise where `path` cannot be read as `kind` ("a GGUF file"). error: what its reader says."""
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
        return ConfigError(f"{path} is a page of the web, not {kind}; fetch the file itself (hub: /resolve/)")
    return ConfigError(f"{path} is cut off or not {kind} ({error}); fetch it again")
