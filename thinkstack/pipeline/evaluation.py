"""`thinkstack eval`: tasks or a suite as a recipe of one stage, its data, its results as a table and as a report."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thinkstack.checkpoint.hf.hub import is_hub_name
from thinkstack.checkpoint.model import locate, open_source
from thinkstack.config import Tree, build, did_you_mean, hashed_settings, merge, override
from thinkstack.evals.benchmark_report import contest_table, result_rows, write_benchmark_report
from thinkstack.evals.contests import RATED, read_standings
from thinkstack.evals.records import ProblemRecord, read_samples
from thinkstack.evals.report import markdown_table, setting_line
from thinkstack.evals.results import Evaluation
from thinkstack.evals.runner import held_out_problems
from thinkstack.evals.sampling import EvalConfig
from thinkstack.evals.suites import load_suite
from thinkstack.log import Run
from thinkstack.pipeline.run import run_single
from thinkstack.stages.contests import rate_run
from thinkstack.stages.evaluate import SAMPLED, SAMPLES, EvaluateConfig, read_evaluation
from thinkstack.stages.evaluation_plan import print_plan
from thinkstack.tasks.benchmarks.datasets import FILE_SUFFIXES, DatasetTask
from thinkstack.tasks.table import BENCHMARKS, make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Problem

MAX_TOKENS = 512
"""Default maximum number of tokens of a completion, if the context of the model has twice as many."""
SHOWN_REASONS = 3
"""Reasons that are printed for completions without a score."""
CACHE = "runs/eval/endpoint"
"""Completions of endpoints by content, which all evaluations share."""
DEFAULTS: Tree = {
    "num_problems": 200,
    "samples": 1,
    "temperature": 0.6,
    "top_p": 0.95,
    "thinking_format": "flexible_extract",
    "greedy": False,
    "max_num_seqs": 64,
    "dtype": "auto",
}
"""Settings of `thinkstack eval` without a suite that differ from those of a stage in a recipe."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What `thinkstack eval` is asked for."""

    model: str = ""
    """A checkpoint; empty for an endpoint or answers."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; with a suite, those of its tasks to evaluate, all if empty."""
    suite: str = ""
    """Name of a suite (evals/suites.toml)."""
    row: Tree = field(default_factory=dict)
    """Settings of every task (TaskConfig)."""
    values: Tree = field(default_factory=dict)
    """Settings of the evaluation (EvaluateConfig)."""
    settings: tuple[str, ...] = ()
    """Dotted overrides of the evaluation's settings."""
    data: str = ""
    """Folder with the data of the tasks; empty: data/TASK."""
    is_partial: bool = False
    """Leave out tasks of a suite whose data are missing."""
    out: Path | None = None
    """Folder of the run; None: derived from model and settings."""


def run_evaluation(request: EvaluationRequest, report: Path | None = None, standings: Path | None = None) -> None:
    """Evaluate and print the results. report: a folder for the report. standings: a file, for a rating."""
    values, left_out = evaluation_values(request)
    if standings is not None:
        read_standings(standings)  # before anything is sampled
        if RATED not in values["tasks"]:
            raise ConfigError(f"--standings {standings} has no effect without the task {RATED}; leave it out")
    try:
        out = request.out or default_folder(request, values)
        run_single("evaluate", values, (), out)
    except ConfigError as error:
        raise ConfigError(_for_command_line(str(error))) from error
    if standings is not None:
        rate_run(out, standings, values.get("seed", 0))
    print_results(out / "evaluate", report, request.suite, left_out)


def print_results(folder: Path, report: Path | None, suite: str = "", left_out: Sequence[str] = ()) -> None:
    """Print the results of an evaluation. folder: of its stage. report: a folder for the report. left_out: tasks."""
    found = read_evaluation(folder, SAMPLED)
    print(f"{setting_line({'': found})}\n\n{results_table(found)}")
    if found.contests:
        table = contest_table(found.contests)
        print("\n".join(["", *markdown_table((table.corner, *table.columns), table.rows), "", table.note]))
    if found.unscorable:
        print(f"not scored: {reasons(read_samples(folder / SAMPLES))}")
    if left_out:
        print(f"left out, without data: {', '.join(left_out)}")
    if report is not None:
        title = f"{found.sampler.model if found.sampler else folder} on {suite or ', '.join(found.by_task)}"
        write_benchmark_report(report, title, found, Run(folder).provenance(), left_out)
        print(f"report: {report / 'report.html'}")


def reasons(records: Sequence[ProblemRecord]) -> str:
    """Return why completions were not scored, each reason with their number, the most frequent first."""
    found = Counter(answer.unscorable for record in records for answer in record.answers if answer.unscorable)
    return "; ".join(f"{count} of {reason}" for reason, count in found.most_common(SHOWN_REASONS))


def show_plan(request: EvaluationRequest, with_ids: bool) -> None:
    """Print what an evaluation would do, without sampling. with_ids: also the first prompt of each task as tokens."""
    values, left_out = evaluation_values(request)
    try:
        print_plan(build(EvaluateConfig, values, "stages.evaluate"), with_ids)
    except ConfigError as error:
        raise ConfigError(_for_command_line(str(error))) from error
    if left_out:
        print(f"left out, without data: {', '.join(left_out)}")


def _for_command_line(message: str) -> str:
    """An error of the stage, in the words of the command line."""
    message = re.sub(r"^stages\.evaluate(: |\.)", "", message)
    return message.replace("num_problems=", "--limit ", 1)


def results_table(found: Evaluation) -> str:
    """Return the results of all tasks as a Markdown table."""
    head, rows = result_rows(found)
    return "\n".join(markdown_table(head, rows))


