"""Published rows: what is there, what is refused, and each way in which a protocol is unlike a published one."""

from dataclasses import replace
from pathlib import Path

import pytest

from thinkstack.evals.protocol import TaskProtocol
from thinkstack.evals.published import (
    FOLDER,
    OTHER_BENCHMARKS,
    PublishedRow,
    all_published,
    check_no_duplicates,
    differences,
    not_stated,
    published_rows,
    read_published,
)
from thinkstack.tasks.table import BENCHMARKS
from thinkstack.types import ConfigError

DEFAULTS = '[defaults]\nsource = "Card, Table 1"\ndate = "2025-01-22"\nmetric = "pass@1"\n'
FIGURE = '[figures."A model"]\naime24 = 50.0\n'
R1_AIME24 = TaskProtocol(
    task="aime24",
    num_problems=30,
    num_available=30,
    samples=64,
    temperature=0.6,
    top_p=0.95,
    max_tokens=32768,
    max_model_len=0,
    prompt="deepseek",
    thinking_format="think_then_answer",
    grader="number",
    seed=0,
)
"""The protocol of R1's paper for AIME 2024."""


def row(benchmark, model, metric="pass@1", date="", mode=""):
    """The only row of a benchmark and a model with this metric, of this date or of the newest document."""
    found = [one for one in published_rows(benchmark, model) if one.metric == metric and one.mode == mode]
    return max((one for one in found if date in ("", one.date)), key=lambda one: one.date)


def read(tmp_path, text):
    path = tmp_path / "card.toml"
    path.write_text(text, encoding="utf-8")
    return read_published(path)


def test_each_published_row_has_a_source_and_a_date_and_is_there_once():
    found = all_published()
    assert len(found) > 350 and all(one.source and one.date for one in found)
    check_no_duplicates(found)
    assert {one.benchmark for one in found} - BENCHMARKS.keys() == set(OTHER_BENCHMARKS)


def test_the_models_of_the_family_and_their_rivals_are_there():
    sizes = ("Qwen-1.5B", "Qwen-7B", "Qwen-14B", "Qwen-32B", "Llama-8B", "Llama-70B")
    family = ["R1", "R1-Zero", "V3", "V3-0324", "R1-0528", "V3.1", "R1-0528-Qwen3-8B", "V3-Base"]
    family += [f"R1-Distill-{size}" for size in sizes] + [f"R1-Dev{stage}" for stage in (1, 2, 3)]
    rivals = ["OpenAI-o1-mini", "OpenAI-o1-1217", "OpenAI-o1-0912", "GPT-4o-0513", "Claude-3.5-Sonnet-1022"]
    small = ["QwQ-32B-Preview", "Qwen2.5-32B-Zero", "SmolLM2-135M", "SmolLM2-135M-Instruct"]
    expected = {f"DeepSeek-{name}" for name in family} | {*rivals, *small}
    assert expected - {one.model for one in all_published()} == set()


@pytest.mark.parametrize(
    ("benchmark", "model", "metric", "figure", "k"),
    [
        ("aime24", "DeepSeek-R1", "pass@1", 79.8, 64),
        ("aime24", "DeepSeek-R1-Distill-Llama-70B", "pass@1", 70.0, 64),
        ("aime24", "DeepSeek-R1-Distill-Llama-70B", "cons@64", 86.7, 64),
        ("math500", "DeepSeek-R1-Distill-Qwen-7B", "pass@1", 92.8, 16),
        ("gpqa", "OpenAI-o1-1217", "pass@1", 75.7, 0),
        ("codeforces", "DeepSeek-R1", "rating", 2029, 16),
        ("livecodebench", "DeepSeek-R1-0528", "pass@1", 73.3, 16),
        ("aime24", "DeepSeek-V3", "pass@1", 39.6, 0),
        ("gsm8k", "SmolLM2-135M-Instruct", "EM", 1.4, 1),
    ],
)
def test_figures_are_those_of_the_sources(benchmark, model, metric, figure, k):
    rows = [one for one in published_rows(benchmark, model) if one.metric == metric]
    assert (figure, k) in [(one.figure, one.k) for one in rows]


def test_two_versions_of_a_paper_and_two_modes_of_a_model_are_rows_of_their_own():
    zero = [one for one in published_rows("aime24", "DeepSeek-R1-Zero") if one.metric == "pass@1"]
    assert [(one.figure, one.date) for one in zero] == [(71.0, "2025-01-22"), (77.9, "2026-01-04")]
    hybrid = published_rows("aime25", "DeepSeek-V3.1")
    assert [(one.mode, one.figure) for one in hybrid] == [("non-thinking", 49.8), ("thinking", 88.4)]


