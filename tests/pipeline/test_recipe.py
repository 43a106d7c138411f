"""Recipe files: what extends what, scales, overrides, and what is refused."""

from pathlib import Path

import pytest

from thinkstack.catalog import describe_recipe, list_recipes
from thinkstack.pipeline.graph import STAGES, plan_stages
from thinkstack.pipeline.recipe import read_recipe, recipe_names, scales_of
from thinkstack.types import ConfigError

SCALED = [(name, scale) for name in recipe_names() for scale in scales_of(name)]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_can_be_planned(name: str, tmp_path: Path):
    assert len(plan_stages(read_recipe(name), tmp_path)) > 1


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_a_scale_changes_settings_and_keeps_the_stages(name: str, scale: str, tmp_path: Path):
    full, scaled = plan_stages(read_recipe(name), tmp_path), plan_stages(read_recipe(name, scale), tmp_path)
    assert [stage.name for stage in full] == [stage.name for stage in scaled]
    assert full[-1].fingerprint != scaled[-1].fingerprint


def write(folder: Path, **recipes: str) -> dict[str, str]:
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text.replace("FOLDER", str(folder)))
    return {name: str(folder / f"{name}.toml") for name in recipes}


def test_a_recipe_lies_over_the_recipes_that_it_extends(tmp_path: Path):
    paths = write(
        tmp_path,
        world='[shared]\nseed = 1\n[stages.base]\nstage = "pretrain"\nsteps = 3\n[scales.big.stages.base]\nsteps = 9\n',
        other="[stages.base]\nrows = 4\n",
        own='extends = ["FOLDER/world.toml", "FOLDER/other.toml"]\n[stages.base]\nsteps = 5\n',
    )
    assert read_recipe(paths["own"]) == {
        "shared": {"seed": 1},
        "stages": {"base": {"stage": "pretrain", "steps": 5, "rows": 4}},
    }
    assert read_recipe(paths["own"], "big")["stages"]["base"]["steps"] == 9
    assert scales_of(paths["own"]) == ["big"]


@pytest.mark.parametrize(
    ("text", "scale", "override", "message"),
    [
        ('extends = ["FOLDER/own.toml"]', "", (), "recipes extend each other in a cycle"),
        ('extends = ["dmeo"]', "", (), "no recipe 'dmeo'"),
        ("[stage.base]", "", (), "unknown key stage; did you mean stages?"),
        ('[stages.base]\nstage = "pretrain"', "smoke", (), "has no scale 'smoke'; add a table scales.smoke"),
        ("[scales.small.stages.a]\nb = 1\n[stages.c]", "smal", (), "has no scale 'smal'; did you mean small?"),
        ("[scales.small.stages.bse]\nb = 1\n[stages.base]", "small", (), "scales.small: the recipe has no stage bse"),
        ("[stages.base]", "", ("stages.bse.steps=1",), "stages.bse.steps=1: the recipe has no stage bse; did you mean"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path, text: str, scale: str, override, message: str):
    path = write(tmp_path, own=text)["own"]
    with pytest.raises(ConfigError) as error:
        read_recipe(path, scale, override)
    assert message in str(error.value)


def test_every_recipe_of_the_package_is_listed_with_its_settings():
    listed = list_recipes()
    for name in recipe_names():
        assert f"\n{name}" in listed and read_recipe(name)["stages"]
        described = describe_recipe(name)
        assert all(f"stages.{stage}" in described for stage in read_recipe(name)["stages"])
    assert "demo_smoke" not in recipe_names() and "demo  (--scale smoke)" in listed


@pytest.mark.parametrize("kind", STAGES)
def test_every_setting_of_a_stage_is_listed_with_what_it_means(kind: str):
    lines = describe_recipe(kind).split("\n")
    settings = [place for place, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert settings and all(lines[place + 1 : place + 2] and lines[place + 1].startswith(" " * 6) for place in settings)
