"""Run a recipe: stages in order, each from the artefacts of earlier ones. What is done is skipped; what was cut off
goes on.

A recipe is a TOML file: `shared` settings for every stage that has them, then one table a stage, in order.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from thinkstack.config import Tree, build, did_you_mean, dump, merge, override, read_toml
from thinkstack.log import Run, clock, write_json
from thinkstack.machine import describe_machine
from thinkstack.models.kernels import choice
from thinkstack.stages.adopt import AdoptConfig, adopt
from thinkstack.stages.evaluate import EvaluateConfig, measure
from thinkstack.stages.grpo import grpo
from thinkstack.stages.grpo_config import PRESETS, GrpoConfig
from thinkstack.stages.learning import MODEL
from thinkstack.stages.pretrain import PretrainConfig, pretrain
from thinkstack.stages.report import ReportConfig, report
from thinkstack.stages.sft import SftConfig, sft
from thinkstack.stopping import stopping_on_signals
from thinkstack.types import ConfigError, Interrupted

log = logging.getLogger(__name__)

STAGES: dict[str, tuple[type, Callable[[Any, Run], None]]] = {
    "adopt": (AdoptConfig, adopt),
    "pretrain": (PretrainConfig, pretrain),
    "sft": (SftConfig, sft),
    "grpo": (GrpoConfig, grpo),
    "evaluate": (EvaluateConfig, measure),
    "report": (ReportConfig, report),
}
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of a recipe, ready to run."""

    name: str
    kind: str
    config: Any
    fingerprint: str
    """Hash of its settings and of those of all stages before it."""


def read_recipe(name: str, scale: str = "", overrides: tuple[str, ...] = ()) -> Tree:
    """A recipe by name (of the package) or path, with a scale's overlay and dotted overrides on top."""
    tree = read_toml(_recipe_path(name))
    if scale:
        tree = merge(tree, read_toml(_recipe_path(f"{name}_{scale}")))
    for assignment in overrides:
        tree = override(tree, assignment)
    return tree


def _recipe_path(name: str) -> Path:
    folder = Path(str(resources.files("thinkstack") / "recipes"))
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.toml"))
        raise ConfigError(f"no recipe {name!r}{did_you_mean(name, known)}")
    return path


def plan(tree: Tree, out: Path) -> list[Step]:
    """The stages of a recipe with all settings checked and the names of earlier stages turned into paths."""
    for key in tree.keys() - {"shared", "stages"}:
        raise ConfigError(f"unknown key {key}{did_you_mean(key, ('shared', 'stages'))}")
    steps: list[Step] = []
    for name, table in tree.get("stages", {}).items():
        values = dict(table)
        kind = values.pop("stage", "")
        if kind not in STAGES:
            raise ConfigError(f"stages.{name}.stage={kind!r}{did_you_mean(str(kind), STAGES)}")
        config_kind = STAGES[kind][0]
        names = {field.name for field in dataclasses.fields(config_kind)}
        values = {key: value for key, value in tree.get("shared", {}).items() if key in names} | values
        preset = values.get("preset", "default")
        if kind == "grpo" and preset in PRESETS:
            values = merge(PRESETS[preset], values)
        if values.get("start") in {step.name for step in steps}:
            values["start"] = str(out / values["start"] / MODEL)
        config: Any = build(config_kind, values, f"stages.{name}")
        text = json.dumps([kind, dump(config), steps[-1].fingerprint if steps else ""], sort_keys=True)
        steps.append(Step(name, kind, config, hashlib.sha256(text.encode()).hexdigest()[:16]))
    if not steps:
        raise ConfigError("the recipe has no stages")
    return steps


def run_recipe(tree: Tree, out: Path) -> None:
    """Run all stages that are not done yet. Raises Interrupted on Ctrl-C or SIGTERM, after saving the state."""
    steps = plan(tree, out)
    Run(out)
    manifest = read_manifest(out)
    machine = describe_machine()
    with stopping_on_signals() as stop:
        for number, step in enumerate(steps, start=1):
            record = manifest.setdefault(step.name, {"fingerprint": step.fingerprint, "seconds": 0.0, "done": False})
            if record["fingerprint"] != step.fingerprint:
                raise ConfigError(
                    f"{out / step.name} was made with other settings; choose another folder with --out, or delete {out}"
                )
            if record["done"]:
                log.info("[%d/%d] %s is done (%s)", number, len(steps), step.name, clock(record["seconds"]))
                continue
            if stop.is_requested:
                raise Interrupted
            log.info("[%d/%d] %s", number, len(steps), step.name)
            write_json(out / MANIFEST, manifest)  # before the first state: a killed stage keeps its settings too
            run = Run(out / step.name, stop)
            choice.adopt(run.provenance().get("config", {}).get("computed_with"))
            config = dump(step.config) | {"stage": step.kind, "computed_with": choice.record()}
            run.start(config, getattr(step.config, "seed", 0), f"{machine}; {choice.describe()}")
            started = time.monotonic()
            try:
                STAGES[step.kind][1](step.config, run)
                record["done"] = True
            finally:
                record["seconds"] += time.monotonic() - started
                write_json(out / MANIFEST, manifest)


def read_manifest(out: Path) -> dict[str, Any]:
    """What is known of the stages run in `out`: fingerprint, seconds, done."""
    path = out / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
