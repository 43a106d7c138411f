"""Prompts of benchmarks in the wording of a program or paper, by its name.

The wordings are not yet compared with the originals letter by letter: a result with them is not the published
prompt's.

A prompt alone can move a result by several points, so every evaluation names its prompt. Templates have {question},
and for multiple choice {choices} (one line for each, by the style of the prompt), {letters} ("ABCD") and {subject}.
"""

import re
from collections.abc import Mapping, Sequence

from thinkstack.config import did_you_mean
from thinkstack.types import ConfigError, Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION_PROMPTS = {"plain": "{question}"}
MATH_PROMPTS = {
    "plain": "{question}",
    "deepseek": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "deepseek-zh": "{question}\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
    "simple-evals": (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{question}\n\nRemember to put your "
        'answer on its own line after "Answer:", and you do not need to use a \\boxed command.'
    ),
    "lm-eval": "Question: {question}\nAnswer:",
    "minerva": "Problem:\n{question}\n\nSolution:",
}
"""deepseek: the recommendation of DeepSeek-R1's model card; deepseek-zh: that of DeepSeekMath. minerva: lm-eval's
minerva_math and hendrycks_math without examples."""
MGSM_PROMPTS = MATH_PROMPTS | {
    "simple-evals": (
        "Solve this math problem. Give the reasoning steps before giving the final answer on the last line by itself "
        'in the format of "Answer:". Do not add anything other than the integer answer after "Answer:".\n\n{question}'
    ),
    "simple-evals-zh": (
        '解决这个数学问题。在最后一行给出答案前，请提供推理步骤。最后一行应该以 "答案:" 的形式独立给出答案。在 '
        '"答案:" 后不要添加除整数答案以外的任何内容。\n\n{question}'
    ),
}
CHOICE_PROMPTS = {
    "simple-evals": (
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before "
        "answering.\n\n{question}\n\n{choices}"
    ),
    "deepseek": (
        "{question}\n\n{choices}\n\nPlease reason step by step, and put your final answer, the letter alone, within "
        "\\boxed{}."
    ),
    "lm-eval": "{question}\n{choices}\nAnswer:",
    "letter": "{question}\n\n{choices}\n\nAnswer with the letter alone.",
}
"""simple-evals: also the prompt of DeepSeek-R1's tables of MMLU and GPQA."""
CHOICE_STYLES = {"simple-evals": "{letter}) {choice}"}
"""How a prompt writes a choice, where it is not "A. choice"."""
_ANSWER_LINE = re.compile(r"^[\W_]*(?:answer|答案)\**\s*[:：]\**[ \t]*(\S[^\n]*)$", re.IGNORECASE | re.MULTILINE)
_FIELD = re.compile(r"\{(question|choices|letters|subject)\}")


def find_prompt(task: str, prompt: str, prompts: Mapping[str, str]) -> str:
    """Return the template of a row's `prompt`: by name, or itself if it has {question}. Raises ConfigError."""
    if not prompt:
        return next(iter(prompts.values()))
    if prompt in prompts:
        return prompts[prompt]
    if "{question}" not in prompt:
        raise ConfigError(
            f"tasks.{task}.prompt={prompt!r:.60} is not a prompt of {task}{did_you_mean(prompt, prompts)}; or write a "
            "text with {question}"
        )
    return prompt


def fill_prompt(template: str, problem: Problem) -> str:
    """Return the text of a prompt; braces in the problem's text have no meaning."""
    choices: Sequence[str] = problem.metadata.get("choices", ())
    style = next(
        (CHOICE_STYLES[name] for name in CHOICE_STYLES if CHOICE_PROMPTS[name] == template), "{letter}. {choice}"
    )
    shown = (style.replace("{letter}", LETTERS[place]) for place in range(len(choices)))
    values = {
        "question": problem.question,
        "choices": "\n".join(line.replace("{choice}", text) for line, text in zip(shown, choices, strict=True)),
        "letters": LETTERS[: len(choices)],
        "subject": str(problem.metadata.get("subject", "")).replace("_", " "),
    }
    return _FIELD.sub(lambda found: values[found[1]], template)


def asks_for_answer_line(template: str) -> bool:
    """Whether a prompt asks for a last line "Answer: ..."."""
    return "Answer:" in template or "答案:" in template


def last_answer_line(text: str) -> str | None:
    """Return what follows "Answer:" in the last line that starts with it."""
    found = _ANSWER_LINE.findall(text)
    return found[-1].strip().strip("*").strip() or None if found else None
