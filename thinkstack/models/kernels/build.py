"""Compile the kernels once per machine and load them; without a compiler everything runs on torch's operators."""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from thinkstack.machine import usable_cores

log = logging.getLogger(__name__)

SOURCES = ("attention.cpp", "blocks.cpp", "decode.cpp", "draw.cpp", "experts.cpp", "rows.cpp", "steps.cpp")
HEADERS = ("simd.h", "matmul.h", "context.h", "tiles.h", "decode.h", "few.h", "experts.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-w")
SWITCH = "THINKSTACK_KERNELS"
"""Environment variable; "0" runs on torch's operators alone."""


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
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    compiler = shlex.split(os.environ.get("CXX", "")) or [found]
    if not compiler[0]:
        log.warning("no C++ compiler found: running on torch's operators, about half as fast; install g++ to change it")
        return None
    folder = Path(__file__).parent
    try:
        path = cache_folder() / f"kernels-{fingerprint(compiler, folder)}.so"
        if not path.exists():
            compile_to(path, compiler, folder)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("the C++ kernels cannot be built, running on torch's operators: %s", detail.strip()[-400:])
        return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: in XDG_CACHE_HOME or ~/.cache.

    Where that cannot be written, a new folder of this process alone: others could put code into a shared one.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinkstack"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass  # not ours to write: as said above
    private = tempfile.mkdtemp(prefix="thinkstack-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


def fingerprint(compiler: list[str], folder: Path) -> str:
    """Changes with the sources, the compiler, torch and the processor."""
    parts = [(folder / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    parts.append(subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout)
    parts += [torch.__version__.encode(), platform.machine().encode(), " ".join(FLAGS).encode()]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        known = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "model name"))]
        parts += [line.encode() for line in known[:2]]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def compile_to(path: Path, compiler: list[str], folder: Path) -> None:
    """Build the library beside `path` and move it there, so that no process ever loads half of one."""
    log.info("compiling the CPU kernels, once")
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        built = Path(work) / path.name

        def compile_one(name: str, flags: tuple[str, ...]) -> str:
            made = built.with_name(f"{name}.o")
            call([*compiler, *FLAGS, *flags, "-c", str(folder / name), "-o", str(made)])
            return str(made)

        def compile_all(*flags: str) -> None:
            with ThreadPoolExecutor(usable_cores()) as pool:
                objects = list(pool.map(compile_one, SOURCES, [flags] * len(SOURCES)))
            call([*compiler, *FLAGS, *flags, "-shared", *objects, "-o", str(built)])

        try:
            compile_all("-fopenmp")
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
            compile_all()
        os.replace(built, path)


def call(command: list[str]) -> None:
    """Run a compiler; raises CalledProcessError with what it wrote."""
    subprocess.run(command, check=True, capture_output=True, text=True)
