"""Stored completions: graded again without a model, and compared with those of another evaluation."""

import json
from dataclasses import replace

import pytest

from tests.evals.test_report import record
from thinkstack.evals.compare import compare_tasks, comparison_rows
from thinkstack.evals.records import write_samples
from thinkstack.evals.regrade import RunTasks, disagreements, grader_rows, pair_rows, regrade
from thinkstack.evals.runner import held_out_problems
from thinkstack.evals.sampling import EvalConfig
from thinkstack.stages.regrade import print_comparison, print_regraded
from thinkstack.tasks.task import TaskConfig
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.types import ConfigError

POOL = VerifierPool()
"""Starts no process: the graders of these tests do not ask math-verify."""


def stored(reference, turns, correct, key="00"):
    """A problem with these completions and the verdicts of the run."""
    found = record(correct, task="math")
    answers = [replace(answer, text=text) for answer, text in zip(found.answers, turns, strict=True)]
    return replace(found, key=key, reference=reference, answers=tuple(answers))


HALF = stored("\\frac{1}{2}", ["\\boxed{0.5}", "\\boxed{1/2}", "\\boxed{2}", "<think>1/2"], [False, True, False, True])
FIVE = stored("5", ["\\boxed{5\\text{ cm}}", "\\boxed{5}", "\\boxed{6}", "\\boxed{6}"], [True] * 4, key="01")


def test_verdicts_and_disagreements_by_hand():
    found = regrade([HALF, FIVE], ["stored", "strict", "text"], "flexible_extract", POOL)
    assert found.verdicts["strict"] == [[True, True, False, False], [True, True, False, False]]
    assert found.verdicts["text"] == [[False, False, False, False], [False, True, False, False]]
    rows = dict(grader_rows(found))
    # majority: 1/2 twice, 2 once: right; 5 and 6 twice each: a tie
    assert rows["strict"] == ["4", "4", "0", "1", "50.0 \N{PLUS-MINUS SIGN} 0.0", "75.0"]
    assert rows["stored"][:2] == ["6", "2"]
    assert dict(pair_rows(found)) == {
        "stored, strict": ["3", "3", "1", "1"],
        "stored, text": ["1", "5", "0", "2"],
        "strict, text": ["1", "3", "0", "4"],
    }
    first = disagreements(found)[0]
    assert (first["sample"], first["answer"], first["verdicts"]) == (
        0, "0.5", {"stored": False, "strict": True, "text": False}
    )  # fmt: skip
    assert len(disagreements(found)) == 6


def test_the_command_prints_tables_and_writes_the_disagreements(tmp_path, capsys):
    folder = tmp_path / "run" / "evaluate"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "other").mkdir()
    write_samples(folder / "samples.jsonl", [HALF, FIVE])
    (folder / "provenance.json").write_text(json.dumps({"config": {"thinking_format": "flexible_extract"}}))
    print_regraded(tmp_path / "run", "stored,strict", "", None)
    shown = capsys.readouterr().out
    assert "| strict | 4 | 4 | 0 | 1 |" in shown and "| stored, strict | 3 | 3 | 1 | 1 |" in shown
    assert "reference '\\\\frac{1}{2}', answer '0.5': stored: wrong, strict: correct" in shown
    rows = [json.loads(line) for line in (folder / "disagreements.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["key"] for row in rows} == {"00", "01"}
    print_comparison(folder, folder)
    assert "| math | 2 | 75.0 | 75.0 | +0.0 |" in capsys.readouterr().out
    write_samples(tmp_path / "run" / "other" / "samples.jsonl", [HALF])
    with pytest.raises(ConfigError, match="several evaluations; give one of"):
        print_regraded(tmp_path / "run", "strict", "", None)


def test_two_evaluations_are_compared_by_task_on_their_common_questions():
    first = [replace(record([False, False]), key=str(index)) for index in range(12)]
    second = [replace(record([index < 10, index < 10]), key=str(index)) for index in range(11)]
    found = compare_tasks([*first, record([True], "cups")], second)
    assert list(found) == ["chain"]
    part = found["chain"]
    # 10 of 11 improve: of 2^10 sign patterns two have so large a sum
    assert (part.num_questions, part.first, part.p_value) == (11, 0.0, 2 / 1024)
    ((_, cells),) = comparison_rows(found)
    assert cells[:4] == ["11", "0.0", "90.9", "+90.9"] and cells[5:7] == ["0.0020", "0.0020"]
    with pytest.raises(ConfigError, match="no question in common"):
        compare_tasks(first, [record([True], "cups")])


def test_answers_are_read_and_verified_as_by_the_task_of_the_run(tmp_path, capsys):
    """Regression: "A) 2" is a letter with text for a task of choices and was no answer for the general rule."""
    data = tmp_path / "test.jsonl"
    row = {"question": "1+1?", "choices": ["2", "3"], "answer": "A"}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    tasks = {"mine": {"data": str(data), "verifier": "choice"}}
    cfg = EvalConfig(tasks={"mine": TaskConfig(data=str(data), verifier="choice")}, num_problems=1)
    (problem,) = held_out_problems(cfg)
    turns = ["Answer: A) 2", "Answer: B) 3", "I do not know"]
    one = replace(stored("A", turns, [True, True, False]), task="mine", key=problem.key, wording=problem.wording)
    folder = tmp_path / "run"
    folder.mkdir()
    write_samples(folder / "samples.jsonl", [one])
    config = {"thinking_format": "flexible_extract", "tasks": tasks, "num_problems": 1, "start": "elsewhere"}
    (folder / "provenance.json").write_text(json.dumps({"config": config}))
    source = RunTasks.of(folder / "samples.jsonl")
    found = regrade([one], ["task", "choice"], "flexible_extract", POOL, source)
    assert found.answers == [["A", "B", None]]
    assert found.verdicts == {"task": [[True, False, False]], "choice": [[True, False, False]]}
    data.unlink()
    assert RunTasks.of(folder / "samples.jsonl") is None
    with pytest.raises(ConfigError, match="needs the problems of the run"):
        regrade([one], ["task"], "flexible_extract", POOL, None)
