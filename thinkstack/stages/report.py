"""Put the evaluations of a recipe side by side: summary.json for programs, a report for people."""

import time
from dataclasses import dataclass, field
from typing import Any

from thinkstack.evals.report import write_report
from thinkstack.evals.results import Evaluation
from thinkstack.files import read_object
from thinkstack.log import CURVE, PROVENANCE, Run, clock, read_lines, write_json
from thinkstack.stages.evaluate import GREEDY, SAMPLED, UNSEEN, read_evaluation, read_evaluations

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is shown."""

    title: str
    """Headline."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the table -> evaluation stage of the same recipe."""
    training: str = ""
    """The stage of reinforcement learning whose curve is shown; empty shows none."""


def report(cfg: ReportConfig, run: Run) -> None:
    """Write run.folder (report.md, .html, .json, plots) and summary.json beside it, and print the table."""
    started = time.monotonic()
    out = run.folder.parent
    columns = {name: read_evaluation(Run(out / stage), SAMPLED) for name, stage in cfg.columns.items()}
    greedy, unseen = (read_evaluations(out, cfg.columns, file) for file in (GREEDY, UNSEEN))
    curve = read_lines(out / cfg.training / CURVE) if cfg.training else []
    metrics = Run(out / cfg.training).rows() if cfg.training else []
    manifest = read_object(out / "manifest.json")
    seconds = {name: record["seconds"] for name, record in manifest.items() if record["done"]}
    facts = describe_run(run, seconds)
    facts |= {f"greedy in unseen wordings, {name}": f"{found.pass_at_1:.3f}" for name, found in unseen.items()}
    write_report(run.folder, cfg.title, columns, greedy, curve, metrics, facts)
    total = sum(seconds.values()) + time.monotonic() - started
    write_json(out / SUMMARY, {"seconds": round(total, 1)} | summary(columns, greedy))
    told = (run.folder / "report.md").read_text(encoding="utf-8").split("\n## ")[0]
    print("\n".join(line for line in told.split("\n") if not line.startswith("![")).rstrip())
    print(f"report: {run.folder / 'report.html'}")


def summary(columns: dict[str, Evaluation], greedy: dict[str, Evaluation]) -> dict[str, Any]:
    """The figures that programs read."""
    return {
        name: {
            "pass_at_1": found.pass_at_1,
            "stderr": found.stderr,
            "cons_at_16": found.cons_at_16,
            "answer_rate": found.answer_rate,
            "n": found.samples,
            "problems": found.problems,
            "greedy": greedy[name].pass_at_1 if name in greedy else None,
            "by_task": {family: part.pass_at_1 for family, part in found.by_task.items()},
        }
        for name, found in columns.items()
    }


def describe_run(run: Run, seconds: dict[str, float]) -> dict[str, str]:
    """Where the figures come from."""
    known = read_object(run.folder / PROVENANCE)
    facts = {name: str(known[name]) for name in ("commit", "date", "machine")}
    return facts | {f"time of {name}": clock(value) for name, value in seconds.items()}
