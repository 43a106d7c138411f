"""GGUF files: header, metadata, and tensors that are read one at a time and dequantized.

The header is parsed here and not by the package gguf: the package's reader does not check a damaged array length
against the file size, and it creates an object per string, which takes seconds for a vocabulary. Dequantization uses
the package. Source of the format: llama.cpp's ggml repository, docs/formats/gguf.md (version 3; version 2 has the same
layout).
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy
import torch

from thinkstack.checkpoint.unreadable import unreadable_file
from thinkstack.types import ConfigError

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBER_FORMATS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
"""struct formats of the numbers in a header, by type code."""
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"
MAX_DIMS = 4
DEQUANTIZE_CHUNK = 2**20
"""Number of values that are dequantized at once."""
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""ggml types that torch has, with their dtypes."""

T = TypeVar("T")


def is_gguf(path: Path) -> bool:
    """Whether a path has the suffix .gguf, in upper or lower case."""
    return path.suffix.lower() == ".gguf"


def require_gguf() -> None:
    """Raise ConfigError if the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("GGUF needs the package gguf; install it with: pip install gguf") from error


class GGUFTensorInfo(NamedTuple):
    """Type, shape and position of a tensor in a file."""

    kind: str
    """ggml type: F32, Q8_0, ..."""
    shape: tuple[int, ...]
    """Shape in torch's order: the innermost dimension last."""
    begin: int
    """Offset in the file, in bytes."""
    row_bytes: int
    """Bytes of one innermost row."""

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * math.prod(self.shape[:-1])


class _HeaderReader:
    """Sequential reader of a header; every read is checked against the end of the file."""

    def __init__(self, data: memoryview):
        self.data, self.position = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.position:
            raise ValueError(f"{size} bytes from offset {self.position} are past the end")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, code: int) -> Any:
        if code not in NUMBER_FORMATS:
            raise ValueError(f"type {code} at {self.position} is unknown")
        return struct.unpack(NUMBER_FORMATS[code], self.take(struct.calcsize(NUMBER_FORMATS[code])))[0]

    def text(self) -> str:
        return bytes(self.take(self.number(10))).decode("utf-8")

    def value(self) -> Any:
        """Read a value: a number, bytes (a string), a numpy array of numbers, or a list of bytes (strings)."""
        code = self.number(4)
        if code == STRING:
            return bytes(self.take(self.number(10)))
        if code != ARRAY:
            return self.number(code)
        code, count = self.number(4), self.number(10)
        if code == STRING:
            if count > (len(self.data) - self.position) // 8:
                raise ValueError(f"{count} strings from offset {self.position} are past the end")
            return [bytes(self.take(self.number(10))) for _ in range(count)]
        if code not in NUMBER_FORMATS:
            raise ValueError(f"array type {code} at {self.position} is unknown")
        return numpy.frombuffer(self.take(count * struct.calcsize(NUMBER_FORMATS[code])), NUMBER_FORMATS[code]).copy()


