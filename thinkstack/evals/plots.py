"""Plots of the report: learning curve, answer length, worked and direct answers, tasks, levels, training health.

Each function writes one PNG; `plot_all` writes every plot that has data. Figures are created without pyplot, so no
global state changes and no display is needed. Labels are English only: the fonts of matplotlib lack Chinese.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from thinkstack.evals.results import Evaluation

Point = Mapping[str, Any]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5f66")
"""Color-blind-safe palette by Okabe and Ito (grey replaces black)."""
GREY, INK, FRAME = "#9aa0a8", "#1f2328", "#d0d4da"
DPI = 144
HEALTH = {
    "reward/mean": "Mean reward",
    "policy/entropy_nats": "Entropy (nats)",
    "train/grad_norm": "Gradient norm",
    "rollout/mean_tokens": "Tokens per answer",
    "rollout/truncated": "Truncated answers",
    "group/mixed": "Groups with different rewards",
    "policy/kl_nats": "KL to the reference (nats)",
    "mismatch/mean_abs_nats": "Mean engine/trainer gap (nats)",
    "router/max_violation": "Busiest expert over mean, minus 1",
    "policy/clipped_high": "Clipped above",
    "policy/clipped_low": "Clipped below",
    "mismatch/abs_nats_max": "Largest engine/trainer gap (nats)",
    "train/learning_rate": "Learning rate",
}
"""Training metrics with a panel of their own, in order, with the panel titles."""
HEALTH_PANELS = 9


def plot_all(
    folder: Path, columns: Mapping[str, Evaluation], curve: Sequence[Point], metrics: Sequence[Point]
) -> dict[str, str]:
    """Write every plot that has data; return file name -> caption, in reading order."""
    chance = next((evaluation.chance for evaluation in columns.values() if evaluation.chance), {})
    captions = {}
    if curve:
        plot_accuracy(folder / "accuracy.png", curve, chance)
        captions["accuracy.png"] = "Accuracy on held-out problems; the band is one question error."
        plot_length(folder / "length.png", curve)
        captions["length.png"] = "Length of answers, and the share truncated at max_tokens."
        if any(point.get("worked_share") is not None for point in curve):
            plot_worked(folder / "worked.png", curve)
            captions["worked.png"] = "Share of answers with worked steps, and accuracy of worked and direct answers."
        if any(point.get("by_task") for point in curve):
            plot_tasks(folder / "tasks.png", curve, chance)
            captions["tasks.png"] = "pass@1 of each task; dotted lines mark a blind guess."
    pair = compared_columns(columns)
    if pair:
        plot_levels(folder / "levels.png", pair, chance)
        captions["levels.png"] = "pass@1 by task and level, with question errors; dotted lines mark a blind guess."
    if any(len(evaluation.over_tokens) > 1 for evaluation in pair.values()):
        plot_budgets(folder / "budgets.png", pair)
        captions["budgets.png"] = "pass@1 if every answer had ended at a token budget; a cut answer is wrong."
    panels = health_panels(metrics)
    if panels:
        plot_health(folder / "health.png", metrics, panels)
        captions["health.png"] = "Training health: single steps pale, running mean strong."
    return captions


def compared_columns(columns: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Return the two columns compared per level: base and zero if both exist, else the first two."""
    names = ["base", "zero"] if {"base", "zero"} <= set(columns) else list(columns)[:2]
    return {name: columns[name] for name in names}


def plot_accuracy(path: Path, curve: Sequence[Point], chance: Mapping[str, float]) -> None:
    """Plot pass@1 with its question error, the majority vote, and, if measured, a level excluded from training."""
    canvas, axes = new_canvas(1, 1, "Accuracy over RL steps")
    panel = axes[0]
    _line(panel, curve, "cons_at_16", COLORS[1], "majority vote")
    _line(panel, curve, "pass_at_1", COLORS[0], "pass@1", error="question_error")
    held_out = [dict(point["held_out_level"]) | {"step": point["step"]} for point in curve if "held_out_level" in point]
    if held_out:
        _line(
            panel, held_out, "pass_at_1", COLORS[2], "pass@1, level never trained", error="question_error", dashes="--"
        )
    if chance:
        mean_chance = sum(chance.values()) / len(chance)
        panel.axhline(mean_chance, color=GREY, linewidth=1.2, linestyle=":", label="blind guess")
    _percent(panel)
    finish(canvas, path, panel)


