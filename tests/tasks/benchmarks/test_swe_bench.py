"""SWE-bench: its rows, its published prompts, the patch of an answer."""

import json
import random
import re

import pytest

from thinkstack.tasks.benchmarks.swe_bench import extract_patch, patch_of
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError

PREMISE = "You will be provided with a partial code base and an issue statement explaining a problem to resolve."
DIFF = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n"


def row(number, **fields):
    """An invented instance in the published layout."""
    return {
        "repo": "owner/repo", "instance_id": f"owner__repo-{number}", "base_commit": "0" * 40, "patch": DIFF,
        "test_patch": DIFF, "problem_statement": f"Error {number} in {{code}}", "hints_text": "",
        "created_at": "2022-03-03T15:14:54Z", "version": "4.3", "FAIL_TO_PASS": '["test_x"]', "PASS_TO_PASS": "[]",
        "environment_setup_commit": "1" * 40, "difficulty": "1-4 hours",
    } | fields  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def task_with(folder, rows, prompt=""):
    write(folder / "test.jsonl", rows)
    task = make_task("swe_bench_verified", TaskConfig(data=str(folder), prompt=prompt))
    return task, task.read(task.file("test"))


def test_a_row_becomes_a_problem(tmp_path):
    task, (problem,) = task_with(tmp_path, [row(1, patch=f"<patch>\n{DIFF}\n</patch>")])
    assert (problem.key, problem.level, problem.question) == ("owner__repo-1", 3, "Error 1 in {code}")
    assert (problem.metadata["cluster"], problem.metadata["date"]) == ("owner/repo", "2022-03-03")
    assert problem.answer == DIFF, "the data sets with a text have the patch in tags"
    assert task.grader == "official harness"


def test_the_text_of_a_row_is_the_prompt_and_its_first_line_the_system_message(tmp_path):
    text = f"{PREMISE}\n<issue>\n{{question}}\n</issue>\nRespond below:\n\n"
    task, problems = task_with(tmp_path, [row(1, text=text), row(2, text="Mend {question}.")])
    messages, tools = task.prompt(problems[0])
    assert [(one.role, one.content) for one in messages] == [
        ("system", PREMISE), ("user", "<issue>\n{question}\n</issue>\nRespond below:\n\n\n\n")
    ]  # fmt: skip
    assert [one.content for one in task.prompt(problems[1])[0]] == ["Mend {question}.\n\n"] and not tools


@pytest.mark.parametrize("prompt", ["", "style-3", "style-2"])
def test_a_prompt_is_built_from_files_with_numbered_lines(tmp_path, prompt):
    files = {"b.py": "x = 1\n\ny", "a/z.py": "1"}
    task, (problem,) = task_with(tmp_path, [row(1, readmes={"README.md": "Hi"}, file_contents=files)], prompt)
    system, user = task.prompt(problem)[0]
    shown = (
        "<code>\n[start of README.md]\n1 Hi\n[end of README.md]\n[start of a/z.py]\n1 1\n[end of a/z.py]\n"
        "[start of b.py]\n1 x = 1\n2 \n3 y\n[end of b.py]\n</code>\n"
    )
    assert system.content == PREMISE and shown in user.content
    assert user.content.startswith("<issue>\nError 1 in {code}\n</issue>\n")
    assert user.content.endswith("Respond below:\n\n\n\n" if prompt != "style-2" else "</patch>\n\n\n\n")
    assert DIFF not in user.content, "the reference is not shown"


def test_instances_without_code_are_counted(tmp_path, caplog):
    task_with(tmp_path, [row(1), row(2, text="x")])
    assert "1 of 2 instances have neither text nor file_contents" in caplog.text


@pytest.mark.parametrize(
    ("fields", "prompt", "message"),
    [
        ({"instance_id": "../../etc"}, "", "instance_id='../../etc' must have letters"),
        ({"instance_id": "a/b"}, "", "instance_id='a/b' must have"),
        ({"instance_id": ".hidden"}, "", "instance_id='.hidden' must have"),
        ({"instance_id": "a\nb"}, "", r"instance_id='a\\nb' must have"),
        ({"instance_id": 3}, "", "instance_id is int, not text"),
        ({"instance_id": "owner__repo-1"}, "", "'owner__repo-1' occurs twice"),
        ({"problem_statement": None}, "", "problem_statement is NoneType"),
        ({"text": ["x"]}, "", "text is list, not text"),
        ({"file_contents": ["x"]}, "", "file_contents is a list; it must be an object from path to text"),
        ({"text": "x"}, "style-2", "prompt='style-2' would show no code"),
    ],
)
def test_a_row_of_the_wrong_shape_is_refused_with_its_line(tmp_path, fields, prompt, message):
    with pytest.raises(ConfigError, match=f"line 2.*{message}"):
        task_with(tmp_path, [row(1), row(2) | fields], prompt)


@pytest.mark.parametrize(
    ("answer", "patch"),
    [
        (f"So:\n<patch>\n{DIFF}</patch>\n", f"\n{DIFF}"),
        (f"So:\n```diff\n{DIFF}```\n", DIFF),
        (f"```python\nx\n```\n```patch\n{DIFF}```\n", DIFF),
        (f"```diff\nfirst```\n<diff>{DIFF}</diff>", DIFF),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("<code>x</code> ```py\ny```", "x"),
        (f"<issue><patch>{DIFF}</patch></issue>", f"<patch>{DIFF}</patch>"),
        (f"{DIFF}</s> more", DIFF),
        ("", ""),
        (f"<think>\n<patch>no</patch></think>\n<patch>{DIFF}</patch>", DIFF),
        (f"<think>\n<patch>{DIFF}</patch>", ""),
        (f"<patch>{DIFF}</patch> wait <think> hm", DIFF),
    ],
)
def test_the_patch_of_an_answer_is_found_as_published(answer, patch):
    assert patch_of(answer) == patch


def test_patches_are_found_like_the_published_expressions_find_them():
    """The published expression for elements takes quadratic time: 12,000 characters of <a> half a second."""

    def published(text):
        found = [(name, inside) for name, inside in re.findall(r"<([\w-]+)>(.*?)</\1>", text, re.DOTALL)]
        found += re.findall(r"```(\w+)?\n(.*?)```", text, re.DOTALL)
        patches = [inside for name, inside in found if name in ("diff", "patch")]
        return (patches or [inside for _, inside in found] or [text.split("</s>")[0]])[0]

    parts = [
        "<patch>",
        "</patch>",
        "<x-y>",
        "</x-y>",
        "```",
        "```diff\n",
        "```py\n",
        "\n",
        "a",
        "</s>",
        "<",
        "</",
        "patch>",
        "<a",
        "</a>",
    ]
    chooser = random.Random(0)
    for _ in range(5000):
        text = "".join(chooser.choices(parts, k=chooser.randrange(14)))
        assert extract_patch(text) == published(text), text
    assert extract_patch("<a>" * 300_000) == "<a>" * 300_000
