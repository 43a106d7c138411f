"""Commands on logs of inspect: an evaluation as a log, and a log as an evaluation."""

import datetime
from pathlib import Path
from typing import get_args

from thinkstack.config import did_you_mean
from thinkstack.evals.records import read_samples, write_samples
from thinkstack.evals.regrade import find_samples
from thinkstack.evals.report import markdown_table
from thinkstack.evals.results import summarize
from thinkstack.files import read_object
from thinkstack.log import PROVENANCE, write_json
from thinkstack.stages.evaluate import SAMPLED, SAMPLES, read_evaluation
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError


def export_log(run: Path, out: Path, task: str = "") -> None:
    """Write the samples of a run as a log. task: the task to write; "" if the run has one.

    Raises ConfigError for an unknown task, for several without a choice, and without the extra `inspect`.
    """
    from thinkstack.evals.adapters.inspect_log import write_eval_log

    path = find_samples(run)
    records = read_samples(path)
    tasks = list(dict.fromkeys(record.task for record in records))
    if task and task not in tasks:
        raise ConfigError(f"{path} has no task {task!r}{did_you_mean(task, tasks)}")
    if not task and len(tasks) > 1:
        raise ConfigError(f"{path} has the tasks {', '.join(tasks)}, and a log has one; choose it by --task")
    task = task or tasks[0]
    has_figures = (path.parent / SAMPLED).exists()
    evaluation = read_evaluation(path.parent, SAMPLED) if has_figures else None
    facts = read_object(path.parent / PROVENANCE) if (path.parent / PROVENANCE).exists() else {}
    written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    write_eval_log(
        [record for record in records if record.task == task],
        out,
        str(facts.get("date", written)),
        None if evaluation is None else evaluation.protocols.get(task),
        None if evaluation is None else evaluation.sampler,
        facts,
        0.0 if evaluation is None else evaluation.seconds,
    )
    print(f"{out}: {task}; show it: inspect view start --log-dir {out.parent}")


def import_log(
    path: Path,
    out: Path | None = None,
    task: str = "",
    scorer: str = "",
    language: str = "en",
    thinking_format: str = "flexible_extract",
) -> None:
    """Write the samples of a log as a run, and print its accuracy. The other arguments are those of `read_eval_log`.

    Raises ConfigError like `read_eval_log`, for an unknown thinking format, and without the extra `inspect`.
    """
    from thinkstack.evals.adapters.inspect_log import read_eval_log

    formats = get_args(ThinkingFormat)
    if thinking_format not in formats:
        raise ConfigError(f"unknown thinking format {thinking_format!r}{did_you_mean(thinking_format, formats)}")
    records = read_eval_log(path, task, scorer, language)
    folder = out or Path("runs") / "eval" / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / SAMPLES, records)
    write_json(folder / PROVENANCE, {"log": str(path), "config": {"thinking_format": thinking_format}})
    found = summarize(records, seconds=0.0)
    spread = "-" if found.question_error is None else f"{100 * found.question_error:.1f}"
    cells = [
        *(str(found.problems), str(found.samples), records[0].grader or "-", f"{100 * found.pass_at_1:.1f}"),
        *(spread, str(found.unscorable)),
    ]
    head = ("task", "problems", "samples", "scorer", "pass@1", "question error", "not scored")
    print("\n".join(markdown_table(head, [(records[0].task, cells)])))
    print(f"\nsamples in {folder}")
