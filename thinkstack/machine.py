"""The machine: usable cores and container limits, settings for fast training, instruction sets, description."""

import contextlib
import ctypes
import functools
import logging
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import thinkstack
from thinkstack.types import ConfigError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CLEARLY_FASTER = 1.1
"""Minimum speed-up for which more threads are used."""
NEGLIGIBLE_CORES = 0.25
"""Load of other processes, in cores, that is ignored."""
ADAPT_SECONDS = 0.3
"""Seconds between two measurements of the load of other processes."""
MEASURE_SECONDS, RECHECK_SECONDS = 0.04, 0.3
"""Seconds for which thread counts are measured, and the longer limit if more threads seem slower, since other processes
may be the cause."""


def prepare_machine(threads: int = 0) -> None:
    """Set torch's threads (0: one per usable core), and let the process keep freed memory.

    By default glibc returns large blocks to the system after every use; allocating them again as zeroed pages takes up
    to half of a training step on a CPU.
    """
    import torch

    torch.set_num_threads(threads or usable_cores())
    if not threads and (reason := why_fewer_cores()):
        log.info(reason)
    if torch.get_num_threads() > 1 and thinkstack.SPIN_SET_TOO_LATE:
        log.warning(
            "torch was imported before thinkstack, so its threads spin at barriers and slow other processes down; "
            "import thinkstack first, or set GOMP_SPINCOUNT=%s",
            thinkstack.SPIN_COUNT,
        )
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        # larger blocks, such as the tensors of a large vocabulary, are returned: glibc's heap does not reuse their gaps
        libc.mallopt(mmap_threshold, 8 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 64 << 20)


def usable_cores(root: Path = Path("/")) -> int:
    """Number of cores that this process can use: the cores of its affinity mask, limited by its CPU quota rounded down,
    at least 1.

    With more threads than the quota, the system suspends some threads, and the other threads wait for them. root: root
    of the file system with the quota files.
    """
    quota = cpu_quota(root)
    return bound_cores() if quota is None else max(1, min(bound_cores(), math.floor(quota)))


def bound_cores() -> int:
    """Number of cores in the affinity mask of this process (taskset, a cpuset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def why_fewer_cores(root: Path = Path("/")) -> str:
    """One line that explains why some cores are not used; empty if all are."""
    used, bound, all_cores = usable_cores(root), bound_cores(), os.cpu_count() or 1
    reasons = []
    if bound < all_cores:
        reasons.append(f"the process is bound to {bound} (taskset or a cpuset)")
    if used < bound:
        reasons.append(f"the container's CPU quota is {cpu_quota(root):.3g} cores")
    return f"using {used} of {all_cores} cores: {' and '.join(reasons)}" if reasons else ""


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU quota of this process' control groups in cores (CPU seconds per second); None without a limit.

    The minimum over its group and all parent groups, of cgroup versions 1 and 2. root: parent folder of /proc and /sys.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    return min((quota for folder in _groups(root) if (quota := _quota(folder)) is not None), default=None)


def _quota(folder: Path) -> float | None:
    words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        return None  # no limit ("max", -1), no file, or an unknown format
    quota, period = map(int, words)
    return quota / period if quota and period else None


def _groups(root: Path) -> list[Path]:
    """Folders of this process' control group and of its parent groups that can limit its CPU time."""
    folders = []
    paths = _group_paths(root)
    for version, point, mounted in _group_mounts(root):
        mount = root / point.lstrip("/")
        path = paths.get(version, "/")
        inside = path if mounted == "/" else path.removeprefix(mounted) if path.startswith(mounted) else "/"
        parts = PurePosixPath(inside.lstrip("/")).parts
        if ".." in parts or not mount.joinpath(*parts).is_dir():
            parts = ()  # in a container the mount is the container's own group, and the path is the host's
        folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return folders


