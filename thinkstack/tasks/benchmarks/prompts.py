"""Prompts of benchmarks for mathematics and multiple choice, by the name of the program or paper that published them.

A prompt alone can move a result by several points, so every evaluation names its prompt, and a prompt that has the name
of a program or paper has its text, letter for letter: `source` names the file and the commit that it was compared with.
Prompts of code are in code_prompts.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinkstack.config import did_you_mean
from thinkstack.types import ConfigError, Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OWN = "thinkstack; no published prompt"
"""Source of prompts that nobody has published."""
SIMPLE_EVALS, LM_EVAL = "openai/simple-evals at ee3b031", "EleutherAI/lm-evaluation-harness at 4e7e0d4"
R1_PAPER = "DeepSeek-R1, arXiv:2501.12948v2"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a task, with fields in braces: {question}, {stripped_question}, and for multiple choice {choices}
    (one line for each), {letters} ("ABCD") and {subject}; for code those of code_prompts.py."""

    text: str
    source: str
    """Where the text was published and compared: repository, file and commit, or the paper."""
    description: str = ""
    """Text before the examples and the question, once; left out if it names the subject and the problem has none."""
    system: str = ""
    """System message; empty: none."""
    with_starter: str = ""
    """Text for problems with starter code; empty: the same."""
    choice: str = "{letter}. {choice}"
    """How a choice is written."""


