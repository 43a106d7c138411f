"""AMC23, CMATH, MGSM and Minerva: rows, answers, prompts, refused files."""

import json

import pytest

from thinkstack.tasks.benchmarks.mathematics import parse_scientific
from thinkstack.tasks.benchmarks.prompts import last_answer_line
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Response


def read(folder, name, rows, **settings):
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = make_task(name, TaskConfig(data=str(folder), **settings))
    return task, task.read(task.file("test"))


def is_correct(task, problem, answer):
    return task.verify(problem, Response(text=answer, answer=answer)).total == 1.0


def test_amc23_answers_are_written_as_floats(tmp_path):
    task, (problem,) = read(tmp_path, "amc23", [{"problem": "How far?", "answer": 27.0}])
    assert (problem.answer, problem.language) == ("27", "en")
    assert is_correct(task, problem, "\\boxed{27}") and is_correct(task, problem, "27 miles")
    assert not is_correct(task, problem, "28") and not is_correct(task, problem, "27 or 28")


def test_cmath_has_fractions_percent_and_grades(tmp_path):
    rows = [{"question": "还剩多少？", "answer": answer, "grade": 4} for answer in ("9", "2/6", "12%")]
    task, problems = read(tmp_path, "cmath", rows, prompt="deepseek-zh", levels=(4,))
    assert [(problem.level, problem.language) for problem in problems] == [(4, "zh")] * 3
    assert task.prompt(problems[0])[0][0].content.endswith("放置于\\boxed{}中。")
    assert is_correct(task, problems[0], "9页") and is_correct(task, problems[1], "\\frac{1}{3}")
    assert is_correct(task, problems[2], "12\\%") and not is_correct(task, problems[2], "13%")


def test_mgsm_has_a_language_for_each_file_and_answers_on_a_last_line(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": "她每天赚多少钱？"}, {"role": "assistant", "content": ""}],
            "answer": "18",
        },
        {"question": "Wie viele Enten sind auf dem See und nicht im Wasser?", "answer": 3},
    ]
    task, problems = read(tmp_path, "mgsm", rows, prompt="simple-evals-zh")
    assert [problem.language for problem in problems] == ["zh", "de"]
    long = "先算鸭蛋的数量，再乘以每颗鸭蛋的价格，" * 8 + "\n\n答案: 18"
    assert is_correct(task, problems[0], long) and not is_correct(task, problems[0], long + "0")


def test_the_last_answer_line_counts():
    assert last_answer_line("Answer: 3\nthen\n**Answer:** 1,024 \n") == "1,024"
    assert last_answer_line("The answer: 3") is None and last_answer_line("Answer:") is None


def test_minerva_compares_scientific_notation_exactly(tmp_path):
    row = {"problem": "How bright?", "solution": "first \\boxed{1}, then $\\boxed{4.5e33}$ ergs", "type": "Astronomy"}
    task, (problem,) = read(tmp_path, "minerva", [row])
    assert problem.answer == "4.5e33" and problem.metadata["subject"] == "Astronomy"
    for answer in (
        "4.5e33",
        "4.5 \\times 10^{33}",
        "$4.5\\times 10^{33}$",
        "\\boxed{4.5 \\cdot 10^33 \\text{ ergs}}",
        "45e32",
    ):
        assert is_correct(task, problem, answer), answer
    for answer in ("4.5", "4.5e32", "4.4e33", "4.5 \\times 10^{33} + 1", ""):
        assert not is_correct(task, problem, answer), answer
    assert parse_scientific("6.4") == parse_scientific("64e-1")


@pytest.mark.parametrize("name", ["aime24", "aime25"])
def test_the_years_of_aime_are_rows_of_their_own(tmp_path, name):
    task, (problem,) = read(tmp_path, name, [{"problem": "n?", "answer": "070"}], prompt="deepseek")
    assert problem.task == name and problem.answer == "70"
    assert task.prompt(problem)[0][0].content == (
        "n?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "amc23",
            {"problem": "?", "answer": "many"},
            r"line 1: answer is 'many', not a number; give .*copyright of the MAA",
        ),
        ("cmath", {"question": 3, "answer": "9"}, "line 1: question is a number, or empty"),
        ("mgsm", {"answer": "9"}, "line 1 has neither question nor messages with a question"),
        ("minerva", {"problem": "?", "solution": "none"}, r"line 1: solution has no \\boxed"),
        ("amc23", {"problem": "?"}, "line 1 has no answer"),
    ],
)
def test_a_row_of_another_shape_is_refused_with_its_line_and_field(tmp_path, name, row, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, name, [row])


def test_data_may_be_the_file_of_the_test_split(tmp_path):
    file = tmp_path / "amc23.jsonl"
    file.write_text('{"problem": "How far?", "answer": 27.0}\n')
    assert make_task("amc23", TaskConfig(data=str(file))).problems("test", 0).take(1)[0].answer == "27"
    with pytest.raises(ConfigError, match="give the folder that contains"):
        make_task("amc23", TaskConfig(data=str(file))).problems("train", 0)