def plot_length(path: Path, curve: Sequence[Point]) -> None:
    """Plot tokens per answer and the truncation rate."""
    canvas, axes = new_canvas(1, 2, "Length of answers over RL steps")
    _line(axes[0], curve, "mean_tokens", COLORS[0], "tokens per answer")
    axes[0].set_ylim(bottom=0)
    axes[0].set_title("Tokens per answer", loc="left", fontsize=10, color=INK)
    _line(axes[1], curve, "truncation_rate", COLORS[1], "truncated")
    _percent(axes[1])
    highest = max((point["truncation_rate"] for point in curve if point.get("truncation_rate") is not None), default=0)
    axes[1].set_ylim(0, max(highest * 1.15, 0.05))
    axes[1].set_title("Truncated answers", loc="left", fontsize=10, color=INK)
    finish(canvas, path)


def plot_worked(path: Path, curve: Sequence[Point]) -> None:
    """Plot the share of worked answers and the accuracy of worked and direct answers."""
    canvas, axes = new_canvas(1, 1, "Worked and direct answers over RL steps")
    _line(axes[0], curve, "worked_share", GREY, "share of worked answers", dashes="--")
    _line(axes[0], curve, "worked_accuracy", COLORS[0], "accuracy of worked answers")
    _line(axes[0], curve, "direct_accuracy", COLORS[1], "accuracy of direct answers")
    _percent(axes[0])
    finish(canvas, path, axes[0])


def plot_tasks(path: Path, curve: Sequence[Point], chance: Mapping[str, float]) -> None:
    """Plot pass@1 with one line per task."""
    canvas, axes = new_canvas(1, 1, "Accuracy by task over RL steps")
    names = sorted({name for point in curve for name in point.get("by_task", {})})
    for index, name in enumerate(names):
        points = [{"step": p["step"], name: p.get("by_task", {}).get(name)} for p in curve]
        color = COLORS[index % len(COLORS)]
        _line(axes[0], points, name, color, name)
        if name in chance:
            axes[0].axhline(chance[name], color=color, linewidth=1, linestyle=":", alpha=0.6)
    _percent(axes[0])
    finish(canvas, path, axes[0])


