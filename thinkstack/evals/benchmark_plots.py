"""Plots of an evaluation's report: accuracy with both errors, published figures beside it, budgets, lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from thinkstack.evals.plots import COLORS, FRAME, GREY, INK, finish, new_canvas, percent_axis
from thinkstack.evals.results import EvalMetrics, Evaluation

if TYPE_CHECKING:
    from thinkstack.evals.benchmark_report import Beside

MAX_BESIDE = 14
"""Published rows of a task in the plot: the comparable ones, then the highest."""


def plot_benchmarks(folder: Path, found: Evaluation, beside: Mapping[str, "Sequence[Beside]"]) -> dict[str, str]:
    """Write every plot that has data; return file name -> caption, in reading order."""
    captions = {}
    plot_tasks(folder / "accuracy.png", found)
    captions["accuracy.png"] = (
        "pass@1 of each task. Wide bar: 95 % interval over questions; narrow bar: 95 % interval over re-runs of the "
        "same questions; tick: a blind guess."
    )
    percentages = {
        task: [one for one in rows if one.row.unit == "%" and one.row.metric != "percentile"]
        for task, rows in beside.items()
    }
    if shown := {task: rows for task, rows in percentages.items() if rows}:
        plot_published(folder / "published.png", found, shown)
        captions["published.png"] = (
            "Published figures beside ours (line). Filled: the same protocol; hollow: another one, or one that is "
            "not stated, so that the figures cannot be compared."
        )
    sampled = {task: part for task, part in found.by_task.items() if part.tokens_at.get(100)}
    if any(points for points in found.forced.values()):
        plot_forced(folder / "forced.png", found)
        captions["forced.png"] = "pass@1 if thinking is closed by force after a budget, and then answered."
    if len(found.over_tokens) > 1:
        plot_cut(folder / "budgets.png", found)
        captions["budgets.png"] = "pass@1 if every answer had ended at a token budget; a cut answer is wrong."
    if sampled:
        plot_lengths(folder / "lengths.png", sampled)
        captions["lengths.png"] = (
            "Tokens of completions: bar from 10 % to 90 %, dot at the median, tick at the longest."
        )
    return captions


def plot_tasks(path: Path, found: Evaluation) -> None:
    """Plot pass@1 of each task with both intervals."""
    parts = list(found.by_task.items())[::-1]
    canvas, (panel, *_) = new_canvas(1, 1, "Accuracy", height=0.42 * len(parts) + 0.7)
    plot_accuracies(panel, dict(parts))
    for place, (task, _) in enumerate(parts):
        if task in found.chance:
            panel.plot(found.chance[task], place, "|", color=INK, markersize=11)
    panel.set_xlim(-0.02, 1.02)
    finish(canvas, path, steps=False)


def plot_accuracies(panel: Axes, parts: Mapping[str, EvalMetrics]) -> None:
    """Plot pass@1 with both intervals, a row for each name from below."""
    for place, part in enumerate(parts.values()):
        for error, width, color in ((part.over_questions, 7, FRAME), (part.over_reruns, 3, COLORS[5])):
            if error is not None:
                panel.hlines(place, max(error.low, 0), min(error.high, 1), color=color, linewidth=width)
        panel.plot(part.pass_at_1, place, "o", color=COLORS[0], markersize=6)
    _label_rows(panel, list(parts))
    percent_axis(panel.xaxis)


def plot_published(path: Path, found: Evaluation, beside: Mapping[str, "Sequence[Beside]"]) -> None:
    """Plot the published figures of each task in a panel of its own."""
    shown = {task: sorted(rows[:MAX_BESIDE], key=lambda one: one.row.figure) for task, rows in beside.items()}
    height = 0.26 * max(map(len, shown.values())) + 0.8
    canvas, panels = new_canvas(-(-len(shown) // 2), min(len(shown), 2), "Beside published figures", height=height)
    for panel, (task, rows) in zip(panels, shown.items(), strict=False):
        part = found.by_task[task]
        panel.axvline(part.pass_at_1, color=COLORS[1], linewidth=2)
        if part.over_questions:
            low, high = max(part.over_questions.low, 0), min(part.over_questions.high, 1)
            panel.axvspan(low, high, color=COLORS[1], alpha=0.12, linewidth=0)
        for place, one in enumerate(rows):
            fill = COLORS[0] if one.is_comparable else "white"
            edge = COLORS[0] if one.is_comparable else GREY
            panel.plot(one.row.figure / 100, place, "o", color=edge, markerfacecolor=fill, markersize=6)
        modes = [f" ({one.row.mode})" if one.row.mode else "" for one in rows]
        names = [f"{one.row.model}{mode}" for one, mode in zip(rows, modes, strict=True)]
        _label_rows(panel, [f"{name}, {one.row.metric}" for name, one in zip(names, rows, strict=True)], 7.5)
        panel.set_title(task, loc="left", fontsize=10, color=INK)
        percent_axis(panel.xaxis)
        panel.set_xlim(-0.02, 1.02)  # room for markers at the ends
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    finish(canvas, path, steps=False)


def _label_rows(panel: Axes, names: Sequence[str], size: float = 9) -> None:
    panel.set_yticks(range(len(names)), names, fontsize=size)
    panel.set_ylim(-0.7, len(names) - 0.3)
    panel.grid(axis="y", visible=False)


def plot_forced(path: Path, found: Evaluation) -> None:
    """Plot pass@1 over thinking budgets with forced ends, one line per task."""
    canvas, (panel, *_) = new_canvas(1, 1, "Accuracy over thinking budgets, closed by force")
    for place, (task, points) in enumerate(found.forced.items()):
        budgets = [point.budget_tokens for point in points]
        color = COLORS[place % len(COLORS)]
        panel.plot(budgets, [point.pass_at_1 for point in points], "o-", color=color, linewidth=2, label=task)
        panel.axhline(found.by_task[task].pass_at_1, color=color, linewidth=1, linestyle=":")
    panel.set_xscale("symlog", base=2, linthresh=1)
    used = sorted({point.budget_tokens for points in found.forced.values() for point in points})
    panel.set_xticks(used, [f"{budget:,}" for budget in used])
    panel.set_xlim(left=-0.2 if used[0] == 0 else used[0] / 1.2, right=used[-1] * 1.2 + 0.2)
    panel.set_xlabel("thinking tokens (dotted: without a budget)", fontsize=9, color=INK)
    percent_axis(panel.yaxis)
    panel.set_ylim(0, 1.02)
    finish(canvas, path, panel, steps=False)


def plot_cut(path: Path, found: Evaluation) -> None:
    """Plot pass@1 and the share of finished completions over token budgets."""
    canvas, (panel, *_) = new_canvas(1, 1, "Accuracy over token budgets")
    budgets = [point.budget_tokens for point in found.over_tokens]
    panel.plot(budgets, [point.pass_at_1 for point in found.over_tokens], "o-", color=COLORS[0], label="pass@1")
    panel.plot(budgets, [point.finished for point in found.over_tokens], "--", color=GREY, label="finished")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("budget (tokens)", fontsize=9, color=INK)
    percent_axis(panel.yaxis)
    panel.set_ylim(0, 1.02)
    finish(canvas, path, panel, steps=False)


def plot_lengths(path: Path, parts: Mapping[str, EvalMetrics]) -> None:
    """Plot the lengths of the completions of each task."""
    rows = list(parts.items())[::-1]
    canvas, (panel, *_) = new_canvas(1, 1, "Length of completions", height=0.42 * len(rows) + 0.7)
    for place, (_, part) in enumerate(rows):
        tokens = part.tokens_at
        panel.hlines(place, tokens[10], tokens[90], color=FRAME, linewidth=7)
        panel.plot(tokens[50], place, "o", color=COLORS[0], markersize=6)
        panel.plot(tokens[100], place, "|", color=INK, markersize=11)
    _label_rows(panel, [task for task, _ in rows])
    panel.set_xlim(left=0)
    panel.set_xlabel("tokens", fontsize=9, color=INK)
    finish(canvas, path, steps=False)
