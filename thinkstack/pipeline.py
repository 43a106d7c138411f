"""Run the stages of a recipe in order, each on the artifacts of earlier stages. Completed stages are skipped,
interrupted stages resume.

A recipe is a TOML file: `shared` settings that apply to every stage with these keys, then one table per stage, in
order.
"""

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from thinkstack.checkpoint.hf.hub import is_hub_name
from thinkstack.checkpoint.model import locate, open_source
from thinkstack.checkpoint.state import MODEL
from thinkstack.config import Tree, build, did_you_mean, dump, merge, override, read_toml
from thinkstack.evals.report import markdown_table, setting_line, table_rows
from thinkstack.files import matching_files, read_object
from thinkstack.kernels import choice
from thinkstack.log import PROVENANCE, Run, clock, write_json
from thinkstack.machine import describe_machine
from thinkstack.rl.config import PRESETS, RLConfig
from thinkstack.stages.evaluate import SAMPLED, EvaluateConfig, evaluate_checkpoint, read_evaluation
from thinkstack.stages.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from thinkstack.stages.pretrain import PretrainConfig, pretrain
from thinkstack.stages.report import ReportConfig, report
from thinkstack.stages.rl import train_rl
from thinkstack.stages.sft import SftConfig, sft
from thinkstack.stages.summary import summarize
from thinkstack.stopping import stopping_on_signals
from thinkstack.tasks.reward import PARTS, RewardConfig
from thinkstack.tasks.table import BENCHMARKS, make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Interrupted

log = logging.getLogger(__name__)

STAGES: dict[str, tuple[type, Callable[[Any, Run], None]]] = {
    "import_checkpoint": (ImportCheckpointConfig, import_checkpoint),
    "pretrain": (PretrainConfig, pretrain),
    "sft": (SftConfig, sft),
    "rl": (RLConfig, train_rl),
    "evaluate": (EvaluateConfig, evaluate_checkpoint),
    "report": (ReportConfig, report),
}
MANIFEST = "manifest.json"
FORMAT = 2
"""Format version of run folders, written into the manifest. A folder with a different version cannot be resumed."""
LAST_COMMITS = {1: "60e1456"}
"""The last commit of thinkstack that resumes each earlier format version; manifests of version 1 have no number."""
MAX_TOKENS = 512
"""Default maximum number of tokens of a completion in `thinkstack eval`."""
RECIPES = Path(str(resources.files("thinkstack") / "recipes"))
"""Folder of the recipes in the package."""


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage of a recipe, ready to run."""

    name: str
    kind: str
    config: Any
    fingerprint: str
    """Hash of the settings and input files of this stage and of all stages before it."""


def read_recipe(name: str, scale: str = "", overrides: tuple[str, ...] = ()) -> Tree:
    """The recipe with this name or path, with the overlay of a scale and dotted overrides applied."""
    path = recipe_path(name)
    tree = read_toml(path)
    if scale:
        overlay = path.with_name(f"{path.stem}_{scale}.toml")
        if not overlay.is_file():
            scales = scales_of(path)
            hint = did_you_mean(scale, scales) if scales else f"; create {overlay}, or leave --scale out"
            raise ConfigError(f"the recipe {name} has no scale {scale!r}{hint}")
        tree = merge(tree, read_toml(overlay))
    for assignment in overrides:
        changed = override(tree, assignment)
        for stage in changed.get("stages", {}).keys() - tree.get("stages", {}).keys():
            raise ConfigError(f"{assignment}: the recipe has no stage {stage}{did_you_mean(stage, tree['stages'])}")
        tree = changed
    return tree


def is_overlay(path: Path) -> bool:
    """Whether a file is an overlay of another recipe: none of its stages has the key `stage`."""
    return not any("stage" in table for table in read_toml(path).get("stages", {}).values())


def scales_of(path: Path) -> list[str]:
    """Names of the overlays of a recipe: files RECIPE_SCALE.toml in its folder."""
    files = sorted(path.parent.glob(f"{path.stem}_*.toml"))
    return [file.stem.removeprefix(f"{path.stem}_") for file in files if is_overlay(file)]


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml") if not is_overlay(path))


def recipe_path(name: str) -> Path:
    """The file of a recipe, by name or by a path that ends in .toml. Raises ConfigError if it does not exist."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        hint = "there is no such file" if name.endswith(".toml") else "give a name, or a path that ends in .toml"
        raise ConfigError(f"no recipe {name!r}: {hint}{did_you_mean(name, recipe_names())}")
    return path


