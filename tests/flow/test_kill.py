"""kill -9 at any instant: a recipe that goes on afterwards leaves the files of one that was never stopped.

The long version, 20 kills a stage of the command line as people start it:
`python -m pytest -m slow -s tests/flow/test_kill.py`
"""

from pathlib import Path

import pytest

from tests.flow.killing import RECIPE, Command, Launch, digests, drive, forked, kill_when, run_through

EXACT = ("model/model.safetensors", "metrics.jsonl", "state/state.safetensors")


def check(launch: Launch, tmp_path: Path, stages: tuple[str, ...], kills: int, steps: int) -> None:
    recipe = tmp_path / "kill.toml"
    recipe.write_text(RECIPE.format(steps=steps))
    run_through(launch, recipe, tmp_path / "straight")
    expected = digests(tmp_path / "straight")
    assert all(f"{stage}/{name}" in expected for stage in ("base", "zero") for name in EXACT)
    assert "base/model-ema/model.safetensors" in expected
    for seed, stage in enumerate(stages):
        found = drive(launch, recipe, tmp_path / "killed", stage, kills, steps, seed)
        print(
            f"{stage}: {kills} kills at rows {found.at_rows}, {found.inside_writes} inside a write: {found.leftovers}"
        )
        assert found.inside_writes >= max(kills // 4, 1), "the kills did not hit the writes that they were aimed at"
    begun = tmp_path / "killed" / "zero-eval" / "provenance.json"
    kill_when(launch, recipe, tmp_path / "killed", begun.exists)
    run_through(launch, recipe, tmp_path / "killed")
    assert digests(tmp_path / "killed") == expected
    rows = [(tmp_path / "killed" / stage / "timings.jsonl").read_text().count("\n") for stage in ("base", "zero")]
    assert rows == [steps, steps]


def test_a_killed_recipe_ends_like_an_uninterrupted_one(tmp_path: Path):
    check(forked, tmp_path, ("base", "zero"), kills=2, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "zero"])
def test_twenty_kills_of_one_stage_change_no_byte(tmp_path: Path, stage: str):
    check(Command, tmp_path, (stage,), kills=20, steps=60)
