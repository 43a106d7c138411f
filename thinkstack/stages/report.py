"""Compare the evaluations of a recipe: a report for people and summary.json for programs."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from thinkstack.config import Input
from thinkstack.evals.report import write_report
from thinkstack.evals.results import Evaluation
from thinkstack.files import read_object
from thinkstack.log import CURVE, PROVENANCE, RECORD, Run, clock, read_lines, write_json
from thinkstack.stages.evaluate import GREEDY, SAMPLED, UNSEEN, read_evaluation, read_evaluations

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Contents of the report."""

    title: str
    """Headline."""
    columns: Annotated[dict[str, str], Input("")] = field(default_factory=dict)
    """Columns of the table: column name -> evaluation stage."""
    training: Annotated[str, Input("")] = ""
    """The RL stage whose training curve is shown; empty: no curve."""


def report(cfg: ReportConfig, run: Run) -> None:
    """Write report.md, .html, .json and plots into run.folder, and summary.json next to run.folder; print the table."""
    started = time.monotonic()
    folders = {name: Path(folder) for name, folder in cfg.columns.items()}
    columns = {name: read_evaluation(folder, SAMPLED) for name, folder in folders.items()}
    greedy, unseen = (read_evaluations(folders, file) for file in (GREEDY, UNSEEN))
    curve = read_lines(Path(cfg.training) / CURVE) if cfg.training else []
    metrics = Run(Path(cfg.training)).rows() if cfg.training else []
    seconds = stage_seconds(run.folder.parent)
    facts = describe_run(run, seconds)
    facts |= {f"greedy on unseen wordings, {name}": f"{result.pass_at_1:.3f}" for name, result in unseen.items()}
    write_report(run.folder, cfg.title, columns, greedy, curve, metrics, facts)
    total = sum(seconds.values()) + time.monotonic() - started
    write_json(run.folder.parent / SUMMARY, {"seconds": round(total, 1)} | summary(columns, greedy))
    head = (run.folder / "report.md").read_text(encoding="utf-8").split("\n## ")[0]
    print("\n".join(line for line in head.split("\n") if not line.startswith("![")).rstrip())
    print(f"report: {run.folder / 'report.html'}")


def stage_seconds(out: Path) -> dict[str, float]:
    """Seconds of each finished stage in a run folder, in the order in which they finished."""
    folders = sorted(
        (path.parent for path in out.glob(f"*/{RECORD}")), key=lambda each: (each / RECORD).stat().st_mtime
    )
    records = {folder.name: Run.record_of(folder) for folder in folders}
    return {name: record["seconds"] for name, record in records.items() if record.get("done")}


def summary(columns: dict[str, Evaluation], greedy: dict[str, Evaluation]) -> dict[str, Any]:
    """The contents of summary.json."""
    return {
        name: {
            "pass_at_1": result.pass_at_1,
            "question_error": result.question_error,
            "rerun_error": result.rerun_error,
            "cons_at_16": result.cons_at_16,
            "answer_rate": result.answer_rate,
            "n": result.samples,
            "problems": result.problems,
            "greedy": greedy[name].pass_at_1 if name in greedy else None,
            "by_task": {task: part.pass_at_1 for task, part in result.by_task.items()},
        }
        for name, result in columns.items()
    }


def describe_run(run: Run, seconds: dict[str, float]) -> dict[str, str]:
    """Provenance of the run and the time of each stage."""
    provenance = read_object(run.folder / PROVENANCE)
    facts = {name: str(provenance[name]) for name in ("commit", "date", "machine")}
    return facts | {f"time of {name}": clock(value) for name, value in seconds.items()}
