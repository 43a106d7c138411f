"""Published prompts: their exact texts, sources, and the answers that their forms ask for."""

import hashlib
import re
from pathlib import Path

import pytest

from tests.problems import make_problem
from thinkstack.tasks.benchmarks.code_prompts import LIVECODEBENCH_PROMPTS
from thinkstack.tasks.benchmarks.prompts import OWN, Prompt, fill_prompt, find_prompt
from thinkstack.tasks.table import BENCHMARKS, make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Response

PROMPTS = {(task, name): prompt for task, cls in BENCHMARKS.items() for name, prompt in cls.PROMPTS.items()}
PINS = {
    "a0a57fff": "aime plain",
    "5e3642ab": "aime deepseek",
    "1ea4255e": "aime deepseek-zh",
    "4bf9753e": "aime simple-evals",
    "9ca75d89": "aime lm-eval",
    "7a2896a2": "aime lighteval",
    "609a1b80": "gpqa simple-evals",
    "1e97090b": "gpqa zero-eval",
    "600c5df1": "gpqa r1-gpqa",
    "332031e6": "gpqa lm-eval",
    "952f5544": "math lm-eval",
    "985c50df": "math minerva",
    "1675a31d": "math lighteval",
    "538434fe": "mgsm simple-evals",
    "4933e8ae": "mgsm simple-evals-zh",
    "b58b0e7e": "mmlu lm-eval",
    "81f257cf": "mmlu lm-eval-cloze",
    "97eca8ca": "mmlu smollm2",
    "701c65c9": "mmlu r1-mmlu",
    "29d34b04": "mmlu_pro mmlu-pro",
    "32459082": "mmlu_pro lm-eval",
    "f2a863cc": "humaneval deepseek-coder",
    "799397c9": "humaneval human-eval",
    "8610186a": "humaneval simple-evals",
    "ce27385e": "humaneval lm-eval",
    "a59f1ae6": "humaneval evalplus",
    "0c84d2a9": "mbpp lm-eval",
    "4f4adfe9": "mbpp lm-eval-instruct",
    "aeab6fb8": "livecodebench livecodebench",
    "c2fc67f8": "livecodebench r1",
    "67a6283e": "cruxeval_input cruxeval",
    "bcf05eb6": "cruxeval_input cruxeval-cot",
    "9d7679ab": "cruxeval_output cruxeval",
    "207261d2": "cruxeval_output cruxeval-cot",
    "35a37da6": "swe_bench published",
    "4aee98d0": "swe_bench style-3",
    "9c17113d": "swe_bench style-2",
}
"""First digits of the SHA-256 of each text that was compared with its original, and the first task that has it."""
GUIDE = (Path(__file__).parents[3] / "docs" / "guides" / "tasks.md").read_text(encoding="utf-8")


def pin(prompt):
    text = "\0".join((prompt.system, prompt.description, prompt.text, prompt.with_starter, prompt.choice))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_published(prompt):
    return not prompt.source.startswith(OWN)


def test_a_compared_text_does_not_change_unnoticed():
    found = {pin(prompt): " ".join(place) for place, prompt in reversed(PROMPTS.items()) if is_published(prompt)}
    assert found == PINS


@pytest.mark.parametrize(("task", "name"), PROMPTS)
def test_each_prompt_says_where_it_was_published_and_is_in_the_guide(task, name):
    prompt = PROMPTS[task, name]
    assert re.search(r" at [0-9a-f]{7}|arXiv:[0-9.]+v[0-9]|alone$", prompt.source) or not is_published(prompt)
    assert f"| `{name}` |" in GUIDE


