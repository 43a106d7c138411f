"""Compile the kernels once per instruction set and load them; without a compiler, torch's operators are used."""

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

from thinkstack.kernels.cpu.structures import STRUCTURES, check_layout
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
"""Source files, relative to PACKAGE, in order of decreasing compile time."""
HEADERS = (
    *(
        f"kernels/cpu/{name}.h"
        for name in ("layout", "simd", "matmul", "context", "tiles", "paged_attention", "small_m", "experts")
    ),
    "engine/fused/gqa_blocks.h",
)
PACKAGE = Path(__file__).parents[2]
"""Folder of the package thinkstack."""
INCLUDE = ("-I", str(PACKAGE / "kernels" / "cpu"))
WARNINGS = ("-Wall", "-Wextra", "-Wno-maybe-uninitialized")
"""GCC warns of uninitialized values in its own header of AVX-512 (GCC bug 105593)."""
FLAGS = ("-O2", "-fpeel-loops", "-std=c++17", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", *WARNINGS)
"""Compiler flags. -O2 with unrolled tiles is as fast as -O3, and compilation takes two thirds of the time."""
LOCK = "building.lock"
SWITCH = "THINKSTACK_KERNELS"
"""Environment variable: "0" uses torch's operators only, "1" uses the kernels wherever they are supported."""


_BUILDING = threading.Lock()


@functools.cache
def binary() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are switched off or cannot be built. Concurrent callers wait for the first."""
    with _BUILDING:
        return load()


@functools.cache
def load() -> ctypes.CDLL | None:
    """`binary` without the lock; logs once why there are no kernels."""
    if os.environ.get(SWITCH) == "0":
        log.info("%s=0: using torch's operators", SWITCH)
        return None
    isa = instruction_set()
    if not isa.has_kernels:
        log.info("this processor has no AVX2: using torch's operators")
        return None
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    compiler = shlex.split(os.environ.get("CXX", "")) or [found]
    if not compiler[0]:
        log.warning("no C++ compiler found: using torch's operators, which are slower; install g++")
        return None
    try:
        path = cache_folder() / f"kernels-{isa.name}-{fingerprint(compiler, isa)}.so"
        with build_lock(path):
            if not path.exists():
                compile_to(path, compiler, isa)
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # damaged, or compiled for another system: compile again
                path.unlink()
                compile_to(path, compiler, isa)
                library = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("the C++ kernels cannot be built; using torch's operators: %s", detail.strip()[-400:])
        return None
    for kind in STRUCTURES.values():
        check_layout(library, kind)
    return library


def cache_folder() -> Path:
    """The folder of compiled kernels and measurements, in XDG_CACHE_HOME or ~/.cache.

    If that folder cannot be written, or other users can write to it (and could place code there), a new private folder
    of this process is used.
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
        pass  # cannot be written: use a private folder
    return private_folder(f"{home} {reason}")


@functools.cache
def private_folder(reason: str) -> Path:
    """A private folder of this process; the reason is logged once."""
    log.warning("%s: kernels are compiled for this process only; set XDG_CACHE_HOME to a private folder", reason)
    private = tempfile.mkdtemp(prefix="thinkstack-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


def fingerprint(compiler: list[str], isa: InstructionSet) -> str:
    """A hash of the sources, the compiler, torch's version and the instruction set."""
    parts = [(PACKAGE / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    parts.append(subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout)
    parts += [torch.__version__.encode(), " ".join((*compiler, *FLAGS, *isa.flags)).encode()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


@contextlib.contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """Make other processes that build the same library wait; if files cannot be locked, each process builds it."""
    try:
        import fcntl

        with (path.parent / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except (ImportError, PermissionError, BlockingIOError):
        yield


def compile_to(path: Path, compiler: list[str], isa: InstructionSet) -> None:
    """Build the library next to `path` and move it to `path`, so that no process loads an incomplete file."""
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
            compile_all()  # raises if the cause is not OpenMP
            log.warning(
                "the compiler does not support OpenMP, so the kernels run on one core: %s", error.stderr.strip()[-200:]
            )
        os.replace(built, path)
    log.info("compiled in %.0f s: %s", time.monotonic() - started, path)


def call(command: list[str]) -> None:
    """Run a compiler; raises CalledProcessError with its output."""
    subprocess.run(command, check=True, capture_output=True, text=True)
