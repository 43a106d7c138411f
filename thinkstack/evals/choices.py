"""Multiple choice by log-likelihood as records of an evaluation, so that all figures and comparisons apply."""

from collections.abc import Callable, Sequence

from thinkstack.evals.loglikelihood import ChoiceResult, choice_prompt, choose_by_loglikelihood
from thinkstack.evals.protocol import SamplerFacts
from thinkstack.evals.records import LOGLIKELIHOOD, AnswerRecord, ProblemRecord, record_problem
from thinkstack.evals.sampling import prompt_record
from thinkstack.models.transformer import Transformer
from thinkstack.tasks.benchmarks.datasets import DatasetTask
from thinkstack.tasks.benchmarks.prompts import LETTERS, Prompt
from thinkstack.text.chat import ChatFormat
from thinkstack.types import Problem

CHUNK = 8
"""Problems that are computed between two calls of on_finish."""


def choose(
    model: Transformer,
    chat: ChatFormat,
    problems: Sequence[Problem],
    task: DatasetTask,
    on_finish: Callable[[Sequence[ChoiceResult]], None],
) -> None:
    """Compute the log-likelihoods of the choices of problems of one task; on_finish gets each chunk in order."""
    for start in range(0, len(problems), CHUNK):
        part = problems[start : start + CHUNK]
        is_cloze = task.cfg.method == "cloze"
        prompt = _prompt(task)
        on_finish(choose_by_loglikelihood(model, chat.tokenizer, part, is_cloze, task.shots, prompt=prompt))


def _prompt(task: DatasetTask) -> Prompt | None:
    """The prompt that the row of the task names; None: the default of the method."""
    return task.template if task.cfg.prompt else None


def choice_record(
    problem: Problem, found: ChoiceResult, task: DatasetTask, chat: ChatFormat, facts: SamplerFacts
) -> ProblemRecord:
    """Return the record of a question.

    With method="letters" the choice with the highest log-probability counts, with method="cloze" that with the highest
    log-probability per byte; the measures `acc` and `acc_norm` have both.
    """
    is_cloze = task.cfg.method == "cloze"
    context = choice_prompt(problem, is_cloze, task.shots(problem), _prompt(task))
    ids = [*chat.tokenizer.begin_ids, *chat.tokenizer.encode(context)]
    letter = LETTERS[found.chosen_normalized if is_cloze else found.chosen]
    answer = AnswerRecord(
        text=problem.metadata["choices"][LETTERS.index(letter)],
        answer=letter,
        correct=letter == problem.answer,
        well_formed=True,
        truncated=False,
        num_tokens=0,
        measures={"acc": float(found.is_correct), "acc_norm": float(found.is_correct_normalized)},
    )
    return record_problem(problem, [answer], f"{LOGLIKELIHOOD}, {task.cfg.method}", prompt_record(ids, chat, 0), facts)
