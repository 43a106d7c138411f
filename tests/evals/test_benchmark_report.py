"""The report of an evaluation beside published figures."""

import re
from dataclasses import replace

import pytest

from tests.evals.test_published import R1_AIME24
from thinkstack.evals.benchmark_report import (
    beside_published,
    cost_of,
    length_table,
    published_table,
    result_rows,
    task_measures,
    write_benchmark_report,
)
from thinkstack.evals.contests import Contest, Standing, rate
from thinkstack.evals.metrics import ForcedPoint
from thinkstack.evals.protocol import SamplerFacts
from thinkstack.evals.records import AnswerRecord, ProblemRecord, PromptRecord
from thinkstack.evals.results import Evaluation, summarize

FACTS = SamplerFacts(
    kind="engine", model="a model", engine="thinkstack", template="r1", prompt_price=1.0, completion_price=2.0
)
HOSTILE = "<script>alert(1)</script> | ```"


def answer(is_correct):
    return AnswerRecord(
        text=HOSTILE, answer="5" if is_correct else "4", correct=is_correct, well_formed=True, truncated=False,
        num_tokens=100, measures={"repeated": 0.25, "looping": 0.0},
    )  # fmt: skip


def evaluation(task="aime24", protocol=R1_AIME24, problems=30, right=51, samples=64):
    """Each problem has `right` correct completions of `samples`."""
    records = [
        ProblemRecord(
            key=f"{number:02}", task=task, level=0, language="en", wording=0, question=HOSTILE, reference="5",
            prompt=PromptRecord(sha256="0", num_tokens=50),
            answers=tuple(answer(place < right) for place in range(samples)),
        )
        for number in range(problems)
    ]  # fmt: skip
    return replace(summarize(records, 60.0), protocols={task: protocol}, sampler=FACTS)


def beside(found, model, metric="pass@1", date="2026-01-04"):
    (one,) = [
        one
        for one in beside_published(found, "aime24")
        if (one.row.model, one.row.metric, one.row.date) == (model, metric, date)
    ]
    return one


def test_a_published_figure_of_the_same_protocol_has_a_difference_with_the_error_of_both():
    one = beside(evaluation(), "DeepSeek-R1")
    assert one.is_comparable and one.unlike == []
    # 51 of 64: 79.7; p (1 - p) / n with n - 1 = 63 over 30 questions: 0.93 points, t of 30 * 63 degrees: 1.96
    error = 100 * (51 / 64 * 13 / 64 / 63 / 30) ** 0.5
    number, half = one.difference.split(" \N{PLUS-MINUS SIGN} ")
    assert float(number) == pytest.approx(100 * 51 / 64 - one.row.figure, abs=0.05)
    assert float(half) == pytest.approx(1.961 * error * 2**0.5, abs=0.05)


def test_a_vote_is_compared_with_the_vote():
    """86.7 of R1-Zero is the majority of 64, which articles quote as pass@1."""
    one = beside(evaluation(), "DeepSeek-R1", "cons@64")
    assert (one.ours, one.metric) == (1.0, "cons@64")
    assert "\N{PLUS-MINUS SIGN}" not in one.difference  # the re-run error is that of pass@1


def test_another_protocol_is_marked_and_gets_no_difference():
    found = evaluation(protocol=replace(R1_AIME24, samples=8, temperature=1.0), samples=8, right=6)
    table = published_table("aime24", beside_published(found, "aime24"))
    assert {row[1][2] for row in table.rows} == {"not comparable", "protocol not stated"}
    assert beside(found, "DeepSeek-R1").unlike == [
        "samples: 8 here, 64 published",
        "temperature: 1 here, 0.6 published",
    ]


def test_comparable_rows_come_first():
    rows = [one.is_comparable for one in beside_published(evaluation(), "aime24")]
    assert rows == sorted(rows, reverse=True) and any(rows) and not all(rows)


def test_the_cost_of_a_correct_answer_by_hand():
    part = evaluation(problems=2, samples=4, right=1).by_task["aime24"]
    # 8 prompts of 50 tokens at 1 and 800 sampled tokens at 2 per million, for 2 correct answers
    assert cost_of(part, FACTS) == pytest.approx((400 * 1 + 800 * 2) / 1e6 / 2)
    assert cost_of(part, replace(FACTS, prompt_price=0.0, completion_price=0.0)) is None


