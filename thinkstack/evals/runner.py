"""Evaluation: sample completions for held-out problems and score them with the reward function of training.

All metrics come from one set of samples; greedy evaluation is samples=1 at temperature 0. Prompts use the chat format
of the rollouts, so training and evaluation differ only in the problems.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from thinkstack.evals.protocol import SamplerFacts
from thinkstack.evals.records import AnswerRecord, ProblemRecord, record_problem
from thinkstack.evals.results import Evaluation, summarize
from thinkstack.evals.sampling import EvalConfig, Generate, SampledProblem, sample_from_engine
from thinkstack.evals.text_measures import text_measures
from thinkstack.tasks.puzzles.generated import alternate
from thinkstack.tasks.reward import Reward, score
from thinkstack.tasks.table import generated_tasks, make_tasks
from thinkstack.tasks.task import Task
from thinkstack.tasks.verify.answers import normalize
from thinkstack.tasks.verify.pool import VerifierPool, unscorable
from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError, Problem, Response, Score

log = logging.getLogger(__name__)

UNREAD_ADVICE: dict[ThinkingFormat, str] = {
    "think_answer_tags": 'set thinking_format = "flexible_extract" for stock models, or "think_then_answer" for R1',
    "think_then_answer": 'set thinking_format = "flexible_extract" to read models that open no think block',
    "last_number": "look at the completions in samples.jsonl: none contains a number after its thinking",
    "flexible_extract": "look at the completions in samples.jsonl: none contains a box, an answer phrase or a number",
}
"""Advice if no answer could be read, by thinking_format."""


def held_out_problems(cfg: EvalConfig) -> list[Problem]:
    """Return the test problems of cfg, deterministically; the training split contains none of them."""
    tasks = make_tasks(cfg.tasks)
    generated = generated_tasks(tasks)
    if generated and not cfg.num_problems:
        raise ConfigError(f"num_problems=0 asks for all problems, but {generated[0].name} is endless; give a number")
    found = alternate(generated, "test", cfg.seed).take(cfg.num_problems) if generated else []
    for task in tasks.values():
        if task not in generated:
            found += data_problems(task, cfg)
    return found


def data_problems(task: Task, cfg: EvalConfig) -> list[Problem]:
    """Return the test problems of a task that is not generated in turn with others: at most as many as there are."""
    problems = task.problems("test", cfg.seed)
    limit = min((number for number in (task.cfg.num_problems, cfg.num_problems) if number), default=0)
    if problems.size is None and not limit:
        raise ConfigError(f"num_problems=0 asks for all problems, but {task.name} is endless; give a number")
    return problems.take(min(limit or problems.size or 0, problems.size or limit))


def evaluate(
    engine_generate: Generate,
    chat: ChatFormat,
    problems: Sequence[Problem],
    cfg: EvalConfig,
    reward: Reward,
    pool: VerifierPool,
) -> Evaluation:
    """Sample completions for each problem by an engine and compute all metrics.

    problems: from `held_out_problems`, or any other problems of the reward's tasks; cfg has the sampling parameters.
    reward: the reward function of training. pool: runs verifiers that may hang.
    """
    started = time.perf_counter()
    sampled = sample_from_engine(engine_generate, chat, problems, reward.tasks, cfg, reward.cfg.thinking_format)
    records = grade_problems(sampled, reward, pool)
    return summarize(records, time.perf_counter() - started, chances(reward.tasks))


def chances(tasks: Mapping[str, Task]) -> dict[str, float]:
    """Return the probability that a blind guess is correct, of the tasks that know it."""
    return {name: task.chance for name, task in tasks.items() if task.chance is not None}


def grade_problems(
    sampled: Sequence[SampledProblem], reward: Reward, pool: VerifierPool, facts: SamplerFacts | None = None
) -> list[ProblemRecord]:
    """Score all responses and return the records of the problems, in order.

    facts: what sampled the responses. A problem that was not sampled is not scored.
    """
    pairs = [(one.problem, response) for one in sampled if not one.refused for response in one.responses]
    scores = iter(score(pairs, reward, pool))
    return [_record(one, reward.tasks[one.problem.task], scores, facts) for one in sampled]


def _record(one: SampledProblem, task: Task, scores: Iterator[Score], facts: SamplerFacts | None) -> ProblemRecord:
    problem = one.problem
    answers = [
        record_answer(task, problem, response, size, unscorable(one.refused) if one.refused else next(scores))
        for response, size in zip(one.responses, one.num_tokens, strict=True)
    ]
    return record_problem(problem, answers, task.grader, one.prompt, facts)


def warn_if_no_answer_read(found: Evaluation, thinking_format: ThinkingFormat) -> None:
    """Log a warning with advice if no answer of an evaluation could be read."""
    if found.answer_rate == 0:
        log.warning(
            "no answer could be read from %d completions with thinking_format=%r, so the accuracy is meaningless. "
            "Either the model has not learned this format yet, or its format differs: %s",
            sum(len(record.answers) for record in found.records),
            thinking_format,
            UNREAD_ADVICE[thinking_format],
        )


def record_answer(task: Task, problem: Problem, response: Response, num_tokens: int, found: Score) -> AnswerRecord:
    """Return the record of one response. `correct` means accuracy 1, independent of the format."""
    answer = task.read_answer(problem, response)
    return AnswerRecord(
        text=response.text,
        answer=None if answer is None else normalize(answer),
        rule=None if answer is None else response.rule,
        correct=None if found.unscorable is not None else found.parts["accuracy"] == 1.0,
        unscorable=found.unscorable,
        grader=found.grader,
        detail=found.detail,
        well_formed=response.is_well_formed,
        measures=text_measures(problem, response) | dict(task.measures(problem, response)),
        truncated=response.is_truncated,
        num_tokens=num_tokens,
        token_ids=response.completion.token_ids if response.completion else (),
    )
