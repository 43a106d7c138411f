"""Evaluation: sample completions for held-out problems and score them with the reward function of training.

All metrics come from one set of samples; greedy evaluation is samples=1 at temperature 0. Prompts use the chat format
of the rollouts, so training and evaluation differ only in the problems.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thinkstack.evals.results import AnswerRecord, Evaluation, ProblemRecord, summarize
from thinkstack.tasks import table
from thinkstack.tasks.benchmarks.datasets import DatasetStream
from thinkstack.tasks.mixture import load_split
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.reward import extract_answer
from thinkstack.tasks.verify.answers import normalize
from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import ThinkingFormat, parse_turn
from thinkstack.types import Completion, ConfigError, Message, Problem, SamplingParams, Score

log = logging.getLogger(__name__)
Generate = Callable[[Sequence[Sequence[int]], Sequence[SamplingParams]], list[list[Completion]]]
"""Interface of Engine.generate: (prompts, sampling parameters) -> n completions for each prompt."""
ScoreFunction = Callable[[Problem, str], Score]
"""Scores one turn; parts["accuracy"] is 1 for a correct answer, parts["format"] is 1 for a well-formed turn."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Problems and sampling parameters of an evaluation."""

    num_problems: int = 200
    """Number of held-out problems of the puzzle tasks together, and of each benchmark."""
    samples: int = 16
    """Number of sampled completions per problem."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy decoding and requires samples=1."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with at least this probability; 1 turns it off."""
    max_tokens: int = 128
    """Maximum tokens per completion; completions that reach it count as truncated."""
    seed: int = 0
    """Seed of the problems and of sampling."""
    tasks: tuple[str, ...]
    """Names of puzzle tasks in tasks/table.py."""
    levels: tuple[int, ...] | None = None
    """Allowed levels; None uses all levels of each task."""
    thinking_format: ThinkingFormat = "think_answer_tags"
    """The expected format of a turn (text/parse.py)."""
    unseen_wordings: bool = False
    """Use the wordings that training never uses."""
    languages: tuple[str, ...] = ()
    """Languages of generated questions; empty uses all languages."""
    files: dict[str, str] = field(default_factory=dict)
    """Folders of benchmarks by name (tasks/table.py); num_problems problems of each are added."""

    def __post_init__(self) -> None:
        if self.num_problems < 1 or self.samples < 1:
            raise ConfigError(f"num_problems={self.num_problems} and samples={self.samples} must be at least 1")
        if not self.tasks and not self.files:
            raise ConfigError("an evaluation needs at least one task or benchmark; set tasks or files")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"samples={self.samples} with temperature=0 gives the same completion every time; use samples=1"
            )


UNREAD_ADVICE: dict[ThinkingFormat, str] = {
    "think_answer_tags": 'set thinking_format = "flexible_extract" for stock models, or "think_then_answer" for R1',
    "think_then_answer": 'set thinking_format = "flexible_extract" to read models that open no think block',
    "flexible_extract": "look at the completions in samples.jsonl: none contains a box, an answer phrase or a number",
}
"""Advice if no answer could be read, by thinking_format."""


def held_out_problems(cfg: EvalConfig) -> list[Problem]:
    """Return the test problems of cfg, deterministically; the training split contains none of them."""
    found: list[Problem] = []
    if cfg.tasks:
        filters = (cfg.levels, cfg.unseen_wordings, cfg.languages)
        found = table.problems(table.puzzle_tasks(cfg.tasks), "test", cfg.seed, cfg.num_problems, *filters)
    for name, folder in cfg.files.items():
        found += DatasetStream(load_split(name, folder, "test"), cfg.seed).take(cfg.num_problems)
    return found


def evaluate(
    engine_generate: Generate,
    chat: ChatFormat,
    problems: Sequence[Problem],
    cfg: EvalConfig,
    score: ScoreFunction,
) -> Evaluation:
    """Sample cfg.samples completions for each problem and compute all metrics.

    problems: from `held_out_problems`, or any other problems; cfg has the sampling parameters. score: the reward
    function of training.
    """
    started = time.perf_counter()
    prompts = [chat.prompt([Message(role="user", content=problem.question)]) for problem in problems]
    completions = engine_generate(prompts, [sampling_params_for(problem, chat, cfg) for problem in problems])
    records = [
        ProblemRecord(
            key=problem.key,
            task=problem.task,
            level=problem.level,
            language=problem.language,
            wording=problem.wording,
            question=problem.question,
            reference=problem.answer,
            answers=tuple(
                grade_completion(problem, completion, chat, score, cfg.thinking_format) for completion in samples
            ),
        )
        for problem, samples in zip(problems, completions, strict=True)
    ]
    chance = {name: table.puzzle_tasks([name])[0].chance for name in cfg.tasks}
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


def sampling_params_for(problem: Problem, chat: ChatFormat, cfg: EvalConfig) -> SamplingParams:
    """Return the sampling parameters for `problem`; the seed depends on the problem, not on its list position."""
    return SamplingParams(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_tokens=cfg.max_tokens,
        stop_token_ids=chat.stop_token_ids,
        seed=digest("evaluation", cfg.seed, problem.key, problem.language, problem.wording),
        n=cfg.samples,
    )


def grade_completion(
    problem: Problem,
    completion: Completion,
    chat: ChatFormat,
    score: ScoreFunction,
    thinking_format: ThinkingFormat = "think_answer_tags",
) -> AnswerRecord:
    """Parse and score one completion. `correct` means accuracy 1, independent of the format.

    A truncated turn is not well-formed, except with thinking_format="think_answer_tags", for which the parser requires
    the closing tag.
    """
    text, is_truncated = chat.text_of(completion.token_ids), completion.finish_reason == "length"
    turn, scored, answer = (
        parse_turn(text, thinking_format),
        score(problem, text),
        extract_answer(problem, text, thinking_format),
    )
    return AnswerRecord(
        text=text,
        answer=None if answer is None else normalize(answer),
        rule=None if answer is None else turn.rule,
        correct=None if scored.unscorable is not None else scored.parts["accuracy"] == 1.0,
        well_formed=turn.is_well_formed and not (is_truncated and thinking_format != "think_answer_tags"),
        worked=is_worked(problem, turn.thinking),
        truncated=is_truncated,
        num_tokens=len(completion.token_ids),
    )


def is_worked(problem: Problem, thinking: str) -> bool:
    """Whether the thinking contains worked steps: at least max(1, level - 1) of its lines contain "=" or ">".

    A worked solution has one step per line, "... = result" or "...>result", and the level is the number of steps. One
    step may be missing, since the last step may be the answer itself; lines without a step do not count.
    """
    steps = sum("=" in line or ">" in line for line in thinking.split("\n"))
    return steps >= max(1, problem.level - 1)
