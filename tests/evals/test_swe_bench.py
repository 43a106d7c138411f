"""SWE-bench by files: predictions of an evaluation for the official harness, and its reports as verdicts."""

import json
import re

import pytest

from tests.tasks.benchmarks.test_swe_bench import DIFF, row, write
from thinkstack.evals.compare import compare_tasks
from thinkstack.evals.records import read_samples
from thinkstack.evals.swe_bench import Predictions, predictions_of
from thinkstack.pipeline.evaluation import EvaluationRequest, run_evaluation
from thinkstack.stages.evaluate import read_evaluation
from thinkstack.stages.swe_bench import apply_reports, write_predictions
from thinkstack.types import ConfigError

INSTANCES = [f"owner__repo-{number}" for number in range(6)]


def turns(number, samples):
    """The completions of an instance: all have a patch but those of instance 2."""
    patch = f"<patch>\n{DIFF}# {number} of {{}}\n</patch>"
    return ["I cannot." if number == 2 and not sample else patch.format(sample) for sample in range(samples)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Evaluates answers to six instances of two repositories and returns the folder of the run."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "test.jsonl", [row(n, repo=f"owner/repo{n % 2}", text="Mend.") for n in range(6)])

    def evaluate(name, samples=1, change=str):
        rows = [
            {"key": key, "completions": [change(one) for one in turns(number, samples)]}
            for number, key in enumerate(INSTANCES)
        ]
        rows[2]["completions"][0] = ""
        answers = write(tmp_path / f"{name}.jsonl", rows)
        out = tmp_path / name
        run_evaluation(
            EvaluationRequest(
                tasks=("swe_bench_verified",), data=str(tmp_path / "data"), out=out,
                values={"answers": str(answers), "samples": samples},
            )
        )  # fmt: skip
        return out

    return evaluate


def harness_report(predictions, folder, resolved=(0,), error=(), infra=(), not_run=(), **changes):
    """What the official harness writes for predictions, by their file; places of instances in INSTANCES."""
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    names = [one["instance_id"] for one in rows]
    empty = [one["instance_id"] for one in rows if not one["model_patch"]]
    groups = {name: [INSTANCES[place] for place in some] for name, some in
              {"resolved": resolved, "error": error, "infra_failure": infra, "none": not_run}.items()}  # fmt: skip
    completed = [one for one in names if one not in empty + groups["error"] + groups["none"]]
    ids = {
        "submitted": names, "completed": completed, "resolved": groups["resolved"], "error": groups["error"],
        "unresolved": [one for one in completed if one not in groups["resolved"]], "empty_patch": empty,
        "incomplete": ["other__repo-1"], "infra_failure": groups["infra_failure"], "ambiguous_failure": [],
    }  # fmt: skip
    report = {f"{name}_ids": sorted(some) for name, some in ids.items()}
    report |= {f"{name}_instances": len(some) for name, some in ids.items()} | {"total_instances": len(names) + 1}
    report |= {"failure_reasons": dict.fromkeys(groups["infra_failure"], "out_of_memory"), "schema_version": 2}
    path = folder / f"{rows[0]['model_name_or_path'].replace('/', '__')}.run1.json"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(report | changes), encoding="utf-8")
    return path


def answers_of(out):
    return {one.key: one.answers for one in read_samples(out / "evaluate" / "samples.jsonl")}


def test_patches_have_no_verdict_before_the_harness_ran(run, capsys):
    out = run("first")
    found = read_evaluation(out / "evaluate", "sampled.json")
    assert (found.pass_at_1, found.unscorable, found.pass_at_1_bound) == (0.0, 5, pytest.approx(5 / 6))
    assert found.protocols["swe_bench_verified"].grader == "official harness"
    assert "not scored: 5 of swe_bench_verified: the official harness has not judged" in capsys.readouterr().out
    assert answers_of(out)[INSTANCES[2]][0].detail == "no patch" and answers_of(out)[INSTANCES[2]][0].correct is False