def test_rows_say_what_articles_misquote():
    majority = [one for one in published_rows("aime24") if one.metric == "cons@64" and one.figure == 86.7]
    assert {one.model for one in majority} == {"DeepSeek-R1", "DeepSeek-R1-Zero", "DeepSeek-R1-Distill-Llama-70B"}
    assert all("majority" in one.note for one in majority)
    assert "R1-Zero" in row("aime24", "DeepSeek-R1").note


def test_defaults_settings_and_models_are_laid_over_each_other(tmp_path):
    text = (
        DEFAULTS + 'k = 4\nnote = "all"\n[settings]\naime24 = { k = 8 }\nmost = { benchmark = "aime24", metric = '
        '"cons@64" }\n[figures.one]\ndefaults = { model = "One", mode = "thinking", note = "own" }\naime24 = 1.0\n'
        'most = { figure = 2, note = "row" }\n'
    )
    first, second = read(tmp_path, text)
    assert (first.model, first.mode, first.k, first.note, first.unit) == ("One", "thinking", 8, "own", "%")
    assert (second.benchmark, second.metric, second.k, second.note) == ("aime24", "cons@64", 4, "row")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEFAULTS.replace("source", "note") + FIGURE, r"card.toml: figures.A model.aime24 has no source; add it"),
        (DEFAULTS.replace("date", "note") + FIGURE, "has no date"),
        (DEFAULTS.replace("Card, Table 1", " ") + FIGURE, "source is empty"),
        (DEFAULTS.replace("2025-01-22", "January") + FIGURE, "date='January' is not a date; write YYYY-MM-DD"),
        (DEFAULTS + FIGURE.replace("aime24", "aime42"), "unknown benchmark 'aime42'; did you mean aime24?"),
        (DEFAULTS.replace("pass@1", "pass@2") + FIGURE, "unknown metric 'pass@2'; did you mean pass@"),
        (DEFAULTS + FIGURE.replace("50.0", "150.0"), "figure=150.0 is outside the scale of pass@1, 0 to 100"),
        (DEFAULTS.replace("pass@1", "rating") + FIGURE.replace("50.0", "-1"), "figure=-1.0 is outside the scale"),
        (DEFAULTS + FIGURE.replace("50.0", "{ figure = 50.0, tempreature = 0.6 }"), "did you mean temperature"),
        (DEFAULTS + FIGURE.replace("50.0", "{ k = 4 }"), "has no figure; add it"),
        (DEFAULTS + FIGURE.replace("50.0", '"half"'), "figure='half': "),
        (
            DEFAULTS + "[settings]\naime25 = { k = 8 }\n" + FIGURE,
            "settings.aime25 has no figures; did you mean aime24?",
        ),
        (DEFAULTS + FIGURE + "[notes]\n", "unknown key notes"),
        (DEFAULTS + "[figures]\nA = 3\n", "card.toml: figures.A=3 must be a table"),
    ],
)
def test_a_wrong_row_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_row_that_is_there_twice_is_refused(tmp_path):
    (one,) = read(tmp_path, DEFAULTS + FIGURE)
    with pytest.raises(ConfigError, match=r"A model has two rows of aime24 \(pass@1\) in Card, Table 1; keep one"):
        check_no_duplicates([one, replace(one, figure=51.0)])
    check_no_duplicates([one, replace(one, metric="cons@64"), replace(one, date="2026-01-04")])


def test_an_evaluation_by_the_published_protocol_has_no_differences():
    published = row("aime24", "DeepSeek-R1")
    assert differences(R1_AIME24, published) == []
    assert not_stated(R1_AIME24, published) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"samples": 16}, "samples: 16 here, 64 published"),
        ({"temperature": 0.7}, "temperature: 0.7 here, 0.6 published"),
        ({"top_p": 1.0}, "top-p: 1 here, 0.95 published"),
        ({"max_tokens": 8192}, "maximum tokens: 8,192 here, 32,768 published"),
        ({"max_model_len": 4096}, "maximum tokens: 4,096 here, 32,768 published"),
        ({"thinking_budget": 1000}, "thinking budget: 1,000 here, none published"),
        ({"prompt": ""}, "prompt: plain here, deepseek published"),
        ({"prompt": "Solve {question}"}, "prompt: a text of its own here, deepseek published"),
        ({"num_shots": 4}, "examples: 4 here, 0 published"),
        ({"grader": "text"}, "grader: text here, last box, rules and SymPy published"),
        ({"num_problems": 10}, "problems: 10 of 30 here, 30 published"),
        ({"num_problems": 15, "num_available": 15}, "problems: 15 here, 30 published"),
        ({"task": "aime25"}, "benchmark: aime25 here, aime24 published"),
    ],
)
def test_each_difference_is_named_alone(change, expected):
    assert differences(replace(R1_AIME24, **change), row("aime24", "DeepSeek-R1")) == [expected]


