"""Running recipes: resuming, changes, stages of other recipes, and what is refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from thinkstack.config import override
from thinkstack.kernels import choice
from thinkstack.kernels.precision import resolve_precision
from thinkstack.log import Run
from thinkstack.pipeline import graph
from thinkstack.pipeline.recipe import read_recipe
from thinkstack.pipeline.run import list_stages, run_recipe
from thinkstack.types import ConfigError, Interrupted

TREE = {
    "stages": {
        "base": {"stage": "pretrain", "steps": 3},
        "zero": {"stage": "rl", "start": "base"},
        "zero-eval": {"stage": "evaluate", "start": "zero"},
    }
}


class Scripted:
    """Stages that note that they ran and write their settings; the one called `stopped` is interrupted once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped: str = ""):
        self.ran: list[str] = []
        self.stopped = stopped
        for name, (kind, _) in graph.STAGES.items():
            monkeypatch.setitem(graph.STAGES, name, (kind, self.stage))

    def stage(self, cfg: object, run: Run) -> None:
        self.ran.append(run.folder.name)
        (run.folder / "settings").write_text(repr(cfg))
        if run.folder.name == self.stopped:
            self.stopped = ""
            raise Interrupted

    def run(self, tree: dict, out: Path, **options: str) -> list[str]:
        """The stages that a run of the recipe runs."""
        self.ran.clear()
        run_recipe(tree, out, **options)
        return list(self.ran)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(monkeypatch)


def test_a_stopped_recipe_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script, tree = Scripted(monkeypatch, stopped="zero"), read_recipe("demo", "smoke")
    with pytest.raises(Interrupted):
        run_recipe(tree, tmp_path)
    assert script.ran == ["base", "base-eval", "zero"]
    assert not Run.record_of(tmp_path / "zero")["done"]
    assert script.run(tree, tmp_path) == ["zero", "zero-eval", "report"]
    assert script.run(tree, tmp_path) == [], "what is done is not done again"


def test_an_inserted_evaluation_runs_alone(tmp_path: Path, script: Scripted):
    """A fingerprint contained the stage before it, so that everything after a new stage had to run again."""
    script.run(TREE, tmp_path)
    stages = TREE["stages"]
    inserted = {"base": stages["base"], "base-eval": {"stage": "evaluate", "start": "base"}} | stages
    assert script.run({"stages": inserted}, tmp_path) == ["base-eval"]


def test_a_changed_stage_runs_again_with_what_needs_it_and_the_old_one_is_kept(tmp_path: Path, script: Scripted):
    script.run(TREE, tmp_path)
    before = (tmp_path / "zero" / "settings").read_text()
    changed = override(TREE, "stages.zero.steps=4")
    assert script.run(changed, tmp_path) == ["zero", "zero-eval"]
    assert "steps=4" in (tmp_path / "zero" / "settings").read_text()
    (kept,) = (path for path in (tmp_path / "previous").glob("zero-*/settings") if "eval" not in path.parent.name)
    assert kept.read_text() == before
    assert script.run(TREE, tmp_path) == [], "the old settings return, and so do their folders"
    assert (tmp_path / "zero" / "settings").read_text() == before
    assert script.run(changed, tmp_path) == []


def test_an_interrupted_stage_with_other_settings_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = Scripted(monkeypatch, stopped="zero")
    with pytest.raises(Interrupted):
        run_recipe(TREE, tmp_path)
    assert script.run(override(TREE, "stages.zero.steps=4"), tmp_path) == ["zero", "zero-eval"]
    assert "interrupted" not in list_stages(override(TREE, "stages.zero.steps=4"), tmp_path)


def test_a_stage_of_another_recipe_is_made_once(tmp_path: Path, script: Scripted):
    (tmp_path / "world.toml").write_text('[stages.base]\nstage = "pretrain"\nsteps = 3\n')
    tree = {"stages": {"zero": {"stage": "rl", "start": f"{tmp_path}/world.toml:base"}}}
    out = tmp_path / "runs" / "zero"
    assert script.run(tree, out) == ["world.toml:base", "zero"]
    assert script.run(tree, out) == []
    assert script.run(override(tree, "stages.zero.steps=3"), tmp_path / "runs" / "second") == ["zero"]
    assert f"done (0:00) in {out}/world.toml:base" in list_stages(tree, tmp_path / "runs" / "third")
    assert script.run(tree, tmp_path / "elsewhere" / "zero") == ["world.toml:base", "zero"]


def test_a_finished_run_of_the_other_recipe_is_used(tmp_path: Path, script: Scripted):
    script.run(read_recipe("demo", "smoke"), tmp_path / "demo")
    controls = read_recipe("demo_controls")
    assert "demo:base" in script.run(controls, tmp_path / "controls"), "the scale differs"
    assert "demo:base" not in script.run(controls, tmp_path / "again", scale="smoke")


