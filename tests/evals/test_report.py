import base64
import json
import re
from dataclasses import replace

import pytest

from thinkstack.evals.page import ReportTable
from thinkstack.evals.plots import health_panels, running_mean
from thinkstack.evals.records import AnswerRecord, ProblemRecord
from thinkstack.evals.report import markdown, setting_line, table_rows, write_report
from thinkstack.evals.results import Evaluation, curve_point, summarize
from thinkstack.types import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE_TEXT = "<script>alert(1)</script> ``` | 从左到右"
TABLE = ReportTable(title="Results", columns=["base"], rows=[("a|b", ["1"])])


def record(correct, task="chain", level=2, language="en", text="x"):
    answers = tuple(
        AnswerRecord(
            text=text,
            answer=int(right),
            correct=right,
            well_formed=True,
            measures={"worked": float(right)},
            truncated=False,
            num_tokens=10,
        )
        for right in correct
    )
    return ProblemRecord(
        key=task,
        task=task,
        level=level,
        language=language,
        wording=0,
        question=HOSTILE_TEXT,
        reference="5",
        answers=answers,
    )


BASE = summarize(
    [record([True] + [False] * 15), record([False] * 16, "cups", 3, "zh", HOSTILE_TEXT)], 1.0, {"chain": 0.1}
)
ZERO = summarize([record([True] * 16), record([True] * 8 + [False] * 8, "cups", 3, "zh")], 1.0, {"chain": 0.1})
CURVE = [curve_point(0, BASE, BASE), curve_point(10, ZERO)]
METRICS = [
    {"step": s, "reward/mean": s / 10, "policy/entropy_nats": 1.0 - s / 20, "train/skipped": 0.0} for s in range(10)
]


def write_to(folder, **changes):
    arguments = {
        "title": "A & B",
        "columns": {"base": BASE, "zero": ZERO},
        "greedy": {"zero": ZERO},
        "curve": CURVE,
        "metrics": METRICS,
        "facts": {"machine": "2 cores"},
    }
    write_report(folder, **(arguments | changes))
    return folder


def test_the_table_contains_the_metrics_in_percent():
    rows = dict(table_rows({"base": BASE, "zero": ZERO}, {"zero": ZERO}))
    # base: means 1/16 and 0; zero: 1 and 1/2
    assert rows["pass@1"] == ["3.1 \N{PLUS-MINUS SIGN} 3.1", "75.0 \N{PLUS-MINUS SIGN} 25.0"]
    assert rows["pass@16"] == ["50.0", "100.0"]
    assert rows["cons@16"] == ["0.0", "75.0"]  # 8 of 16 is a tie
    assert rows["greedy"] == ["-", "75.0 \N{PLUS-MINUS SIGN} 25.0"]
    assert rows["chain (chance 10.0)"] == ["6.2", "100.0"]
    assert rows["cups"] == ["0.0", "50.0"]
    assert rows["zh"] == ["0.0", "50.0"]
    # 16 samples with 1 and 0 correct: 1/16 * 15/16 / 15 over 2^2; 0 and 8 correct: 1/4 / 15 over 2^2
    assert rows["re-run error"] == ["3.1", "6.5"]
    assert rows["tokens per correct answer (number)"] == ["320.0", "13.3"]
    assert not any(label.startswith(("not scored", "pass@1 of answers not truncated")) for label in rows)


def test_the_table_names_the_bounds_of_unscorable_answers_and_the_accuracy_of_finished_ones():
    part = record([True, False, False, False])
    lost, cut = replace(part.answers[1], correct=None), replace(part.answers[2], truncated=True)
    part = replace(part, answers=(part.answers[0], lost, cut, cut))
    rows = dict(table_rows({"base": summarize([part], 1.0)}, {}))
    assert rows["pass@1"] == ["25.0"]
    assert rows["not scored, counted as wrong (number)"] == ["1"]
    assert rows["pass@1 if these were correct"] == ["50.0"]
    assert (rows["truncated"], rows["pass@1 of answers not truncated"]) == (["50.0"], ["50.0"])


def test_the_setting_names_graders_and_different_sample_counts_and_warns_of_few_questions():
    math = replace(record([True, False], "math"), grader="strict", key="01")
    line = setting_line({"base": summarize([math, record([True])], 1.0)})
    assert line.startswith("2 held-out problems, 1 to 2 answers each. math is graded by strict. Percent;")
    assert "question error" in line and "2 questions are fewer than 100" in line


def test_a_report_is_complete_and_leaves_no_temporary_file(tmp_path):
    folder = write_to(tmp_path / "report")
    pictures = {"accuracy.png", "length.png", "worked.png", "tasks.png", "levels.png", "budgets.png", "health.png"}
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.html", "report.json", *pictures}
    assert all((folder / name).read_bytes().startswith(PNG) for name in pictures)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in text for name in pictures)
    assert "| machine | 2 cores |" in text


def test_the_page_is_self_contained_and_escapes_model_output(tmp_path):
    page = (write_to(tmp_path) / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<title>A &amp; B</title>" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    images = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == 7
    assert all(base64.b64decode(image).startswith(PNG) for image in images)


def test_the_table_says_no_answer_read_instead_of_an_accuracy():
    unread = record([False, False])
    unread = replace(unread, answers=tuple(replace(answer, answer=None) for answer in unread.answers))
    rows = dict(table_rows({"stock": summarize([unread], 1.0), "base": BASE}, {}))
    assert rows["pass@1"][0] == rows["chain (chance 10.0)"][0] == "no answer read"
    assert rows["answers read"] == ["0.0", "100.0"]


def test_evaluations_round_trip_through_the_json(tmp_path):
    data = json.loads((write_to(tmp_path) / "report.json").read_text(encoding="utf-8"))
    assert Evaluation.from_dict(data["columns"]["zero"]) == replace(ZERO, records=())
    assert data["curve"][0]["held_out_level"]["pass_at_1"] == pytest.approx(1 / 32)


def test_model_output_cannot_close_its_code_block_or_table_cell():
    text = markdown("t", "s", [TABLE], {}, {"base": BASE.shown}, {"k": HOSTILE_TEXT})
    assert "````text" in text
    assert "| a\\|b | 1 |" in text
    assert "| k | <script>alert(1)</script> ``` \\| 从左到右 |" in text


def test_a_report_without_training_has_a_table_and_no_curves(tmp_path):
    folder = write_to(tmp_path, columns={"base": BASE}, greedy={}, curve=[], metrics=[])
    assert {path.name for path in folder.iterdir()} == {
        "report.md",
        "report.html",
        "report.json",
        "levels.png",
        "budgets.png",
    }


def test_a_curve_with_missing_metrics_is_plotted(tmp_path):
    incomplete = [
        dict(point) | {"worked_accuracy": None, "question_error": None, "cons_at_16": None} for point in CURVE
    ]
    assert (write_to(tmp_path, curve=incomplete) / "worked.png").exists()


def test_a_report_without_columns_and_an_unknown_greedy_column_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one evaluation"):
        write_to(tmp_path, columns={}, greedy={})
    with pytest.raises(ConfigError, match="greedy evaluations of other"):
        write_to(tmp_path, greedy={"other": ZERO})


def test_health_panels_list_known_metrics_first_and_omit_constants():
    rows = [
        {"step": s, "group/trained": s, "policy/entropy_nats": -s, "train/skipped": s, "reward/mean": 1} for s in (1, 2)
    ]
    assert list(health_panels(rows)) == ["policy/entropy_nats", "group/trained"]


def test_running_mean_by_hand():
    assert running_mean([0.0, 3.0, 6.0], radius=1) == [1.5, 3.0, 4.5]
