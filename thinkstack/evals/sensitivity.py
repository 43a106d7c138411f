"""How far an accuracy depends on the prompt: spread over variants of the same questions, and its plot."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from thinkstack.evals.benchmark_plots import plot_accuracies
from thinkstack.evals.plots import INK, finish, new_canvas
from thinkstack.evals.results import EvalMetrics


def spread_line(found: Mapping[str, EvalMetrics]) -> str:
    """Describe the spread of the accuracies over variants, beside what sampling alone gives."""
    shares = {name: part.pass_at_1 for name, part in found.items()}
    low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    errors = [part.rerun_error for part in found.values() if part.rerun_error is not None]
    alone = f"; the re-run error of one is {100 * max(errors):.1f}" if errors else ""
    return (
        f"{len(shares)} variants: {100 * shares[low]:.1f} ({low}) to {100 * shares[high]:.1f} ({high}), standard "
        f"deviation {100 * statistics.stdev(shares.values()):.1f} points{alone}"
    )


def plot_sensitivity(path: Path, task: str, found: Mapping[str, EvalMetrics]) -> None:
    """Plot pass@1 of each variant with both intervals."""
    rows = list(found.items())[::-1]
    canvas, (panel, *_) = new_canvas(1, 1, f"{task}: accuracy by prompt", height=0.42 * len(rows) + 0.7)
    plot_accuracies(panel, {name if len(name) <= 30 else f"{name[:27]}...": part for name, part in rows})
    panel.set_xlabel("wide: 95 % over questions; narrow: over re-runs", fontsize=9, color=INK)
    finish(canvas, path, steps=False)
