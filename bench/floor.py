"""What this machine can do: `python bench/floor.py [--json FILE]`, about 20 seconds.

Matrix products per precision and shape, reading and copying memory, and the cost of calling an operator at all. Speed
targets are stated as shares of these figures. The best of all repetitions counts: a floor is what is possible.
"""

import statistics
from collections.abc import Callable

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import torch
from common import Row, arguments, machine, print_table, repeat, write_json

SHAPES = {
    "square 2048": (1, 2048, 2048, 2048),
    "v3-tiny projection": (1, 2048, 128, 256),
    "v3-tiny experts": (8, 512, 128, 128),
    "v3-tiny head": (1, 1024, 128, 640),
    "hidden 256, 32 experts": (32, 256, 256, 256),
}
"""Batch, rows, inner width, columns."""
MEMORY_BYTES = 1 << 28
"""Far beyond any cache."""


def matmul_gflops(
    shape: tuple[int, int, int, int], dtype: torch.dtype, budget_seconds: float = 1.2
) -> tuple[float, int]:
    """Best rate of (B, M, K) @ (B, K, N) in GFLOP/s, and the number of repetitions."""
    B, M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(B, M, K, generator=generator).to(dtype)
    right = torch.randn(B, K, N, generator=generator).to(dtype)
    out = torch.empty(B, M, N, dtype=dtype)
    times = repeat(lambda: torch.bmm(left, right, out=out), budget_seconds)
    return 2.0 * B * M * K * N / min(times) / 1e9, len(times)


def peak_gflops(dtype: torch.dtype) -> float:
    """Best rate over all shapes: no program of this machine multiplies faster."""
    return max(matmul_gflops(shape, dtype, budget_seconds=0.3)[0] for shape in SHAPES.values())


def gigabytes_per_second(work: Callable[[], object], moved_bytes: int) -> tuple[float, int]:
    """Best rate of `work`, which moves so many bytes, in GB/s."""
    times = repeat(work, 1.2)
    return moved_bytes / min(times) / 1e9, len(times)


def operator_microseconds() -> tuple[float, int]:
    """Time of one addition of two numbers: what every operator costs before it computes."""
    number, calls = torch.ones(1), 10_000

    def add() -> None:
        for _ in range(calls):
            number + number

    times = repeat(add, 1.2)
    return statistics.median(times) / calls * 1e6, len(times) * calls


def measure() -> list[Row]:
    """All figures."""
    source, target = torch.ones(MEMORY_BYTES // 4), torch.ones(MEMORY_BYTES // 4)
    found = [
        (f"matmul {name}, {str(dtype).removeprefix('torch.')}", "GFLOP/s", matmul_gflops(shape, dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for name, shape in SHAPES.items()
    ]
    found.append(("read memory", "GB/s", gigabytes_per_second(source.sum, MEMORY_BYTES)))
    found.append(("copy memory", "GB/s", gigabytes_per_second(lambda: target.copy_(source), 2 * MEMORY_BYTES)))
    found.append(("call an operator", "us", operator_microseconds()))
    return [Row(name=name, value=value, unit=unit, n=n, machine=machine()) for name, unit, (value, n) in found]


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    rows = measure()
    print_table(
        "floor of this machine",
        ("", "value", "unit", "n"),
        [(r.name, f"{r.value:.4g}", r.unit, str(r.n)) for r in rows],
    )
    print(machine())
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
