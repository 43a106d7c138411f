"""Run a recipe: stages in order, each from the artifacts of earlier ones. What is done is skipped; what was cut off
goes on.

A recipe is a TOML file: `shared` settings for every stage that has them, then one table a stage, in order.
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
from thinkstack.files import matching_files
from thinkstack.kernels import choice
from thinkstack.log import PROVENANCE, Run, clock, write_json
from thinkstack.machine import describe_machine
from thinkstack.rl.config import PRESETS, RLConfig
from thinkstack.stages.evaluate import SAMPLED, EvaluateConfig, measure, read_evaluation
from thinkstack.stages.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from thinkstack.stages.pretrain import PretrainConfig, pretrain
from thinkstack.stages.report import ReportConfig, report
from thinkstack.stages.rl import train_rl
from thinkstack.stages.sft import SftConfig, sft
from thinkstack.stages.summary import summarize
from thinkstack.stopping import stopping_on_signals
from thinkstack.tasks.benchmarks import reasoning_gym as gym
from thinkstack.tasks.benchmarks.datasets import split_file
from thinkstack.tasks.table import BENCHMARKS, TASKS
from thinkstack.types import ConfigError, Interrupted

log = logging.getLogger(__name__)

STAGES: dict[str, tuple[type, Callable[[Any, Run], None]]] = {
    "import_checkpoint": (ImportCheckpointConfig, import_checkpoint),
    "pretrain": (PretrainConfig, pretrain),
    "sft": (SftConfig, sft),
    "rl": (RLConfig, train_rl),
    "evaluate": (EvaluateConfig, measure),
    "report": (ReportConfig, report),
}
MANIFEST = "manifest.json"
MAX_TOKENS = 512
"""Of an answer in `thinkstack eval`, where nothing else is asked for."""
RECIPES = Path(str(resources.files("thinkstack") / "recipes"))
"""Folder of the package's recipes."""


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage of a recipe, ready to run."""

    name: str
    kind: str
    config: Any
    fingerprint: str
    """Hash of its settings and of those of all stages before it."""


def read_recipe(name: str, scale: str = "", overrides: tuple[str, ...] = ()) -> Tree:
    """A recipe by name (of the package) or path, with a scale's overlay and dotted overrides on top."""
    path = recipe_path(name)
    tree = read_toml(path)
    if scale:
        overlay = path.with_name(f"{path.stem}_{scale}.toml")
        if not overlay.is_file():
            known = scales_of(path)
            hint = did_you_mean(scale, known) if known else f"; write {overlay}, or leave --scale out"
            raise ConfigError(f"the recipe {name} has no scale {scale!r}{hint}")
        tree = merge(tree, read_toml(overlay))
    for assignment in overrides:
        changed = override(tree, assignment)
        for stage in changed.get("stages", {}).keys() - tree.get("stages", {}).keys():
            raise ConfigError(f"{assignment}: the recipe has no stage {stage}{did_you_mean(stage, tree['stages'])}")
        tree = changed
    return tree


def is_overlay(path: Path) -> bool:
    """Whether a file only changes another recipe: none of its stages says what it is."""
    return not any("stage" in table for table in read_toml(path).get("stages", {}).values())


def scales_of(path: Path) -> list[str]:
    """Names of a recipe's overlays, which lie beside it as RECIPE_SCALE.toml."""
    beside = sorted(path.parent.glob(f"{path.stem}_*.toml"))
    return [found.stem.removeprefix(f"{path.stem}_") for found in beside if is_overlay(found)]


def recipe_names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml") if not is_overlay(path))


