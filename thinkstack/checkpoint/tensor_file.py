"""Safetensors files: reading with bounded memory, and writing one tensor at a time.

Format (huggingface.co/docs/safetensors): the length of the header (8 bytes, little-endian), a JSON header with type,
shape and offsets of each tensor, padded with spaces to a multiple of 8, then the tensors. The library validates a file
when it opens it. But it reads by mapping files, whose pages then count as process memory, and it writes all tensors of
a file at once. This module therefore reads each tensor into its own memory, and writes the header first. It uses the
order and padding of the library, so equal tensors give equal files.
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

from thinkstack.checkpoint.unreadable import unreadable_file
from thinkstack.types import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Supported dtypes by their names in a header, in the order in which the library writes them."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of several files as one table. No file stays open, so several threads may read."""

    def __init__(self, paths: Mapping[str, Path]):
        """paths: the file of each tensor. Raises ConfigError for a damaged file, a missing tensor or an unknown
        type."""
        self.paths = paths
        self.infos: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        headers = {path: read_header(path) for path in sorted(set(paths.values()))}
        for name, path in paths.items():
            begin, header = headers[path]
            if name not in header:
                raise ConfigError(f"{path} lacks the tensor {name}; fetch it again")
            kind = header[name]["dtype"]
            if kind not in DTYPES:
                raise ConfigError(
                    f"{path}: {name} has the type {kind}, which is not supported; convert it to bf16 first"
                )
            self.infos[name] = TensorInfo(DTYPES[kind], tuple(header[name]["shape"]))
            self._offsets[name] = begin + header[name]["data_offsets"][0]

    def path_of(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self.paths[name]

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype into new memory. Raises ConfigError for a disk error."""
        out = torch.empty(self.infos[name].shape, dtype=self.infos[name].dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Read into a contiguous CPU tensor of the stored dtype and shape. Raises ConfigError for a disk error."""
        assert (out.dtype, tuple(out.shape)) == self.infos[name], (name, out.dtype, out.shape)
        path = self.paths[name]
        left = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(self._offsets[name])
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise OSError("unexpected end of file")
                    left = left[count:]
        except OSError as error:
            raise ConfigError(f"{path} cannot be read at {name} ({error}); fetch it again") from error


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the offset of the first tensor of a safetensors file, and type, shape and offsets of each tensor.

    Raises ConfigError for a damaged file; the library compares the header with the file length.
    """
    try:
        safe_open(path, framework="pt")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error}); give a safetensors file") from error
    except (SafetensorError, ValueError) as error:
        raise unreadable_file(path, "a safetensors file", error) from error
    return 8 + size, {name: entry for name, entry in header.items() if name != "__metadata__"}


class TensorFileWriter:
    """Writes a file: the header first, then each tensor at its offset, in any order."""

    def __init__(self, file: BinaryIO, infos: Mapping[str, TensorInfo]):
        self.file, self.infos = file, infos
        self.remaining = set(infos)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.offsets, end, order = {}, 0, list(DTYPE_NAMES)
        for name in sorted(infos, key=lambda name: (order.index(infos[name].dtype), name)):
            self.offsets[name], start, end = end, end, end + infos[name].num_bytes
            dtype, shape = infos[name]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self.begin = file.tell()
        file.truncate(self.begin + end)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor at its offset. Dtype and shape must match the header."""
        assert (tensor.dtype, tuple(tensor.shape)) == self.infos[name], (name, tensor.dtype, tensor.shape)
        self.remaining.remove(name)
        self.file.seek(self.begin + self.offsets[name])
        self.file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def write_file(path: Path, infos: Mapping[str, TensorInfo]) -> Iterator[TensorFileWriter]:
    """Write a safetensors file tensor by tensor; every tensor must be written before the block ends."""
    with path.open("wb") as file:
        writer = TensorFileWriter(file, infos)
        yield writer
        assert not writer.remaining, writer.remaining
