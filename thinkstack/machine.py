"""The machine a program runs on: settings that make training fast, and its name for reports."""

import ctypes
import os
import platform
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


def describe_machine() -> str:
    """Processor, usable cores, memory and the versions that decide numbers."""
    import torch

    name = platform.processor() or platform.machine()
    memory = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        memory = f", {int(Path('/proc/meminfo').read_text().split()[1]) / 2**20:.0f} GiB"
    except (OSError, StopIteration, ValueError, IndexError):
        pass  # not Linux: the short name stays
    return f"{name}, {usable_cores()} cores{memory}, Python {platform.python_version()}, torch {torch.__version__}"