def evaluation_values(request: EvaluationRequest) -> tuple[Tree, list[str]]:
    """Return the settings of the stage, and the tasks of a suite that are left out.

    Raises ConfigError for an unknown suite or task, and for data that are missing, with all places to get them.
    """
    values = DEFAULTS
    rows: dict[str, Tree] = {name: {} for name in request.tasks}
    if request.suite:
        suite = load_suite(request.suite)
        unknown = [name for name in request.tasks if name not in suite.tasks]
        if unknown:
            raise ConfigError(f"the suite {request.suite} has no task {unknown[0]}; it has {', '.join(suite.tasks)}")
        rows = {name: row for name, row in suite.tasks.items() if not request.tasks or name in request.tasks}
        values = merge(values, suite.settings)
    given = {name: value for name, value in request.values.items() if value is not None}
    row = {name: value for name, value in request.row.items() if value not in (None, "", 0, False, [])}
    values = merge(values, given) | {"tasks": {name: own | row for name, own in rows.items()}}
    for setting in request.settings:
        values = override(values, setting)
        _check_task_rows(values["tasks"], rows, setting)
    tasks, missing = task_rows(request, values["tasks"])
    left_out = sorted(missing) if request.is_partial else []
    if len(left_out) == len(tasks) or (missing and not request.is_partial):
        way_out = ", or leave them out with --available" if len(missing) < len(tasks) else ""
        raise ConfigError(f"{'; '.join(missing.values())} with --data{way_out}")
    values = values | {"tasks": {name: row for name, row in tasks.items() if name not in left_out}}
    if endpoint := values.get("endpoint"):
        values = values | {"endpoint": {"cache": CACHE} | endpoint}
    if request.model:
        values = values | {"start": request.model}
        if "max_tokens" not in values:
            values["max_tokens"] = min(MAX_TOKENS, open_source(request.model).cfg.max_positions // 2)
    return {"max_tokens": MAX_TOKENS} | values, left_out


def _check_task_rows(changed: object, rows: Mapping[str, Tree], setting: str) -> None:
    """Raise ConfigError for a setting after which the rows of tasks are not those of the evaluation."""
    if not isinstance(changed, dict) or not all(isinstance(row, dict) for row in changed.values()):
        raise ConfigError(f"--set {setting}: write it as tasks.TASK.SETTING=VALUE")
    if unknown := sorted(changed.keys() - rows):
        raise ConfigError(f"--set {setting}: the evaluation has no task {unknown[0]!r}{did_you_mean(unknown[0], rows)}")


def task_rows(request: EvaluationRequest, rows: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict[str, str]]:
    """Return the settings of each task, with its data, and why the data of a task are missing.

    Raises ConfigError for an unknown task and for settings that do not apply to it.
    """
    found, missing = {}, {}
    generated = [name for name in rows if _is_generated(name)]
    for name, row in rows.items():
        if name not in generated and (name in BENCHMARKS or request.data):
            row = {"data": find_data(request.data, name)} | row
        elif len(generated) == len(rows) and request.data:
            row = {"data": request.data} | row  # make_task refuses it
        found[name] = row
        task = make_task(name, build(TaskConfig, row, f"tasks.{name}"))
        if isinstance(task, DatasetTask):
            try:
                task.file("test")
            except ConfigError as error:
                missing[name] = f"{name}: {error}"
    return found, missing


def _is_generated(name: str) -> bool:
    try:
        make_task(name, TaskConfig())
    except ConfigError:
        return False
    return True


def test_problems(task: str, data: str, limit: int) -> list[Problem]:
    """Return the test problems of a task. limit: their number; 0: all."""
    request = EvaluationRequest(tasks=(task,), data=data)
    rows, missing = task_rows(request, {task: {}})
    if missing:
        raise ConfigError(f"{missing[task]} with --data")
    return held_out_problems(EvalConfig(tasks={task: build(TaskConfig, rows[task])}, num_problems=limit))


def find_data(root: str, name: str) -> str:
    """Return where the data of a task are below `root`: its file, or its folder; data/NAME without a root.

    For the task aime24 that is ROOT if it is a file, else ROOT/aime24, a file ROOT/aime24.jsonl (or with another
    suffix), a file of this name or of a published name of the set in any folder of ROOT; else ROOT itself.
    """
    if not root:
        return f"data/{name}"
    folder = Path(root)
    if folder.is_file():
        return root
    if (folder / name).is_dir():
        return str(folder / name)
    published = BENCHMARKS[name].FILE_NAMES if name in BENCHMARKS else ()
    names = [each + end for each in (name, *published) for end in (*FILE_SUFFIXES, ".csv")]
    found = [path for each in names for path in (*sorted(folder.glob(each)), *sorted(folder.glob(f"*/{each}")))]
    return str(found[0]) if found else root


def default_folder(request: EvaluationRequest, values: Tree) -> Path:
    """Return a folder below runs/eval that depends on the model, the settings and the files of the model."""
    label = request.suite or "-".join(values["tasks"])
    source = request.model or values.get("endpoint", {}).get("model") or values.get("answers") or "endpoint"
    name = re.sub(r"[^\w.-]+", "-", f"{Path(source).name or source}-{label}")[:100]
    versions: Sequence[tuple[str, int, int]] = ()
    if request.model and not is_hub_name(request.model):
        path = locate(request.model)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        # file sizes and times: a new training run may write a checkpoint with the same name
        versions = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = hashed_settings(build(EvaluateConfig, values, "stages.evaluate"))
    digest = hashlib.sha256(json.dumps([settings, versions], sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / "eval" / f"{name}-{digest}"
