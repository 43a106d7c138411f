"""What each part is worth, at tiny scale: `python bench/ablations.py pretraining|reinforcement [--seeds 0 1 2]`.

pretraining (about 6 minutes a seed on two cores): v3-tiny on the demo's corpus. The bias against an auxiliary loss
(Switch-like, weight 1e-2 over rows) and against nothing; with and without multi-token prediction, at equal steps; Muon
against AdamW, each at its best of three rates, at equal time: seconds a step are measured in alternation and
Muon gets as many steps as fit. Held-out loss and load, training curves.
reinforcement (about 5 minutes a seed): GRPO against PPO with a critic from the base of a finished demo, the same steps;
figures at the time at which the faster one ends. Nothing else may run.

Leaves runs in --out (a finished one is not run again), and docs/images/ablations-*.png.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from studies import band, held_out_rows, measure, panel, smoothed, table

from thinkstack.checkpoint.model import load_model
from thinkstack.checkpoint.state import MODEL
from thinkstack.config import build, merge
from thinkstack.evals.plots import COLORS
from thinkstack.log import CURVE, TIMINGS, Run, write_json
from thinkstack.machine import describe_machine, prepare_machine
from thinkstack.rl.config import PRESETS, RLConfig
from thinkstack.stages.pretrain import pretrain, start_pretraining
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.stages.rl import train_rl

STEPS, RL_STEPS = 500, 30
CORPUS = {"drill_share": 0.15, "worked_share": 0.45, "wrong_working_share": 0.5}
SETTING: dict[str, Any] = {
    "steps": STEPS,
    "rows": 8,
    "save_steps": 0,
    "corpus": CORPUS,
    "trainer": {
        "micro_batch_tokens": 640,
        "workers": 2,
        "optim": {"learning_rate": 2e-3, "warmup_steps": 20, "schedule": "cosine"},
    },
}
AUXILIARY_LOSS = {"trainer": {"bias_speed": 0.0, "balance_weight": 1e-2}}
PRETRAINING: dict[str, dict[str, Any]] = {
    "AdamW, bias, MTP": {},
    "auxiliary loss": AUXILIARY_LOSS,
    "no balancing": {"trainer": {"bias_speed": 0.0, "balance_weight": 0.0}},
    "no MTP": {"model": {"mtp_layers": 0}},
    "AdamW, rate 1e-3": {"trainer": {"optim": {"learning_rate": 1e-3}}},
    "AdamW, rate 4e-3": {"trainer": {"optim": {"learning_rate": 4e-3}}},
    "Muon, rate 2e-3": {"trainer": {"optim": {"optimizer": "muon"}}},
    "Muon, rate 4e-3": {"trainer": {"optim": {"optimizer": "muon", "learning_rate": 4e-3}}},
    "Muon, rate 8e-3": {"trainer": {"optim": {"optimizer": "muon", "learning_rate": 8e-3}}},
}
RL: dict[str, Any] = {
    "steps": RL_STEPS,
    "held_out_levels": [4],
    "eval_steps": 5,
    "save_steps": 0,
    "dynamic_sampling": False,
    "trainer": {"micro_batch_tokens": 2560, "workers": 2, "optim": {"learning_rate": 3e-4, "weight_decay": 0.0}},
}
REINFORCEMENT: dict[str, dict[str, Any]] = {
    "GRPO": {"advantage": "standardized"},
    "PPO with a critic": {"preset": "ppo"} | PRESETS["ppo"],
}


def config(arm: str, seed: int, steps: int = STEPS) -> PretrainConfig:
    """Settings of one arm."""
    return build(PretrainConfig, merge(SETTING, PRETRAINING[arm]) | {"seed": seed, "steps": steps}, arm)


def seconds_a_step(arms: list[str], folder: Path, rounds: int = 30) -> dict[str, float]:
    """Least time of a step of each, taken in turn."""
    runs = {arm: start_pretraining(config(arm, 0), Run(folder / "probe" / arm.replace(" ", "_"))) for arm in arms}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, run in runs.items():
            start = time.perf_counter()
            run.step()
            times[arm].append(time.perf_counter() - start)
    return {arm: min(found) for arm, found in times.items()}


def pretrained(arm: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train one arm, unless that is done, and measure it."""
    folder = out / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"
    cfg = config(arm, seed, steps)
    run = Run(folder)
    if not (folder / MODEL).exists():
        print(f"{arm}, seed {seed}: {steps} steps", flush=True)
        pretrain(cfg, run)
    found = measure(load_model(folder / MODEL), held_out_rows(cfg, folder / MODEL))
    return asdict(found) | {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "seconds": sum(row["time/step_seconds"] for row in run.rows(TIMINGS)),
        "loss_curve": smoothed([row["loss/next_token_nats"] for row in run.rows()], 20),
        "load_curve": smoothed([row.get("router/max_violation", 0.0) for row in run.rows()], 20),
    }