def plan_stages(tree: Tree, out: Path) -> list[StageRun]:
    """The stages of a recipe, with validated settings; names of earlier stages are replaced by paths."""
    for key in tree.keys() - {"shared", "stages"}:
        raise ConfigError(f"unknown key {key}{did_you_mean(key, ('shared', 'stages'))}")
    check_shared(tree)
    stages: list[StageRun] = []
    for name, table in tree.get("stages", {}).items():
        values = dict(table)
        kind = values.pop("stage", "")
        if kind not in STAGES:
            raise ConfigError(f"stages.{name}.stage={kind!r}{did_you_mean(str(kind), STAGES)}")
        config_type = STAGES[kind][0]
        names = {field.name for field in dataclasses.fields(config_type)}
        values = {key: value for key, value in tree.get("shared", {}).items() if key in names} | values
        preset = values.get("preset", "default")
        if kind == "rl" and preset in PRESETS:
            values = merge(PRESETS[preset], values)
        if isinstance(values.get("reward"), str):
            values["reward"] = {"parts": RewardConfig().parts | {values["reward"]: 1.0}}
        if values.get("start") in {stage.name for stage in stages}:
            values["start"] = str(out / values["start"] / MODEL)
        config: Any = build(config_type, values, f"stages.{name}")
        hashes = [content_hash(path) for path in input_files(config)]
        text = json.dumps([kind, dump(config), stages[-1].fingerprint if stages else "", *hashes], sort_keys=True)
        stages.append(StageRun(name, kind, config, hashlib.sha256(text.encode()).hexdigest()[:16]))
    if not stages:
        raise ConfigError("the recipe has no stages")
    return stages


def input_files(config: Any) -> list[Path]:
    """The user's files that a stage reads (data, texts, rewards); their contents are part of the fingerprint."""
    paths = (*getattr(config, "data", ()), *getattr(config, "text_files", ()))
    parts = getattr(getattr(config, "reward", None), "parts", ())
    files = [
        file for path in map(Path, paths) for file in (path.parent.glob(path.name) if "*" in path.name else [path])
    ]
    own_parts = [Path(part.rpartition(":")[0]) for part in parts if part not in PARTS]
    return sorted(file for file in files if file.is_file()) + own_parts


def content_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shared(tree: Tree) -> None:
    """Raise ConfigError for a shared setting that no stage of the recipe has."""
    tables = tree.get("stages", {}).values()
    config_types = [STAGES[table["stage"]][0] for table in tables if table.get("stage") in STAGES]
    names = {field.name for config_type in config_types for field in dataclasses.fields(config_type)}
    for key in tree.get("shared", {}).keys() - names:
        raise ConfigError(f"unknown key shared.{key}{did_you_mean(key, sorted(names), 'shared')}")


def check_inputs(stages: Sequence[StageRun], out: Path) -> None:
    """Raise ConfigError for the first missing file or checkpoint outside of `out` that a stage needs.

    Names on the hub are not checked, because the check would download the files.
    """
    for stage in stages:
        start = getattr(stage.config, "start", "")
        try:
            if start and not Path(start).is_relative_to(out) and not is_hub_name(start):
                locate(start)
            for name, row in getattr(stage.config, "tasks", {}).items():
                task = make_task(name, row)
                for split in ("test",) if stage.kind == "evaluate" else ("train", "test"):
                    task.check_files(split)
            for path in (*getattr(stage.config, "data", ()), *getattr(stage.config, "text_files", ())):
                matching_files(Path(path))
        except ConfigError as error:
            raise ConfigError(f"stages.{stage.name}: {error}") from error


