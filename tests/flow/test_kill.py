"""kill -9 at any instant: a recipe that goes on afterwards leaves the files of one that was never stopped.

The long version, 20 kills a stage of the command line as people start it, at random instants:
`python -m pytest -m slow -s tests/flow/test_kill.py`
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow.killing import RECIPE, Command, Launch, Moment, digests, drive, forked, kill_at, kill_when, run_through

EXACT = ("model/model.safetensors", "metrics.jsonl", "state/state.safetensors")
MOMENTS = {
    "half of the first state is written": (Moment("open", "base/state.writing/state.safetensors"), ["state.writing"]),
    "between two renames": (Moment("os.rename", "base/state.writing", count=2), ["state.writing", "state.old"]),
    "before the older state is removed": (Moment("os.rmdir", "base/state.old"), ["state.old"]),
    "a model is written, and has no name": (
        Moment("os.rename", "base/model.writing"),
        ["state.old", "model.writing"],  # no state was left to write after the kill before
    ),
    "a model is there, and not its average": (Moment("os.mkdir", "base/model-ema.writing"), ["state.old"]),
    "between the two rows of a step": (Moment("open", "zero/timings.jsonl", count=5), []),
    "half of a model is written": (Moment("open", "zero/model.writing/model.safetensors"), ["model.writing"]),
    "an evaluation is half done": (Moment("open", "zero-eval/greedy.json.writing"), []),
}
"""In the order of a run, and what lies half there then."""


def check(launch: Launch, tmp_path: Path, steps: int, interrupt: Callable[[Path, Path], None]) -> None:
    recipe = tmp_path / "kill.toml"
    recipe.write_text(RECIPE.format(steps=steps))
    run_through(launch, recipe, tmp_path / "straight")
    expected = digests(tmp_path / "straight")
    assert all(f"{stage}/{name}" in expected for stage in ("base", "zero") for name in EXACT)
    assert "base/model-ema/model.safetensors" in expected
    interrupt(recipe, tmp_path / "killed")
    run_through(launch, recipe, tmp_path / "killed")
    assert digests(tmp_path / "killed") == expected
    rows = [(tmp_path / "killed" / stage / "timings.jsonl").read_text().count("\n") for stage in ("base", "zero")]
    assert rows == [steps, steps]


def test_a_killed_recipe_ends_like_an_uninterrupted_one(tmp_path: Path):
    def interrupt(recipe: Path, out: Path) -> None:
        for name, (moment, half_there) in MOMENTS.items():
            assert kill_at(moment, recipe, out) == half_there, name

    check(forked, tmp_path, 6, interrupt)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "zero"])
def test_twenty_kills_of_one_stage_change_no_byte(tmp_path: Path, stage: str):
    kills, steps = 20, 60

    def interrupt(recipe: Path, out: Path) -> None:
        found = drive(Command, recipe, out, stage, kills, steps, seed=0)
        print(
            f"{stage}: {kills} kills at rows {found.at_rows}, {found.inside_writes} inside a write: {found.leftovers}"
        )
        assert found.inside_writes >= kills // 4, "the kills did not hit the writes that they were aimed at"
        kill_when(Command, recipe, out, (out / "zero-eval" / "provenance.json").exists)

    check(Command, tmp_path, steps, interrupt)