def test_results_show_subsets_both_errors_and_cost():
    protocol = replace(R1_AIME24, num_problems=10)
    head, rows = result_rows(evaluation(protocol=protocol, problems=10))
    cells = dict(zip(head, [rows[0][0], *rows[0][1]], strict=True))
    assert cells["problems"] == "10 of 30"
    assert cells["re-run error"] == f"{100 * (51 / 64 * 13 / 64 / 63 / 10) ** 0.5:.1f}"
    assert cells["cons@64"] == "100.0"
    assert "cost per correct answer (price)" in cells


def test_the_report_is_written_with_plots_and_model_text_is_escaped(tmp_path):
    points = tuple(
        ForcedPoint(budget_tokens=budget, pass_at_1=budget / 100, forced=0.5, mean_tokens=budget)
        for budget in (0, 8, 64)
    )
    found = replace(evaluation(), forced={"aime24": points})
    write_benchmark_report(
        tmp_path, "a model on r1", found, {"commit": "abc", "seed": 3, "command": ["/a/b/thinkstack", "eval"]}, ["gpqa"]
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # nothing from elsewhere
    assert "/a/b" not in text + page + (tmp_path / "report.json").read_text(encoding="utf-8")
    for part in ("## Protocol", "## Length and text", " published figures, ", "Left out, without data: gpqa"):
        assert part in text
    for name in ("accuracy.png", "published.png", "forced.png", "budgets.png", "lengths.png"):
        assert f"({name})" in text and (tmp_path / name).stat().st_size > 5_000
    assert Evaluation.from_dict(found.to_dict()) == replace(found, records=())


def test_counts_of_instructions_are_shown_as_accuracies_and_log_likelihoods_have_no_length():
    """Regression: 1.48 instructions a prompt were 148 %, and a cloze was right at every token budget."""
    measures = {"num_instructions": 2.0, "instructions_strict": 1.0, "instructions_loose": 1.5, "prompt_strict": 0.25}
    ifeval = replace(evaluation("ifeval").records[0], answers=(replace(answer(True), measures=measures),))
    cloze = replace(
        ifeval, key="c", task="mmlu", grader="log-likelihood, cloze",
        answers=(replace(answer(True), num_tokens=0, measures={"acc": 1.0}),),
    )  # fmt: skip
    found = summarize([ifeval, cloze], 1.0)
    (table,) = task_measures(found)
    assert dict(table.rows) == {
        "ifeval: instructions_loose": ["75.0"], "ifeval: instructions_strict": ["50.0"],
        "ifeval: prompt_strict": ["25.0"], "mmlu: acc": ["100.0"],
    }  # fmt: skip
    assert [label for label, _ in length_table(found).rows] == ["ifeval"]
    assert found.over_tokens[0].pass_at_1 == 0.0  # 100 tokens are cut at 1
    assert summarize([cloze], 1.0).over_tokens == ()


def test_no_question_of_gpqa_is_quoted(tmp_path):
    """Its authors ask that the questions are never published."""
    write_benchmark_report(tmp_path, "t", evaluation("gpqa", replace(R1_AIME24, task="gpqa")), {})
    for name in ("report.md", "report.html", "report.json"):
        assert "alert(1)" not in (tmp_path / name).read_text(encoding="utf-8")


def test_an_evaluation_of_a_task_without_published_rows_has_a_report(tmp_path):
    found = evaluation(task="chain", protocol=replace(R1_AIME24, task="chain", num_available=0))
    write_benchmark_report(tmp_path, "t", found, {})
    assert "published figures" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_rating_stands_beside_published_ones_and_is_never_compared(tmp_path):
    """Published problems, tests and standings of Codeforces are unknown, so the protocol cannot be the same."""
    protocol = replace(R1_AIME24, task="codeforces", samples=16, grader="tests by experts")
    found = evaluation("codeforces", protocol, problems=2, right=3, samples=16)
    records = [replace(one, metadata={"contest_id": 7}) for one in found.records]
    standings = [Standing(rating=1500.0, points=points) for points in (1, 2, 3)]
    found = replace(found, contests=rate(records, {"7": Contest(standings)}))
    rows = {one.row.metric: one for one in beside_published(found, "codeforces") if one.row.model == "DeepSeek-R1"}
    assert {"rating", "percentile"} <= rows.keys()
    for one in rows.values():
        assert not one.is_comparable and one.verdict == "not comparable"
        assert one.unlike[-1] == "problems, tests and standings: your own here, not published"
    assert published_table("codeforces", list(rows.values())).note.startswith("Ours: rating 1600, percentile 64.0 %. ")
    write_benchmark_report(tmp_path, "a model", found, {"seed": 0})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 7 | 2 of 2 | 2 | 0 | 2 of 3 | 1600 |" in text and "The protocol is thinkstack's: the 16" in text
    assert Evaluation.from_dict(found.to_dict()).contests == found.contests