def run_recipe(tree: Tree, out: Path) -> None:
    """Run all stages that are not done yet, then print a summary.

    Raises Interrupted on Ctrl-C or SIGTERM, after saving the state, and ConfigError if the run folder has a different
    format version.
    """
    stages = plan_stages(tree, out)
    records = read_manifest(out)
    check_inputs([stage for stage in stages if not records.get(stage.name, {}).get("done")], out)
    Run(out)
    machine = describe_machine()
    with stopping_on_signals() as stop:
        for index, stage in enumerate(stages, start=1):
            record = records.setdefault(stage.name, new_record(stage))
            if record["fingerprint"] != stage.fingerprint:
                if record["done"] or has_output(out / stage.name):
                    raise ConfigError(
                        f"{out / stage.name} was made with other settings or data; choose another folder with --out, "
                        f"or delete {out}"
                    )
                record["fingerprint"] = stage.fingerprint  # the stage failed before it wrote anything
            if record["done"]:
                log.info("[%d/%d] %s is done (%s)", index, len(stages), stage.name, clock(record["seconds"]))
                continue
            if stop.is_requested:
                raise Interrupted
            log.info("[%d/%d] %s", index, len(stages), stage.name)
            write_manifest(out, records)  # before the first state, so that the fingerprint of a killed stage is on disk
            run = Run(out / stage.name, stop)
            choice.restore(run.provenance().get("config", {}).get("computed_with"))
            config = dump(stage.config) | {"stage": stage.kind, "computed_with": choice.record()}
            run.start(config, getattr(stage.config, "seed", 0), f"{machine}; {choice.describe()}")
            started = time.monotonic()
            try:
                STAGES[stage.kind][1](stage.config, run)
                record["done"] = True
            finally:
                record["seconds"] += time.monotonic() - started
                write_manifest(out, records)
    print(f"results in {out}:\n{summarize(out, [(stage.name, stage.kind) for stage in stages])}")


def run_stage(kind: str, values: Tree, settings: Sequence[str], out: Path) -> None:
    """Run a recipe of one stage, named after its kind. settings: dotted overrides of `values`."""
    tree: Tree = {"stages": {kind: {"stage": kind} | values}}
    for setting in settings:
        tree = override(tree, f"stages.{kind}.{setting}")
    run_recipe(tree, out)


def run_evaluation(model: str, task: str, row: Tree, values: Tree, out: Path | None) -> None:
    """Evaluate a checkpoint on one task and print the results.

    row: settings of the task (TaskConfig); without `data`, a benchmark's folder is data/TASK. out: None derives it from
    checkpoint and settings."""
    if task in BENCHMARKS and not row["data"]:
        row = row | {"data": f"data/{task}"}
    make_task(task, build(TaskConfig, row, f"tasks.{task}"))  # refuse its settings before the checkpoint is opened
    if values["max_tokens"] is None:
        values = values | {"max_tokens": min(MAX_TOKENS, open_source(model).cfg.max_positions // 2)}
    values = {"start": model, "tasks": {task: row}} | values
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", f"{Path(model).name or model}-{task}")
        path = locate(model)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        # file sizes and times: a new training run may write a checkpoint with the same name
        versions = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        digest = hashlib.sha256(json.dumps([values, versions], sort_keys=True).encode()).hexdigest()[:8]
        out = Path("runs") / "eval" / f"{name}-{digest}"
    try:
        run_stage("evaluate", values, (), out)
    except ConfigError as error:
        hint = " with --data" if "give the folder that contains" in str(error) else ""
        message = re.sub(r"^stages\.evaluate(: |\.)", "", str(error)).replace("num_problems=", "--limit ", 1)
        raise ConfigError(message + hint) from error
    results = {task: read_evaluation(Run(out / "evaluate"), SAMPLED)}
    print("\n".join((setting_line(results), "", *markdown_table(["", task], table_rows(results, {})))))


def has_output(folder: Path) -> bool:
    """Whether the folder of a stage has any file besides its provenance."""
    return folder.is_dir() and any(path.name != PROVENANCE for path in folder.iterdir())


def read_manifest(out: Path) -> dict[str, Any]:
    """The records of the stages run in `out`, by name: fingerprint, seconds, done.

    Raises ConfigError if the run folder has a different format version.
    """
    path = out / MANIFEST
    if not path.exists():
        return {}
    manifest = read_object(path)
    number = manifest.get("format", 1)
    if number != FORMAT:
        commit = LAST_COMMITS.get(number)
        fix = f"finish it with commit {commit} of thinkstack, or " if commit else ""
        raise ConfigError(
            f"{out} is a run folder of format version {number}; this version resumes format {FORMAT}; "
            f"{fix}use another --out"
        )
    stages: dict[str, Any] = manifest["stages"]
    return stages


def new_record(stage: StageRun) -> dict[str, Any]:
    """The record of a stage that has not run."""
    return {"fingerprint": stage.fingerprint, "seconds": 0.0, "done": False}


def write_manifest(out: Path, records: dict[str, Any]) -> None:
    """Write the records of the stages in `out`, with the format version of the folder."""
    write_json(out / MANIFEST, {"format": FORMAT, "stages": records})