_PLAIN = Prompt(text="{question}", source="the question alone")
QUESTION_PROMPTS = {"plain": _PLAIN}
MATH_PROMPTS = {
    "plain": _PLAIN,
    "deepseek": Prompt(
        text="{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        source=f"README of deepseek-ai/DeepSeek-R1 at 0cf7856 and {R1_PAPER}, Table 32 (the sentence); README of "
        "deepseek-ai/DeepSeek-Math at b8b0f8c (with the line break)",
    ),
    "deepseek-zh": Prompt(
        text="{question}\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
        source="README of deepseek-ai/DeepSeek-Math at b8b0f8c",
    ),
    "simple-evals": Prompt(
        text="Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{question}\n\nRemember to put "
        'your answer on its own line after "Answer:", and you do not need to use a \\boxed command.',
        source=f"{SIMPLE_EVALS}, math_eval.py",
    ),
    "lm-eval": Prompt(text="Question: {question}\nAnswer:", source=f"{LM_EVAL}, gsm8k.yaml and aime.yaml"),
}
AIME_PROMPTS = MATH_PROMPTS | {
    "lighteval": Prompt(
        text="\nSolve the following math problem efficiently and clearly.  The last line of your response should be of "
        "the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without "
        "quotes) where ANSWER is just the final number or expression that solves the problem. Think step by step "
        "before answering.\n\n{question}\n",
        source="huggingface/lighteval at 3fd1526, tasks/aime.py",
    ),
}
FORMULA_PROMPTS = MATH_PROMPTS | {
    "lm-eval": Prompt(text="Problem: {question}\nAnswer:", source=f"{LM_EVAL}, hendrycks_math_algebra.yaml"),
    "minerva": Prompt(text="Problem:\n{question}\n\nSolution:", source=f"{LM_EVAL}, minerva_math/utils.py"),
    "lighteval": Prompt(
        text="Solve the following problem. The final line of your response MUST be of the following format:\n"
        '"ANSWER: $ANSWER" (without quotes) where $ANSWER is the final answer. Think step by step before answering.\n\n'
        "{question}",
        source="huggingface/lighteval at 3fd1526, tasks/math_500.py",
    ),
}
"""Prompts of MATH, MATH-500 and Minerva."""
MGSM_PROMPTS = MATH_PROMPTS | {
    "simple-evals": Prompt(
        text="Solve this math problem. Give the reasoning steps before giving the final answer on the last line by "
        'itself in the format of "Answer:". Do not add anything other than the integer answer after "Answer:".\n\n'
        "{question}",
        source=f"{SIMPLE_EVALS}, mgsm_eval.py",
    ),
    "simple-evals-zh": Prompt(
        text='解决这个数学问题。在最后一行给出答案前，请提供推理步骤。最后一行应该以 "答案: " 的形式独立给出答案。在 '
        '"答案：" 后不要添加除整数答案之外的任何内容。\n\n{question}',
        source=f"{SIMPLE_EVALS}, mgsm_eval.py",
    ),
}
_MULTIPLE_CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'{word}: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering.\n\n"
    "{question}\n\n{choices}"
)
CHOICE_PROMPTS = {
    "simple-evals": Prompt(
        text=_MULTIPLE_CHOICE.replace("{word}", "Answer"),
        source=f"{SIMPLE_EVALS}, common.py (for MMLU and GPQA)",
        choice="{letter}) {choice}",
    ),
    "zero-eval": Prompt(
        text="\n## Question: \n\n{question}\n\n## Choices:\n\n{choices}\n\n\n## Instruction \n\nPlease answer this "
        "question by first reasoning and then selecting the correct choice. \nPresent your reasoning and solution in "
        "the following json format. \nPlease show your choice in the `answer` field with only the choice letter, "
        'e.g.,`"answer": "C"`.\n\n```json\n{\n    "reasoning": "___",\n    "answer": "___"\n}\n```\n',
        source=f"WildEval/ZeroEval at 8c1485e, src/templates/MCQA.py; R1's for MMLU-Redux ({R1_PAPER}, Table 19)",
        choice="- ({letter}) {choice}",
    ),
    "lm-eval": Prompt(
        description="The following are multiple choice questions (with answers) about {subject}.\n\n",
        text="{stripped_question}\n{choices}\nAnswer:",
        source=f"{LM_EVAL}, mmlu/default",
    ),
    "lm-eval-cloze": Prompt(
        description="The following are questions (with answers) about {subject}.\n\n",
        text="Question: {stripped_question}\nAnswer:",
        source=f"{LM_EVAL}, mmlu/continuation",
    ),
    "smollm2": Prompt(
        description="The following are questions about {subject}.\n",
        text="Question: {question}\nAnswer:",
        source="huggingface/smollm at a041759, text/evaluation/smollm2/tasks.py (MMLU as a cloze)",
    ),
    "boxed": Prompt(
        text="{question}\n\n{choices}\n\nPlease reason step by step, and put your final answer, the letter alone, "
        "within \\boxed{}.",
        source=OWN,
    ),
    "letter": Prompt(text="{question}\n\n{choices}\n\nAnswer with the letter alone.", source=OWN),
}
"""Prompts of MMLU, MMLU-Redux, and your own tasks with choices."""
MMLU_PROMPTS = CHOICE_PROMPTS | {
    "r1-mmlu": Prompt(
        text=_MULTIPLE_CHOICE.replace("{word}", "Answer"),
        source=f"{R1_PAPER}, Table 18, whose line breaks cannot be seen: those of simple-evals",
    )
}
_NOT_MMLU = {
    name: prompt for name, prompt in CHOICE_PROMPTS.items() if name not in ("lm-eval", "lm-eval-cloze", "smollm2")
}
GPQA_PROMPTS = _NOT_MMLU | {
    "r1-gpqa": Prompt(
        text=_MULTIPLE_CHOICE.replace("{word}", "ANSWER"),
        source=f"{R1_PAPER}, Table 29, whose line breaks cannot be seen: those of simple-evals",
        choice="{letter}) {choice}",
    ),
    "lm-eval": Prompt(
        text="What is the correct answer to this question:{question}\nChoices:\n{choices}\nAnswer:",
        source=f"{LM_EVAL}, gpqa/zeroshot",
        choice="({letter}) {choice}",
    ),
}
MMLU_PRO_PROMPTS = _NOT_MMLU | {
    "mmlu-pro": Prompt(
        description="The following are multiple choice questions (with answers) about {subject}. Think step by step "
        "and "
        'then output the answer in the format of "The answer is (X)" at the end.\n\n',
        text="Question: {question}\nOptions: {choices}\nAnswer: Let's think step by step.\n\n",
        source=f"TIGER-AI-Lab/MMLU-Pro at f418b11, evaluate_from_api.py; without examples R1's ({R1_PAPER}, Table 21)",
    ),
    "lm-eval": Prompt(
        description="The following are multiple choice questions (with answers) about {subject}. Think step by step "
        "and "
        'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n',
        text="Question:\n{question}\nOptions:\n{choices}\nAnswer: Let's think step by step.",
        source=f"{LM_EVAL}, mmlu_pro",
    ),
}
_ANSWER_LINE = re.compile(r"^[\W_]*(?:answer|答案)\**\s*[:：]\**[ \t]*(\S[^\n]*)$", re.IGNORECASE | re.MULTILINE)
_ANSWER_FIELD = re.compile(r'"answer"\s*:\s*"([^"]*)"', re.IGNORECASE)
_ANSWER_IS = re.compile(r"answer is:?\s*\**\(?([A-Z])\)?(?!\w)")
_FIELD = re.compile(
    r"\{(question|stripped_question|choices|letters|subject|prompt|tests|code|input|output|starter_code|text)\}"
)


