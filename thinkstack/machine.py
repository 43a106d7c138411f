"""The machine a program runs on: its cores and what a container leaves of them, settings that make training fast, and
its name for reports.
"""

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
"""More threads are used where they are so many times as fast as fewer."""
SPARE_CORES_SHARE = 0.25
"""Other work of less than so much of a core is left out of account."""
ADAPT_SECONDS = 0.3
"""Between two looks at what other work takes of the cores."""
MEASURE_SECONDS, DOUBT_SECONDS = 0.04, 0.3
"""How long thread counts are measured, and how long where more threads look slower: other work may be the cause."""


def prepare_machine(threads: int = 0) -> None:
    """Set torch's threads (0: one per usable core) and keep freed memory in the process.

    By default glibc gives large blocks back to the system after every use; fetching them again as fresh zeroed pages
    takes up to half of a training step on a CPU.
    """
    import torch

    torch.set_num_threads(threads or usable_cores())
    if not threads and (reason := why_fewer_cores()):
        log.info(reason)
    if torch.get_num_threads() > 1 and thinkstack.SPIN_SET_TOO_LATE:
        log.warning(
            "torch was imported before thinkstack, so its threads spin at barriers, which is slow beside other work; "
            "import thinkstack first, or set GOMP_SPINCOUNT=%s",
            thinkstack.SPIN_COUNT,
        )
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        # larger blocks, such as a big vocabulary's, do go back: glibc's heap does not refill the holes that they leave
        libc.mallopt(mmap_threshold, 8 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 64 << 20)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process can keep busy: those it may run on, at most its CPU quota, rounded down, and at least 1.

    More threads than the quota holds are stopped in the middle of their work, and the others wait for them.
    root: where the file system that tells the quota begins.
    """
    quota = cpu_quota(root)
    return bound_cores() if quota is None else max(1, min(bound_cores(), math.floor(quota)))


def bound_cores() -> int:
    """Cores this process may run on (taskset, a cpuset), whatever its quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def why_fewer_cores(root: Path = Path("/")) -> str:
    """One line on cores of the machine that are not used; empty where all are."""
    used, bound, all_cores = usable_cores(root), bound_cores(), os.cpu_count() or 1
    reasons = []
    if bound < all_cores:
        reasons.append(f"the process is bound to {bound} (taskset or a cpuset)")
    if used < bound:
        reasons.append(f"the container's CPU quota is {cpu_quota(root):.3g} cores")
    return f"using {used} of {all_cores} cores: {' and '.join(reasons)}" if reasons else ""


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Seconds of CPU time that this process' control groups get per second, in cores; None without a limit.

    The tightest limit of its group and all groups above it counts, of version 1 and 2. root: where /proc and /sys lie.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    return min((quota for folder in _groups(root) if (quota := _quota(folder)) is not None), default=None)


def _quota(folder: Path) -> float | None:
    words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        return None  # no limit ("max", -1), no file, or one that this code does not know
    quota, period = map(int, words)
    return quota / period if quota and period else None


def _groups(root: Path) -> list[Path]:
    """Folders of this process' control group and of all above it, where they may limit its CPU time."""
    folders = []
    paths = _group_paths(root)
    for version, point, mounted in _group_mounts(root):
        mount = root / point.lstrip("/")
        path = paths.get(version, "/")
        inside = path if mounted == "/" else path.removeprefix(mounted) if path.startswith(mounted) else "/"
        parts = PurePosixPath(inside.lstrip("/")).parts
        if ".." in parts or not mount.joinpath(*parts).is_dir():
            parts = ()  # a container that sees its own group at the mount, and a path of the machine outside
        folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return folders