class Metadata:
    """Typed access to the metadata of a file; every error message names the file."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        """values: from `_HeaderReader.value`, or the values that will be written."""
        self.path, self.values = path, values

    def find(self, key: str, kind: type[T]) -> T | None:
        """Return the metadata value of `key`, or None. kind: list for an array. Raises ConfigError for another type."""
        value = self.values.get(key)
        try:
            if isinstance(value, bytes):
                value = value.decode("utf-8")
            elif isinstance(value, numpy.ndarray):
                value = value.tolist()
            elif isinstance(value, list):
                value = [item.decode("utf-8") if isinstance(item, bytes) else item for item in value]
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path}: {key} cannot be read ({error}); fetch it again") from error
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise ConfigError(f"{self.path}: {key}={value!r:.80} has an unexpected type; fetch another conversion")

    def get(self, key: str, kind: type[T]) -> T:
        """Return the metadata value of `key`. Raises ConfigError if it is missing or of another type."""
        value = self.find(key, kind)
        if value is None:
            raise ConfigError(f"{self.path} has no {key}, so it is incomplete; fetch another conversion")
        return value


class GGUFFile:
    """A file with a header that has been checked against the file length; every error message names the file."""

    def __init__(self, path: Path):
        require_gguf()
        self.path = path
        try:
            size = path.stat().st_size
            self._read(_HeaderReader(memoryview(numpy.memmap(path, mode="r") if size else b"")))  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, OverflowError) as error:
            raise unreadable_file(path, "a GGUF file", error) from error

    def _read(self, header: _HeaderReader) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if bytes(header.take(4)) != MAGIC:
            raise ValueError("it does not begin with the magic bytes GGUF")
        version = header.number(4)
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not supported; known: 2 and 3, little-endian")
        num_tensors, num_values = header.number(10), header.number(10)
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = header.text()
            if key in values:
                raise ValueError(f"the key {key} occurs twice")
            values[key] = header.value()
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name, num_dims = header.text(), header.number(4)
            if name in found or not 1 <= num_dims <= MAX_DIMS:
                raise ValueError(f"tensor {name} occurs twice or has {num_dims} dimensions")
            dims = tuple(header.number(10) for _ in range(num_dims))
            found[name] = header.number(4), dims[::-1], header.number(10)
        self.meta = Metadata(self.path, values)
        align = values.get(ALIGNMENT, 32)
        if not isinstance(align, int) or align < 8 or align & (align - 1):
            raise ValueError(f"{ALIGNMENT}={align!r} is not a power of two >= 8")
        begin = -(-header.position // align) * align
        self.tensors: dict[str, GGUFTensorInfo] = {}
        for name, (code, shape, offset) in found.items():
            kind = GGMLQuantizationType(code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block or offset % align:
                raise ValueError(
                    f"tensor {name} has shape {shape} and offset {offset}, which the type {kind.name} does not allow"
                )
            self.tensors[name] = GGUFTensorInfo(kind.name, shape, begin + offset, shape[-1] // block * block_bytes)
        self._check_offsets(len(header.data))

    def _check_offsets(self, size: int) -> None:
        end = 0
        for name, info in sorted(self.tensors.items(), key=lambda pair: pair[1].begin):
            if info.begin < end or info.begin + info.num_bytes > size:
                raise ValueError(f"tensor {name} overlaps another or is past the end")
            end = info.begin + info.num_bytes

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Read a tensor, or the matrix `index` of a stack: in its stored dtype if torch has it, else dequantized to
        fp32.

        Raises ConfigError for a quantization that gguf cannot dequantize.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        shape, begin, size = info.shape, info.begin, info.num_bytes
        if index is not None:
            size //= shape[0]
            shape, begin = shape[1:], begin + index * size
        with self.path.open("rb") as file:
            file.seek(begin)
            data = bytearray(file.read(size))
        if len(data) < size:
            raise ConfigError(f"{self.path} became shorter while it was read; fetch it again")
        if info.kind in TORCH_DTYPES:
            return torch.frombuffer(data, dtype=TORCH_DTYPES[info.kind]).view(shape)
        out = torch.empty(math.prod(shape))
        block_bytes = info.row_bytes * DEQUANTIZE_CHUNK // info.shape[-1]
        try:
            for number, start in enumerate(range(0, size, block_bytes)):
                part = numpy.frombuffer(memoryview(data)[start : start + block_bytes], numpy.uint8)
                values = dequantize(part[None], GGMLQuantizationType[info.kind])[0]
                out[number * DEQUANTIZE_CHUNK : number * DEQUANTIZE_CHUNK + values.size] = torch.from_numpy(values)
        except NotImplementedError as error:
            raise ConfigError(
                f"{self.path}: {name} is quantized as {info.kind}, which gguf cannot dequantize; use Q8_0 or F16"
            ) from error
        return out.view(shape)
