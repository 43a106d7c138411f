"""Commands of SWE-bench: predictions of an evaluation for the official harness, and its reports as verdicts."""

import json
from collections.abc import Sequence
from pathlib import Path

from thinkstack.config import did_you_mean
from thinkstack.evals import swe_bench
from thinkstack.evals.records import ProblemRecord, read_samples
from thinkstack.evals.regrade import find_samples
from thinkstack.files import Row
from thinkstack.log import write_json, write_text
from thinkstack.stages.evaluate import replace_records
from thinkstack.tasks.benchmarks.swe_bench import SweBench
from thinkstack.tasks.table import BENCHMARKS
from thinkstack.types import ConfigError

JUDGED = "official_harness.json"
"""What was judged: reports and predictions with their hashes."""


def write_predictions(run: Path, out: Path, label: str, task: str) -> None:
    """Write the patches of an evaluation, one file for each completion of an instance, and print their names.

    out: a file NAME.jsonl; with n completions NAME-1.jsonl to NAME-n.jsonl. label: the start of model_name_or_path; ""
    is the name of the model. task: which task; "" if the run has one of SWE-bench.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"--predictions {out}: the harness takes files that end in .jsonl; add the ending")
    _, records = load(run, task)
    files = swe_bench.predictions_of(records)
    out.parent.mkdir(parents=True, exist_ok=True)
    for one in files:
        rows = one.rows(label or model_label(records[0]))
        path = out if len(files) == 1 else out.with_name(f"{out.stem}-{one.sample + 1}.jsonl")
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        empty = sum(not row["model_patch"] for row in rows)
        print(f"{path}: {len(rows)} instances, {empty} without a patch, as {rows[0]['model_name_or_path']}")


def apply_reports(run: Path, reports: Sequence[Path], logs: Path | None, task: str) -> Path:
    """Write the verdicts of the official harness into an evaluation; return the folder of its stage.

    reports: of one or several completions, in any order. logs: logs/run_evaluation/RUN_ID, for the reasons. Raises
    ConfigError for reports of other predictions or instances; then nothing is written.
    """
    samples, records = load(run, task)
    files = swe_bench.predictions_of(records)
    judged: dict[int, dict[str, swe_bench.Verdict]] = {}
    facts: list[Row] = []
    for path in reports:
        report = swe_bench.read_report(path)
        predictions = swe_bench.match(report, files)
        if predictions.sample in judged:
            raise ConfigError(f"{path.name} is a second report of the same predictions; give one of them")
        judged[predictions.sample] = swe_bench.verdicts(report, predictions, logs)
        facts.append(
            {"sample": predictions.sample, "predictions": predictions.digest, "report": str(path)}
            | {"report_sha256": report.sha256}
        )
    name = records[0].task
    replace_records(samples.parent, swe_bench.with_verdicts(read_samples(samples), judged, name))
    write_json(samples.parent / JUDGED, {"task": name, "reports": facts})
    return samples.parent


def load(run: Path, task: str) -> tuple[Path, list[ProblemRecord]]:
    """Return the samples file of a run, and its records of one task of SWE-bench. Raises ConfigError without one."""
    samples = find_samples(run)
    records = read_samples(samples)
    tasks = [name for name in dict.fromkeys(one.task for one in records) if BENCHMARKS.get(name) is SweBench]
    if task and task not in tasks:
        raise ConfigError(f"{samples} has no task {task!r} of SWE-bench{did_you_mean(task, tasks) if tasks else ''}")
    if not tasks:
        known = ", ".join(name for name, cls in BENCHMARKS.items() if cls is SweBench)
        raise ConfigError(f"{samples} has no task of SWE-bench; evaluate one of {known} first")
    if not task and len(tasks) > 1:
        raise ConfigError(f"{samples} has the tasks {', '.join(tasks)}; choose one by --task")
    return samples, [one for one in records if one.task == (task or tasks[0])]


def model_label(record: ProblemRecord) -> str:
    """Return the name of what sampled the completions: the last part of a path, without the ending of a file."""
    model = record.sampler.model if record.sampler else ""
    return Path(model).stem if record.sampler and record.sampler.kind == "answers" else Path(model).name
