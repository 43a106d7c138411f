"""Each operation by its kernel against torch's operators: `python bench/kernels.py [--write] [--n 9]`.

For every instruction set that this processor has, in a process of its own that is capped to it (torch, oneDNN and MKL
too), on one thread, nothing else running. A pair is the best of some repetitions by the kernel over the best of as many
without, in turn; the least ratio of n pairs counts. --write puts it into thinkstack/kernels/table.toml, which
says what is used where (docs/internals/kernels.md).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

from common import capped, machine

from thinkstack.machine import instruction_sets, prepare_machine
from thinkstack.stages.measure_kernels import CASES, speedup, warm_up

TABLE = Path(__file__).parents[1] / "thinkstack" / "kernels" / "table.toml"
PAIR_SECONDS = 0.1


def pairs(n: int) -> dict[str, list[float]]:
    """Ratios of each operation here and now."""
    prepare_machine(1)
    warm_up()
    found: dict[str, list[float]] = {}
    for name, case in CASES.items():
        work = case()
        found[name] = [speedup(name, work, PAIR_SECONDS) for _ in range(n)]
        print(f"{name:<22}{statistics.median(found[name]):8.2f}{min(found[name]):8.2f}", file=sys.stderr, flush=True)
    return found


def capped_pairs(isa: str, n: int) -> dict[str, list[float]]:
    """`pairs` in a process that has this instruction set and none better."""
    environment = os.environ | capped(isa) | {"THINKSTACK_KERNELS": ""}
    command = [sys.executable, __file__, "--here", "--n", str(n)]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    """Measure, print, and write the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process, as it is")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(pairs(args.n)))
        return
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    for isa in (one for one in instruction_sets() if one.has_kernels):
        print(f"{isa.name}: median, least of {args.n}; {machine()}", file=sys.stderr)
        table[isa.name] = {name: round(min(ratios), 2) for name, ratios in capped_pairs(isa.name, args.n).items()}
    lines = ["# Seconds of torch's operators over those of the kernel, the least of nine pairs; from 1 on it is used.",
             "# Made by: python bench/kernels.py --write"]  # fmt: skip
    for isa, rows in table.items():
        lines += ["", f"[{isa}]", *(f'"{name}" = {value}' for name, value in rows.items())]
    if args.write:
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