@pytest.mark.parametrize(
    ("task", "name", "expected"),
    [
        (
            "gpqa",
            "r1-gpqa",
            "Answer the following multiple choice question. The last line of your response should be of the following "
            "format: 'ANSWER: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before "
            "answering.\n\nWhich?\n\nA) one\nB) two\nC) three\nD) four",
        ),
        (
            "mmlu_pro",
            "mmlu-pro",
            "The following are multiple choice questions (with answers) about computer science. Think step by step and "
            'then output the answer in the format of "The answer is (X)" at the end.\n\nQuestion: Which?\nOptions: A. '
            "one\nB. two\nC. three\nD. four\nAnswer: Let's think step by step.\n\n",
        ),
        (
            "mmlu_redux",
            "zero-eval",
            "\n## Question: \n\nWhich?\n\n## Choices:\n\n- (A) one\n- (B) two\n- (C) three\n- (D) four\n\n\n## "
            "Instruction \n\nPlease answer this question by first reasoning and then selecting the correct choice. "
            "\nPresent your reasoning and solution in the following json format. \nPlease show your choice in the "
            '`answer` field with only the choice letter, e.g.,`"answer": "C"`.\n\n```json\n{\n    "reasoning": "___",\n'
            '    "answer": "___"\n}\n```\n',
        ),
        ("mmlu", "smollm2", "The following are questions about computer science.\nQuestion: Which?\nAnswer:"),
        ("math500", "lm-eval", "Problem: Which?\nAnswer:"),
        ("aime25", "deepseek", "Which?\nPlease reason step by step, and put your final answer within \\boxed{}."),
    ],
)
def test_prompts_by_hand(task, name, expected):
    problem = make_problem("Which?", choices=["one", "two", "three", "four"], subject="computer_science")
    assert fill_prompt(PROMPTS[task, name], problem) == expected


@pytest.mark.parametrize("starter", ["", "class Solution:\n    def add(self): "])
def test_livecodebench_has_a_form_for_scripts_and_one_for_functions(starter):
    problem = make_problem("Add {x}.", starter_code=starter)
    code = starter or "# YOUR CODE HERE"
    published = fill_prompt(LIVECODEBENCH_PROMPTS["livecodebench"], problem)
    assert published.startswith("### Question:\nAdd {x}.\n\n### Format: ")
    assert published.endswith(f"\n```python\n{code}\n```\n\n### Answer: (use the provided format with backticks)\n\n")
    assert ("reads the inputs, runs the algorithm and writes output to STDOUT." in published) == (not starter)
    assert LIVECODEBENCH_PROMPTS["livecodebench"].system.endswith("and passes all tests.")
    own = fill_prompt(LIVECODEBENCH_PROMPTS["r1"], problem)
    assert own.startswith("Question: Add {x}.\n\n") and ("output the results to stdout." in own) == (not starter)
    assert not LIVECODEBENCH_PROMPTS["r1"].system


def test_a_description_stands_once_and_needs_its_subject():
    prompt = Prompt(description="About {subject}:\n", text="{question}", source=OWN)
    assert fill_prompt(prompt, make_problem("Which?")) == "Which?"
    problem = make_problem("Which?", subject="us_law")
    assert fill_prompt(prompt, problem) == "About us law:\nWhich?"
    assert fill_prompt(prompt, problem, with_description=False) == "Which?"


def test_a_text_of_ones_own_needs_the_question():
    assert find_prompt("math", "Solve: {question}", {}).text == "Solve: {question}"
    with pytest.raises(
        ConfigError, match=r"tasks\.gpqa\.prompt='r1-gqa' is not a prompt of gpqa; did you mean r1-gpqa"
    ):
        find_prompt("gpqa", "r1-gqa", BENCHMARKS["gpqa"].PROMPTS)


def test_programs_are_read_in_the_form_that_the_prompt_asks_for():
    """Without a fence: MBPP's [DONE], and CRUXEval's answer after a prompt that opens the tag."""

    def program(task, prompt, text):
        made = make_task(task, TaskConfig(data="files", prompt=prompt))
        return made.program(make_problem("?", "", task), Response(text=text))

    assert program("mbpp", "lm-eval", "def f():\n    return 1\n[DONE]\nmore") == "def f():\n    return 1"
    assert program("mbpp", "lm-eval", "Here:\n```python\nx = 1\n```\n") == "x = 1\n"
    assert program("mbpp", "", "def f():\n    return 1\n[DONE]") is None
    assert program("cruxeval_output", "cruxeval", "assert f(1) == 2\n[/ANSWER]\n\n") == "assert f(1) == 2"
    assert program("cruxeval_output", "zero-shot", "assert f(1) == 2\n[/ANSWER]") is None
    assert program("cruxeval_input", "cruxeval-cot", "so\n[ANSWER]\nf(3)\n[/ANSWER]") == "f(3)"
