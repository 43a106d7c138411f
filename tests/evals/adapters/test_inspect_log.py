"""Logs of inspect: our records in them, inspect's metrics equal ours, and logs of others as records.

Needs the extra `inspect`: pip install -e '.[inspect]'.
"""

import sys
import zipfile
from dataclasses import replace

import pytest

from thinkstack.cli import main
from thinkstack.evals.protocol import SamplerFacts, TaskProtocol
from thinkstack.evals.records import AnswerRecord, ProblemRecord, PromptRecord, read_samples, write_samples
from thinkstack.evals.results import compute_metrics
from thinkstack.log import write_json
from thinkstack.types import ConfigError

pytest.importorskip("inspect_ai")
from inspect_ai.log import EvalConfig, EvalDataset, EvalError, EvalLog, EvalSample, EvalSpec
from inspect_ai.log import read_eval_log as read_inspect_log
from inspect_ai.log import write_eval_log as write_inspect_log
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.scorer import SampleScore, Score, accuracy, mean_score, stderr

from thinkstack.evals.adapters.inspect_log import read_eval_log, write_eval_log

CREATED = "2026-11-30T10:00:00+00:00"
SAMPLER = SamplerFacts(kind="engine", model="runs/r1", engine="thinkstack 0.1.0", dtype="fp32", template="r1")
PROTOCOL = TaskProtocol(
    task="math", num_problems=3, num_available=500, samples=3, temperature=0.6, top_p=0.95, max_tokens=256,
    max_model_len=4096, prompt="deepseek", thinking_format="think_then_answer", grader="latex", seed=7,
)  # fmt: skip
TEXTS = (
    "<think>\n2+3=5\n</think>\n\nThe answer is \\boxed{5}.",
    " \n<think>let me think",
    "</think>5",
    "<think></think>",
    "5 <b>&amp;</b> 你好",
)


def answer(text, correct=True, **changes):
    values = {
        "text": text, "answer": 5, "correct": correct, "well_formed": True, "truncated": False, "num_tokens": 12,
        "rule": "last_box", "grader": "strict", "measures": {"repeated": 0.25},
    } | changes  # fmt: skip
    return AnswerRecord(**values)


def problem(key, answers, **changes):
    values = {
        "key": key, "task": "math", "level": 2, "language": "en", "wording": 0, "question": f"What is {key}?",
        "reference": "5", "grader": "latex", "answers": tuple(answers),
        "prompt": PromptRecord(sha256="ab", num_tokens=40, num_bos=1, seed=3), "sampler": SAMPLER,
    } | changes  # fmt: skip
    return ProblemRecord(**values)


