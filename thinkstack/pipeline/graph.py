"""The graph of a recipe: which stage needs which, in which order they run, and the fingerprint of each.

An input of a stage (a setting whose type is annotated with config.Input) names a stage of the recipe, STAGE/OUTPUT for
an output other than the default one, RECIPE:STAGE for a stage of another recipe, or a path. The fingerprint of a stage
is a hash of its settings, in which each input is replaced by the fingerprint of its stage or by the contents of its
files. It therefore changes if the stage or anything before it changes, and with nothing else in the recipe.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from thinkstack.checkpoint.hf.hub import is_hub_name
from thinkstack.config import Input, Tree, build, did_you_mean, hashed_settings, map_inputs, merge
from thinkstack.log import Run
from thinkstack.pipeline.recipe import read_recipe, scales_of
from thinkstack.rl.config import PRESETS, RLConfig
from thinkstack.stages.evaluate import EvaluateConfig, evaluate_checkpoint
from thinkstack.stages.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from thinkstack.stages.pretrain import PretrainConfig, pretrain
from thinkstack.stages.report import ReportConfig, report
from thinkstack.stages.rl import train_rl
from thinkstack.stages.sft import SftConfig, sft
from thinkstack.tasks.reward import RewardConfig
from thinkstack.types import ConfigError

STAGES: dict[str, tuple[type, Callable[[Any, Run], None]]] = {
    "import_checkpoint": (ImportCheckpointConfig, import_checkpoint),
    "pretrain": (PretrainConfig, pretrain),
    "sft": (SftConfig, sft),
    "rl": (RLConfig, train_rl),
    "evaluate": (EvaluateConfig, evaluate_checkpoint),
    "report": (ReportConfig, report),
}
STAGE_NAME = re.compile(r"[\w.-]+")
FOREIGN = re.compile(r"(?!pip:)(?P<recipe>[\w-]+|.+\.toml):(?P<stage>[\w.-]+)(?:/(?P<output>.+))?")
"""A stage of another recipe, by the name or the path of the recipe."""
HASHED_BYTES = 1 << 16
"""Number of bytes at the start and the end of a large file that enter its hash; smaller files are hashed entirely."""


class StageRun(NamedTuple):
    """One stage of a recipe, ready to run."""

    name: str
    """Name in the recipe; RECIPE:STAGE for a stage of another recipe."""
    kind: str
    config: Any
    """The settings; inputs are paths."""
    fingerprint: str
    folder: Path
    needs: tuple[str, ...]
    """Names of the stages whose outputs are inputs of this stage."""


def plan_stages(tree: Tree, out: Path, scale: str = "") -> list[StageRun]:
    """The stages of a recipe with validated settings, each after the stages that it needs, otherwise in file order.

    out: folder of the run. scale: the scale of the recipe, which also applies to stages of other recipes that have it.
    Raises ConfigError for invalid settings, unknown stages and cycles.
    """
    for key in tree.keys() - {"shared", "stages"}:
        raise ConfigError(f"unknown key {key}{did_you_mean(key, ('shared', 'stages'))}")
    check_shared(tree)
    graph = _Graph(tree, out, scale)
    for name in tree.get("stages", {}):
        graph.add("", name)
    if not graph.planned:
        raise ConfigError("the recipe has no stages")
    return list(graph.planned.values())


def ancestors(stages: list[StageRun], name: str) -> list[StageRun]:
    """The stage called `name` and all stages that it needs, in order. Raises ConfigError for an unknown name."""
    by_name = {stage.name: stage for stage in stages}
    if name not in by_name:
        raise ConfigError(f"--until {name}: the recipe has no such stage{did_you_mean(name, by_name)}")
    wanted, waiting = set[str](), [name]
    while waiting:
        current = waiting.pop()
        if current not in wanted:
            wanted.add(current)
            waiting += by_name[current].needs
    return [stage for stage in stages if stage.name in wanted]


def check_shared(tree: Tree) -> None:
    """Raise ConfigError for a shared setting that no stage of the recipe has."""
    tables = tree.get("stages", {}).values()
    config_types = [STAGES[table["stage"]][0] for table in tables if table.get("stage") in STAGES]
    names = {field.name for config_type in config_types for field in dataclasses.fields(config_type)}
    for key in tree.get("shared", {}).keys() - names:
        raise ConfigError(f"unknown key shared.{key}{did_you_mean(key, sorted(names), 'shared')}")


class _Graph:
    """The stages planned so far; `add` plans the inputs of a stage before the stage."""

    def __init__(self, tree: Tree, out: Path, scale: str):
        self.out, self.scale = out, scale
        self.trees = {"": tree}
        """The tables of this recipe, under "", and of the other recipes of which it uses stages."""
        self.planned: dict[str, StageRun] = {}
        self.open: list[str] = []
        """The stages whose inputs are being planned, outermost first."""

    def add(self, recipe: str, name: str) -> StageRun:
        """Plan a stage of a recipe and the stages that it needs. recipe: "" for the recipe of this run."""
        full_name = f"{recipe}:{name}" if recipe else name
        if full_name in self.open:
            raise ConfigError(f"the stages need each other in a cycle: {' -> '.join((*self.open, full_name))}")
        if full_name not in self.planned:
            self.open.append(full_name)
            self.planned[full_name] = self._plan(recipe, name, full_name)
            self.open.pop()
        return self.planned[full_name]

    def _plan(self, recipe: str, name: str, full_name: str) -> StageRun:
        tree = self.trees[recipe]
        kind, config = build_config(tree, name)
        identities: dict[str, str] = {}
        needs: list[str] = []

        def to_path(address: str, value: str, wanted: Input) -> str:
            stage, output = self._find(recipe, value, f"stages.{full_name}.{address}")
            if stage is None:
                identities[address] = value if is_hub_name(value) else f"{value} {content_hash(value)}"
                return value
            needs.append(stage.name)
            identities[address] = f"{stage.fingerprint}/{output or wanted.output}"
            return str(stage.folder / (output or wanted.output))

        config = map_inputs(config, to_path)
        identified = hashed_settings(map_inputs(config, lambda address, value, wanted: identities[address]))
        text = json.dumps([kind, identified, reward_hashes(config)], sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = self.out / full_name.rpartition("/")[2]
        if recipe:
            folder = find_finished(self.out, fingerprint) or folder
        return StageRun(full_name, kind, config, fingerprint, folder, tuple(dict.fromkeys(needs)))

    def _find(self, recipe: str, value: str, where: str) -> tuple[StageRun | None, str]:
        """The stage that an input names and the output after its name; (None, "") for a path.

        where: address of the setting, for messages. Raises ConfigError for a name that is neither a stage nor a path.
        """
        head, slash, output = value.partition("/")
        known = self.trees[recipe]["stages"]
        if head in known:
            return self.add(recipe, head), output
        if foreign := FOREIGN.fullmatch(value):
            other, stage = foreign["recipe"], foreign["stage"]
            if other not in self.trees:
                self.trees[other] = read_recipe(other, self.scale if self.scale in scales_of(other) else "")
            if stage not in (known := self.trees[other].get("stages", {})):
                hint = did_you_mean(stage, known)
                raise ConfigError(f"{where}={value!r}: the recipe {other} has no stage {stage!r}{hint}")
            return self.add(other, stage), foreign["output"] or ""
        if not slash and STAGE_NAME.fullmatch(value) and not Path(value).exists():
            raise ConfigError(f"{where}={value!r} is neither a stage nor a path{did_you_mean(value, known)}")
        return None, ""


def build_config(tree: Tree, name: str) -> tuple[str, Any]:
    """Kind and validated settings of a stage; inputs are still names."""
    values = dict(tree["stages"][name])
    if not STAGE_NAME.fullmatch(name):
        raise ConfigError(f"stages.{name}: a stage name consists of letters, digits, '-', '_' and '.'")
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
    return kind, build(config_type, values, f"stages.{name}")


def find_finished(out: Path, fingerprint: str) -> Path | None:
    """The folder of a finished stage with this fingerprint in a run folder beside `out`, or None."""
    for folder in sorted(out.parent.glob("*/*/")):
        record = Run.record_of(folder)
        if folder.parent != out and record.get("fingerprint") == fingerprint and record.get("done"):
            return folder
    return None


def reward_hashes(config: Any) -> list[str]:
    """Hashes of the Python files that the reward of a stage uses."""
    parts = getattr(getattr(config, "reward", None), "parts", ())
    return [content_hash(name.rpartition(":")[0]) for name in parts if ":" in name]


def content_hash(path: str) -> str:
    """A hash of the files that `path` names: a file, a folder, or a pattern with * in its last part; "" if there are
    none. Of files over 2 * HASHED_BYTES, the size, the start and the end are hashed."""
    place = Path(path)
    found = sorted(place.parent.glob(place.name)) if "*" in place.name else [place]
    files = [file for each in found for file in ([each] if each.is_file() else sorted(each.rglob("*")))]
    digest, count = hashlib.sha256(), 0
    for file in files:
        if file.is_file():
            count += 1
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(HASHED_BYTES))
                handle.seek(max(file.stat().st_size - HASHED_BYTES, 0))
                digest.update(handle.read(HASHED_BYTES))
    return digest.hexdigest()[:16] if count else ""
