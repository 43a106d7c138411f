"""Retrieval from generated contexts, and infilling of a line."""

import json
from itertools import count

import pytest

from thinkstack.tasks.benchmarks.retrieval import WORDS_PER_LEVEL, largest_level
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig, encode_prompt
from thinkstack.text.chat import chat_format
from thinkstack.text.fim import fim_prompt
from thinkstack.text.tokenizer import CONTROL, FIM, train_tokenizer
from thinkstack.types import ConfigError, Response


@pytest.mark.parametrize(("name", "num_keys"), [("needle", 1), ("multi_key", 16)])
def test_a_number_is_hidden_at_a_depth_of_a_context_of_the_level(name, num_keys):
    task = make_task(name, TaskConfig(levels=(1, 3)))
    problems = task.problems("test", 0).take(44)
    assert {problem.level for problem in problems} == {1, 3}
    assert len({problem.metadata["depth"] for problem in problems}) == 11
    for problem in problems:
        words, context = len(problem.question.split()), problem.question.partition("\n\n")[0]
        assert abs(words - problem.level * WORDS_PER_LEVEL) < 40
        assert context.count("The secret number of") == num_keys and context.count(problem.answer) == 1
        place = context.index(problem.answer) / len(context)
        assert abs(place - problem.metadata["depth"]) < 0.12
    assert problems == task.problems("test", 0).take(44) != task.problems("test", 1).take(44)


def test_only_the_asked_number_is_right():
    task = make_task("multi_key", TaskConfig())
    problem = task.problems("test", 0)[0]
    other = str(int(problem.answer) + 1)
    for answer, is_correct in (
        (problem.answer, True),
        (f"It is {problem.answer}.", True),
        (f"{int(problem.answer):,}", True),
        (other, False),
        (f"{other} or {problem.answer}", False),
        (f"{problem.answer}0", False),
        ("", False),
    ):
        assert task.verify(problem, Response(text=answer, answer=answer)).total == is_correct, answer


def test_the_largest_level_fills_the_context_of_the_model():
    task = make_task("needle", TaskConfig())

    def count_words(problem):
        return len(problem.question.split())

    level = largest_level(task, count_words, 5000)
    assert count_words(task.make(level, 0.5, level)) <= 5000 < count_words(task.make(level + 1, 0.5, level + 1))
    assert largest_level(task, count_words, 10) == 0


def test_settings_without_effect_are_refused():
    for name, settings, message in (
        ("needle", {"data": "files"}, "needle is generated and reads no files"),
        ("needle", {"levels": (0,)}, "levels are at least 1"),
        ("needle", {"languages": ("zh",)}, "needle is English"),
        ("multi_key", {"verifier": "text"}, "has no effect: multi_key has a verifier"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task(name, TaskConfig(**settings))


ROW = {"prompt": "def f(x):\n", "suffix": "    return y\n", "canonical_solution": "    y = x + 1", "language": "py"}


def test_infilling_has_the_prompt_of_fill_in_the_middle_and_exact_match(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    task = make_task("fim", TaskConfig(data=str(tmp_path)))
    problem = task.problems("test", 0)[0]
    tokenizer = train_tokenizer(["def f(x):", "return x"] * 3, 300, control=(*CONTROL, *FIM))
    chat = chat_format("r1_zero", tokenizer)
    assert encode_prompt(chat, task, problem) == tuple(fim_prompt(tokenizer, ROW["prompt"], ROW["suffix"]))
    for text, is_correct in (
        ("    y = x + 1", True),
        ("\n    y = x + 1\n    return y", True),
        ("<think>    y = x + 1", True),
        ("    y = x+1", False),
        ("    z = 0\n    y = x + 1", False),
        ("", False),
    ):
        assert task.verify(problem, Response(text=text)).total == is_correct, text


def test_rows_of_infilling_of_another_shape_are_refused(tmp_path):
    for number, (changes, message) in zip(
        count(),
        (
            ({"suffix": 3}, "line 1: suffix is a number"),
            ({"canonical_solution": " "}, "line 1: canonical_solution is empty"),
        ),
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(ROW | changes) + "\n")
        with pytest.raises(ConfigError, match=message):
            make_task("fim", TaskConfig(data=str(path))).problems("test", 0)
