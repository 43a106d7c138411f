"""What is to be said of a file of weights that is not what its name promises; text and JSON are files.py's."""

from pathlib import Path

from thinkstack.types import ConfigError

LFS = b"version https://git-lfs"
"""How a pointer of Git LFS begins, which lies in a clone in place of a file that was not fetched."""


def unreadable(path: Path, kind: str, error: object) -> ConfigError:
    """The error to raise where `path` cannot be read as `kind` ("a GGUF file"). error: what its reader says."""
    try:
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError:
        return ConfigError(f"cannot read {path} ({error}); give {kind}")
    if begin.startswith(LFS):
        return ConfigError(f"{path} is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`")
    if not begin:
        return ConfigError(f"{path} is empty; fetch it again")
    if begin.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return ConfigError(f"{path} is a page of the web, not {kind}; fetch the file itself (hub: /resolve/)")
    return ConfigError(f"{path} is cut off or not {kind} ({error}); fetch it again")
