"""Curriculum phases: tasks, levels and shares, and identical problems after a resume."""

import json
from collections import Counter
from pathlib import Path

import pytest

from thinkstack.config import build
from thinkstack.rl.config import RLConfig
from thinkstack.tasks.mixture import PhaseConfig, load_split, make_mixture
from thinkstack.types import ConfigError

PHASES = (
    PhaseConfig(until=0.5, tasks={"sums": 1.0}, levels={"sums": (1,)}),
    PhaseConfig(tasks={"sums": 1.0, "gsm8k": 3.0}, levels={"gsm8k": (1, 2)}),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        rows = [{"question": f"{split} {i}?", "answer": "step\n" * (1 + i % 4) + f"#### {i}"} for i in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def test_a_phase_samples_its_tasks_and_levels_by_weight(folder: Path):
    stream = make_mixture(PHASES, {"gsm8k": str(folder)}, seed=0, languages=("en",))
    first = stream.take(40)
    assert {(p.task, p.level, p.language) for p in first} == {("sums", 1, "en")}
    stream.progress = 0.5
    later = stream.take(400)
    shares = Counter(p.task for p in later)
    assert 270 < shares["gsm8k"] < 330
    assert {p.level for p in later if p.task == "gsm8k"} == {1, 2}
    assert {p.level for p in later if p.task == "sums"} == {1, 2, 3, 4}
    assert all(p.question.startswith("train") for p in later if p.task == "gsm8k")


def test_a_resumed_curriculum_continues_with_the_same_problems(folder: Path):
    whole, first, second = (make_mixture(PHASES, {"gsm8k": str(folder)}, seed=1) for _ in range(3))
    expected = []
    for progress in (0.2, 0.4, 0.6, 0.9):
        whole.progress = progress
        expected += whole.take(7)
    found = []
    for progress in (0.2, 0.4):
        first.progress = progress
        found += first.take(7)
    second.restore(json.loads(json.dumps(first.state())))
    for progress in (0.6, 0.9):
        second.progress = progress
        found += second.take(7)
    assert found == expected


@pytest.mark.parametrize(
    ("phases", "files", "message"),
    [
        ([{"until": 0.5, "tasks": {"sums": 1.0}}], {}, "must increase from above 0 to exactly 1.0"),
        ([{"tasks": {"summs": 1.0}}], {}, "unknown task 'summs'; did you mean sums"),
        ([{"tasks": {"gsm8k": 1.0}}], {}, "the task gsm8k needs its data: set files.gsm8k=FOLDER"),
        ([{"tasks": {"sums": 0.0}}], {}, "must have weights >= 0, at least one weight above 0"),
        ([{"tasks": {"sums": 1.0}, "levels": {"times": [1]}}], {}, "levels.times is not a task"),
        ([{"tasks": {"sums": 1.0}}], {"gsm": "x"}, "files.gsm is not a known benchmark; did you mean gsm8k"),
        ([{"tusks": {"sums": 1.0}}], {}, r"unknown key zero.phases\[0\].tusks; did you mean"),
    ],
)
def test_an_invalid_curriculum_is_refused_before_the_run(phases, files, message: str):
    with pytest.raises(ConfigError, match=message):
        build(RLConfig, {"start": "x", "phases": phases, "files": files}, "zero")


def test_a_folder_without_the_split_is_refused(folder: Path):
    (folder / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"has no test.jsonl or test.jsonl.gz or test.parquet"):
        load_split("gsm8k", str(folder), "test")
