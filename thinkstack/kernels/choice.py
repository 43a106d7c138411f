"""Which operations the kernels compute here, and which precision is fast: decided in this file and nowhere else.

A committed table (table.toml, made by bench/kernels.py) has, for each instruction set, how many times as fast as
torch's operators the kernel of an operation is; it is used from 1 on. What this machine measured itself
(stages/measure_kernels.py) overrides the table only clearly. A run keeps what was decided, and goes on with it wherever
it is resumed.
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

CLEARLY = 1.2
"""A measurement of this machine overrides the table where it says the opposite by this factor."""
CAPS = ("THINKSTACK_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that change what is measured."""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Choices:
    """What this process computes with."""

    instruction_set: str
    auto_dtype: str
    """What dtype="auto" means on the CPU: fp32 or bf16."""
    reason: str
    """Why."""
    emulates_bf16: bool
    """Whether torch's products in bf16 take more than twice as long as those in fp32 (`emulates_bf16`)."""
    kernels: dict[str, bool] = field(default_factory=dict)
    """By operation and precision, such as "attend.fp32": whether a kernel computes it."""
    others: bool = True
    """The same of operations that are not named."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What this machine was found to do."""

    gflops: dict[str, float]
    """Of a matrix product of torch, by precision."""
    threads: int
    """Of torch, meanwhile."""
    read_gb_per_second: float = 0.0
    """Of the main memory; 0: not measured."""
    factors: dict[str, float] = field(default_factory=dict)
    """Seconds of torch's operators over those of the kernel, by operation and precision."""
    fast_threads: dict[str, int] = field(default_factory=dict)
    """Threads that are faster than fewer, by the number of usable cores."""


@functools.cache
def table() -> dict[str, dict[str, float]]:
    """Factors by instruction set, then by operation and precision."""
    return tomllib.loads((Path(__file__).parent / "table.toml").read_text(encoding="utf-8"))


def facts_path() -> Path:
    """Where what was measured is kept: apart for each processor, version of torch and cap on instruction sets."""
    parts = [processor_name(), torch.__version__, *(os.environ.get(name, "") for name in CAPS)]
    name = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
    return cache_folder() / f"measured-{instruction_set().name}-{name}.json"


def measured() -> Measured:
    """What is known of this machine; measures at least whether bf16 is fast, in milliseconds."""
    global _MEASURED
    if _MEASURED is None:
        try:
            _MEASURED = Measured(**json.loads(facts_path().read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            store_measured(Measured(gflops=product_speeds(), threads=torch.get_num_threads()))
    assert _MEASURED is not None
    return _MEASURED


def store_measured(found: Measured) -> None:
    """Use what was measured, and write it down for later processes; a folder that refuses is no reason to stop."""
    global _MEASURED, _CHOICES
    _MEASURED, _CHOICES = found, None
    try:
        write_json(facts_path(), asdict(found))
    except (OSError, ValueError):
        log.info("cannot keep what was measured in %s; the next process measures again", facts_path())


def product_speeds(size: int = 256, repetitions: int = 8) -> dict[str, float]:
    """Best GFLOP/s of torch's product of square matrices, by precision. A slow one is measured once: some machines
    take 50 ms for what others do in 50 us."""
    speeds = {}
    for dtype, name in DTYPES.items():
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


def contradicts(name: str, factor: float) -> bool:
    """Whether a measured factor clearly says the opposite of what the table says of an operation."""
    by_table = table().get(instruction_set().name, {}).get(name, 1.0) >= 1
    return factor <= 1 / CLEARLY if by_table else factor >= CLEARLY


def decide() -> Choices:
    """Table, instruction set and measurements, put together."""
    isa, found = instruction_set().name, measured()
    rows = table().get(isa, {})
    kernels = {}
    for name in sorted({*rows, *found.factors}):
        own = found.factors.get(name)
        kernels[name] = (rows.get(name, 1.0) >= 1) != (own is not None and contradicts(name, own))
    fp32, bf16 = found.gflops["fp32"], found.gflops["bf16"]
    is_fast = isa in BF16_PRODUCTS and bf16 > fp32
    speeds = f"torch multiplies bf16 at {bf16:.4g} GFLOP/s and fp32 at {fp32:.4g}"
    reason = speeds if isa in BF16_PRODUCTS else f"{isa} has no products in bf16; {speeds}"
    return Choices(isa, "bf16" if is_fast else "fp32", reason, bf16 < fp32 / 2, kernels)


_MEASURED: Measured | None = None
_CHOICES: Choices | None = None


def choices() -> Choices:
    """What this process computes with: decided when first asked, unless a run's record was taken over."""
    global _CHOICES
    if _CHOICES is None:
        _CHOICES = decide()
    return _CHOICES


def record() -> dict[str, Any]:
    """What was chosen, for a run's provenance; where THINKSTACK_KERNELS forces it, what that says."""
    found = asdict(choices())
    if switch := os.environ.get(SWITCH, ""):
        found |= {"kernels": dict.fromkeys(found["kernels"], switch != "0"), "others": switch != "0"}
    return found


def describe() -> str:
    """What was chosen and why, in one line."""
    found = choices()
    off = sorted(name for name, uses_kernel in found.kernels.items() if not uses_kernel)
    kernels = {"0": "none, as asked", "1": "all, as asked"}.get(os.environ.get(SWITCH, ""), "")
    if not kernels:
        kernels = "none" if binary() is None else f"all but {', '.join(off)}" if off else "all"
    return f"{found.instruction_set}, dtype auto = {found.auto_dtype} ({found.reason}), kernels: {kernels}"


def restore(recorded: dict[str, Any] | None) -> None:
    """Compute as a record says from now on, or, for None, as this machine is found."""
    global _CHOICES
    if recorded is None:
        _CHOICES = None
        return
    own = decide()
    _CHOICES = Choices(**{name: recorded[name] for name in asdict(own)})
    if _CHOICES.instruction_set != own.instruction_set:
        log.warning(
            "begun on %s and continued on %s: the same choices (dtype auto = %s), but sums may differ in the last bits",
            _CHOICES.instruction_set,
            own.instruction_set,
            _CHOICES.auto_dtype,
        )


@contextlib.contextmanager
def choosing(name: str, uses_kernel: bool) -> Iterator[None]:
    """Meanwhile compute this operation, such as "attend.fp32", by its kernel or without."""
    known = choices().kernels
    before = dict(known)
    known[name] = uses_kernel
    try:
        yield
    finally:
        known.clear()
        known.update(before)


def uses(operation: str, dtype: torch.dtype) -> bool:
    """Whether the kernel computes an operation in this precision; THINKSTACK_KERNELS forces it."""
    switch = os.environ.get(SWITCH, "")
    if switch == "0" or binary() is None:
        return False
    found = choices()
    return switch == "1" or found.kernels.get(f"{operation}.{DTYPES[dtype]}", found.others)


def emulates_bf16() -> bool:
    """Whether products in bf16 go through fp32 here."""
    return choices().emulates_bf16


# What torch.compiler.assume_constant_result sets; calling that imports the whole compiler, a second of every start.
uses._dynamo_marked_constant = True  # type: ignore[attr-defined]
emulates_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]
