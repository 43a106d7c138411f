"""Suites: what they hold, what is refused, and that they are the published protocols."""

import pytest

from thinkstack.evals.protocol import TaskProtocol
from thinkstack.evals.published import differences, published_rows
from thinkstack.evals.suites import load_suite, suite_names
from thinkstack.tasks.table import BENCHMARKS, make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError

SUITES = [(name, task) for name in suite_names() for task in load_suite(name).tasks]
CODE_GRADERS = {"livecodebench": "scripts, bwrap", "humaneval": "calls, bwrap"}


def protocol(suite, task, num_problems):
    """The protocol of all problems of a task in a suite."""
    cfg, settings = make_task(task, TaskConfig(data="files", **suite.tasks[task])).cfg, suite.settings
    is_sampled = cfg.method == "sampled"
    return TaskProtocol(
        task=task,
        method=cfg.method,
        num_problems=num_problems,
        num_available=num_problems,
        samples=cfg.num_samples or settings.get("samples", 1),
        temperature=settings["temperature"] if cfg.temperature is None else cfg.temperature,
        top_p=settings["top_p"],
        max_tokens=cfg.max_tokens or settings["max_tokens"],
        max_model_len=0,
        prompt=cfg.prompt,
        num_shots=cfg.num_shots,
        thinking_format=settings["thinking_format"],
        grader=CODE_GRADERS.get(task)
        or (make_task(task, cfg).grader if is_sampled else f"log-likelihood, {cfg.method}"),
        since=cfg.since,
        until=cfg.until,
        seed=0,
    )


def test_the_suites_of_the_family_are_there():
    assert suite_names() == ["r1", "r1-0528", "distill", "v3", "smollm2", "laptop"]
    r1 = load_suite("r1")
    assert {name: row["num_samples"] for name, row in r1.tasks.items() if row["num_samples"] > 1} == {
        "aime24": 64,
        "math500": 16,
        "gpqa": 64,
        "livecodebench": 8,
        "codeforces": 16,
    }
    assert (r1.settings["temperature"], r1.settings["top_p"], r1.settings["max_tokens"]) == (0.6, 0.95, 32768)
    assert r1.settings["num_problems"] == 0 and "arXiv:2501.12948v2" in r1.source


@pytest.mark.parametrize(("name", "task"), SUITES)
def test_each_row_makes_its_task_and_says_where_to_get_its_data(name, task, tmp_path):
    made = make_task(task, TaskConfig(data=str(tmp_path), **load_suite(name).tasks[task]))
    with pytest.raises(ConfigError, match="give the folder that contains"):
        made.file("test")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_names_its_licence(name):
    words = ("MIT", "CC BY", "CC-BY", "Apache-2.0", "OpenRAIL", "copyright", "licence")
    assert any(word in BENCHMARKS[name].SOURCE for word in words), BENCHMARKS[name].SOURCE


@pytest.mark.parametrize(
    ("name", "model", "date", "unlike"),
    [
        (
            "r1",
            "DeepSeek-R1",
            "2026-01-04",
            {"math500": ["grader"], "ifeval": ["grader"], "codeforces": ["metric", "grader"]},
        ),
        (
            "distill",
            "DeepSeek-R1-Distill-Qwen-7B",
            "2026-01-04",
            {"math500": ["grader"], "codeforces": ["metric", "grader"]},
        ),
        ("r1-0528", "DeepSeek-R1-0528", "2025-05-28", {}),
        ("v3", "DeepSeek-V3", "2024-12-27", {"livecodebench": ["prompt"]}),
        (
            "smollm2",
            "SmolLM2-135M-Instruct",
            "2025-02-04",
            {"gsm8k": ["grader"], "ifeval": ["metric"]},
        ),
    ],
)
def test_a_suite_is_the_published_protocol_but_for_what_is_named(name, model, date, unlike):
    """Of several rows of a document the nearest counts: a majority vote and a percentile are others."""
    suite, found = load_suite(name), {}
    for task in suite.tasks:
        rows = [one for one in published_rows(task, model) if one.date == date]
        unlikes = [differences(protocol(suite, task, row.num_problems or 1), row) for row in rows]
        if rows and (least := min(unlikes, key=len)):
            found[task] = [one.partition(":")[0] for one in least]
    assert found == unlike


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\nsource = "x"\n[a.settings]\n[a.tasks]\nmath = {}\n', "unknown suite 'b'; known: a"),
        ('[b]\nsource = "x"\n[b.settings]\n[b.tasks]\n', "own.toml: b has no tasks"),
        ('[b]\nsource = "x"\n[b.settings]\n[b.tasks]\nmaths = {}\n', "unknown task 'maths'; did you mean math"),
        (
            '[b]\nsource = "x"\n[b.settings]\n[b.tasks]\nmath = { sample = 3 }\n',
            "unknown key own.toml: b.tasks.math.sample",
        ),
        ('[b]\nsource = "x"\n[b.settings]\ntemp = 1\n[b.tasks]\nmath = {}\n', "b.settings.temp; known: num_problems"),
        (
            '[b]\nsource = "x"\n[b.settings]\ntop_p = 2\n[b.tasks]\nmath = {}\n',
            "b.settings.top_p=2: input should be less",
        ),
        ("[b]\n[b.settings]\n[b.tasks]\nmath = {}\n", "source"),
        ('[b]\nsource = "x"\nsorce = "x"\n[b.settings]\n[b.tasks]\nmath = {}\n', "unknown key own.toml: b.sorce"),
    ],
)
def test_a_suite_of_the_wrong_form_is_refused(tmp_path, text, message):
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_suite("b", tmp_path / "own.toml")


def test_an_unknown_suite_names_the_closest():
    with pytest.raises(ConfigError, match="unknown suite 'r1-528'; did you mean r1-0528"):
        load_suite("r1-528")
