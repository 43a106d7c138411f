"""Folders that are either whole or absent, and the state of a training run as safetensors and JSON.

A folder is filled under a temporary name, flushed to disk and renamed. Nothing is ever pickled.
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
"""Beside the merged model, where adapters were trained."""
TENSORS, NUMBERS = "state.safetensors", "state.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` by calling fill(temporary folder) and renaming; an older folder of that name is replaced.

    A reader that comes between the two renames of a replacement finds the older one through `current`.
    Raises ConfigError if the disk refuses; then nothing of the new folder is left.
    """
    fresh, old = folder.with_name(folder.name + ".writing"), folder.with_name(folder.name + ".old")
    try:
        current(folder)
        for left in (fresh, old):  # by a process that was killed while it wrote or cleaned up
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir(parents=True)
        fill(fresh)
        for path in (*fresh.rglob("*"), fresh):
            flush(path)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def current(folder: Path) -> Path:
    """`folder`, put back from its older version if a replacement was interrupted between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    return folder


def save_state(folder: Path, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write tensors (safetensors) and everything that JSON holds, atomically."""

    def fill(target: Path) -> None:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, target / TENSORS)
        (target / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")

    write_folder(folder, fill)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_state` wrote, or None if it never did. Raises ConfigError for a damaged folder."""
    if not current(folder).exists():
        return None
    try:
        return load_file(folder / TENSORS), json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the state in {folder} is damaged ({error}); delete that folder to begin the stage again"
        ) from error