def plot_levels(path: Path, columns: Mapping[str, Evaluation], chance: Mapping[str, float]) -> None:
    """Plot bars of pass@1 per level: one panel per task, one color per column."""
    cells = {name: evaluation.by_task_level for name, evaluation in columns.items()}
    tasks = sorted({task for cell in cells.values() for task in cell})
    canvas, axes = new_canvas(-(-len(tasks) // 2), min(len(tasks), 2), "Accuracy by difficulty", height=2.5)
    width = 0.8 / len(columns)
    for panel, task in zip(axes, tasks, strict=False):
        levels = sorted({level for cell in cells.values() for level in cell.get(task, {})})
        for index, (name, cell) in enumerate(cells.items()):
            shown = [
                (position, cell[task][level]) for position, level in enumerate(levels) if level in cell.get(task, {})
            ]
            panel.bar(
                [position + (index - (len(cells) - 1) / 2) * width for position, _ in shown],
                [part.pass_at_1 or 0.0 for _, part in shown],
                width * 0.94,
                yerr=[part.question_error or 0.0 for _, part in shown],
                color=GREY if index == 0 else COLORS[index - 1],
                error_kw={"elinewidth": 1, "ecolor": INK},
                label=name,
            )
        if task in chance:
            panel.axhline(chance[task], color=INK, linewidth=1, linestyle=":")
        panel.set_xticks(range(len(levels)), [str(level) for level in levels])
        panel.set_title(task, loc="left", fontsize=10, color=INK)
        panel.set_xlabel("steps to solve (level)", color=INK)
        panel.grid(axis="x", visible=False)
        _percent(panel)
    for panel in axes[len(tasks) :]:
        panel.set_visible(False)
    _legend_on_top(canvas, axes[0])
    finish(canvas, path, steps=False)


def plot_budgets(path: Path, columns: Mapping[str, Evaluation]) -> None:
    """Plot pass@1 over token budgets, one line per column, and the share of answers that end within the budget."""
    canvas, axes = new_canvas(1, 1, "Accuracy over token budgets")
    for index, (name, evaluation) in enumerate(columns.items()):
        budgets, color = [point.budget_tokens for point in evaluation.over_tokens], GREY if index == 0 else COLORS[0]
        shares = [point.pass_at_1 for point in evaluation.over_tokens]
        finished = [point.finished for point in evaluation.over_tokens]
        axes[0].plot(budgets, shares, color=color, linewidth=2, marker="o", markersize=3.5, label=f"{name}: pass@1")
        axes[0].plot(budgets, finished, "--", color=color, linewidth=1.2, label=f"{name}: finished")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("budget (tokens)", fontsize=9, color=INK)
    _percent(axes[0])
    finish(canvas, path, axes[0], steps=False)


def health_panels(metrics: Sequence[Point]) -> dict[str, str]:
    """Return metric -> panel title: the metrics of HEALTH first, then other reward, group and rollout metrics.

    Metrics that never change are left out.
    """
    values: dict[str, set[float]] = {}
    for row in metrics:
        for key, value in row.items():
            if isinstance(value, int | float):
                values.setdefault(key, set()).add(value)
    present = {key for key, seen in values.items() if len(seen) > 1}
    others = sorted(key for key in present - set(HEALTH) if key.split("/")[0] in ("reward", "group", "rollout"))
    titles = {key: title for key, title in HEALTH.items() if key in present} | {key: key for key in others}
    return dict(list(titles.items())[:HEALTH_PANELS])


def plot_health(path: Path, metrics: Sequence[Point], panels: Mapping[str, str]) -> None:
    """Plot one small panel per metric."""
    columns = min(3, len(panels))
    canvas, axes = new_canvas(-(-len(panels) // columns), columns, "Training health", height=2.1)
    for panel, (key, title) in zip(axes, panels.items(), strict=False):
        rows = [row for row in metrics if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        steps, values = [row["step"] for row in rows], [float(row[key]) for row in rows]
        panel.plot(steps, values, color=COLORS[0], linewidth=0.8, alpha=0.3)
        panel.plot(steps, running_mean(values, max(len(values) // 20, 1)), color=COLORS[0], linewidth=1.8)
        panel.set_title(title, loc="left", fontsize=9, color=INK)
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    finish(canvas, path)


def running_mean(values: Sequence[float], radius: int) -> list[float]:
    """Return the mean of each value and up to `radius` neighbors on either side."""
    windows = (values[max(index - radius, 0) : index + radius + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def new_canvas(rows: int, columns: int, title: str, height: float = 3.6) -> tuple[Canvas, list[Axes]]:
    """Create an empty figure with a title; return it and its panels in reading order."""
    canvas = Canvas(figsize=(8.2, height * rows + 0.6), dpi=DPI, layout="constrained", facecolor="white")
    canvas.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FRAME)
        panel.grid(color=FRAME, linewidth=0.6, alpha=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(colors="#59606a", labelsize=9, length=0)
    return canvas, panels


def _line(
    panel: Axes,
    points: Sequence[Point],
    name: str,
    color: str,
    label: str,
    error: str | None = None,
    dashes: str = "-",
) -> None:
    """Plot one metric over steps; points without the metric leave a gap."""
    steps = [point["step"] for point in points]
    values = [math.nan if point.get(name) is None else float(point[name]) for point in points]
    marker = "o" if len(points) <= 40 else None
    panel.plot(steps, values, dashes, color=color, linewidth=2, label=label, marker=marker, markersize=3.5)
    if error:
        spread = [point.get(error) or 0.0 for point in points]
        low = [value - half for value, half in zip(values, spread, strict=True)]
        high = [value + half for value, half in zip(values, spread, strict=True)]
        panel.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)


def percent_axis(axis: Axis) -> None:
    """Label an axis of shares in percent."""
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _percent(panel: Axes) -> None:
    percent_axis(panel.yaxis)
    panel.set_ylim(0, 1.02)


def _legend_on_top(canvas: Canvas, panel: Axes) -> None:
    """Add one legend for all panels, next to the title."""
    handles, labels = panel.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=9, labelcolor=INK)


def finish(canvas: Canvas, path: Path, panel: Axes | None = None, steps: bool = True) -> None:
    """Label the step axes, add the panel's legend below, and write the file atomically."""
    if steps:
        for axes in canvas.axes:
            position = axes.get_subplotspec()
            if position is not None and position.is_last_row():
                axes.set_xlabel("RL step", fontsize=9, color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=9 if len(canvas.axes) < 3 else 5, integer=True))
    if panel is not None:
        _, labels = panel.get_legend_handles_labels()
        canvas.legend(loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9, labelcolor=INK)
    temporary = path.with_name(path.name + ".writing")
    canvas.savefig(temporary, format="png")
    temporary.replace(path)
