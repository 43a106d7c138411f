"""What the benches share: alternating pairs, the machine in words, tables, JSON files, and the transformers twin."""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.model import save_model
from thinkstack.models.transformer import Transformer

ATTENTION = ("sdpa", "eager")
EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""What transformers offers on a CPU; a bench takes the fastest combination for the work it measures."""
DEFAULT = "sdpa attention, grouped_mm experts"
"""What transformers builds when nothing is asked for."""
CAPS = {"x86-64-v3": ("avx2", "AVX2", "AVX2"), "x86-64-v4": ("avx512", "AVX512_CORE", "AVX512"),
        "avx512-vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
        "avx512-bf16": ("avx512", "AVX512_CORE_BF16", "AVX512")}  # fmt: skip
"""What torch, oneDNN and MKL are told, so that they use an instruction set and none better."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure."""

    name: str
    value: float
    unit: str
    n: int
    """Repetitions behind the value."""
    machine: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ours against a peer in alternating pairs. Times in seconds."""

    name: str
    ours: float
    """Median."""
    peer: float
    """Median."""
    floor: float
    """What the machine would need at its matmul peak; 0 where no floor is stated."""
    ratio: float
    """Median over pairs of peer / ours: above 1, ours is faster."""
    ratio_low: float
    """Least ratio of any pair."""
    n: int
    """Pairs."""
    machine: str
    spread: str
    """min .. max of ours and of the peer."""


def machine() -> str:
    """Processor, cores and versions in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"


def capped(isa: str) -> dict[str, str]:
    """Environment variables of a process that has this instruction set and none better."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return dict(zip(names, CAPS.get(isa, ()), strict=False)) | {"THINKSTACK_ISA": isa}


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def repeat(work: Callable[[], Any], budget_seconds: float, at_least: int = 3) -> list[float]:
    """Wall times of calls until the budget is used, after one call that does not count."""
    work()
    times: list[float] = []
    while len(times) < at_least or sum(times) < budget_seconds:
        times.append(seconds(work))
    return times


def compare(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    pairs: int,
    floor_seconds: float = 0.0,
    warm_up: int = 2,
    before: Callable[[], Any] = lambda: None,
) -> Comparison:
    """Time both in turn, so that a machine that slows down slows both. The first of a pair alternates too.

    before: called before each of them, untimed.
    """
    for _ in range(warm_up):
        ours()
        peer()
    mine, theirs = [], []
    for pair in range(pairs):
        order = ((ours, mine), (peer, theirs)) if pair % 2 == 0 else ((peer, theirs), (ours, mine))
        for work, times in order:
            before()
            times.append(seconds(work))
    return comparison_of(name, mine, theirs, floor_seconds)


def comparison_of(name: str, mine: Sequence[float], theirs: Sequence[float], floor_seconds: float) -> Comparison:
    """The figures of two lists of seconds, taken in pairs."""
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    return Comparison(
        name=name,
        ours=statistics.median(mine),
        peer=statistics.median(theirs),
        floor=floor_seconds,
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        n=len(ratios),
        machine=machine(),
        spread=f"ours {min(mine):.3f} .. {max(mine):.3f}, peer {min(theirs):.3f} .. {max(theirs):.3f}",
    )


def print_comparisons(title: str, found: Sequence[Comparison]) -> None:
    """The one table of a bench that compares."""
    rows = [
        (
            c.name,
            f"{c.ours:.3f}",
            f"{c.peer:.3f}",
            f"{c.ratio:.2f}",
            f"{c.ratio_low:.2f}",
            f"{c.floor / c.ours:.0%}" if c.floor else "-",
            str(c.n),
            c.spread,
        )
        for c in found
    ]
    heads = ("", "ours [s]", "peer [s]", "peer/ours", "least", "of floor", "n", "min .. max [s]")
    print_table(title, heads, rows)
    print(machine())


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    print(f"\n{title}")
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def write_json(path: Path | None, rows: Sequence[Row | Comparison]) -> None:
    """One JSON list of objects; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every bench takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--threads", type=int, default=2, help="threads of a product, on both sides")
    return parser


def twins(model: Transformer, dtype: torch.dtype, experts_kinds: Sequence[str] = EXPERTS) -> dict[str, Any]:
    """The same weights as transformers models, one per combination of attention and experts, by name."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", model)
        for attention in ATTENTION:
            for experts in experts_kinds:
                chosen = {"attn_implementation": attention} | (
                    {"experts_implementation": experts} if model.cfg.moe else {}
                )
                found[f"{attention} attention, {experts} experts"] = transformers.AutoModelForCausalLM.from_pretrained(
                    Path(folder) / "model", dtype=dtype, **chosen
                )
    return found


def fastest(works: dict[str, Callable[[], Any]], tries: int = 3) -> str:
    """Name of the work with the least time of `tries`, after one call that does not count; failures are left out."""
    times: dict[str, float] = {}
    for name, work in works.items():
        try:
            first = seconds(work)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"left out: {name}: {str(error).splitlines()[0]}")
            continue
        if not times or first < 3 * min(times.values()):  # hopeless ones cost a minute each
            times[name] = min(seconds(work) for _ in range(tries))
    if not times:
        raise RuntimeError("no implementation of the peer ran")
    return min(times, key=times.__getitem__)
