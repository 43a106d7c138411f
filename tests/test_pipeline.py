"""Recipes: planning, resuming, and refusing what does not fit."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from thinkstack import pipeline
from thinkstack.catalog import describe_recipe, list_recipes
from thinkstack.config import override
from thinkstack.kernels import choice
from thinkstack.log import Run
from thinkstack.models.precision import resolve_precision
from thinkstack.pipeline import plan_stages, read_manifest, read_recipe, recipe_names, run_recipe
from thinkstack.types import ConfigError, Interrupted

RECIPES = sorted(path.stem for path in (Path(pipeline.__file__).parent / "recipes").glob("*.toml"))
SCALED = [name.rpartition("_")[::2] for name in RECIPES if name.endswith(("_smoke", "_small"))]
"""Overlays: of which recipe, at which scale."""


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in map("_".join, SCALED)])
def test_every_recipe_of_the_package_can_be_planned(name: str, tmp_path: Path):
    assert len(plan_stages(read_recipe(name), tmp_path)) > 1


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_a_scale_changes_settings_and_keeps_the_stages(name: str, scale: str, tmp_path: Path):
    full, scaled = plan_stages(read_recipe(name), tmp_path), plan_stages(read_recipe(name, scale), tmp_path)
    assert [step.name for step in full] == [step.name for step in scaled]
    assert full[-1].fingerprint != scaled[-1].fingerprint


def test_the_smoke_scale_changes_settings_and_keeps_the_stages(tmp_path: Path):
    full, smoke = plan_stages(read_recipe("demo"), tmp_path), plan_stages(read_recipe("demo", "smoke"), tmp_path)
    assert [step.name for step in full] == [step.name for step in smoke]
    assert smoke[0].config.steps < full[0].config.steps


def test_a_stage_starts_from_an_earlier_one_and_shared_settings_reach_all(tmp_path: Path):
    steps = plan_stages(override(read_recipe("demo"), "shared.seed=7"), tmp_path)
    by_name = {step.name: step.config for step in steps}
    assert by_name["zero"].start == str(tmp_path / "base" / "model")
    assert by_name["base"].seed == by_name["zero"].seed == by_name["base-eval"].seed == 7


def test_a_preset_lies_under_the_settings_of_the_recipe(tmp_path: Path):
    steps = plan_stages(
        override(override(read_recipe("demo"), "stages.zero.preset=paper"), "stages.zero.group_size=8"), tmp_path
    )
    zero = next(step.config for step in steps if step.name == "zero")
    assert zero.advantage == "standardized" and zero.group_size == 8


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.zero.stepz=1", "unknown key stages.zero.stepz; did you mean stages.zero.steps?"),
        ("stages.zero.trainer.optim.learning_rte=1", "did you mean stages.zero.trainer.optim.learning_rate?"),
        ("stages.zero.top_p=0.9", "top_p=0.9"),
        ("stages.zero.stage=rll", "did you mean rl?"),
        ("stages.base.model.moe.num_exprts=3", "num_exprts"),
        ("stages.base.tasks=['chian']", "did you mean chain?"),
        ("stages.base.trainer.optim.learning_rate=-1", "learning_rate=-1"),
        ("stage.base=1", "unknown key stage; did you mean stages?"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(assignment: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        run_recipe(override(read_recipe("demo", "smoke"), assignment), tmp_path / "run")
    assert message in str(error.value)


def test_an_unwritable_folder_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file.*--out"):
        run_recipe(read_recipe("demo", "smoke"), tmp_path / "file" / "run")


class Scripted:
    """Stages that only note that they ran; the one called `stopped` is interrupted the first time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped: str = ""):
        self.ran: list[str] = []
        self.stopped = stopped
        stages = {name: (kind, self.stage) for name, (kind, _) in pipeline.STAGES.items()}
        monkeypatch.setattr(pipeline, "STAGES", stages)

    def stage(self, cfg: object, run: Run) -> None:
        self.ran.append(run.folder.name)
        if run.folder.name == self.stopped:
            self.stopped = ""
            raise Interrupted


def test_a_stopped_recipe_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script, tree = Scripted(monkeypatch, stopped="zero"), read_recipe("demo", "smoke")
    with pytest.raises(Interrupted):
        run_recipe(tree, tmp_path)
    assert script.ran == ["base", "base-eval", "zero"]
    assert not read_manifest(tmp_path)["zero"]["done"]
    run_recipe(tree, tmp_path)
    assert script.ran == ["base", "base-eval", "zero", "zero", "zero-eval", "report"]
    run_recipe(tree, tmp_path)
    assert len(script.ran) == 6, "what is done is not done again"


