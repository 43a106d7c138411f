"""Evaluation: sample completions for held-out problems and score them with the reward function of training.

All metrics come from one set of samples; greedy evaluation is samples=1 at temperature 0. Prompts use the chat format
of the rollouts, so training and evaluation differ only in the problems.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thinkstack.config import Count, Seed, Share, Temperature
from thinkstack.evals.results import AnswerRecord, Evaluation, ProblemRecord, summarize
from thinkstack.tasks.puzzles.generated import alternate
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.reward import Reward, score
from thinkstack.tasks.table import generated_tasks, make_tasks
from thinkstack.tasks.task import Task, TaskConfig, default_tasks, encode_prompt
from thinkstack.tasks.verify.answers import normalize
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import ThinkingFormat, parse_response
from thinkstack.types import Completion, ConfigError, Problem, Response, SamplingParams, Score

log = logging.getLogger(__name__)
Generate = Callable[[Sequence[Sequence[int]], Sequence[SamplingParams]], list[list[Completion]]]
"""Interface of Engine.generate: (prompts, sampling parameters) -> n completions for each prompt."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Problems and sampling parameters of an evaluation."""

    tasks: dict[str, TaskConfig] = field(default_factory=default_tasks)
    """Tasks to evaluate on, by name; the problems are those of the test split."""
    num_problems: Count = 200
    """Number of held-out problems: of the generated tasks together, and of each data set."""
    samples: Count = 16
    """Number of completions sampled per problem."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy decoding and requires samples=1."""
    top_p: Share = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with at least this total probability; 1 is off."""
    max_tokens: Count = 128
    """Maximum number of tokens of a completion; completions that reach it count as truncated."""
    seed: Seed = 0
    """Seed of the problems and of sampling."""

    def __post_init__(self) -> None:
        make_tasks(self.tasks)
        if self.num_problems < 1 or self.samples < 1:
            raise ConfigError(f"num_problems={self.num_problems} and samples={self.samples} must be at least 1")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"samples={self.samples} with temperature=0 gives the same completion every time; use samples=1"
            )


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
    found = alternate(generated, "test", cfg.seed).take(cfg.num_problems) if generated else []
    for task in tasks.values():
        if task not in generated:
            found += task.problems("test", cfg.seed).take(cfg.num_problems)
    return found


def evaluate(
    engine_generate: Generate,
    chat: ChatFormat,
    problems: Sequence[Problem],
    cfg: EvalConfig,
    reward: Reward,
    pool: VerifierPool,
) -> Evaluation:
    """Sample completions for each problem and compute all metrics.

    problems: from `held_out_problems`, or any other problems of the reward's tasks; cfg has the sampling parameters.
    reward: the reward function of training. pool: runs verifiers that may hang.
    """
    started = time.perf_counter()
    tasks = [reward.tasks[problem.task] for problem in problems]
    prompts = [encode_prompt(chat, task, problem) for task, problem in zip(tasks, problems, strict=True)]
    sampling = [sampling_params_for(problem, task, chat, cfg) for task, problem in zip(tasks, problems, strict=True)]
    responses = [
        [parse_response(chat, completion, reward.cfg.thinking_format) for completion in completions]
        for completions in engine_generate(prompts, sampling)
    ]
    pairs = [(problem, one) for problem, samples in zip(problems, responses, strict=True) for one in samples]
    scores = iter(score(pairs, reward, pool))
    records = [
        ProblemRecord(
            key=problem.key,
            task=problem.task,
            level=problem.level,
            language=problem.language,
            wording=problem.wording,
            question=problem.question,
            reference=problem.answer,
            cluster=str(problem.metadata.get("cluster", "")),
            grader=task.grader,
            answers=tuple(record_answer(task, problem, response, next(scores)) for response in samples),
        )
        for task, problem, samples in zip(tasks, problems, responses, strict=True)
    ]
    chance = {name: task.chance for name, task in reward.tasks.items() if task.chance is not None}
    return summarize(records, time.perf_counter() - started, chance)


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


def sampling_params_for(problem: Problem, task: Task, chat: ChatFormat, cfg: EvalConfig) -> SamplingParams:
    """Return the sampling parameters for `problem`; the seed depends on the problem, not on its list position."""
    return SamplingParams(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_tokens=cfg.max_tokens,
        stop_token_ids=chat.stop_token_ids,
        seed=digest("evaluation", cfg.seed, problem.key, problem.language, problem.wording),
        n=cfg.samples if cfg.temperature == 0 else task.num_samples or cfg.samples,
    )


def record_answer(task: Task, problem: Problem, response: Response, found: Score) -> AnswerRecord:
    """Return the record of one response. `correct` means accuracy 1, independent of the format."""
    assert response.completion is not None, "an evaluation samples its responses"
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
        measures=dict(task.measures(problem, response)),
        truncated=response.is_truncated,
        num_tokens=len(response.completion.token_ids),
    )
