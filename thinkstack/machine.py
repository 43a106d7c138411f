"""The machine a program runs on: settings that make training fast, and its name for reports."""

import contextlib
import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thinkstack.types import ConfigError

if TYPE_CHECKING:
    import torch


def prepare_machine(threads: int = 0) -> None:
    """Set torch's threads (0: one per usable core) and keep freed memory in the process.

    By default glibc gives large blocks back to the system after every use; fetching them again as fresh zeroed pages
    takes up to half of a training step on a CPU.
    """
    import torch

    torch.set_num_threads(threads or usable_cores())
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        # larger blocks, such as a big vocabulary's, do go back: glibc's heap does not refill the holes that they leave
        libc.mallopt(mmap_threshold, 8 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 64 << 20)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> "torch.device":
    """The device called "auto" (CUDA where there is one, else the CPU), "cpu" or "cuda".

    Raises ConfigError for "cuda" without one.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device="cuda", but torch finds no CUDA device; use "auto" or "cpu", or its CUDA build')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def free_memory() -> dict[str, int]:
    """Bytes that a program could still take, by device; of the main memory where the system tells it."""
    import torch

    found = {}
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    for line in lines:
        if line.startswith("MemAvailable"):
            found["CPU"] = int(line.split()[1]) * 1024
    for index in range(torch.cuda.device_count()):
        found[torch.cuda.get_device_name(index)] = torch.cuda.mem_get_info(index)[0]
    return found


def processor_name() -> str:
    """As /proc/cpuinfo has it; elsewhere a short one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe_machine() -> str:
    """Processor, usable cores, memory and the versions that decide numbers."""
    import torch

    memory = ""
    with contextlib.suppress(OSError, ValueError, IndexError):  # not Linux
        memory = f", {int(Path('/proc/meminfo').read_text().split()[1]) / 2**20:.0f} GiB"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor_name()}, {usable_cores()} cores{memory}, {versions}"


ISA = "THINKSTACK_ISA"
"""Environment variable: the instruction set to use in place of the best that the processor has (`INSTRUCTION_SETS`)."""


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """What the kernels are compiled for."""

    name: str
    needs: frozenset[str]
    """Features as /proc/cpuinfo names them."""
    flags: tuple[str, ...]
    """Of a compiler; no feature beyond `needs`, so that a library that was built runs wherever they are."""
    has_kernels: bool = True
    """Whether the kernels are worth compiling for it."""


_V3 = "avx2 fma f16c bmi1 bmi2"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"


def _x86(name: str, needs: str) -> InstructionSet:
    features = (name.replace("_", "") for name in needs.replace("bmi1", "bmi").split() if not name.startswith("amx"))
    flags = tuple(f"-m{name}" for name in features)
    return InstructionSet(name=name, needs=frozenset(needs.split()), flags=flags, has_kernels=bool(needs))


INSTRUCTION_SETS = {
    "x86_64": (
        _x86("amx", f"{_V4} avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"),
        _x86("avx512-bf16", f"{_V4} avx512_vnni avx512_bf16"),
        _x86("avx512-vnni", f"{_V4} avx512_vnni"),
        _x86("x86-64-v4", _V4),
        _x86("x86-64-v3", _V3),
        _x86("x86-64", ""),
    ),
    "aarch64": (
        InstructionSet(name="armv8-bf16", needs=frozenset({"bf16"}), flags=()),
        InstructionSet(name="armv8", needs=frozenset(), flags=()),
    ),
}
"""By architecture, the best first. "amx" and "armv8-bf16" compile the same kernels as the next one: their products are
oneDNN's."""
BF16_PRODUCTS = ("amx", "avx512-bf16", "armv8-bf16")
"""Instruction sets that multiply bf16."""


@functools.cache
def instruction_set() -> InstructionSet:
    """The best instruction set of this processor, or the one that THINKSTACK_ISA names.

    Raises ConfigError for one that there is not, or that the processor lacks.
    """
    possible = instruction_sets()
    asked = os.environ.get(ISA, "")
    if not asked:
        return possible[0]
    found = next((one for one in possible if one.name == asked), None)
    if found is None:
        here = ", ".join(one.name for one in possible)
        raise ConfigError(f"{ISA}={asked} is not an instruction set of this processor; use one of {here}")
    return found


def instruction_sets() -> tuple[InstructionSet, ...]:
    """Those that this processor has, the best first."""
    kind = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    plain = InstructionSet(name=kind, needs=frozenset(), flags=())
    features = cpu_features()
    return tuple(one for one in INSTRUCTION_SETS.get(kind, (plain,)) if one.needs <= features)


def cpu_features() -> frozenset[str]:
    """Features of the processor as Linux names them; elsewhere what torch says of the vectors."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        lines = path.read_text().splitlines()
        found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        return frozenset(found.partition(":")[2].split())
    import torch

    vectors = torch.backends.cpu.get_cpu_capability()
    return frozenset({"AVX512": _V4, "AVX2": _V3}.get(vectors, "").split())