def pretraining(seeds: list[int], out: Path) -> list[dict[str, Any]]:
    """All arms over all seeds."""
    timed = seconds_a_step(["AdamW, bias, MTP", "Muon, rate 2e-3"], out)
    cost = timed["Muon, rate 2e-3"] / timed["AdamW, bias, MTP"]
    print(f"a step with Muon takes {cost:.2f} times as long")
    steps = {arm: int(STEPS / cost) if arm.startswith("Muon") else STEPS for arm in PRETRAINING}
    found = [pretrained(arm, seed, steps[arm], out) for seed in seeds for arm in PRETRAINING]
    rows = []
    for arm in PRETRAINING:
        mine = [one for one in found if one["arm"] == arm]
        rows.append(
            {
                "arm": arm,
                "steps": mine[0]["steps"],
                "seconds": f"{statistics.fmean(one['seconds'] for one in mine):.0f}",
                "held-out loss": spread([one["loss"] for one in mine], 4),
                "busiest expert, held-out": spread([one["violation"] for one in mine], 2),
            }
        )
    print(table(rows))
    plot_pretraining(found, Path("docs/images"))
    return found


def spread(values: list[float], digits: int) -> str:
    """Mean with the least and the largest."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def plot_pretraining(found: list[dict[str, Any]], folder: Path) -> None:
    """Load with and without the bias; loss with Muon and AdamW over time."""
    canvas = Figure(figsize=(7.2, 3.4), dpi=144, layout="constrained")
    axes = canvas.subplots()
    panel(canvas, axes, "Expert load in pre-training", "step", "busiest expert over mean, minus 1")
    for arm, color in zip(("AdamW, bias, MTP", "auxiliary loss", "no balancing"), COLORS, strict=False):
        runs = [one["load_curve"] for one in found if one["arm"] == arm]
        label = "bias (aux-loss-free)" if arm.startswith("AdamW") else arm
        band(axes, [20 * (i + 1) for i in range(len(runs[0]))], runs, label, color)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    canvas.savefig(folder / "ablations-load.png")
    canvas = Figure(figsize=(7.2, 3.4), dpi=144, layout="constrained")
    axes = canvas.subplots()
    panel(canvas, axes, "Optimizers at equal time", "seconds", "training loss (nats)")
    for name, color in zip(("AdamW", "Muon"), COLORS, strict=False):
        arms = {one["arm"] for one in found if one["arm"].startswith(name)}
        mean = {arm: statistics.fmean(one["loss"] for one in found if one["arm"] == arm) for arm in arms}
        best = min(mean, key=mean.__getitem__)
        mine = [one for one in found if one["arm"] == best]
        runs = [one["loss_curve"] for one in mine]
        pace = statistics.fmean(one["seconds"] for one in mine) / mine[0]["steps"]
        rate = best if "rate" in best else "AdamW, rate 2e-3"
        band(axes, [20 * (i + 1) * pace for i in range(len(runs[0]))], runs, f"{rate} (best of its rates)", color)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    canvas.savefig(folder / "ablations-optimizers.png")


def reinforced(arm: str, seed: int, start: Path, out: Path) -> dict[str, Any]:
    """Train one arm from the base, unless that is done; its accuracy over seconds of steps."""
    folder = out / f"{arm.replace(' ', '_')}-{seed}"
    run = Run(folder)
    if not (folder / MODEL).exists():
        print(f"{arm}, seed {seed}", flush=True)
        cfg = build(RLConfig, merge(RL, REINFORCEMENT[arm]) | {"start": str(start), "seed": seed}, arm)
        train_rl(cfg, run)
    clock, at = 0.0, {0: 0.0}
    for row in run.rows(TIMINGS):
        clock += row["time/rollout_seconds"] + row["time/train_seconds"]
        at[row["step"]] = clock
    points = [(at[point["step"]], point["pass_at_1"]) for point in run.rows(CURVE)]
    return {"arm": arm, "seed": seed, "points": points, "seconds": clock}


def at_time(points: list[tuple[float, float]], seconds: float) -> float:
    """Accuracy at a time, between the two points beside it."""
    for (t0, a0), (t1, a1) in itertools.pairwise(points):
        if t0 <= seconds <= t1:
            return a0 + (a1 - a0) * (seconds - t0) / (t1 - t0)
    return points[-1][1]


def reinforcement(seeds: list[int], start: Path, out: Path) -> list[dict[str, Any]]:
    """Both arms over all seeds."""
    found = [reinforced(arm, seed, start, out) for seed in seeds for arm in REINFORCEMENT]
    common = min(one["seconds"] for one in found)
    rows = []
    canvas = Figure(figsize=(7.2, 3.4), dpi=144, layout="constrained")
    axes = canvas.subplots()
    panel(canvas, axes, "From the same base, without dynamic sampling", "seconds of steps", "pass@1, held-out")
    grid = [common * i / 40 for i in range(41)]
    for arm, color in zip(REINFORCEMENT, COLORS, strict=False):
        mine = [one for one in found if one["arm"] == arm]
        band(axes, grid, [[at_time(one["points"], second) for second in grid] for one in mine], arm, color)
        step = statistics.fmean(one["seconds"] for one in mine) / RL_STEPS
        ends = spread([one["points"][-1][1] for one in mine], 3)
        equal = spread([at_time(one["points"], common) for one in mine], 3)
        rows.append({"arm": arm, "s/step": f"{step:.2f}", f"pass@1 at {common:.0f} s": equal, "at the end": ends})
    axes.legend(frameon=False)
    canvas.savefig(Path("docs/images") / "ablations-ppo.png")
    print(table(rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("pretraining", "reinforcement"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", type=Path, default=Path("runs/bench/seed1/base/model"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepare_machine()
    torch.manual_seed(0)
    if args.study == "pretraining":
        found = pretraining(args.seeds, args.out)
    else:
        found = reinforcement(args.seeds, args.start, args.out)
    print(describe_machine())
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
