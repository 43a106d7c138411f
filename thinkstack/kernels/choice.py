"""Decide which operations use the C++ kernels on this machine, and which precision is fast.

A committed table (table.toml, written by bench/kernels.py) has the speed of the kernel relative to torch's operators
for each instruction set and operation; the kernel is used if this factor is at least 1. A measurement on this machine
(stages/measure_kernels.py) overrides the table if it contradicts the table by OVERRIDE_FACTOR. A run records the
decisions, and a resumed run uses the same decisions on any machine.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from thinkstack.kernels.cpu.build import SWITCH, binary, cache_folder
from thinkstack.log import write_json
from thinkstack.machine import BF16_PRODUCTS, instruction_set, processor_name

log = logging.getLogger(__name__)

OVERRIDE_FACTOR = 1.2
"""Minimum factor by which a measurement on this machine must contradict the table to override it."""
CAP_VARIABLES = ("THINKSTACK_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that limit the instruction sets in use and therefore change measurements."""
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Choices:
    """The decisions for this process; recorded in the provenance of a run."""

    instruction_set: str
    auto_dtype: str
    """The meaning of dtype="auto" on the CPU: fp32 or bf16."""
    reason: str
    """The reason for auto_dtype."""
    emulates_bf16: bool
    """Whether torch's matmuls in bf16 are more than twice as slow as in fp32 (`emulates_bf16`)."""
    kernels: dict[str, bool] = field(default_factory=dict)
    """Whether the kernel is used, by operation and precision, such as "attend.fp32"."""
    others: bool = True
    """Whether the kernel is used for operations that are not in `kernels`."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Measurements of this machine."""

    gflops: dict[str, float]
    """GFLOP/s of torch's matmul, by precision."""
    threads: int
    """Torch's number of threads during the measurement."""
    read_gb_per_second: float = 0.0
    """Bandwidth of reading main memory; 0: not measured."""
    factors: dict[str, float] = field(default_factory=dict)
    """Time of torch's operators divided by the time of the kernel, by operation and precision."""
    fast_threads: dict[str, int] = field(default_factory=dict)
    """Number of threads above which more threads are not faster, by number of usable cores."""


@functools.cache
def table() -> dict[str, dict[str, float]]:
    """The factors of the committed table, by instruction set, then by operation and precision."""
    return tomllib.loads((Path(__file__).parent / "table.toml").read_text(encoding="utf-8"))


def measurements_path() -> Path:
    """The file of the measurements; there is one file per processor, version of torch and limit of instruction sets."""
    parts = [processor_name(), torch.__version__, *(os.environ.get(name, "") for name in CAP_VARIABLES)]
    name = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
    return cache_folder() / f"measured-{instruction_set().name}-{name}.json"


