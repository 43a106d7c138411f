"""Ask a model held-out problems, several times each, and judge the answers with the function training uses.

One pass of samples gives every figure; greedy evaluation is samples=1 at temperature 0. The prompt comes from the chat
format that rollouts use, so training and evaluation differ in nothing but the problems.
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
"""Engine.generate, or anything like it: prompts and samplings to sampling.n completions for each prompt."""
ScoreFunction = Callable[[Problem, str], Score]
"""Judges one turn; parts["accuracy"] says whether the answer is right, parts["format"] whether the form was kept."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is asked, how often, and how answers are drawn."""

    num_problems: int = 200
    """Held-out problems."""
    samples: int = 16
    """Answers drawn per problem."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token, and then one sample says all."""
    top_p: float = 1.0
    """Keeps the smallest set of tokens with at least this probability; 1 keeps all."""
    max_tokens: int = 128
    """Most tokens of an answer; longer ones are cut off and counted as truncated."""
    seed: int = 0
    """Chooses the problems and the draws."""
    tasks: tuple[str, ...]
    """Names of the families asked, in tasks/table.py."""
    levels: tuple[int, ...] | None = None
    """Difficulties asked; None asks all levels of each family."""
    form: ThinkingFormat = "think_answer_tags"
    """How a turn is to look: text/parse.py."""
    unseen_wordings: bool = False
    """Ask in the wordings that training never uses."""
    languages: tuple[str, ...] = ()
    """Languages of generated questions; empty asks in all of them."""
    files: dict[str, str] = field(default_factory=dict)
    """Folders of data sets to ask as many problems of each, too: tasks/table.py."""

    def __post_init__(self) -> None:
        if self.num_problems < 1 or self.samples < 1:
            raise ConfigError(f"num_problems={self.num_problems} and samples={self.samples} must be at least 1")
        if not self.tasks and not self.files:
            raise ConfigError("an evaluation needs at least one task family or data set")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"samples={self.samples} at temperature 0 draws the same answer every time; use samples=1"
            )


WAY_OUT: dict[ThinkingFormat, str] = {
    "think_answer_tags": 'set form = "flexible_extract" to read what stock models write, or "think_then_answer" for R1',
    "think_then_answer": 'set form = "flexible_extract" to read models that open no think block',
    "flexible_extract": "look at the answers in samples.jsonl: no box, mark or number stands in any of them",
}
"""What to do if no answer could be read in a form."""


def held_out(cfg: EvalConfig) -> list[Problem]:
    """The test problems that cfg names: always the same ones, and none that training can draw."""
    found: list[Problem] = []
    if cfg.tasks:
        asked = (cfg.levels, cfg.unseen_wordings, cfg.languages)
        found = table.problems(table.puzzle_tasks(cfg.tasks), "test", cfg.seed, cfg.num_problems, *asked)
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
    """Draw cfg.samples answers to each problem and compute all figures.

    problems: those of `held_out`, or any others; cfg says how answers are drawn. score: the function training uses.
    """
    started = time.perf_counter()
    prompts = [chat.prompt([Message(role="user", content=problem.question)]) for problem in problems]
    completions = engine_generate(prompts, [sampling_of(problem, chat, cfg) for problem in problems])
    records = [
        ProblemRecord(
            key=problem.key,
            task=problem.task,
            level=problem.level,
            language=problem.language,
            wording=problem.wording,
            question=problem.question,
            reference=problem.answer,
            answers=tuple(grade_completion(problem, completion, chat, score, cfg.form) for completion in drawn),
        )
        for problem, drawn in zip(problems, completions, strict=True)
    ]
    chance = {name: table.puzzle_tasks([name])[0].chance for name in cfg.tasks}
    return summarize(records, time.perf_counter() - started, chance)


def warn_if_unread(found: Evaluation, form: ThinkingFormat) -> None:
    """Log a warning, with the way out, if no answer of an evaluation could be read."""
    if found.answer_rate == 0:
        log.warning(
            "none of the %d answers could be read in the form %r, so their accuracy says nothing: either the model has "
            "not learnt it yet, or %s",
            sum(len(record.answers) for record in found.records),
            form,
            WAY_OUT[form],
        )


def sampling_of(problem: Problem, chat: ChatFormat, cfg: EvalConfig) -> SamplingParams:
    """How answers to `problem` are drawn; the seed depends on the problem, not on its place in the list."""
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
    form: ThinkingFormat = "think_answer_tags",
) -> AnswerRecord:
    """Read and judge one answer. Right means accuracy 1: the form is counted beside it, not mixed into it.

    An answer without a closing tag that was cut off does not keep its form.
    """
    text, is_cut = chat.text_of(completion.token_ids), completion.finish_reason == "length"
    turn, verdict, answer = parse_turn(text, form), score(problem, text), extract_answer(problem, text, form)
    return AnswerRecord(
        text=text,
        answer=None if answer is None else normalize(answer),
        rule=None if answer is None else turn.rule,
        correct=None if verdict.unscorable is not None else verdict.parts["accuracy"] == 1.0,
        well_formed=turn.is_well_formed and not (is_cut and form != "think_answer_tags"),
        worked=is_worked(problem, turn.thinking),
        truncated=is_cut,
        num_tokens=len(completion.token_ids),
    )


def is_worked(problem: Problem, thinking: str) -> bool:
    """Whether the thinking works the problem out: at least max(1, level - 1) of its lines hold "=" or ">".

    Every family writes a step as "... = result" or "...>result", one step a line, and a level is a number of steps. One
    step may be missing (a last step left to the answer); remarks without a step do not count.
    """
    steps = sum("=" in line or ">" in line for line in thinking.split("\n"))
    return steps >= max(1, problem.level - 1)
