"""Atomic writes of folders, and the state of a training run as safetensors and JSON.

A folder is written under a temporary name, flushed to disk and renamed. Nothing is pickled.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thinkstack.types import ConfigError

MODEL, AVERAGE, STATE = "model", "model-ema", "state"

ADAPTER = "adapter"
"""Folder of the trained adapter, next to the merged model."""
TENSORS, NUMBERS = "state.safetensors", "state.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write `folder` atomically: call fill(temporary folder), then rename; an existing folder is replaced.

    A reader between the two renames of a replacement gets the older version through `current`.
    Raises ConfigError for a disk error; the new folder is then removed.
    """
    temporary, old = folder.with_name(folder.name + ".writing"), folder.with_name(folder.name + ".old")
    try:
        current(folder)
        for stale in (temporary, old):  # left by a process that was killed while writing or cleaning up
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def current(folder: Path) -> Path:
    """Return `folder`; restore its older version if a replacement was interrupted between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    return folder


def save_state(folder: Path, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write tensors (safetensors) and JSON values, atomically."""

    def fill(target: Path) -> None:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, target / TENSORS)
        (target / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")

    write_folder(folder, fill)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the state that `save_state` wrote, or None if there is none. Raises ConfigError for a damaged folder."""
    if not current(folder).exists():
        return None
    try:
        return load_file(folder / TENSORS), json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the state in {folder} is damaged ({error}); delete that folder to restart the stage"
        ) from error
