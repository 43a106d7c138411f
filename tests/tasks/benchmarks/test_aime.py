"""AIME: its rows, its answers, and what is refused."""

import json

import pytest

from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Response


def aime(folder, rows, split="test"):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return make_task("aime", TaskConfig(data=str(folder)))


def test_answers_are_compared_as_numbers(tmp_path):
    task = aime(tmp_path, [{"problem": "How many?", "answer": "025", "id": 3}])
    (problem,) = task.problems("test", 0).take(1)
    assert (problem.question, problem.answer, problem.task) == ("How many?", "25", "aime")
    for answer, is_correct in (("25", True), ("025", True), ("\\boxed{25}", True), ("$25$.", True), ("25.0", True)):
        assert task.verify(problem, Response(text="", answer=answer)).total == is_correct, answer
    for answer in ("26", "25 or 26", "\\boxed{25} or \\boxed{26}", "2 5", ""):
        assert not task.verify(problem, Response(text="", answer=answer)).total, answer


@pytest.mark.parametrize("answer", ["1000", "-1", "\\frac12", "", None])
def test_other_answers_are_refused_with_their_row(tmp_path, answer):
    task = aime(tmp_path, [{"problem": "a", "answer": 7}, {"problem": "b", "answer": answer}])
    with pytest.raises(ConfigError, match=r"test\.jsonl line 2 .*integers from 0 to 999"):
        task.problems("test", 0)


def test_it_has_no_training_split(tmp_path):
    with pytest.raises(ConfigError, match=r"has no train\.jsonl"):
        aime(tmp_path, [{"problem": "a", "answer": 7}]).problems("train", 0)
