"""A user's own task: rows become problems, wrong rows are refused by file, line and field."""

import json

import pytest

from tests.problems import make_problem
from thinkstack.tasks.benchmarks.jsonl import JsonlTask
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Message, Response


def verify_by(task, problem, answer):
    return task.verify(problem, Response(text="", answer=answer)).total == 1.0


ROW = {"question": "2+2?", "answer": 4}


def task_of(folder, *rows, **settings):
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return make_task("mine", TaskConfig(data=str(folder), **settings))


def test_a_row_becomes_a_problem_with_its_other_fields_as_metadata(tmp_path):
    task = task_of(tmp_path, ROW | {"level": 3, "language": "zh", "subject": "sums", "choices": ["3", "4"]})
    (problem,) = task.problems("train", seed=0).take(1)
    assert (problem.question, problem.answer, problem.task, problem.language) == ("2+2?", "4", "mine", "zh")
    assert problem.level == 3
    assert problem.metadata == {"level": 3, "subject": "sums", "choices": ["3", "4"]}


def test_a_row_may_be_a_conversation_that_ends_with_the_user(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    task = task_of(tmp_path, {"messages": turns, "answer": "4"})
    (problem,) = task.problems("test", seed=0).take(1)
    assert problem.messages == tuple(Message(**turn) for turn in turns)
    assert task.prompt(problem) == (problem.messages, ()) and problem.question == "2+2?"


def test_only_the_rows_of_the_allowed_levels_and_languages_are_used(tmp_path):
    rows = [{"question": f"{i}?", "answer": i, "level": i, "language": ("en", "zh")[i % 2]} for i in range(6)]
    task = task_of(tmp_path, *rows, levels=(1, 2, 3), languages=("zh",))
    assert {problem.level for problem in task.problems("train", seed=0).take(20)} == {1, 3}


@pytest.mark.parametrize(
    ("verifier", "reference", "right", "wrong"),
    [
        ("text", "uncle", "Uncle.", "aunt"),
        ("text", "4", "\\boxed{4}", "2+2"),
        ("number", "0.5", "$\\frac{1}{2}$", "0.51"),
        ("choice", "B", "(b)", "B or C"),
        ("latex", "\\frac{1}{2}x", "\\frac12 x", "\\frac{1}{3}x"),
    ],
)
def test_answers_are_compared_by_the_rows_verifier(verifier, reference, right, wrong):
    task = JsonlTask("mine", TaskConfig(data="files", verifier=verifier))
    problem = make_problem(answer=reference, task="mine")
    assert verify_by(task, problem, right) and not verify_by(task, problem, wrong)


@pytest.mark.parametrize(
    ("row", "verifier", "message"),
    [
        ({"question": "?"}, "text", "line 2 has no answer .it has question"),
        ({"answer": "4"}, "text", "line 2 has answer; it needs question or messages, one of them"),
        (ROW | {"messages": []}, "text", "it needs question or messages, one of them"),
        ({"question": 4, "answer": "4"}, "text", "line 2: question is a number; it must be text, not empty"),
        ({"messages": [], "answer": "4"}, "text", "line 2: messages is a list; use a list of objects"),
        (
            {"messages": [{"role": "bot", "content": "x"}], "answer": "4"},
            "text",
            r"messages\[0\].role is 'bot'; use one",
        ),
        ({"messages": [{"role": "user"}], "answer": "4"}, "text", r"messages\[0\].content is null; it must be text"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "4"}, "text", "it must be the user's"),
        ({"question": "?", "answer": " "}, "text", "line 2: answer is text; it must be text or a number, not empty"),
        ({"question": "?", "answer": ["4"]}, "text", "line 2: answer is a list; it must be text or a number"),
        ({"question": "?", "answer": "four"}, "number", "line 2: answer is 'four', not a number; correct it"),
        ({"question": "?", "answer": "BC"}, "choice", "line 2: answer is 'BC', not a single letter"),
        (ROW | {"level": "hard"}, "text", "line 2: level is 'hard'; use an integer"),
        (ROW | {"language": 4}, "text", "line 2: language is a number; use text such as en or zh"),
    ],
)
def test_a_wrong_row_is_refused_with_file_line_and_field(tmp_path, row, verifier, message):
    good = {"question": "?", "answer": "B" if verifier == "choice" else "4"}
    with pytest.raises(ConfigError, match=rf"train\.jsonl.*{message}"):
        task_of(tmp_path, good, row, verifier=verifier).problems("train", seed=0)


def test_a_folder_without_the_split_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no test.jsonl or test.jsonl.gz or test.parquet; give the folder"):
        make_task("mine", TaskConfig(data=str(tmp_path))).check_files("test")