def test_predictions_are_those_of_the_harness_and_a_digest_names_them(run, tmp_path):
    out = run("first")
    write_predictions(out, tmp_path / "p.jsonl", "my model/v1", "")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert sorted(one["instance_id"] for one in rows) == INSTANCES
    by_name = {one["instance_id"]: one["model_patch"] for one in rows}
    assert by_name[INSTANCES[3]] == f"\n{DIFF}# 3 of 0\n" and by_name[INSTANCES[2]] == ""
    (name,) = {one["model_name_or_path"] for one in rows}
    assert re.fullmatch(r"my-model-v1-[0-9a-f]{12}", name) and set(rows[0]) == {
        "instance_id", "model_name_or_path", "model_patch"
    }  # fmt: skip
    other = predictions_of(read_samples(run("second", change=lambda one: one + "</patch>") / "evaluate/samples.jsonl"))
    assert other[0].digest == name[-12:], "the same patches have the same name"
    other = predictions_of(read_samples(run("third", change=str.upper) / "evaluate/samples.jsonl"))
    assert other[0].digest != name[-12:]


def test_a_report_of_the_harness_becomes_verdicts(run, tmp_path, capsys):
    """0 resolved, 1 not, 2 without a patch, 3 an error, 4 an environment that failed, 5 not run."""
    out = run("first")
    write_predictions(out, tmp_path / "p.jsonl", "", "")
    report = harness_report(tmp_path / "p.jsonl", tmp_path / "reports", error=(3,), infra=(4,), not_run=(5,))
    assert apply_reports(out, [report], None, "") == out / "evaluate"
    found = {key: (one.correct, one.unscorable or one.detail) for key, (one,) in answers_of(out).items()}
    assert found[INSTANCES[0]] == (True, "") and found[INSTANCES[1]] == (False, "not resolved")
    assert found[INSTANCES[2]] == (False, "no patch")
    assert [found[name][0] for name in INSTANCES[3:]] == [None, None, None]
    assert "the patch did not apply, or container" in found[INSTANCES[3]][1]
    assert "environment failed: out_of_memory" in found[INSTANCES[4]][1] and "not run" in found[INSTANCES[5]][1]
    result = read_evaluation(out / "evaluate", "sampled.json")
    assert (result.pass_at_1, result.pass_at_1_bound) == (pytest.approx(1 / 6), pytest.approx(4 / 6))
    assert result.unscorable == 3 and result.question_error and result.protocols and result.sampler
    facts = json.loads((out / "evaluate" / "official_harness.json").read_text())
    assert facts["reports"][0]["report"] == str(report) and len(facts["reports"][0]["report_sha256"]) == 64