UNSCORED = answer(TEXTS[4], None, unscorable="the comparison took longer than 10 s", answer="5^{5}")
RECORDS = [
    problem(
        "a", [answer(TEXTS[0]), answer(TEXTS[0]), answer(TEXTS[1], False, answer=None, truncated=True)], cluster="x"
    ),
    problem("b", [UNSCORED, answer(TEXTS[3], False, truncated=True), answer(TEXTS[2])], cluster="x", date="2024-05-01"),
    problem("c", [answer(TEXTS[4], False)] * 3, language="zh", wording=2),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "math.eval"
    write_eval_log(RECORDS, path, CREATED, PROTOCOL, facts={"commit": "abc"}, seconds=90)
    return path


@pytest.fixture(scope="module")
def log(path):
    return read_inspect_log(str(path))


def test_records_come_back_from_a_log_as_they_were(path):
    assert read_eval_log(path) == RECORDS


def test_equal_records_give_equal_logs(path, tmp_path):
    again = tmp_path / "again.eval"
    write_eval_log(RECORDS, again, CREATED, PROTOCOL, SAMPLER, {"commit": "abc"}, seconds=90)
    first, second = (
        {name: file.read(name) for file in [zipfile.ZipFile(each)] for name in file.namelist()}
        for each in (path, again)
    )
    assert first == second


def test_the_header_names_model_settings_and_figures(log):
    assert (log.status, log.eval.task, log.eval.model) == ("success", "math", "thinkstack/runs/r1")
    config = log.eval.model_generate_config
    assert (config.temperature, config.top_p, config.max_tokens, config.seed) == (0.6, 0.95, 256, 7)
    assert log.eval.model_args["dtype"] == "fp32" and log.eval.metadata["protocol"]["prompt"] == "deepseek"
    assert log.eval.metadata["commit"] == "abc" and log.stats.completed_at == "2026-11-30T10:01:30+00:00"
    expected = compute_metrics(RECORDS)
    (figures,) = [score.metrics for score in log.results.scores if score.name == "thinkstack"]
    assert figures["question_error"].value == expected.question_error
    assert figures["rerun_error"].value == expected.rerun_error != expected.question_error
    assert figures["pass_at_1"].value == expected.pass_at_1 == pytest.approx(3 / 9)
    assert figures["pass_at_1_if_unscored_were_correct"].value == pytest.approx(4 / 9)


def test_metrics_that_inspect_computes_from_the_scores_are_ours(log):
    assert len(log.samples) == 9 and log.eval.config.epochs == 3
    reduced = []
    for name in dict.fromkeys(sample.id for sample in log.samples):
        own = [sample for sample in log.samples if sample.id == name]
        score = mean_score()([sample.scores["latex"] for sample in own])
        reduced.append(SampleScore(score=score, sample_id=name, sample_metadata=own[0].metadata))
    expected = compute_metrics(RECORDS)
    assert accuracy()(reduced) == pytest.approx(expected.pass_at_1)
    assert stderr(cluster="cluster")(reduced) == pytest.approx(expected.question_error)
    (inspects,) = [score.metrics for score in log.results.scores if score.name == "latex"]
    assert inspects["accuracy"].value == pytest.approx(expected.pass_at_1)
    assert inspects["stderr"].value == pytest.approx(expected.question_error)


def test_a_sample_has_thinking_verdict_and_reason(log):
    by_place = {(sample.id, sample.epoch): sample for sample in log.samples}
    first, unclosed, unscored = (by_place[place] for place in (("a-en-0", 1), ("a-en-0", 3), ("b-en-0", 1)))
    reasoning, visible = first.output.message.content
    assert reasoning.reasoning == "\n2+3=5\n" and visible.text == "\n\nThe answer is \\boxed{5}."
    score = first.scores["latex"]
    assert (score.value, score.answer, score.reason) == ("C", "5", None)
    assert score.explanation == "strict: correct; the answer was found by the rule last_box"
    assert unclosed.output.completion == "" and unclosed.output.stop_reason == "max_tokens"
    assert unclosed.scores["latex"].reason == "invalid_response_format"
    score = unscored.scores["latex"]
    assert (score.value, score.reason) == ("N", "scoring_failed")
    assert "counts as wrong; the comparison took longer than 10 s" in score.explanation
    assert first.output.usage.input_tokens == 40 and first.metadata["prompt"]["sha256"] == "ab"


def others_sample(id, epoch, content, value, target="5", **changes):
    """A sample as another scorer left it."""
    message = ChatMessageAssistant(content=content)
    choice = ChatCompletionChoice(message=message, stop_reason=changes.pop("stop_reason", "stop"))
    scores = {"includes": Score(value=value, answer="5", explanation="looked for the target")}
    values = {
        "input": [ChatMessageUser(content="first"), ChatMessageUser(content=f"{id}?")],
        "scores": scores,
    } | changes
    output = ModelOutput(model="m", choices=[choice], usage=ModelUsage(output_tokens=9))
    return EvalSample(id=id, epoch=epoch, target=target, output=output, **values)


def others_log(path, samples):
    """A log of another task, model and scorer."""
    spec = EvalSpec(created=CREATED, task="sums", dataset=EvalDataset(), model="openai/m", config=EvalConfig(epochs=2))
    write_inspect_log(EvalLog(status="success", eval=spec, samples=samples), str(path))
    return path


def test_a_log_of_others_becomes_records(tmp_path):
    thinking, hidden = ContentReasoning(reasoning="5?"), ContentReasoning(reasoning="x9", redacted=True, summary="adds")
    samples = [
        others_sample(1, 1, "The sum is 5", "C", metadata={"cluster": "book"}),
        others_sample(1, 2, [thinking, ContentText(text="6")], "I"),
        others_sample(2, 1, [thinking], 0, ["7", "seven"], stop_reason="max_tokens"),
        others_sample(2, 2, [hidden, ContentText(text="7")], True, ["7", "seven"]),
    ]
    first, second = read_eval_log(others_log(tmp_path / "sums.eval", samples), task="mine", language="zh")
    assert (first.key, first.task, first.language, first.question) == ("1", "mine", "zh", "1?")
    assert (first.grader, first.cluster, second.reference) == ("includes", "book", "7 or seven")
    assert [one.text for one in first.answers] == ["The sum is 5", "<think>5?</think>6"]
    assert [one.text for one in second.answers] == ["<think>5?", "<think>adds</think>7"]
    assert [one.correct for one in (*first.answers, *second.answers)] == [True, False, False, True]
    assert [one.truncated for one in second.answers] == [True, False]
    assert first.answers[1].detail == "looked for the target" and first.answers[1].num_tokens == 9


def test_partial_credit_and_samples_that_failed_are_not_scored(tmp_path):
    error = EvalError(message="timeout", traceback="", traceback_ansi="")
    samples = [
        others_sample(1, 1, "5", 0.5),
        others_sample(1, 2, "", "C", error=error),
        others_sample(1, 3, "5", "C", scores=None),
        others_sample(1, 4, "5", float("nan")),
    ]
    (record,) = read_eval_log(others_log(tmp_path / "sums.eval", samples))
    assert [one.correct for one in record.answers] == [None] * 4
    assert [one.unscorable for one in record.answers] == [
        "the score is 0.5, neither right nor wrong: looked for the target",
        "the sample failed: timeout",
        "the sample has no score of 'includes'",
        "the score is nan, neither right nor wrong: looked for the target",
    ]


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["thinkstack", "eval", *map(str, words)])
    main()
    return capsys.readouterr().out


