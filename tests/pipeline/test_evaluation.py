"""`thinkstack eval`: data below one folder, suites, log-likelihoods, endpoints, answers, plans, reports."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import save_model
from thinkstack.evals.records import read_samples
from thinkstack.pipeline.evaluation import (
    EvaluationRequest,
    default_folder,
    evaluation_values,
    find_data,
    run_evaluation,
    show_plan,
)
from thinkstack.stages.evaluate import read_evaluation
from thinkstack.types import ConfigError

MMLU = [
    {"question": f"Which number is {number}?", "choices": ["one", "two", "three", "four"], "answer": number % 4,
     "subject": "counting"}
    for number in range(6)
]  # fmt: skip
LONG = "a question that the server refuses"
GSM8K = [{"question": f"{number} and 2 is?", "answer": f"so\n#### {number + 2}"} for number in range(5)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "mmlu" / "test.jsonl", MMLU)
    write(tmp_path / "data" / "mmlu" / "dev.jsonl", [MMLU[0] | {"question": "Which is 1?", "answer": 0}])
    write(tmp_path / "data" / "other" / "gsm8k.jsonl", GSM8K)
    return str(tmp_path / "data")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    save_model(path, tiny_model(GQA_TINY, vocab_size=360, max_positions=512), tiny_tokenizer(), "r1_zero_short")
    return str(path)


@pytest.fixture
def endpoint():
    """A server that answers every question with 4, and counts the requests."""

    class Handler(BaseHTTPRequestHandler):
        asked: list[dict] = []  # noqa: RUF012
        too_long = LONG

        def do_POST(self):
            self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if self.asked[-1]["messages"][-1]["content"] == self.too_long:
                self.send_error(413)
                return
            message = {"role": "assistant", "reasoning_content": "5 and 2", "content": "The answer is 4."}
            reply = {
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "model": "m",
                "system_fingerprint": "fp_1", "usage": {"prompt_tokens": 500, "completion_tokens": 100},
            }  # fmt: skip
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler.asked
    Handler.asked.clear()
    server.shutdown()


def evaluation(out):
    return read_evaluation(out / "evaluate", "sampled.json")


def test_data_are_found_below_one_folder(data, tmp_path):
    assert find_data(data, "mmlu") == f"{data}/mmlu"
    assert find_data(data, "gsm8k") == f"{data}/other/gsm8k.jsonl"
    assert find_data(f"{data}/other/gsm8k.jsonl", "gsm8k") == f"{data}/other/gsm8k.jsonl"
    write(tmp_path / "data" / "x" / "input_data.jsonl", GSM8K)
    assert find_data(data, "ifeval") == f"{data}/x/input_data.jsonl"  # a published name of the set
    assert find_data(data, "math") == data
    assert find_data("", "math") == "data/math"


def test_a_suite_names_what_is_missing_and_leaves_it_out_on_request(data):
    request = EvaluationRequest(suite="smollm2", data=data, values={"answers": "a.jsonl"})
    with pytest.raises(ConfigError, match=r"ifeval: .*Apache-2.0.*; humaneval: .*with --data, or .* --available"):
        evaluation_values(request)
    values, left_out = evaluation_values(EvaluationRequest(**vars(request) | {"is_partial": True}))
    assert left_out == ["humaneval", "ifeval"]
    assert list(values["tasks"]) == ["gsm8k", "mmlu"]
    assert values["tasks"]["gsm8k"] == {
        "num_shots": 5, "prompt": "lm-eval", "max_tokens": 256, "data": f"{data}/other/gsm8k.jsonl"
    }  # fmt: skip
    assert (values["temperature"], values["max_tokens"]) == (0.0, 1280)
    with pytest.raises(ConfigError, match="the suite smollm2 has no task math"):
        evaluation_values(EvaluationRequest(suite="smollm2", tasks=("math",), data=data))
    with pytest.raises(ConfigError, match="unknown suite 'r2'; known: r1, r1-0528"):
        evaluation_values(EvaluationRequest(suite="r2", data=data))


def test_options_change_a_suite(data):
    request = EvaluationRequest(
        suite="smollm2", tasks=("gsm8k",), data=data, row={"prompt": "plain"}, values={"temperature": 0.5},
        settings=("max_num_seqs=3",),
    )  # fmt: skip
    values, _ = evaluation_values(request)
    assert values["tasks"]["gsm8k"]["prompt"] == "plain"
    assert (values["temperature"], values["max_num_seqs"], values["num_problems"]) == (0.5, 3, 0)


def test_a_setting_changes_the_row_of_one_task(data):
    """It was overwritten by the rows of the tasks, without a word."""
    request = EvaluationRequest(
        tasks=("gsm8k", "mmlu"), data=data, row={"num_shots": 1}, values={"answers": "a.jsonl"},
        settings=("tasks.mmlu.num_shots=0", "tasks.gsm8k.max_tokens=9"),
    )  # fmt: skip
    values, _ = evaluation_values(request)
    assert [row["num_shots"] for row in values["tasks"].values()] == [1, 0]
    assert values["tasks"]["gsm8k"]["max_tokens"] == 9 and values["tasks"]["mmlu"]["data"] == f"{data}/mmlu"
    for setting, message in (
        ("tasks.mlu.num_shots=0", "no task 'mlu'; did you mean mmlu"),
        ("tasks=3", "TASK.SETTING"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluation_values(EvaluationRequest(**vars(request) | {"settings": (setting,)}))


def test_questions_are_answered_by_log_likelihood_and_a_killed_run_computes_only_the_rest(
    data, model, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    request = EvaluationRequest(
        model=model, tasks=("mmlu",), data=data, row={"method": "cloze", "num_shots": 1}, values={"dtype": "fp32"}
    )
    run_evaluation(EvaluationRequest(**vars(request) | {"out": whole}), report=tmp_path / "report")
    found = evaluation(whole)
    assert found.protocols["mmlu"].method == "cloze" and found.protocols["mmlu"].num_shots == 1
    assert (found.problems, found.by_task["mmlu"].tokens_per_solution, found.rerun_error) == (6, None, None)
    records = read_samples(whole / "evaluate" / "samples.jsonl")
    assert {record.grader for record in records} == {"log-likelihood, cloze"}
    assert all(record.prompt.token_ids and record.sampler.kind == "engine" for record in records)
    assert "cloze" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")

    computed = []
    monkeypatch.setattr("thinkstack.evals.choices.CHUNK", 2)
    from thinkstack.evals import choices

    choose = choices.choose_by_loglikelihood

    def counted(model, tokenizer, problems, *others, **named):
        computed.extend(problem.key for problem in problems)
        if len(computed) == 4:
            raise KeyboardInterrupt  # as a kill between two chunks
        return choose(model, tokenizer, problems, *others, **named)

    monkeypatch.setattr("thinkstack.evals.choices.choose_by_loglikelihood", counted)
    again = EvaluationRequest(**vars(request) | {"out": parts})
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(again)
    run_evaluation(again)
    assert len(computed) == 4 + 4 and len(set(computed[:2] + computed[4:])) == 6
    assert read_samples(parts / "evaluate" / "samples.jsonl") == records


def test_an_endpoint_is_evaluated_with_thinking_cost_and_nothing_paid_twice(data, endpoint, tmp_path, capsys):
    url, asked = endpoint
    values = {
        "endpoint": {"url": url, "model": "m", "prompt_price": 1.0, "completion_price": 2.0},
        "samples": 2, "thinking_format": "flexible_extract",
    }  # fmt: skip
    request = EvaluationRequest(tasks=("gsm8k",), data=data, values=values, out=tmp_path / "one")
    run_evaluation(request)
    found = evaluation(tmp_path / "one")
    assert len(asked) == 10 and len({body["seed"] for body in asked}) == 10
    assert found.pass_at_1 == 1 / 5  # 2 and 2 is 4
    assert (found.sampler.kind, found.sampler.engine) == ("endpoint", f"{url}, fp_1")
    record = read_samples(tmp_path / "one" / "evaluate" / "samples.jsonl")[0]
    assert record.answers[0].text == "<think>\n5 and 2\n</think>\nThe answer is 4."
    assert (record.prompt.num_tokens, record.answers[0].num_tokens) == (500, 100)
    # 10 requests of 500 and 100 tokens at 1 and 2 per million, for 2 correct answers
    assert "| 0.0035 |" in capsys.readouterr().out
    run_evaluation(EvaluationRequest(**vars(request) | {"out": tmp_path / "two"}))
    assert len(asked) == 10
    assert evaluation(tmp_path / "two").pass_at_1 == found.pass_at_1


def test_a_question_that_the_endpoint_refuses_counts_as_wrong_and_not_scored(data, endpoint, tmp_path):
    url, _ = endpoint
    write(Path(data) / "other" / "gsm8k.jsonl", [*GSM8K, GSM8K[0] | {"question": LONG}])
    values = {"endpoint": {"url": url, "model": "m"}}
    run_evaluation(EvaluationRequest(tasks=("gsm8k",), data=data, values=values, out=tmp_path / "out"))
    found = evaluation(tmp_path / "out")
    assert (found.problems, found.unscorable) == (6, 1)
    assert (found.pass_at_1, found.pass_at_1_bound) == pytest.approx((1 / 6, 2 / 6))
    records = read_samples(tmp_path / "out" / "evaluate" / "samples.jsonl")
    (reason,) = {answer.unscorable for one in records for answer in one.answers if answer.unscorable}
    assert "status 413" in reason


def test_a_raised_budget_goes_on_in_the_same_folder(data, endpoint):
    url, asked = endpoint

    def request(max_cost):
        prices = {"prompt_price": 1.0, "completion_price": 2.0, "concurrency": 1}
        values = {"endpoint": {"url": url, "model": "m", "max_cost": max_cost} | prices, "max_tokens": 100}
        return EvaluationRequest(tasks=("gsm8k",), data=data, values=values)

    first = request(0.0026)
    folder = default_folder(first, evaluation_values(first)[0])
    with pytest.raises(Exception, match=r"max_cost=0\.0026 is reached"):
        run_evaluation(first)
    before = len(asked)
    assert 0 < before < 5
    second = request(1.0)
    assert default_folder(second, evaluation_values(second)[0]) == folder
    run_evaluation(second)
    assert len(asked) == 5
    assert evaluation(folder).problems == 5


def test_a_file_of_answers_is_evaluated_without_a_model(data, tmp_path):
    rows = [{"question": row["question"], "completions": ["\\boxed{7}", "\\boxed{2}"]} for row in GSM8K[:3]]
    answers = write(tmp_path / "answers.jsonl", rows)
    request = EvaluationRequest(
        tasks=("gsm8k",), data=data, out=tmp_path / "out", values={"answers": str(answers), "samples": 2}
    )
    run_evaluation(request)
    found = evaluation(tmp_path / "out")
    assert (found.problems, found.protocols["gsm8k"].num_available) == (3, 5)
    assert found.pass_at_1 == pytest.approx(1 / 6)  # 0 and 2 is 2
    with pytest.raises(ConfigError, match="has 2 completions, fewer than samples=64"):
        run_evaluation(EvaluationRequest(**vars(request) | {"values": request.values | {"samples": 64}}))


def test_a_plan_shows_prompts_and_tokens_and_samples_nothing(data, model, capsys, tmp_path):
    request = EvaluationRequest(model=model, tasks=("gsm8k",), data=data, values={"samples": 4, "max_tokens": 10})
    show_plan(request, with_ids=True)
    shown = capsys.readouterr().out
    assert "| gsm8k | 5 | 4 |" in shown and "at most 200 sampled tokens" in shown
    assert "SHA-256" in shown and "<｜begin▁of▁sentence｜>" in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "needs one of start, endpoint.url and answers"),
        ({"answers": "a.jsonl", "endpoint": {"url": "http://h/v1"}}, "it has answers and endpoint"),
        ({"answers": "a.jsonl", "thinking_budgets": [4]}, "thinking_budgets need a checkpoint, not answers"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(values, reason, data):
    with pytest.raises(ConfigError, match=reason):
        run_evaluation(EvaluationRequest(tasks=("gsm8k",), data=data, values=values))


def test_log_likelihoods_of_an_endpoint_are_refused(data):
    values = {"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}
    with pytest.raises(ConfigError, match="method='letters' needs a checkpoint, not endpoint"):
        run_evaluation(EvaluationRequest(tasks=("mmlu",), data=data, row={"method": "letters"}, values=values))
