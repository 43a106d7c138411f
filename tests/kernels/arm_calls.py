"""Calls of kernels, recorded with all memory that they point to, and replayed on Arm by arm_driver.cpp."""

import contextlib
import ctypes
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor

from thinkstack.kernels.cpu import build, calls, inference

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


address_of = ctypes.addressof


class Memory:
    """The memory that kernels get addresses of, kept alive so that no address is reused."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, object]] = {}
        """By address: the size in bytes, and the object."""

    def note(self, at: int, size: int, seq_index: object) -> int:
        self.held[at] = size, seq_index
        return at

    def note_tensor(self, x: Tensor) -> None:
        quantization = x.untyped_storage()
        self.note(quantization.data_ptr(), quantization.nbytes(), quantization)

    def around(self, address: int) -> int:
        """The start of the memory that contains this address."""
        found = [at for at, (size, _) in self.held.items() if at <= address < at + size]
        assert len(found) == 1, f"{len(found)} pieces of memory hold what a kernel is given"
        return found[0]


@dataclass
class Call:
    """A kernel's arguments. Addresses are replaced by 0 and listed separately."""

    name: str
    integers: list[int] = field(default_factory=list)
    reals: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    """Addresses of the memory that the arguments point to, directly or through other blocks."""
    addresses: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Block (-1: the arguments) and offset of an address; block and offset that it points to."""
    before: list[bytes] = field(default_factory=list)
    """Contents of the blocks."""
    after: list[bytes] = field(default_factory=list)


def described(name: str, arguments: tuple, memory: Memory) -> Call:
    """A call of a kernel with the current contents of its blocks."""
    call = Call(name)

    def lead(block: int, offset: int, address: int | None) -> None:
        if not address:
            return
        start = memory.around(address)
        if start not in call.blocks:
            call.blocks.append(start)
            follow(len(call.blocks) - 1, memory.held[start][1])
        call.addresses.append((block, offset, call.blocks.index(start), address - start))

    def follow(block: int, seq_index: object) -> None:
        for n, part in enumerate(seq_index if isinstance(seq_index, ctypes.Array) else [seq_index]):
            for key, kind in getattr(part, "_fields_", ()):
                if kind is ctypes.c_void_p:
                    lead(block, n * ctypes.sizeof(part) + getattr(type(part), key).offset, getattr(part, key))

    for argument in arguments:
        if isinstance(argument, ctypes.c_double):
            call.reals.append(argument.value)
            continue
        call.integers.append(argument.value if isinstance(argument, ctypes.c_int64) else 0)
        offset = 8 * (len(call.integers) - 1)
        if isinstance(argument, ctypes.c_void_p):
            lead(-1, offset, argument.value)
        elif not isinstance(argument, ctypes.c_int64):
            made = argument._obj  # of byref
            lead(-1, offset, memory.note(address_of(made), ctypes.sizeof(made), made))
    call.before = contents(call, memory)
    return call


def contents(call: Call, memory: Memory) -> list[bytes]:
    return [ctypes.string_at(at, memory.held[at][0]) for at in call.blocks]


class Library:
    """Replaces the compiled kernels: each call goes to a function of its name, its arguments and the memory."""

    def __init__(self, memory: Memory, handle: Callable[[str, tuple, Memory], None]):
        self.memory, self.handle = memory, handle

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.handle(name, arguments, self.memory)


@contextlib.contextmanager
def redirected(handle: Callable[[str, tuple, Memory], None]) -> Iterator[None]:
    """Within the block every call of a kernel goes to `handle`."""
    memory, data_ptr, place = Memory(), Tensor.data_ptr, inference.array_address

    def noted_tensor(x: Tensor) -> int:
        memory.note_tensor(x)
        return data_ptr(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "binary", lambda: Library(memory, handle))
        patch.setattr(Tensor, "data_ptr", noted_tensor)
        patch.setattr(ctypes, "addressof", lambda x: memory.note(address_of(x), ctypes.sizeof(x), x))
        patch.setattr(inference, "array_address", lambda x: memory.note(place(x), x.nbytes, x))
        yield


def padded(size: int) -> int:
    return (size + 7) // 8 * 8


def serialized(call: Call) -> bytes:
    """A call in the format of arm_driver.cpp."""
    name = call.name.encode().ljust(padded(len(call.name)), b"\0")
    sizes = struct.pack("<qq", len(call.integers), len(call.reals))
    numbers = struct.pack(f"<{len(call.integers)}q{len(call.reals)}d", *call.integers, *call.reals)
    parts = [struct.pack("<q", len(name)), name, sizes, numbers, struct.pack("<q", len(call.before))]
    for block in call.before:
        parts += [struct.pack("<q", padded(len(block))), block.ljust(padded(len(block)), b"\0")]
    places = [number for address in call.addresses for number in address]
    return b"".join(parts) + struct.pack(f"<q{len(places)}q", len(call.addresses), *places)


def compile_program(folder: Path, names: list[str]) -> Path:
    """arm_driver.cpp with the kernels of these names."""
    (folder / "kernels.inc").write_text("".join(f"KERNEL({name})\n" for name in names))
    sources = [*(build.PACKAGE / name for name in build.SOURCES), Path(__file__).with_name("arm_driver.cpp")]
    objects = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, made: str) -> None:
        build.call([COMPILER, *build.INCLUDE, *build.FLAGS, "-I", str(folder), "-c", str(source), "-o", made])

    with ThreadPoolExecutor(build.usable_cores()) as pool:
        list(pool.map(compile_one, sources, objects))
    build.call([COMPILER, "-static", *objects, "-o", str(folder / "program")])
    return folder / "program"


def run_on_arm(every: list[Call], folder: Path) -> None:
    """Make these calls on Arm and store the contents of memory afterwards in each."""
    program = compile_program(folder, sorted({call.name for call in every}))
    (folder / "calls").write_bytes(struct.pack("<q", len(every)) + b"".join(map(serialized, every)))
    command = [EMULATOR, str(program), str(folder / "calls"), str(folder / "results")]
    subprocess.run(command, check=True, timeout=3600)  # pytest shows its error output
    with (folder / "results").open("rb") as file:
        for call in every:
            call.after = [file.read(padded(len(block)))[: len(block)] for block in call.before]
        assert not file.read(1)