def find_prompt(task: str, prompt: str, prompts: Mapping[str, Prompt]) -> Prompt:
    """Return the prompt of a row: by name, or the row's own text with {question}. Raises ConfigError."""
    if not prompt:
        return next(iter(prompts.values()))
    if prompt in prompts:
        return prompts[prompt]
    if "{question}" not in prompt:
        raise ConfigError(
            f"tasks.{task}.prompt={prompt!r:.60} is not a prompt of {task}{did_you_mean(prompt, prompts)}; or write a "
            "text with {question}"
        )
    return Prompt(text=prompt, source="the recipe")


def fill_prompt(prompt: Prompt, problem: Problem, with_description: bool = True) -> str:
    """Return the text of a prompt; braces in the problem's text have no meaning.

    with_description: False for all but the first of several questions in one prompt.
    """
    choices: Sequence[str] = problem.metadata.get("choices", ())
    shown = (prompt.choice.replace("{letter}", LETTERS[place]) for place in range(len(choices)))
    values = {
        "question": problem.question,
        "stripped_question": problem.question.strip(),
        "choices": "\n".join(line.replace("{choice}", text) for line, text in zip(shown, choices, strict=True)),
        "letters": LETTERS[: len(choices)],
        "subject": str(problem.metadata.get("subject", "")).replace("_", " "),
    }
    text = prompt.with_starter if prompt.with_starter and problem.metadata.get("starter_code") else prompt.text
    if with_description and (values["subject"] or "{subject}" not in prompt.description):
        text = prompt.description + text
    return _FIELD.sub(lambda found: str(values.get(found[1], problem.metadata.get(found[1], ""))), text)


def asks_for_answer_line(prompt: Prompt) -> bool:
    """Whether a prompt asks for a last line "Answer: ..."."""
    return "answer:" in prompt.text.casefold() or "答案:" in prompt.text


def last_answer_line(text: str) -> str | None:
    """Return what follows "Answer:" in the last line that starts with it."""
    found = _ANSWER_LINE.findall(text)
    return found[-1].strip().strip("*").strip() or None if found else None


def stated_letter(prompt: Prompt | None, text: str) -> str | None:
    """Return the answer in the last place where a prompt for multiple choice asks for it: the field "answer" of a JSON
    object, "the answer is (X)", or a line "Answer: X", which counts whatever the prompt."""
    asked = "" if prompt is None else prompt.description + prompt.text
    if '"answer":' in asked and (found := _ANSWER_FIELD.findall(text)):
        return found[-1]
    if "answer is (X)" in asked and (found := _ANSWER_IS.findall(text)):
        return found[-1]
    return last_answer_line(text)
