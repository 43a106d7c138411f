"""The demo over several seeds, and its controls: seconds and held-out accuracy, as docs/benchmarks.md shows them.

python bench/demo.py --seeds 1 2 3 4 5          about 6 minutes a seed on two cores; draws docs/images/demo.png
python bench/demo.py --seeds 1 --controls       and the controls of the first seed, about as long again
python bench/demo.py --seeds 1 2 3 4 5 --only-table     what runs/bench already holds
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure as Canvas
from studies import band, panel

from thinkstack.evals.plots import COLORS
from thinkstack.evals.results import Evaluation
from thinkstack.log import CURVE, read_lines, write_json
from thinkstack.machine import describe_machine


def read(path: Path) -> Evaluation:
    return Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8")))


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "thinkstack", *arguments], check=True, stdin=subprocess.DEVNULL)


def row_of(name: str, folder: Path, stage: str, seconds: float | None) -> dict[str, object]:
    """The figures of one model on the held-out problems."""
    found, greedy = read(folder / stage / "sampled.json"), read(folder / stage / "greedy.json")
    unseen = read(folder / stage / "unseen_wordings.json")
    return {
        "model": name,
        "seconds": "" if seconds is None else round(seconds),
        "pass@1": f"{found.pass_at_1:.3f} +- {found.question_error:.3f}",
        "cons@16": found.cons_at_16,
        "greedy": greedy.pass_at_1,
        "unseen wordings": unseen.pass_at_1,
        "level 4": found.by_level[4].pass_at_1,
        "worked": found.worked_share,
        "worked right": found.worked_accuracy,
        "direct right": found.direct_accuracy,
        "least over chance": min(found.by_task[f].pass_at_1 / found.chance[f] for f in found.by_task),
        "tokens": found.mean_tokens,
    }


def plot(folders: list[Path], path: Path) -> None:
    """Accuracy and length over the steps of reinforcement learning: mean, and least to largest over seeds."""
    curves = [read_lines(folder / "zero" / CURVE) for folder in folders]
    steps = [point["step"] for point in curves[0]]
    canvas = Canvas(figsize=(8.2, 3.4), dpi=144, layout="constrained")
    left, right = canvas.subplots(1, 2)
    panel(canvas, left, f"Held-out accuracy, {len(folders)} seeds", "RL step", "pass@1")
    panel(canvas, right, "Length of answers", "RL step", "tokens per answer")
    band(left, steps, [[point["pass_at_1"] for point in curve] for curve in curves], "all levels", COLORS[0])
    unseen = [[point["held_out_level"]["pass_at_1"] for point in curve] for curve in curves]
    band(left, steps, unseen, "level 4, never asked", COLORS[1])
    left.set_ylim(0, 1)
    left.legend(frameon=False, loc="lower right")
    band(right, steps, [[point["mean_tokens"] for point in curve] for curve in curves], "tokens", COLORS[2])
    right.set_ylim(bottom=0)
    canvas.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--controls", action="store_true", help="also run the controls of the first seed")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, ends = [], []
    for seed in options.seeds:
        folder = options.out / f"seed{seed}"
        if not options.only_table:
            run("demo", "--out", str(folder), "--seed", str(seed))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rows.append(row_of(f"base, seed {seed}", folder, "base-eval", None))
        rows.append(row_of(f"zero, seed {seed}", folder, "zero-eval", summary["seconds"]))
        ends.append((summary["base"]["pass_at_1"], summary["zero"]["pass_at_1"]))
    controls = options.out / f"controls{options.seeds[0]}"
    if options.controls and not options.only_table:
        start = options.out / f"seed{options.seeds[0]}" / "base" / "model"
        run("run", "demo_controls", "--out", str(controls), "--set", f"shared.start={start}")
    if (controls / "report").exists():
        for name in ("longer", "random", "format"):
            rows.append(row_of(f"{name}, seed {options.seeds[0]}", controls, f"{name}-eval", None))
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
    before, after = (statistics.fmean(column) for column in zip(*ends, strict=True))
    print(f"\nmean pass@1 over {len(ends)} seeds: {before:.3f} -> {after:.3f}   ({describe_machine()})")
    if not options.controls:
        plot([options.out / f"seed{seed}" for seed in options.seeds], Path("docs/images/demo.png"))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