def measurements() -> Measurements:
    """The measurements of this machine; if there is no file, matmuls are measured, which takes milliseconds."""
    global _MEASURED
    if _MEASURED is None:
        try:
            _MEASURED = Measurements(**json.loads(measurements_path().read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            store_measurements(Measurements(gflops=product_speeds(), threads=torch.get_num_threads()))
    assert _MEASURED is not None
    return _MEASURED


def store_measurements(found: Measurements) -> None:
    """Use new measurements and write them to disk for later processes; a failed write is logged."""
    global _MEASURED, _CHOICES
    _MEASURED, _CHOICES = found, None
    try:
        write_json(measurements_path(), asdict(found))
    except (OSError, ValueError):
        log.info("cannot write the measurements to %s; the next process measures again", measurements_path())


def product_speeds(size: int = 256, repetitions: int = 8) -> dict[str, float]:
    """Best GFLOP/s of torch's matmul of square matrices, by precision. A repetition that takes more than 10 ms is the
    last: times range from 50 us to 50 ms between machines."""
    speeds = {}
    for dtype, name in PRECISIONS.items():
        a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        torch.nn.functional.linear(a[:8], b)
        best = float("inf")
        for _ in range(repetitions):
            started = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = min(best, time.perf_counter() - started)
            if best > 0.01:
                break
        speeds[name] = 2e-9 * size**3 / best
    return speeds


def contradicts_table(name: str, factor: float) -> bool:
    """Whether a measured factor of an operation contradicts the table by OVERRIDE_FACTOR."""
    by_table = table().get(instruction_set().name, {}).get(name, 1.0) >= 1
    return factor <= 1 / OVERRIDE_FACTOR if by_table else factor >= OVERRIDE_FACTOR


def decide() -> Choices:
    """Combine table, instruction set and measurements."""
    isa, found = instruction_set().name, measurements()
    rows = table().get(isa, {})
    kernels = {}
    for name in sorted({*rows, *found.factors}):
        own = found.factors.get(name)
        kernels[name] = (rows.get(name, 1.0) >= 1) != (own is not None and contradicts_table(name, own))
    fp32, bf16 = found.gflops["fp32"], found.gflops["bf16"]
    is_fast = isa in BF16_PRODUCTS and bf16 > fp32
    speeds = f"torch multiplies bf16 at {bf16:.4g} GFLOP/s and fp32 at {fp32:.4g}"
    reason = speeds if isa in BF16_PRODUCTS else f"{isa} has no bf16 matmuls; {speeds}"
    return Choices(isa, "bf16" if is_fast else "fp32", reason, bf16 < fp32 / 2, kernels)


_MEASURED: Measurements | None = None
_CHOICES: Choices | None = None


def choices() -> Choices:
    """The decisions for this process, made at the first call unless `restore` set the decisions of a run."""
    global _CHOICES
    if _CHOICES is None:
        _CHOICES = decide()
    return _CHOICES


def record() -> dict[str, Any]:
    """The decisions for the provenance of a run, THINKSTACK_KERNELS included."""
    found = asdict(choices())
    if switch := os.environ.get(SWITCH, ""):
        found |= {"kernels": dict.fromkeys(found["kernels"], switch != "0"), "others": switch != "0"}
    return found


def describe() -> str:
    """The decisions and their reasons in one line."""
    found = choices()
    off = sorted(name for name, uses_kernel in found.kernels.items() if not uses_kernel)
    kernels = {"0": f"none ({SWITCH}=0)", "1": f"all ({SWITCH}=1)"}.get(os.environ.get(SWITCH, ""), "")
    if not kernels:
        kernels = "none" if binary() is None else f"all but {', '.join(off)}" if off else "all"
    return f"{found.instruction_set}, dtype auto = {found.auto_dtype} ({found.reason}), kernels: {kernels}"


def restore(recorded: dict[str, Any] | None) -> None:
    """Use recorded decisions from now on; None: decide again for this machine."""
    global _CHOICES
    if recorded is None:
        _CHOICES = None
        return
    own = decide()
    _CHOICES = Choices(**{name: recorded[name] for name in asdict(own)})
    if _CHOICES.instruction_set != own.instruction_set:
        log.warning(
            "started on %s and resumed on %s: the same kernels and dtype (auto = %s), but sums may differ in the last "
            "bits",
            _CHOICES.instruction_set,
            own.instruction_set,
            _CHOICES.auto_dtype,
        )


@contextlib.contextmanager
def using_kernel(name: str, uses_kernel: bool) -> Iterator[None]:
    """Within the block, compute this operation, such as "attend.fp32", with its kernel or with torch's operators."""
    kernels = choices().kernels
    before = dict(kernels)
    kernels[name] = uses_kernel
    try:
        yield
    finally:
        kernels.clear()
        kernels.update(before)


def uses(operation: str, dtype: torch.dtype) -> bool:
    """Whether the kernel computes an operation in this precision; THINKSTACK_KERNELS overrides the decision."""
    switch = os.environ.get(SWITCH, "")
    if switch == "0" or binary() is None:
        return False
    found = choices()
    return switch == "1" or found.kernels.get(f"{operation}.{PRECISIONS[dtype]}", found.others)


def emulates_bf16() -> bool:
    """Whether matmuls in bf16 should be computed in fp32 on this machine."""
    return choices().emulates_bf16


# The attribute that torch.compiler.assume_constant_result sets; calling it would import the compiler, which takes 1 s.
uses._dynamo_marked_constant = True  # type: ignore[attr-defined]
emulates_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]