@pytest.mark.parametrize("format_number", [None, 1, 3])
def test_a_run_folder_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_number):
    """A folder of an older version was continued with files that this version reads differently."""
    script, tree = Scripted(monkeypatch), read_recipe("demo", "smoke")
    records = {"base": {"fingerprint": "0", "seconds": 1.0, "done": True}}
    manifest = records if format_number is None else {"format": format_number, "stages": records}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError) as error:
        run_recipe(tree, tmp_path)
    message = str(error.value)
    assert (
        f"{tmp_path} is a run folder of format version {format_number or 1}; this version resumes format 2" in message
    )
    assert ("finish it with commit 60e1456 of thinkstack" in message) == (format_number != 3)
    assert message.endswith("use another --out") and script.ran == []


def test_a_killed_stage_keeps_its_settings_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The manifest was written when a stage ended; a killed one went on under other settings, unnoticed."""

    def killed(cfg: object, run: Run) -> None:
        found.append(read_manifest(tmp_path))

    found: list[dict[str, dict[str, object]]] = []
    tree = read_recipe("demo", "smoke")
    monkeypatch.setattr(pipeline, "STAGES", {name: (kind, killed) for name, (kind, _) in pipeline.STAGES.items()})
    run_recipe(tree, tmp_path)
    assert list(found[0]) == ["base"] and found[0]["base"]["fingerprint"] and not found[0]["base"]["done"]


def test_a_folder_made_with_other_settings_is_not_mixed_with_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Scripted(monkeypatch)
    tree = read_recipe("demo", "smoke")
    run_recipe(tree, tmp_path)
    with pytest.raises(ConfigError, match=r"was made with other settings or data; choose another folder"):
        run_recipe(override(tree, "stages.zero.steps=3"), tmp_path)


def test_a_resumed_stage_computes_as_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On another machine "auto" was another precision, and the rest of the run another run."""
    dtypes: list[str] = []

    def stage(config: object, run: Run) -> None:
        dtypes.append(resolve_precision("auto"))
        if len(dtypes) == 1:
            raise Interrupted

    monkeypatch.setitem(pipeline.STAGES, "pretrain", (pipeline.STAGES["pretrain"][0], stage))
    recipe = {"stages": {name: read_recipe("demo", "smoke")["stages"]["base"] for name in ("first", "second")}}
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


def test_other_data_under_the_same_name_is_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stage was "done" for data that had been written anew."""
    Scripted(monkeypatch)
    data = tmp_path / "chats.jsonl"
    data.write_text("{}")
    tree = {"stages": {"sft": {"stage": "sft", "start": "OWNER/NAME", "data": [str(data)]}}}
    run_recipe(tree, tmp_path / "run")
    run_recipe(tree, tmp_path / "run")
    data.write_text("{ }")
    with pytest.raises(ConfigError, match="other settings or data"):
        run_recipe(tree, tmp_path / "run")


def test_a_stage_that_was_refused_before_its_first_step_takes_other_settings(tmp_path: Path, monkeypatch):
    """A row that could not be read left a folder that no other settings were allowed in."""

    def refused(cfg: object, run: Run) -> None:
        raise ConfigError("no conversation")

    tree = read_recipe("demo", "smoke")
    with monkeypatch.context() as patch:
        patch.setitem(pipeline.STAGES, "pretrain", (pipeline.STAGES["pretrain"][0], refused))
        with pytest.raises(ConfigError, match="no conversation"):
            run_recipe(tree, tmp_path)
    script = Scripted(monkeypatch)
    run_recipe(override(tree, "stages.base.steps=3"), tmp_path)
    assert script.ran[0] == "base"


@pytest.mark.parametrize("missing", ["stages.sft.data", "stages.sft.start"])
def test_what_a_stage_needs_from_outside_is_looked_for_before_the_first_stage(tmp_path: Path, missing: str):
    tree = {"stages": {"sft": {"stage": "sft", "start": "OWNER/NAME", "data": [str(tmp_path / "none.jsonl")]}}}
    if missing.endswith("start"):
        tree["stages"]["sft"]["start"] = "no/such/model/folder"
    with pytest.raises(ConfigError, match=r"^stages\.sft: .* does not exist"):
        run_recipe(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_recipe_of_the_package_is_listed_with_its_settings():
    listed = list_recipes()
    for name in recipe_names():
        assert f"\n{name}" in listed and read_recipe(name)["stages"]
        described = describe_recipe(name)
        assert all(f"stages.{stage}" in described for stage in read_recipe(name)["stages"])
    assert "demo_smoke" not in recipe_names() and "--scale smoke" in listed


@pytest.mark.parametrize("kind", pipeline.STAGES)
def test_every_setting_of_a_stage_is_listed_with_what_it_means(kind: str):
    lines = describe_recipe(kind).split("\n")
    settings = [place for place, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert settings and all(lines[place + 1 : place + 2] and lines[place + 1].startswith(" " * 6) for place in settings)