def test_commands_export_a_run_and_import_a_log(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run" / "evaluate"
    folder.mkdir(parents=True)
    write_samples(folder / "samples.jsonl", RECORDS)
    write_json(folder / "provenance.json", {"date": CREATED, "config": {"thinking_format": "think_then_answer"}})
    out = tmp_path / "logs" / "math.eval"
    assert "inspect view start" in run(monkeypatch, capsys, "export", tmp_path / "run", "--out", out)
    printed = run(monkeypatch, capsys, "import", out, "--out", tmp_path / "back")
    assert "| math | 3 | 3 | latex | 33.3 |" in printed
    assert read_samples(tmp_path / "back" / "samples.jsonl") == RECORDS
    assert "strict" in run(monkeypatch, capsys, "regrade", tmp_path / "back", "--grader", "stored,strict")
    assert "| math | 3 |" in run(monkeypatch, capsys, "compare", tmp_path / "run", tmp_path / "back")


@pytest.mark.parametrize(
    ("records", "name", "message"),
    [
        ([RECORDS[0], replace(RECORDS[1], task="aime")], "x.eval", "the records of one task; these have aime, math"),
        (RECORDS, "x.txt", "end it in .eval"),
    ],
)
def test_what_is_no_log_is_refused(records, name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        write_eval_log(records, tmp_path / name, CREATED)


def test_files_that_are_no_logs_and_unknown_scorers_are_refused(path, tmp_path):
    (tmp_path / "broken.eval").write_bytes(b"PK\x03\x04 no zip")
    for file, message in ((tmp_path / "broken.eval", "is no log of inspect"), (tmp_path / "no.eval", "does not exist")):
        with pytest.raises(ConfigError, match=message):
            read_eval_log(file)
    with pytest.raises(ConfigError, match="no scores of 'text'; it has latex"):
        read_eval_log(path, scorer="text")
