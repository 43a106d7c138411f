"""What a run leaves behind."""

import json
import logging
from pathlib import Path

import pytest

from thinkstack.log import Progress, Run, read_lines, timed, write_text
from thinkstack.types import ConfigError


def test_rewinding_cuts_every_file_of_rows_to_what_it_was(tmp_path: Path):
    """Rows were once kept by step number: a step logged twice (a skipped one, a rollout step without signal) came back
    twice."""
    run = Run(tmp_path / "run")
    for step in (1, 2, 2):
        run.log(step, {"loss": 1 / step, "time/step_seconds": 0.1})
    before, mark = (run.folder / "metrics.jsonl").read_bytes(), run.mark()
    run.log(2, {"loss": 0.1, "time/step_seconds": 0.2})
    run.append("curve.jsonl", {"step": 2})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"ste')
    run.rewind(mark)
    assert (run.folder / "metrics.jsonl").read_bytes() == before
    assert len(run.rows("timings.jsonl")) == 3 and run.rows("curve.jsonl") == []
    run.rewind({})
    assert run.rows() == []


def test_rows_that_are_gone_are_named(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.log(1, {"loss": 1.0})
    mark = run.mark()
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"metrics.jsonl has 0 bytes; it had 25 .* restore the file"):
        run.rewind(mark)


def test_timings_are_in_a_separate_file(tmp_path: Path):
    """Two runs of one seed were told apart by their seconds alone."""
    run = Run(tmp_path / "run")
    run.log(1, {"loss": 0.5, "time/step_seconds": 0.1, "train/tokens_per_second": 10.0})
    assert run.rows() == [{"step": 1, "loss": 0.5}]
    assert run.rows("timings.jsonl") == [{"step": 1, "time/step_seconds": 0.1, "train/tokens_per_second": 10.0}]


def test_a_row_cut_off_by_a_crash_is_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_file_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left on device; free space"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_provenance_says_where_a_run_comes_from(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = Run(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        run.start({"steps": 3}, seed=7, machine="a laptop")
    known = json.loads((run.folder / "provenance.json").read_text())
    assert known["seed"] == 7 and known["config"] == {"steps": 3} and known["machine"] == "a laptop"
    assert "seed 7" in caplog.text


def test_progress_says_how_long_it_still_takes(monkeypatch: pytest.MonkeyPatch):
    now = iter([100.0, 130.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Progress("training", total=40, done=10)  # resumed: ten were done before
    progress.done = 20
    assert progress.line() == "training: 20/40, 0:30 elapsed, 1:00 left  "


def test_items_in_flight_count_as_half_done(monkeypatch: pytest.MonkeyPatch):
    """Without it an evaluation that samples 64 completions at once is estimated at several times its time at first."""
    monkeypatch.setattr("time.monotonic", iter([100.0, 130.0]).__next__)
    progress = Progress("evaluation", total=100, in_flight=20)
    progress.done = 20
    assert progress.seconds_left() == 70.0  # 30 are done in 30 s, 70 are left


def test_times_of_one_name_add_up():
    times: dict[str, float] = {"time/train_seconds": 1.0}
    with timed(times, "train"):
        pass
    assert times["time/train_seconds"] > 1.0
