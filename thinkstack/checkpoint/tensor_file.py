"""Safetensors files: read with bounded memory, and written one tensor at a time.

The format is that of huggingface.co/docs/safetensors: the length of a header (8 bytes, little-endian), a JSON header
with type, shape and place of each tensor, padded with blanks to a multiple of 8, then the tensors. The library checks a
file when it is opened. It reads by mapping files, whose pages then count as the process's memory, and writes only all
tensors of a file at once; so tensors are read into memory of their own here, and the writer lays the header out first.
Order and padding are the library's, so equal tensors are equal files.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thinkstack.checkpoint.unreadable import unreadable
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


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Files:
    """The tensors of several files as one table. Nothing is kept open, so threads may read at once."""

    def __init__(self, paths: Mapping[str, Path]):
        """paths: the file of each tensor. Raises ConfigError for a damaged file, a missing tensor, an unknown type."""
        self.paths = paths
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, int] = {}
        headers = {path: read_header(path) for path in sorted(set(paths.values()))}
        for name, path in paths.items():
            begin, header = headers[path]
            if name not in header:
                raise ConfigError(f"{path} lacks the tensor {name}; fetch it again")
            kind = header[name]["dtype"]
            if kind not in DTYPES:
                raise ConfigError(
                    f"{path}: {name} is {kind}, which no supported checkpoint holds; convert it to bf16 first"
                )
            self.entries[name] = Entry(DTYPES[kind], tuple(header[name]["shape"]))
            self._places[name] = begin + header[name]["data_offsets"][0]

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.paths[name]

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, in memory of its own. Raises ConfigError if the disk refuses."""
        out = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill a contiguous CPU tensor of the stored type and shape. Raises ConfigError if the disk refuses."""
        assert (out.dtype, tuple(out.shape)) == self.entries[name], (name, out.dtype, out.shape)
        path = self.paths[name]
        left = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(self._places[name])
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise OSError("it ends too early")
                    left = left[count:]
        except OSError as error:
            raise ConfigError(f"{path} cannot be read at {name} ({error}); fetch it again") from error


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and type, shape and place of each. Raises ConfigError for a
    damaged file; the library compares header and length.
    """
    try:
        safe_open(path, framework="pt")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error}); give a safetensors file") from error
    except (SafetensorError, ValueError) as error:
        raise unreadable(path, "a safetensors file", error) from error
    return 8 + size, {name: entry for name, entry in header.items() if name != "__metadata__"}


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