def test_logs_of_the_harness_say_which_patch_could_not_be_applied(run, tmp_path):
    out = run("first")
    write_predictions(out, tmp_path / "p.jsonl", "", "")
    report = harness_report(tmp_path / "p.jsonl", tmp_path, error=(3, 4))
    (one,) = predictions_of(read_samples(out / "evaluate/samples.jsonl"))
    logs = tmp_path / "logs" / "run_evaluation" / "run1"
    folder = logs / one.model_name("answers")
    status = {"FAIL_TO_PASS": {"success": ["a"], "failure": ["b"]}, "PASS_TO_PASS": {"success": ["c"], "failure": []}}
    texts = {
        (0, "patch.diff"): one.patches[INSTANCES[0]],
        (1, "report.json"): json.dumps(
            {INSTANCES[1]: {"resolved": False, "patch_successfully_applied": True, "tests_status": status}}
        ),
        (3, "run_instance.log"): "log\n>>>>> Patch Apply Failed:\nerror: corrupt patch",
        (4, "run_instance.log"): "container did not start",
        (5, "report.json"): json.dumps({INSTANCES[5]: {"resolved": False, "patch_successfully_applied": False}}),
    }
    for (place, name), text in texts.items():
        (folder / INSTANCES[place]).mkdir(parents=True, exist_ok=True)
        (folder / INSTANCES[place] / name).write_text(text, encoding="utf-8")
    apply_reports(out, [report], logs, "swe_bench_verified")
    found = {key: (one.correct, one.unscorable or one.detail) for key, (one,) in answers_of(out).items()}
    assert found[INSTANCES[1]] == (False, "FAIL_TO_PASS: 1 of 2 pass, PASS_TO_PASS: 1 of 1 pass")
    assert found[INSTANCES[3]] == (False, "the patch could not be applied")
    assert found[INSTANCES[4]][0] is None
    assert found[INSTANCES[5]] == (False, "the patch or the tests did not run to their end")
    before = (out / "evaluate" / "samples.jsonl").read_bytes()
    (folder / INSTANCES[0] / "patch.diff").write_text("another")
    with pytest.raises(ConfigError, match=r"owner__repo-0/patch.diff is another patch"):
        apply_reports(out, [report], logs, "")
    (folder / INSTANCES[0] / "patch.diff").write_text(one.patches[INSTANCES[0]])
    (folder / INSTANCES[0] / "report.json").write_text(json.dumps({INSTANCES[0]: {"resolved": False}}))
    with pytest.raises(ConfigError, match="disagree on owner__repo-0"):
        apply_reports(out, [report], logs, "")
    with pytest.raises(ConfigError, match="has 0 folders"):
        apply_reports(out, [report], tmp_path, "")
    assert (out / "evaluate" / "samples.jsonl").read_bytes() == before


def test_each_completion_has_a_file_and_a_report_of_its_own(run, tmp_path):
    first, second = run("first", samples=3), run("second", samples=3, change=lambda one: one.replace(" of ", "/"))
    for out, resolved in ((first, [(0, 1), (0,), (0, 3)]), (second, [(0,), (1,), (3,)])):
        write_predictions(out, tmp_path / out.name / "p.jsonl", "", "")
        files = sorted((tmp_path / out.name).glob("p-*.jsonl"))
        assert [path.name for path in files] == ["p-1.jsonl", "p-2.jsonl", "p-3.jsonl"]
        reports = [harness_report(path, tmp_path / "r", some) for path, some in zip(files, resolved, strict=True)]
        apply_reports(out, reports[::-1], None, "")
    found = answers_of(first)
    assert [one.correct for one in found[INSTANCES[0]]] == [True, True, True]
    assert [one.correct for one in found[INSTANCES[3]]] == [False, False, True]
    result = read_evaluation(first / "evaluate", "sampled.json")
    assert result.pass_at_1 == pytest.approx(5 / 18) and result.rerun_error and result.pass_at_k[2] > result.pass_at_1
    differences = compare_tasks(*(read_samples(out / "evaluate/samples.jsonl") for out in (first, second)))
    assert differences["swe_bench_verified"].difference == pytest.approx(-2 / 18)
    apply_reports(second, reports[:1], None, "")  # a part of the reports changes a part of the verdicts
    assert [one.correct for one in answers_of(second)[INSTANCES[3]]] == [False, False, True]
    with pytest.raises(ConfigError, match="is a second report of the same predictions"):
        apply_reports(second, [reports[0], reports[0]], None, "")