def _group_paths(root: Path) -> dict[int, str]:
    """Paths of this process' control groups by cgroup version, from /proc/self/cgroup (id:controllers:path)."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "cpu" in controllers.split(","):
            paths[1] = path
        elif number == "0" and not controllers:
            paths[2] = path
    return paths


def _group_mounts(root: Path) -> list[tuple[int, str, str]]:
    """(version, mount point, path of the mounted group) of the cgroup hierarchies that can limit CPU time."""
    mounts = []
    for line in _lines(root / "proc/self/mountinfo"):  # 31 23 0:28 /root /point options - kind source options
        before, _, after = (part.split() for part in line.partition(" - "))
        if len(before) < 5 or len(after) < 3:
            continue
        mounted, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word) for word in before[3:5])
        if after[0] == "cgroup2" or (after[0] == "cgroup" and "cpu" in after[2].split(",")):
            mounts.append((2 if after[0] == "cgroup2" else 1, point, mounted))
    default = [(2, "/sys/fs/cgroup", "/"), (1, "/sys/fs/cgroup/cpu", "/"), (1, "/sys/fs/cgroup/cpu,cpuacct", "/")]
    return mounts or default


def _lines(path: Path) -> list[str]:
    """The lines of a file; [] if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def measure_threads(cores: int) -> int:
    """Number of threads to use on `cores` usable cores: all, or half if pairs of "cores" are hardware threads of one
    core.

    Returns 0 if other processes make the measurement unreliable; then use all cores, and measure again later. The time
    per thread count is the minimum of many short matrix multiplications over MEASURE_SECONDS; if more threads seem
    slower, over RECHECK_SECONDS.
    """
    import torch

    if cores < 2:
        return 1
    before = torch.get_num_threads()
    side = round(320 * (cores / 2) ** (1 / 3))  # half a millisecond on all cores
    a, b = torch.rand(2, side, side)
    torch.mm(a, b)
    seconds = dict.fromkeys((cores // 2, cores), math.inf)
    others, started = OtherWork(), time.perf_counter()
    try:
        while (spent := time.perf_counter() - started) < MEASURE_SECONDS or (
            fastest_threads(seconds) < cores and spent < RECHECK_SECONDS
        ):
            for threads in seconds:
                torch.set_num_threads(threads)
                for _ in range(16):  # consecutive: with other processes all threads run together only for milliseconds
                    start = time.perf_counter()
                    torch.mm(a, b)
                    seconds[threads] = min(seconds[threads], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    chosen = fastest_threads(seconds)
    return 0 if chosen < cores and others.cores() > NEGLIGIBLE_CORES else chosen


def fastest_threads(seconds: Mapping[int, float]) -> int:
    """Number of threads to use, given the seconds of the same work by thread count: more only if CLEARLY_FASTER."""
    chosen, *more = sorted(seconds)
    for threads in more:
        if seconds[threads] * CLEARLY_FASTER < seconds[chosen]:
            chosen = threads
    return chosen


def free_threads(cores: int, others: float) -> int:
    """Number of threads to use on `cores` usable cores while other processes have a load of `others` cores.

    A thread that shares its core with another process delays all other threads at the next barrier.
    """
    return max(1, math.floor(cores - others + NEGLIGIBLE_CORES))


class OtherWork:
    """CPU load of other processes, which include child processes, on the cores of this process."""

    def __init__(self) -> None:
        self._last = self._read()

    def cores(self) -> float:
        """CPU load of the other processes, in cores (CPU seconds per second), since the last call or since this object
        was created; 0 if the system does not report it.

        The system counts in units of 10 ms, so calls should be some 100 ms apart.
        """
        last, self._last = self._last, self._read()
        wall, used, own = (now - then for now, then in zip(self._last, last, strict=True))
        return max(0.0, (used - own) / wall) if wall > 0 and used > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        """Wall seconds, CPU seconds of all processes on these cores, CPU seconds of this process."""
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        ticks = 0
        for line in _lines(Path("/proc/stat")):  # cpu0 user nice system idle iowait irq softirq steal guest guest_nice
            words = line.split()
            if words and re.fullmatch(r"cpu\d+", words[0]) and int(words[0][3:]) in allowed:
                ticks += sum(int(words[column]) for column in (1, 2, 3, 6, 7))
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0, time.process_time()


class SharedCores:
    """Context manager that limits torch's threads to the cores that other processes leave free."""

    def __init__(self) -> None:
        self._others, self._measured, self._busy, self._before = OtherWork(), time.monotonic(), 0.0, 0

    def __enter__(self) -> "SharedCores":
        import torch

        if time.monotonic() - self._measured >= ADAPT_SECONDS:
            self._measured, self._busy = time.monotonic(), self._others.cores()
        self._before = torch.get_num_threads()
        if (threads := free_threads(self._before, self._busy)) < self._before:
            torch.set_num_threads(threads)
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)


def pick_device(name: str) -> "torch.device":
    """Return the torch device for `name`: "auto" (CUDA if available, else the CPU), "cpu" or "cuda".

    Raises ConfigError for name="cuda" without a CUDA device.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'device="cuda", but torch finds no CUDA device; use device="auto" or device="cpu", or install a CUDA build '
            "of torch"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def free_memory() -> dict[str, int]:
    """Free memory in bytes by device; main memory is included only if the system reports it."""
    import torch

    free = {}
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    for line in lines:
        if line.startswith("MemAvailable"):
            free["CPU"] = int(line.split()[1]) * 1024
    for index in range(torch.cuda.device_count()):
        free[torch.cuda.get_device_name(index)] = torch.cuda.mem_get_info(index)[0]
    return free


def processor_name() -> str:
    """Processor name from /proc/cpuinfo; a shorter one on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe_machine() -> str:
    """Processor, usable cores, memory, and the versions that numerical results depend on."""
    import torch

    memory = ""
    with contextlib.suppress(OSError, ValueError, IndexError):  # not Linux
        memory = f", {int(Path('/proc/meminfo').read_text().split()[1]) / 2**20:.0f} GiB"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor_name()}, {usable_cores()} cores{memory}, {versions}"


ISA = "THINKSTACK_ISA"
"""Environment variable that overrides the best instruction set of the processor (see `INSTRUCTION_SETS`)."""


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """A compilation target of the kernels."""

    name: str
    needs: frozenset[str]
    """Required features, by their names in /proc/cpuinfo."""
    flags: tuple[str, ...]
    """Compiler flags; they enable no feature beyond `needs`, which every processor with this instruction set has."""
    has_kernels: bool = True
    """Whether the kernels are compiled for this instruction set."""


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
"""Instruction sets by architecture, best first. "amx" and "armv8-bf16" compile the same kernels as the next entry:
oneDNN computes their matrix multiplications."""
BF16_PRODUCTS = ("amx", "avx512-bf16", "armv8-bf16")
"""Instruction sets with instructions for bf16 dot products or bf16 matrix multiplications."""


@functools.cache
def instruction_set() -> InstructionSet:
    """The best instruction set of this processor, or the one that THINKSTACK_ISA names.

    Raises ConfigError for an unknown instruction set, or one that the processor lacks.
    """
    available = instruction_sets()
    requested = os.environ.get(ISA, "")
    if not requested:
        return available[0]
    chosen = next((one for one in available if one.name == requested), None)
    if chosen is None:
        names = ", ".join(one.name for one in available)
        raise ConfigError(f"{ISA}={requested} is not an instruction set of this processor; use one of {names}")
    return chosen


def instruction_sets() -> tuple[InstructionSet, ...]:
    """The instruction sets of this processor, best first."""
    kind = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    plain = InstructionSet(name=kind, needs=frozenset(), flags=())
    features = cpu_features()
    return tuple(one for one in INSTRUCTION_SETS.get(kind, (plain,)) if one.needs <= features)


def cpu_features() -> frozenset[str]:
    """Features of the processor by their Linux names; on other systems, the features that torch reports."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        lines = path.read_text().splitlines()
        features_line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        return frozenset(features_line.partition(":")[2].split())
    import torch

    vectors = torch.backends.cpu.get_cpu_capability()
    return frozenset({"AVX512": _V4, "AVX2": _V3}.get(vectors, "").split())
