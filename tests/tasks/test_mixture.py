"""Curriculum phases: tasks, levels and shares, and identical problems after a resume."""

import json
from collections import Counter
from pathlib import Path

import pytest

from thinkstack.config import build
from thinkstack.rl.config import RLConfig
from thinkstack.tasks.mixture import PhaseConfig, make_mixture
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
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


def table(folder: Path) -> dict[str, TaskConfig]:
    return {"sums": TaskConfig(languages=("en",)), "gsm8k": TaskConfig(data=str(folder))}


def test_a_phase_samples_its_tasks_and_levels_by_weight(folder: Path):
    stream = make_mixture(table(folder), PHASES, seed=0)
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
    whole, first, second = (make_mixture(table(folder), PHASES, seed=1) for _ in range(3))
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


def test_without_phases_generated_tasks_alternate_without_the_held_out_levels(folder: Path):
    tasks = {"sums": TaskConfig(), "times": TaskConfig(levels=(1, 2))}
    found = make_mixture(tasks, (), seed=0, held_out_levels=(2, 4)).take(200)
    assert [problem.task for problem in found[:4]] == ["sums", "times"] * 2
    assert {(problem.task, problem.level) for problem in found} == {("sums", 1), ("sums", 3), ("times", 1)}


def test_without_phases_all_tasks_have_equal_weights_if_there_are_data_sets(folder: Path):
    shares = Counter(problem.task for problem in make_mixture(table(folder), (), seed=0).take(400))
    assert 150 < shares["gsm8k"] < 250


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": [{"until": 0.5, "tasks": {"sums": 1.0}}]}, "must increase from above 0 to exactly 1.0"),
        ({"phases": [{"tasks": {"summs": 1.0}}]}, "the task 'summs' of a phase is not in tasks; did you mean sums"),
        ({"tasks": {"gsm8k": {}}}, "the task gsm8k needs its data: set tasks.gsm8k.data=FOLDER"),
        ({"phases": [{"tasks": {"sums": 0.0}}]}, "must have weights >= 0, at least one weight above 0"),
        ({"phases": [{"tasks": {"sums": 1.0}, "levels": {"times": [1]}}]}, "levels.times is not a task"),
        ({"phases": [{"tasks": {"sums": 1.0}}], "held_out_levels": [1]}, "held_out_levels=.1. needs generated tasks"),
        ({"phases": [{"tusks": {"sums": 1.0}}]}, r"unknown key zero.phases\[0\].tusks; did you mean"),
    ],
)
def test_an_invalid_curriculum_is_refused_before_the_run(settings, message: str):
    with pytest.raises(ConfigError, match=message):
        build(RLConfig, {"start": "x", "tasks": ["sums"]} | settings, "zero")


def test_held_out_levels_that_leave_nothing_are_refused():
    with pytest.raises(ConfigError, match="leaves times no level to train on"):
        make_mixture({"times": TaskConfig()}, (), seed=0, held_out_levels=(1, 2, 3))


def test_a_folder_without_the_split_is_refused(folder: Path):
    (folder / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"has no test.jsonl or test.jsonl.gz or test.parquet"):
        make_task("gsm8k", TaskConfig(data=str(folder))).problems("test", 0)
