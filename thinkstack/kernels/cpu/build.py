"""Compile the kernels once per instruction set and load them; without a compiler torch's operators do all work."""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from thinkstack.machine import InstructionSet, instruction_set, usable_cores

log = logging.getLogger(__name__)

SOURCES = (
    "engine/fused/gqa_blocks_bf16.cpp",
    "engine/fused/gqa_blocks_int8.cpp",
    "kernels/cpu/attention.cpp",
    "kernels/cpu/paged_attention.cpp",
    "engine/fused/mla_model.cpp",
    "kernels/cpu/experts.cpp",
    "kernels/cpu/sample.cpp",
    "kernels/cpu/rows.cpp",
    "kernels/cpu/linear.cpp",
)
"""Relative to PACKAGE, the longest first."""
HEADERS = (
    *(
        f"kernels/cpu/{name}.h"
        for name in ("simd", "matmul", "context", "tiles", "paged_attention", "small_m", "experts")
    ),
    "engine/fused/gqa_blocks.h",
)
PACKAGE = Path(__file__).parents[2]
"""The folder of thinkstack."""
INCLUDE = ("-I", str(PACKAGE / "kernels" / "cpu"))
FLAGS = ("-O2", "-fpeel-loops", "-std=c++17", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-w")
"""-O2 with tiles unrolled is as fast as -O3 and takes two thirds of the time to compile."""
LOCK = "building.lock"
SWITCH = "THINKSTACK_KERNELS"
"""Environment variable; "0" runs on torch's operators alone, "1" uses the kernels for all that they can do."""


_BUILDING = threading.Lock()


@functools.cache
def binary() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be built. Threads that ask at once wait."""
    with _BUILDING:
        return load()


@functools.cache
def load() -> ctypes.CDLL | None:
    """What `binary` returns; why there is none is logged once."""
    if os.environ.get(SWITCH) == "0":
        log.info("%s=0: running on torch's operators", SWITCH)
        return None
    isa = instruction_set()
    if not isa.has_kernels:
        log.info("a processor without AVX2: running on torch's operators")
        return None
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    compiler = shlex.split(os.environ.get("CXX", "")) or [found]
    if not compiler[0]:
        log.warning("no C++ compiler found: running on torch's operators, which is slower; install g++ to change it")
        return None
    try:
        path = cache_folder() / f"kernels-{isa.name}-{fingerprint(compiler, isa)}.so"
        with only_builder(path):
            if not path.exists():
                compile_to(path, compiler, isa)
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # damaged, or made for another system: once more
                path.unlink()
                compile_to(path, compiler, isa)
                return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("the C++ kernels cannot be built, running on torch's operators: %s", detail.strip()[-400:])
        return None


def cache_folder() -> Path:
    """Where compiled kernels and what was measured of this machine are kept: in XDG_CACHE_HOME or ~/.cache.

    Where that cannot be written, or where others can write, a new folder of this process alone: others could put code
    into a shared one.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinkstack"
    reason = "cannot be written"
    try:
        home.mkdir(parents=True, exist_ok=True)
        found = home.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            reason = "can be written by others"
        elif os.access(home, os.W_OK):
            return home
    except OSError:
        pass  # not ours to write: as said above
    return private_folder(f"{home} {reason}")


@functools.cache
def private_folder(reason: str) -> Path:
    """A folder of this process alone; why is said once."""
    log.warning("%s: kernels are compiled for this process alone; set XDG_CACHE_HOME to a folder of yours", reason)
    private = tempfile.mkdtemp(prefix="thinkstack-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


def fingerprint(compiler: list[str], isa: InstructionSet) -> str:
    """Changes with the sources, the compiler, torch and the instruction set."""
    parts = [(PACKAGE / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    parts.append(subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout)
    parts += [torch.__version__.encode(), " ".join((*compiler, *FLAGS, *isa.flags)).encode()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


@contextlib.contextmanager
def only_builder(path: Path) -> Iterator[None]:
    """Other processes that would build the same wait here; where files cannot be locked they build it as well."""
    try:
        import fcntl

        with (path.parent / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except (ImportError, PermissionError, BlockingIOError):
        yield


def compile_to(path: Path, compiler: list[str], isa: InstructionSet) -> None:
    """Build the library beside `path` and move it there, so that no process ever loads half of one."""
    cores = usable_cores()
    log.info("compiling the CPU kernels for %s, once: %d files on %d cores ...", isa.name, len(SOURCES), cores)
    started = time.monotonic()
    flags = (*FLAGS, *isa.flags)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        built = Path(work) / path.name

        def compile_one(name: str, more: tuple[str, ...]) -> str:
            made = built.with_name(f"{Path(name).stem}.o")
            call([*compiler, *INCLUDE, *flags, *more, "-c", str(PACKAGE / name), "-o", str(made)])
            return str(made)

        def compile_all(*more: str) -> None:
            with ThreadPoolExecutor(cores) as pool:
                objects = list(pool.map(compile_one, SOURCES, [more] * len(SOURCES)))
            call([*compiler, *flags, *more, "-shared", *objects, "-o", str(built)])

        try:
            compile_all("-fopenmp")
        except subprocess.CalledProcessError as error:
            compile_all()  # if this fails too, it says why
            log.warning("the compiler knows no OpenMP, so the kernels run on one core: %s", error.stderr.strip()[-200:])
        os.replace(built, path)
    log.info("compiled in %.0f s: %s", time.monotonic() - started, path)


def call(command: list[str]) -> None:
    """Run a compiler; raises CalledProcessError with what it wrote."""
    subprocess.run(command, check=True, capture_output=True, text=True)