def test_a_majority_vote_is_not_compared_with_an_average():
    published = row("aime24", "DeepSeek-R1", "cons@64")
    assert differences(R1_AIME24, published) == ["metric: pass@1 here, cons@64 published"]
    assert differences(R1_AIME24, published, metric="cons@64") == []


def test_exact_match_of_one_attempt_is_pass_at_1_but_a_rating_is_not():
    def unlike(benchmark, metric):
        protocol = replace(R1_AIME24, task=benchmark)
        return [one for one in differences(protocol, row(benchmark, "DeepSeek-R1", metric)) if "metric" in one]

    assert unlike("mmlu", "EM") == unlike("ifeval", "prompt-strict") == []
    assert unlike("codeforces", "rating") == ["metric: pass@1 here, rating published"]


def test_what_a_source_does_not_state_is_neither_like_nor_unlike():
    published = row("aime24", "DeepSeek-V3.1", mode="thinking")
    assert differences(R1_AIME24, published) == []
    names = ["method", "prompt", "examples", "grader", "samples", "temperature", "top-p", "maximum tokens"]
    assert not_stated(R1_AIME24, published) == names


def test_the_window_of_the_problems_is_compared_where_problems_have_dates():
    protocol = replace(R1_AIME24, task="livecodebench", since="2024-08-01", until="2025-01-31", prompt="r1")
    published = row("livecodebench", "DeepSeek-R1", date="2026-01-04")

    def unlike(protocol, published=published):
        return [one for one in differences(protocol, published) if "window" in one]

    assert unlike(protocol) == []
    assert unlike(replace(protocol, until="")) == [
        "window: 2024-08-01 to last here, 2024-08-01 to 2025-01-31 published"
    ]
    card = row("livecodebench", "DeepSeek-V3-0324", date="2025-03-24")
    assert unlike(protocol, card) == [] and "window" in not_stated(protocol, card)


def test_greedy_decoding_has_no_top_p():
    greedy = replace(R1_AIME24, task="math500", temperature=0.0, top_p=1.0, samples=1, max_tokens=8192)
    published = row("math500", "DeepSeek-V3", "EM")
    greedy = replace(greedy, num_problems=500, num_available=500)
    assert differences(greedy, published) == []
    assert not_stated(greedy, published) == ["prompt", "examples", "grader"]
    assert "top-p" in not_stated(replace(greedy, temperature=0.6), published)


def test_log_likelihoods_are_compared_by_method_and_not_by_sampling():
    """Of texts, our figure is that of the choice with the highest log-likelihood per byte."""
    cloze = replace(R1_AIME24, task="mmlu", method="cloze", prompt="smollm2", grader="log-likelihood, cloze")
    card = row("mmlu", "SmolLM2-135M", "acc_norm")
    assert differences(cloze, card) == []
    letters = replace(cloze, method="letters", grader="log-likelihood, letters")
    assert differences(letters, card) == [
        "metric: accuracy here, acc_norm published",
        "method: letters here, cloze published",
    ]
    base = row("mmlu", "DeepSeek-V3-Base", "accuracy")
    assert differences(replace(letters, num_shots=5), base) == []
    assert differences(replace(cloze, num_shots=5), base) == ["metric: acc_norm here, accuracy published"]
    sampled = replace(letters, num_shots=5, method="sampled")
    assert differences(sampled, base) == ["method: sampled here, loglikelihood published"]


def test_the_sandbox_does_not_make_another_grader():
    published = row("livecodebench", "DeepSeek-R1", date="2026-01-04")
    for grader, is_like in (("scripts, bwrap", True), ("calls, sandlock", True), ("text", False)):
        protocol = replace(R1_AIME24, task="livecodebench", grader=grader)
        assert any("grader" in one for one in differences(protocol, published)) != is_like


def test_every_prompt_that_a_row_names_is_one_of_the_task():
    """A name that is not of the task would make its rows unlike every evaluation."""
    for one in all_published():
        if one.benchmark in BENCHMARKS and one.prompt and " " not in one.prompt:
            assert one.prompt in BENCHMARKS[one.benchmark].PROMPTS, one


def test_the_files_are_package_data():
    assert {path.suffix for path in FOLDER.iterdir() if path.is_file()} == {".toml", ".py"}
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"evals/published/*.toml"' in pyproject


def test_a_row_is_refused_without_its_model():
    with pytest.raises(ConfigError, match="model is empty"):
        PublishedRow(model=" ", benchmark="math", figure=1.0, metric="EM", source="Card", date="2025-01-01")