def test_completions_with_equal_patches_have_names_of_their_own():
    """Else the harness would take the results of the first for the second, and a report could be of either."""
    first, second = (Predictions(sample=sample, patches={"a__b-1": DIFF}) for sample in (0, 1))
    assert first.digest != second.digest and first.model_name("m") != second.model_name("m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "empty_patch_ids": INSTANCES[2:4],
                "empty_patch_instances": 2,
                "completed_ids": INSTANCES[:2],
                "completed_instances": 2,
                "unresolved_ids": INSTANCES[1:2],
                "unresolved_instances": 1,
            },
            "owner__repo-3 has a patch in this run and none in the report",
        ),
        (
            {"empty_patch_ids": [], "empty_patch_instances": 0, "completed_ids": INSTANCES, "completed_instances": 6},
            "owner__repo-2 has no patch in this run and one in the report",
        ),
        ({"submitted_ids": INSTANCES[:5], "submitted_instances": 5}, "is not in submitted_ids"),
        ({"submitted_ids": [*INSTANCES, "x"], "submitted_instances": 7}, r"0 of the run .* and 1 are unknown \(x\)"),
        ({"empty_patch_ids": [], "empty_patch_instances": 0, "error_ids": [INSTANCES[2]], "error_instances": 1}, None),
        ({"empty_patch_ids": INSTANCES[2:4], "empty_patch_instances": 2}, "in two of the lists"),
        ({"resolved_ids": INSTANCES[:1] * 2, "resolved_instances": 2}, "resolved_ids has 1 instances"),
        ({"resolved_instances": 5}, "resolved_ids has 1 instances and resolved_instances=5"),
        ({"resolved_ids": "all"}, "resolved_ids is text; it must be a list"),
        ({"resolved_ids": INSTANCES[2:3]}, "in two of the lists"),
        ({"schema_version": 1}, "schema_version 1, not a report of schema_version 2"),
        ({"infra_failure_ids": INSTANCES[:1], "infra_failure_instances": 1}, "owner__repo-0 has a verdict and is not"),
    ],
)
def test_a_report_that_is_not_of_these_predictions_is_refused(run, tmp_path, changes, message):
    out = run("first")
    write_predictions(out, tmp_path / "p.jsonl", "", "")
    report = harness_report(tmp_path / "p.jsonl", tmp_path, **changes)
    before = (out / "evaluate" / "samples.jsonl").read_bytes()
    if message is None:  # an empty patch that the harness reports as an error is wrong all the same
        apply_reports(out, [report], None, "")
        assert answers_of(out)[INSTANCES[2]][0].detail == "no patch"
        return
    with pytest.raises(ConfigError, match=message):
        apply_reports(out, [report], None, "")
    assert (out / "evaluate" / "samples.jsonl").read_bytes() == before


def test_a_report_of_other_patches_is_refused(run, tmp_path):
    """The harness keeps results by model, run and instance: without the digest it takes those of other patches."""
    first, second = run("first"), run("second", change=str.upper)
    write_predictions(second, tmp_path / "p.jsonl", "", "")
    report = harness_report(tmp_path / "p.jsonl", tmp_path)
    with pytest.raises(ConfigError, match="is not a report of the predictions of this run"):
        apply_reports(first, [report], None, "")
    with pytest.raises(ConfigError, match="is not a report of the predictions"):
        apply_reports(second, [report.rename(tmp_path / "report.json")], None, "")


def test_a_report_of_an_old_harness_is_named(run, tmp_path, caplog):
    out = run("first")
    write_predictions(out, tmp_path / "p.jsonl", "", "")
    report = harness_report(tmp_path / "p.jsonl", tmp_path)
    rows = json.loads(report.read_text())
    report.write_text(json.dumps({key: value for key, value in rows.items() if not key.startswith("infra")}))
    apply_reports(out, [report], None, "")
    assert "is of a harness before 5.0, which counts tests that a patch only prints" in caplog.text


def test_a_run_without_the_benchmark_is_refused(run, tmp_path):
    out = run("first")
    with pytest.raises(ConfigError, match="has no task 'swe_bench' of SWE-bench; did you mean swe_bench_verified"):
        write_predictions(out, tmp_path / "p.jsonl", "", "swe_bench")
    with pytest.raises(ConfigError, match=r"the harness takes files that end in .jsonl"):
        write_predictions(out, tmp_path / "p.json", "", "")
    path = out / "evaluate" / "samples.jsonl"
    path.write_text(path.read_text().replace("swe_bench_verified", "gsm8k"))
    with pytest.raises(ConfigError, match="has no task of SWE-bench; evaluate one of swe_bench, swe_bench_verified"):
        write_predictions(out, tmp_path / "p.jsonl", "", "")
