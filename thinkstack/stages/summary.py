"""Summary of a run: one line per stage with the artifact and the main result."""

from collections.abc import Mapping
from pathlib import Path

from thinkstack.checkpoint.state import MODEL
from thinkstack.evals.report import accuracy, describe_samples
from thinkstack.log import CURVE, Run
from thinkstack.stages.evaluate import SAMPLED, read_evaluation

LOSS_METRIC = "loss/next_token_nats"


def summarize(folders: Mapping[str, tuple[Path, str]]) -> str:
    """One line per finished stage, with the path of the artifact and the main result. folders: (folder, kind) of each
    stage, by name."""
    width = max(map(len, folders))
    return "\n".join(f"  {name:<{width}}  {_describe(Run(folder), kind)}" for name, (folder, kind) in folders.items())


def _describe(run: Run, kind: str) -> str:
    if kind == "report":
        return str(run.folder / "report.html")
    if kind == "evaluate" and (run.folder / SAMPLED).is_file():
        result = read_evaluation(run.folder, SAMPLED)
        figure = f"pass@1 {accuracy(result)} %" if result.answer_rate else accuracy(result)
        return f"{figure} of {result.problems:,} problems, {describe_samples(result)} ({run.folder})"
    model = run.folder / MODEL
    return "  ".join(filter(None, (str(model if model.is_dir() else run.folder), _progress(run))))


def _progress(run: Run) -> str:
    """Text with the main metric at the start and at the end of training."""
    curve = run.rows(CURVE)
    for key, label, factor, unit in (
        ("pass_at_1", "pass@1 during training", 100, " %"),
        ("held_out_nats", "held-out loss", 1, " nats"),
    ):
        points = [row[key] for row in curve if row.get(key) is not None]
        if len(points) > 1:
            return f"{label} {factor * points[0]:.4g} -> {factor * points[-1]:.4g}{unit}"
    losses = [row[LOSS_METRIC] for row in run.rows() if LOSS_METRIC in row]
    return f"loss {losses[0]:.4g} -> {losses[-1]:.4g} nats" if losses else ""
