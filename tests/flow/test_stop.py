"""Ctrl-C and SIGTERM: a run ends soon, with its state, and goes on to the bytes of one that was never stopped."""

import json
import signal
from pathlib import Path

import pytest

from tests.flow.killing import RECIPE, Moment, digests, forked, run_through
from thinkstack.log import Run

MOMENTS = {
    "between two steps": Moment("open", "base/metrics.jsonl", 2, signal.SIGTERM),
    "between two stages": Moment("open", "base/stage.json.writing", 2, signal.SIGTERM),
    "in an evaluation on the way": Moment("open", "zero/curve.jsonl", 1, signal.SIGINT),
    "while rollouts are sampled": Moment("open", "zero/metrics.jsonl", 4, signal.SIGTERM),
    "in an evaluation": Moment("open", "zero-eval/completions.jsonl", 3, signal.SIGINT),
}
"""In the order of a run."""


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stopped_recipe_ends_like_an_uninterrupted_one(tmp_path: Path):
    """SIGTERM lost all since the last state, and an evaluation ran on for a minute and lost its answers."""
    recipe, out = tmp_path / "stop.toml", tmp_path / "stopped"
    recipe.write_text(RECIPE.format(steps=6))
    run_through(forked, recipe, tmp_path / "straight")
    for name, moment in MOMENTS.items():
        process = forked(recipe, out, moment)
        process.join()
        assert process.exitcode == 130, name
        stage = moment.path.partition("/")[0]
        assert Run.record_of(out / stage)["done"] == (name == "between two stages")
        if name == "between two stages":
            assert not (out / "zero").exists()
        if stage in ("base", "zero"):
            assert (out / stage / "state" / "state.safetensors").is_file(), name
    kept = rows(out / "zero-eval" / "completions.jsonl")
    assert len(kept) >= 2
    run_through(forked, recipe, out)
    assert not (out / "zero-eval" / "completions.jsonl").exists()
    assert digests(out) == digests(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_request_does_not_wait(number: int):
    from thinkstack.stopping import stopping_on_signals

    before = signal.getsignal(number)
    with stopping_on_signals() as stop:
        signal.raise_signal(number)
        assert stop.is_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
