"""Safetensors files: read with bounded memory, and written one tensor at a time.

The format is that of huggingface.co/docs/safetensors: the length of a header (8 bytes, little-endian), a JSON header
with type, shape and place of each tensor, padded with blanks to a multiple of 8, then the tensors. The library reads
it; its writer wants all tensors of a file at once, so the writer here lays the header out first. Order and padding are
the library's, so equal tensors are equal files.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thinkstack.types import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Types that a checkpoint may hold, by their names in a header; in the order that the library writes them in."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAPPED_BYTES = 2**26
"""A file is opened anew after so many bytes: what was read of it counts as this process's memory until it is closed."""


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Files:
    """The tensors of several files as one table; at most one file is open, and little of it mapped."""

    def __init__(self, paths: Mapping[str, Path]):
        """paths: the file of each tensor. Raises ConfigError for a damaged file, a missing tensor, an unknown type."""
        self.paths = paths
        self.entries: dict[str, Entry] = {}
        self._handle: Any = None
        self._opened: Path | None = None
        self._mapped = 0
        for name, path in sorted(paths.items(), key=lambda pair: pair[1]):
            try:
                header = self._open(path).get_slice(name)
                kind, shape = header.get_dtype(), tuple(header.get_shape())
            except SafetensorError as error:
                raise ConfigError(f"{path} lacks the tensor {name}; fetch it again") from error
            if kind not in DTYPES:
                raise ConfigError(
                    f"{path}: {name} is {kind}, which no supported checkpoint holds; convert it to bf16 first"
                )
            self.entries[name] = Entry(DTYPES[kind], shape)
        self._close()

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.paths[name]

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored. It maps the file: drop it soon, or copy it."""
        if self._mapped > MAPPED_BYTES:
            self._close()
        handle = self._open(self.paths[name])
        self._mapped += self.entries[name].num_bytes
        return handle.get_tensor(name)

    def _open(self, path: Path) -> Any:
        if path != self._opened:
            self._handle, self._opened, self._mapped = open_file(path), path, 0
        return self._handle

    def _close(self) -> None:
        self._handle, self._opened = None, None


def open_file(path: Path) -> "safe_open":
    """A safetensors file; its header is checked against its length. Raises ConfigError if they disagree."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is cut off or not a safetensors file ({error}); fetch it again") from error


class Writer:
    """A file that is being written: its header is there, and each tensor has its place."""

    def __init__(self, file: BinaryIO, entries: Mapping[str, Entry]):
        self.file, self.entries = file, entries
        self.left = set(entries)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.places, end, order = {}, 0, list(NAMES)
        for name in sorted(entries, key=lambda name: (order.index(entries[name].dtype), name)):
            self.places[name], start, end = end, end, end + entries[name].num_bytes
            dtype, shape = entries[name]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self.begin = file.tell()
        file.truncate(self.begin + end)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place. It must be what the header says."""
        assert (tensor.dtype, tuple(tensor.shape)) == self.entries[name], (name, tensor.dtype, tensor.shape)
        self.left.remove(name)
        self.file.seek(self.begin + self.places[name])
        self.file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def write_file(path: Path, entries: Mapping[str, Entry]) -> Iterator[Writer]:
    """Write a safetensors file tensor by tensor; all entries must have been put when the block ends."""
    with path.open("wb") as file:
        writer = Writer(file, entries)
        yield writer
        assert not writer.left, writer.left
        file.flush()
        os.fsync(file.fileno())
