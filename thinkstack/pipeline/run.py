"""Run the stages of a recipe. Finished stages are skipped, interrupted stages resume.

A stage whose settings or inputs have changed since it wrote its folder runs again. Its old folder moves to
`previous/NAME-FINGERPRINT`, and moves back if the old settings return.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from thinkstack.checkpoint.hf.hub import is_hub_name
from thinkstack.checkpoint.model import locate
from thinkstack.config import Input, Tree, dump, map_inputs, override
from thinkstack.files import matching_files, read_object
from thinkstack.kernels import choice
from thinkstack.log import PROVENANCE, RECORD, Run, clock, write_json
from thinkstack.machine import describe_machine
from thinkstack.pipeline.graph import STAGES, StageRun, ancestors, plan_stages
from thinkstack.stages.summary import summarize
from thinkstack.stopping import StopRequest, stopping_on_signals
from thinkstack.tasks.table import make_task
from thinkstack.types import ConfigError, Interrupted

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 4
"""Format version of run folders, written into the manifest. A folder with a different version cannot be resumed."""
LAST_COMMITS = {1: "60e1456", 2: "46a34e5", 3: "cac19d0"}
"""The last commit of thinkstack that resumes each earlier format version; manifests of version 1 have no number."""
PREVIOUS = "previous"
"""Folder in the run folder for the folders of stages that ran with other settings."""


def run_recipe(tree: Tree, out: Path, scale: str = "", until: str = "") -> None:
    """Run all stages that are not done yet, or with `until` only this stage and what it needs; then print a summary.

    Raises Interrupted on Ctrl-C or SIGTERM, after saving the state, and ConfigError if the run folder has a different
    format version.
    """
    stages = plan_stages(tree, out, scale)
    stages = ancestors(stages, until) if until else stages
    check_format(out)
    check_inputs([stage for stage in stages if not is_done(stage)], [stage.folder for stage in stages])
    Run(out)
    write_json(out / MANIFEST, {"format": FORMAT})
    machine = describe_machine()
    with stopping_on_signals() as stop:
        for index, stage in enumerate(stages, start=1):
            title = f"[{index}/{len(stages)}] {stage.name}"
            if not is_done(stage):
                make_room(stage, out)
            if is_done(stage):
                log.info("%s is done (%s)", title, clock(Run.record_of(stage.folder)["seconds"]))
                continue
            if stop.is_requested:
                raise Interrupted
            log.info("%s", title)
            run_stage(stage, stop, machine)
    print(f"results in {out}:\n{summarize({stage.name: (stage.folder, stage.kind) for stage in stages})}")


def run_stage(stage: StageRun, stop: StopRequest, machine: str) -> None:
    """Run or resume one stage and keep its record."""
    run = Run(stage.folder, stop)
    seconds = Run.record_of(stage.folder).get("seconds", 0.0)
    run.write_record(stage.fingerprint, seconds, done=False)  # before the first state, for a stage that is killed
    choice.restore(run.provenance().get("config", {}).get("computed_with"))
    config = dump(stage.config) | {"stage": stage.kind, "computed_with": choice.record()}
    run.start(config, getattr(stage.config, "seed", 0), f"{machine}; {choice.describe()}")
    started, done = time.monotonic(), False
    try:
        STAGES[stage.kind][1](stage.config, run)
        done = True
    finally:
        run.write_record(stage.fingerprint, seconds + time.monotonic() - started, done)


def is_done(stage: StageRun) -> bool:
    """Whether the stage has finished with these settings and inputs."""
    record = Run.record_of(stage.folder)
    return bool(record.get("done")) and record["fingerprint"] == stage.fingerprint


def make_room(stage: StageRun, out: Path) -> None:
    """Move a folder that other settings wrote out of the way, and a folder that these settings wrote back."""
    folder, found = stage.folder, Run.record_of(stage.folder).get("fingerprint")
    if found == stage.fingerprint:
        return
    if has_output(folder):
        place = free_name(out / PREVIOUS / f"{folder.name}-{found or 'unknown'}")
        place.parent.mkdir(exist_ok=True)
        log.info(
            "%s has other settings or inputs than before and runs again; %s moves to %s", stage.name, folder, place
        )
        folder.rename(place)
    elif folder.is_dir():  # the stage failed before it wrote anything
        shutil.rmtree(folder)
    earlier = out / PREVIOUS / f"{folder.name}-{stage.fingerprint}"
    if earlier.is_dir():
        log.info("%s has the settings of %s, which moves back", stage.name, earlier)
        earlier.rename(folder)


def free_name(path: Path) -> Path:
    """The path itself, or with a number at the end if it exists."""
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not name.exists())


def has_output(folder: Path) -> bool:
    """Whether the folder of a stage has any file besides its record and its provenance."""
    return folder.is_dir() and any(path.name not in (PROVENANCE, RECORD) for path in folder.iterdir())


def check_format(out: Path) -> None:
    """Raise ConfigError if `out` is a run folder of a different format version."""
    path = out / MANIFEST
    number = read_object(path).get("format", 1) if path.exists() else FORMAT
    if number != FORMAT:
        commit = LAST_COMMITS.get(number)
        fix = f"finish it with commit {commit} of thinkstack, or " if commit else ""
        raise ConfigError(
            f"{out} is a run folder of format version {number}; this version resumes format {FORMAT}; "
            f"{fix}use another --out"
        )


def check_inputs(stages: Sequence[StageRun], folders: Sequence[Path]) -> None:
    """Raise ConfigError for the first missing file or checkpoint that a stage needs from outside of `folders`, the
    folders of the stages of the recipe.

    Names on the hub are not checked, because the check would download the files.
    """

    def check(address: str, value: str, wanted: Input) -> str:
        if not is_hub_name(value) and not any(Path(value).is_relative_to(folder) for folder in folders):
            locate(value) if wanted.output == "model" else matching_files(Path(value))
        return value

    for stage in stages:
        try:
            map_inputs(stage.config, check)
            for name, row in getattr(stage.config, "tasks", {}).items():
                for split in ("test",) if stage.kind == "evaluate" else ("train", "test"):
                    make_task(name, row).check_files(split)
        except ConfigError as error:
            raise ConfigError(f"stages.{stage.name}: {error}") from error


def list_stages(tree: Tree, out: Path, scale: str = "") -> str:
    """One line per stage: name, kind, state in `out`, and the stages that it needs."""
    check_format(out)
    rows = [(stage.name, stage.kind, _state(stage, out), stage.needs) for stage in plan_stages(tree, out, scale)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for *cells, needs in rows:
        aligned = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{aligned}  {'needs ' + ', '.join(needs) if needs else ''}".rstrip())
    return "\n".join(lines)


def _state(stage: StageRun, out: Path) -> str:
    record = Run.record_of(stage.folder)
    if is_done(stage):
        place = "" if stage.folder.parent == out else f" in {stage.folder}"
        return f"done ({clock(record['seconds'])}){place}"
    if not record:
        return "to do"
    return "interrupted" if record["fingerprint"] == stage.fingerprint else "changed, runs again"


def run_single(kind: str, values: Tree, settings: Sequence[str], out: Path) -> None:
    """Run a recipe of one stage, named after its kind. settings: dotted overrides of `values`."""
    tree: Tree = {"stages": {kind: {"stage": kind} | values}}
    for setting in settings:
        tree = override(tree, f"stages.{kind}.{setting}")
    run_recipe(tree, out)