def test_until_runs_one_stage_and_what_it_needs(tmp_path: Path, script: Scripted):
    tree = read_recipe("demo", "smoke")
    assert script.run(tree, tmp_path, until="zero") == ["base", "zero"]
    listed = list_stages(tree, tmp_path).split("\n")
    assert [line.split()[0] for line in listed] == ["base", "base-eval", "zero", "zero-eval", "report"]
    assert "done" in listed[0] and "to do" in listed[1] and listed[2].endswith("needs base")


KILLED = """
import os, signal, sys
from pathlib import Path
from thinkstack.pipeline import graph
from thinkstack.pipeline.run import run_recipe
from thinkstack.config import override
tree = {tree!r}
ran = []
def stage(cfg, run):
    ran.append(run.folder.name)
    (run.folder / "settings").write_text(repr(cfg))
    if run.folder.name == {victim!r}:
        os.kill(os.getpid(), signal.SIGKILL)
for name, (kind, _) in list(graph.STAGES.items()):
    graph.STAGES[name] = (kind, stage)
run_recipe(tree, Path({out!r}))
print("ran", *ran)
"""


def test_after_a_kill_exactly_the_stages_run_that_must(tmp_path: Path):
    """An evaluation is inserted, a setting changed, another recipe's stage taken; a process is killed in each."""

    def run(tree: dict, victim: str = "") -> list[str]:
        code = KILLED.format(tree=tree, victim=victim, out=str(tmp_path / "run"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
        assert done.returncode == (-signal.SIGKILL if victim else 0), done.stderr[-500:]
        return [] if victim else done.stdout.rpartition("ran")[2].split()

    run(TREE, victim="zero")
    assert run(TREE) == ["zero", "zero-eval"]
    (tmp_path / "world.toml").write_text('[stages.base]\nstage = "pretrain"\nsteps = 2\n')
    stages = override(TREE, "stages.zero-eval.samples=4")["stages"]
    stages |= {"base-eval": {"stage": "evaluate", "start": "base"}}
    stages |= {"other": {"stage": "rl", "start": f"{tmp_path}/world.toml:base"}}
    run({"stages": stages}, victim="zero-eval")
    run({"stages": stages}, victim="world.toml:base")
    assert run({"stages": stages}) == ["world.toml:base", "other"]
    assert run({"stages": stages}) == []


@pytest.mark.parametrize("format_number", [None, 1, 2, 3, 5])
def test_a_run_folder_of_another_format_is_refused(tmp_path: Path, script: Scripted, format_number):
    """A folder of an older version was continued with files that this version reads differently."""
    (tmp_path / "manifest.json").write_text(json.dumps({} if format_number is None else {"format": format_number}))
    with pytest.raises(ConfigError) as error:
        run_recipe(TREE, tmp_path)
    message = str(error.value)
    assert f"{tmp_path} is a run folder of format version {format_number or 1}; this version resumes" in message
    assert ("finish it with commit" in message) == (format_number != 5)
    assert message.endswith("use another --out") and script.ran == []


def test_a_killed_stage_keeps_its_settings_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The record was written when a stage ended; a killed one went on under other settings, unnoticed."""
    found: list[dict[str, object]] = []
    for name, (kind, _) in graph.STAGES.items():
        monkeypatch.setitem(graph.STAGES, name, (kind, lambda cfg, run: found.append(Run.record_of(run.folder))))
    run_recipe(TREE, tmp_path)
    assert found[0]["fingerprint"] and not found[0]["done"]


def test_an_unwritable_folder_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file.*--out"):
        run_recipe(read_recipe("demo", "smoke"), tmp_path / "file" / "run")


def test_a_resumed_stage_computes_as_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On another machine "auto" was another precision, and the rest of the run another run."""
    dtypes: list[str] = []

    def stage(config: object, run: Run) -> None:
        dtypes.append(resolve_precision("auto"))
        if len(dtypes) == 1:
            raise Interrupted

    monkeypatch.setitem(graph.STAGES, "pretrain", (graph.STAGES["pretrain"][0], stage))
    recipe = {"stages": {name: TREE["stages"]["base"] for name in ("first", "second")}}
    for machine in ("bf16", "fp32"):
        found = replace(choice.decide(), auto_dtype=machine)
        monkeypatch.setattr(choice, "decide", lambda found=found: found)
        choice.restore(None)
        with contextlib.suppress(Interrupted):
            run_recipe(recipe, tmp_path)
    choice.restore(None)
    assert dtypes == ["bf16", "bf16", "fp32"]  # the second stage was not begun before
    recorded = Run(tmp_path / "first").provenance()["config"]["computed_with"]
    assert recorded["auto_dtype"] == "bf16" and recorded["reason"]


@pytest.mark.parametrize("missing", ["stages.sft.data", "stages.sft.start"])
def test_what_a_stage_needs_from_outside_is_looked_for_before_the_first_stage(tmp_path: Path, missing: str):
    tree = {"stages": {"sft": {"stage": "sft", "start": "OWNER/NAME", "data": [str(tmp_path / "none.jsonl")]}}}
    if missing.endswith("start"):
        tree["stages"]["sft"]["start"] = "no/such/model/folder"
    with pytest.raises(ConfigError, match=r"^stages\.sft: .* does not exist"):
        run_recipe(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()