def _group_paths(root: Path) -> dict[int, str]:
    """Paths of this process' control groups by version, of /proc/self/cgroup: id:controllers:path."""
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
    """(version, mount point, path of the group that is seen there) of the hierarchies that may limit CPU time."""
    found = []
    for line in _lines(root / "proc/self/mountinfo"):  # 31 23 0:28 /root /point options - kind source options
        before, _, after = (part.split() for part in line.partition(" - "))
        if len(before) < 5 or len(after) < 3:
            continue
        mounted, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word) for word in before[3:5])
        if after[0] == "cgroup2" or (after[0] == "cgroup" and "cpu" in after[2].split(",")):
            found.append((2 if after[0] == "cgroup2" else 1, point, mounted))
    usual = [(2, "/sys/fs/cgroup", "/"), (1, "/sys/fs/cgroup/cpu", "/"), (1, "/sys/fs/cgroup/cpu,cpuacct", "/")]
    return found or usual


def _lines(path: Path) -> list[str]:
    """Lines of a file; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def measure_threads(cores: int) -> int:
    """Threads to use on so many usable cores: all, or half where two "cores" turn out to be threads of one.

    0: other work on the machine hides the answer; use all, and ask again another day. Multiplies matrices for
    MEASURE_SECONDS, the least time of many short products counts. Where more threads look slower, DOUBT_SECONDS are
    spent before that is believed.
    """
    import torch

    if cores < 2:
        return 1
    before = torch.get_num_threads()
    side = round(320 * (cores / 2) ** (1 / 3))  # half a millisecond of all cores
    a, b = torch.rand(2, side, side)
    torch.mm(a, b)
    seconds = dict.fromkeys((cores // 2, cores), math.inf)
    others, started = OtherWork(), time.perf_counter()
    try:
        while (spent := time.perf_counter() - started) < MEASURE_SECONDS or (
            fastest_threads(seconds) < cores and spent < DOUBT_SECONDS
        ):
            for threads in seconds:
                torch.set_num_threads(threads)
                for _ in range(16):  # in a row: beside other work threads run together for milliseconds at a time
                    start = time.perf_counter()
                    torch.mm(a, b)
                    seconds[threads] = min(seconds[threads], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    chosen = fastest_threads(seconds)
    return 0 if chosen < cores and others.cores() > SPARE_CORES_SHARE else chosen


def fastest_threads(seconds: Mapping[int, float]) -> int:
    """Threads to use after the same work took `seconds`, by threads: more only where they are clearly faster."""
    chosen, *more = sorted(seconds)
    for threads in more:
        if seconds[threads] * CLEARLY_FASTER < seconds[chosen]:
            chosen = threads
    return chosen


def threads_beside(cores: int, others: float) -> int:
    """Threads to use on so many usable cores while other work keeps `others` of them busy, in cores.

    A thread that has to share its core holds up all others at the next barrier.
    """
    return max(1, math.floor(cores - others + SPARE_CORES_SHARE))


class OtherWork:
    """What other processes, this one's children among them, use of the cores that this process may run on."""

    def __init__(self) -> None:
        self._last = self._read()

    def cores(self) -> float:
        """CPU seconds per second, in cores, since the last call or the beginning; 0 where the system does not tell.

        The system counts in hundredths of a second: ask after some tenths.
        """
        last, self._last = self._last, self._read()
        wall, used, own = (now - then for now, then in zip(self._last, last, strict=True))
        return max(0.0, (used - own) / wall) if wall > 0 and used > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        """Wall seconds, CPU seconds of everybody on these cores, CPU seconds of this process."""
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        ticks = 0
        for line in _lines(Path("/proc/stat")):  # cpu0 user nice system idle iowait irq softirq steal guest guest_nice
            words = line.split()
            if words and re.fullmatch(r"cpu\d+", words[0]) and int(words[0][3:]) in mine:
                ticks += sum(int(words[place]) for place in (1, 2, 3, 6, 7))
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0, time.process_time()


class SharedCores:
    """Inside a with block torch has no more threads than cores are free, as other work comes and goes."""

    def __init__(self) -> None:
        self._others, self._asked, self._busy, self._before = OtherWork(), time.monotonic(), 0.0, 0

    def __enter__(self) -> "SharedCores":
        import torch

        if time.monotonic() - self._asked >= ADAPT_SECONDS:
            self._asked, self._busy = time.monotonic(), self._others.cores()
        self._before = torch.get_num_threads()
        if (threads := threads_beside(self._before, self._busy)) < self._before:
            torch.set_num_threads(threads)
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)


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