def recipe_path(name: str) -> Path:
    """The file of a recipe of the package, by its name, or of one's own, by its path. Raises ConfigError if none."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = recipe_names()
        where = "there is no such file" if name.endswith(".toml") else "give a name, or a path that ends in .toml"
        raise ConfigError(f"no recipe {name!r}: {where}{did_you_mean(name, known)}")
    return path


def plan(tree: Tree, out: Path) -> list[StageRun]:
    """The stages of a recipe with all settings checked and the names of earlier stages turned into paths."""
    for key in tree.keys() - {"shared", "stages"}:
        raise ConfigError(f"unknown key {key}{did_you_mean(key, ('shared', 'stages'))}")
    refuse_unused(tree)
    steps: list[StageRun] = []
    for name, table in tree.get("stages", {}).items():
        values = dict(table)
        kind = values.pop("stage", "")
        if kind not in STAGES:
            raise ConfigError(f"stages.{name}.stage={kind!r}{did_you_mean(str(kind), STAGES)}")
        config_kind = STAGES[kind][0]
        names = {field.name for field in dataclasses.fields(config_kind)}
        values = {key: value for key, value in tree.get("shared", {}).items() if key in names} | values
        preset = values.get("preset", "default")
        if kind == "rl" and preset in PRESETS:
            values = merge(PRESETS[preset], values)
        if isinstance(values.get("reward"), str):
            values["reward"] = {"parts": {values["reward"]: 1.0}}
        if values.get("start") in {step.name for step in steps}:
            values["start"] = str(out / values["start"] / MODEL)
        config: Any = build(config_kind, values, f"stages.{name}")
        contents = [content_hash(path) for path in own_files(config)]
        text = json.dumps([kind, dump(config), steps[-1].fingerprint if steps else "", *contents], sort_keys=True)
        steps.append(StageRun(name, kind, config, hashlib.sha256(text.encode()).hexdigest()[:16]))
    if not steps:
        raise ConfigError("the recipe has no stages")
    return steps


def own_files(config: Any) -> list[Path]:
    """Files of the person who runs the recipe: data, texts, rewards. What is in them counts among the settings."""
    named = (*getattr(config, "data", ()), *getattr(config, "text_files", ()))
    parts = getattr(getattr(config, "reward", None), "parts", ())
    found = [
        file for path in map(Path, named) for file in (path.parent.glob(path.name) if "*" in path.name else [path])
    ]
    return sorted(file for file in found if file.is_file()) + [Path(part.rpartition(":")[0]) for part in parts]


def content_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_unused(tree: Tree) -> None:
    """Raise ConfigError for a shared setting that no stage of the recipe has."""
    kinds = [STAGES[table["stage"]][0] for table in tree.get("stages", {}).values() if table.get("stage") in STAGES]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for key in tree.get("shared", {}).keys() - names:
        raise ConfigError(f"unknown key shared.{key}{did_you_mean(key, sorted(names), 'shared')}")


def check_inputs(steps: Sequence[StageRun], out: Path) -> None:
    """Raise ConfigError for the first file or checkpoint from outside that a stage needs and that is not there.

    Names of the hub are not looked up, for that would fetch them.
    """
    for step in steps:
        start = getattr(step.config, "start", "")
        try:
            if start and not Path(start).is_relative_to(out) and not is_hub_name(start):
                locate(start)
            for name, folder in getattr(step.config, "files", {}).items():
                for split in ("test",) if step.kind == "evaluate" else ("train", "test"):
                    split_file(folder, split, BENCHMARKS[name].SOURCE)
            for path in (*getattr(step.config, "data", ()), *getattr(step.config, "text_files", ())):
                matching_files(Path(path))
        except ConfigError as error:
            raise ConfigError(f"stages.{step.name}: {error}") from error


def run_recipe(tree: Tree, out: Path) -> None:
    """Run all stages that are not done yet, then say what they made. Raises Interrupted on Ctrl-C or SIGTERM, after
    saving the state."""
    steps = plan(tree, out)
    manifest = read_manifest(out)
    check_inputs([step for step in steps if not manifest.get(step.name, {}).get("done")], out)
    Run(out)
    machine = describe_machine()
    with stopping_on_signals() as stop:
        for number, step in enumerate(steps, start=1):
            record = manifest.setdefault(step.name, {"fingerprint": step.fingerprint, "seconds": 0.0, "done": False})
            if record["fingerprint"] != step.fingerprint:
                if record["done"] or has_begun(out / step.name):
                    raise ConfigError(
                        f"{out / step.name} was made with other settings or data; choose another folder with --out, or "
                        f"delete {out}"
                    )
                record["fingerprint"] = step.fingerprint  # what was refused before its first step keeps nothing
            if record["done"]:
                log.info("[%d/%d] %s is done (%s)", number, len(steps), step.name, clock(record["seconds"]))
                continue
            if stop.is_requested:
                raise Interrupted
            log.info("[%d/%d] %s", number, len(steps), step.name)
            write_json(out / MANIFEST, manifest)  # before the first state: a killed stage keeps its settings too
            run = Run(out / step.name, stop)
            choice.restore(run.provenance().get("config", {}).get("computed_with"))
            config = dump(step.config) | {"stage": step.kind, "computed_with": choice.record()}
            run.start(config, getattr(step.config, "seed", 0), f"{machine}; {choice.describe()}")
            started = time.monotonic()
            try:
                STAGES[step.kind][1](step.config, run)
                record["done"] = True
            finally:
                record["seconds"] += time.monotonic() - started
                write_json(out / MANIFEST, manifest)
    print(f"made in {out}:\n{summarize(out, [(step.name, step.kind) for step in steps])}")


def run_stage(kind: str, values: Tree, settings: Sequence[str], out: Path) -> None:
    """A recipe of one stage, called as its kind is. settings: dotted assignments on top of its values."""
    tree: Tree = {"stages": {kind: {"stage": kind} | values}}
    for setting in settings:
        tree = override(tree, f"stages.{kind}.{setting}")
    run_recipe(tree, out)


def run_evaluation(model: str, task: str, data: str, values: Tree, out: Path | None) -> None:
    """Evaluate a checkpoint on one task and print its table; out: None names a folder by all that is asked."""
    if task not in BENCHMARKS and not task.startswith(gym.PREFIX):
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}{did_you_mean(task, TASKS)}")
        if data:
            raise ConfigError(f"--data {data}: the task {task} is generated and reads no files; leave it out")
    asked: Tree = {"files": {task: data or f"data/{task}"}, "tasks": []} if task in BENCHMARKS else {"tasks": [task]}
    if values["max_tokens"] is None:
        values = values | {"max_tokens": min(MAX_TOKENS, open_source(model).cfg.max_positions // 2)}
    values = {"start": model} | asked | values
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", f"{Path(model).name or model}-{task}")
        place = locate(model)
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        written = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files
        ]  # it may be trained again
        digest = hashlib.sha256(json.dumps([values, written], sort_keys=True).encode()).hexdigest()[:8]
        out = Path("runs") / "eval" / f"{name}-{digest}"
    try:
        run_stage("evaluate", values, (), out)
    except ConfigError as error:
        where = " with --data" if "give the folder that holds" in str(error) else ""
        said = re.sub(r"^stages\.evaluate(: |\.)", "", str(error)).replace("num_problems=", "--limit ", 1)
        raise ConfigError(said + where) from error
    found = {task: read_evaluation(Run(out / "evaluate"), SAMPLED)}
    print("\n".join((setting_line(found), "", *markdown_table(["", task], table_rows(found, {})))))


def has_begun(folder: Path) -> bool:
    """Whether a stage has left anything in its folder but where it comes from."""
    return folder.is_dir() and any(path.name != PROVENANCE for path in folder.iterdir())


def read_manifest(out: Path) -> dict[str, Any]:
    """What is known of the stages run in `out`: fingerprint, seconds, done."""
    path = out / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
