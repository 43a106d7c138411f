"""What the stages of a run made, each in a line with its main figure."""

from collections.abc import Sequence
from pathlib import Path

from thinkstack.checkpoint.state import MODEL
from thinkstack.evals.report import accuracy, each
from thinkstack.log import CURVE, Run
from thinkstack.stages.evaluate import SAMPLED, read_evaluation

LOSS = "loss/next_token_nats"


def summarize(out: Path, stages: Sequence[tuple[str, str]]) -> str:
    """A line for each stage (name, kind) that is done: where its artifact lies, and its main figure."""
    width = max(len(name) for name, _ in stages)
    return "\n".join(f"  {name:<{width}}  {_describe(Run(out / name), kind)}" for name, kind in stages)


def _describe(run: Run, kind: str) -> str:
    if kind == "report":
        return str(run.folder / "report.html")
    if kind == "evaluate" and (run.folder / SAMPLED).is_file():
        found = read_evaluation(run, SAMPLED)
        figure = f"pass@1 {accuracy(found)} %" if found.answer_rate else accuracy(found)
        return f"{figure} of {found.problems:,} problems, {each(found.samples)} ({run.folder})"
    made = run.folder / MODEL
    return "  ".join(filter(None, (str(made if made.is_dir() else run.folder), _progress(run))))


def _progress(run: Run) -> str:
    """The main figure of training, before and after."""
    curve = run.rows(CURVE)
    for key, label, factor, unit in (
        ("pass_at_1", "pass@1 on the way", 100, " %"),
        ("held_out_nats", "held-out loss", 1, " nats"),
    ):
        points = [row[key] for row in curve if row.get(key) is not None]
        if len(points) > 1:
            return f"{label} {factor * points[0]:.4g} -> {factor * points[-1]:.4g}{unit}"
    losses = [row[LOSS] for row in run.rows() if LOSS in row]
    return f"loss {losses[0]:.4g} -> {losses[-1]:.4g} nats" if losses else ""
