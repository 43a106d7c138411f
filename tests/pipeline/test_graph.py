"""The graph of a recipe: inputs, order, fingerprints."""

from pathlib import Path

import pytest

from thinkstack.config import override
from thinkstack.pipeline.graph import StageRun, ancestors, plan_stages
from thinkstack.pipeline.recipe import read_recipe
from thinkstack.types import ConfigError

TREE = {
    "stages": {
        "base": {"stage": "pretrain", "steps": 3},
        "zero": {"stage": "rl", "start": "base"},
        "zero-eval": {"stage": "evaluate", "start": "zero"},
    }
}


def plan(tree: dict, out: Path) -> dict[str, StageRun]:
    return {stage.name: stage for stage in plan_stages(tree, out)}


def with_stage(name: str, **settings: object) -> dict:
    return {"stages": TREE["stages"] | {name: settings}}


def test_an_input_is_the_output_of_its_stage(tmp_path: Path):
    stages = plan(with_stage("again", stage="sft", start="base/model-ema", data=["zero-eval/samples.jsonl"]), tmp_path)
    assert stages["zero"].config.start == str(tmp_path / "base" / "model")
    assert stages["again"].config.start == str(tmp_path / "base" / "model-ema")
    assert stages["again"].config.data == (str(tmp_path / "zero-eval" / "samples.jsonl"),)
    assert stages["again"].needs == ("base", "zero-eval")
    report = plan(with_stage("report", stage="report", title="t", columns={"zero": "zero-eval"}), tmp_path)["report"]
    assert report.config.columns == {"zero": str(tmp_path / "zero-eval")}


def test_a_stage_runs_after_the_stages_that_it_needs(tmp_path: Path):
    backwards = {"stages": dict(reversed(TREE["stages"].items()))}
    assert list(plan(backwards, tmp_path)) == ["base", "zero", "zero-eval"]


def changed(before: dict, after: dict, out: Path) -> set[str]:
    """Stages whose fingerprint is new or differs."""
    old, new = plan(before, out), plan(after, out)
    return {name for name, stage in new.items() if name not in old or old[name].fingerprint != stage.fingerprint}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("stages.base.steps=4", {"base", "zero", "zero-eval"}),
        ("stages.zero.steps=4", {"zero", "zero-eval"}),
        ("stages.zero-eval.samples=4", {"zero-eval"}),
        ("shared.max_tokens=77", {"zero", "zero-eval"}),
    ],
)
def test_a_fingerprint_depends_on_the_settings_of_a_stage_and_of_its_inputs(tmp_path: Path, assignment, expected):
    assert changed(TREE, override(TREE, assignment), tmp_path) == expected


def test_an_inserted_evaluation_changes_nothing_else(tmp_path: Path):
    """Every stage after an inserted one had to run again, because a fingerprint contained the stage before it."""
    evaluation = {"stage": "evaluate", "start": "base"}
    stages = TREE["stages"]
    inserted = {
        "base": stages["base"],
        "base-eval": evaluation,
        "zero": stages["zero"],
        "zero-eval": stages["zero-eval"],
    }
    assert changed(TREE, {"stages": inserted}, tmp_path) == {"base-eval"}


def test_a_renamed_stage_in_another_folder_keeps_its_fingerprint(tmp_path: Path):
    renamed = {"stages": {"first": TREE["stages"]["base"], "second": TREE["stages"]["zero"] | {"start": "first"}}}
    assert plan(renamed, tmp_path / "b")["second"].fingerprint == plan(TREE, tmp_path / "a")["zero"].fingerprint


def test_other_contents_under_the_same_path_are_another_input(tmp_path: Path):
    """The stage was "done" for data that had been written anew."""
    data = tmp_path / "chats.jsonl"
    tree = {"stages": {"sft": {"stage": "sft", "start": "OWNER/NAME", "data": [str(tmp_path / "chat*.jsonl")]}}}
    found = set()
    for text in ("{}", "{ }", "{" + " " * 200_000 + "}", "{" + " " * 199_999 + "\n}"):
        data.write_text(text)
        found.add(plan(tree, tmp_path)["sft"].fingerprint)
    assert len(found) == 4


def test_a_stage_of_another_recipe_is_planned_with_all_that_it_needs(tmp_path: Path):
    (tmp_path / "world.toml").write_text(
        '[stages.base]\nstage = "pretrain"\nsteps = 3\n[scales.big.stages.base]\nsteps = 9'
    )
    tree = {"stages": {"zero": {"stage": "rl", "start": f"{tmp_path}/world.toml:base/model-ema"}}}
    base, zero = plan_stages(tree, tmp_path / "run")
    assert base.name == f"{tmp_path}/world.toml:base" and zero.needs == (base.name,)
    assert zero.config.start == f"{tmp_path}/run/world.toml:base/model-ema" and base.config.steps == 3
    assert plan_stages(tree, tmp_path / "run", "big")[0].config.steps == 9


def test_the_controls_of_the_demo_take_its_base_model(tmp_path: Path):
    base = plan(read_recipe("demo"), tmp_path / "demo")["base"]
    controls = plan(read_recipe("demo_controls"), tmp_path / "controls")
    assert controls["demo:base"].fingerprint == base.fingerprint
    assert controls["longer"].config.start == str(tmp_path / "controls" / "demo:base" / "model")


def test_only_what_a_stage_needs_is_run_for_it(tmp_path: Path):
    stages = plan_stages(with_stage("base-eval", stage="evaluate", start="base"), tmp_path)
    assert [stage.name for stage in ancestors(stages, "base-eval")] == ["base", "base-eval"]
    with pytest.raises(ConfigError, match=r"--until zerro: the recipe has no such stage; did you mean zero\?"):
        ancestors(stages, "zerro")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.zero.start=bse", "stages.zero.start='bse' is neither a stage nor a path; did you mean base?"),
        ("stages.zero.start=dmeo:base", "no recipe 'dmeo'"),
        ("stages.zero.start=demo:bse", "the recipe demo has no stage 'bse'; did you mean base?"),
        ("stages.base.start=zero-eval", "the stages need each other in a cycle: base -> zero-eval -> zero -> base"),
        ("stages.zero.stepz=1", "unknown key stages.zero.stepz; did you mean stages.zero.steps?"),
        ("stages.zero.trainer.optim.learning_rte=1", "did you mean stages.zero.trainer.optim.learning_rate?"),
        ("stages.zero.top_p=0.9", "top_p=0.9"),
        ("stages.zero.stage=rll", "did you mean rl?"),
        ("stages.base.model.moe.num_exprts=3", "num_exprts"),
        ("stages.base.tasks=['chian']", "did you mean chain?"),
        ("stages.base.trainer.optim.learning_rate=-1", "learning_rate=-1"),
        ("shared.seeed=1", "unknown key shared.seeed; did you mean shared.seed?"),
        ("stage.base=1", "unknown key stage; did you mean stages?"),
    ],
)
def test_a_wrong_setting_is_refused(assignment: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        plan_stages(override(TREE, assignment), tmp_path)
    assert message in str(error.value)


def test_a_preset_lies_under_the_settings_of_the_recipe(tmp_path: Path):
    tree = override(override(TREE, "stages.zero.preset=paper"), "stages.zero.group_size=8")
    zero = plan(tree, tmp_path)["zero"].config
    assert zero.advantage == "standardized" and zero.group_size == 8


def test_shared_settings_reach_all_stages_that_have_them(tmp_path: Path):
    stages = plan(override(TREE, "shared.seed=7"), tmp_path)
    assert {stage.config.seed for stage in stages.values()} == {7}
