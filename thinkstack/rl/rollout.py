"""Drawing and scoring the answers of one GRPO step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from thinkstack.evals.runner import Generate, ScoreFunction
from thinkstack.rl.groups import by_group, is_mixed
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.chat import ChatFormat
from thinkstack.types import Message, Problem, Rollout, SamplingParams

log = logging.getLogger(__name__)


class Problems(Protocol):
    """Where problems come from: tasks/table.ProblemStream."""

    def take(self, count: int) -> list[Problem]:
        """The next problems."""


@dataclass
class Counter:
    """Hands out group ids; its value is part of the training state."""

    value: int = 0

    def next(self) -> int:
        """A number never given before."""
        self.value += 1
        return self.value - 1


@dataclass(frozen=True, kw_only=True)
class RolloutStep:
    """What drawing for one step gave."""

    trainable: list[Rollout]
    """Answers to train on."""
    rollouts: list[Rollout]
    """All answers, for statistics and the log."""
    rounds: int
    """How often problems were drawn; more than one when groups without contrast were replaced."""
    too_long: int
    """Problems left out because their prompt does not fit the context."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How a step asks."""

    sampling: SamplingParams
    """n is the group size; the seed is replaced for each group."""
    seed: int
    prompts_per_step: int
    """Groups wanted."""
    dynamic_sampling: bool
    """Replace groups whose answers all earned the same (dynamic sampling, arXiv:2503.14476, section 3.2)."""
    max_rounds: int
    """Most rounds of drawing; then the step makes do with what there is."""
    max_prompt_tokens: int


def collect_rollouts(
    generate: Generate, chat: ChatFormat, score: ScoreFunction, problems: Problems, counter: Counter, cfg: RolloutConfig
) -> RolloutStep:
    """Draw groups of answers until `cfg.prompts_per_step` of them can be trained on."""
    kept: list[Rollout] = []
    drawn: list[Rollout] = []
    missing, rounds, too_long = cfg.prompts_per_step, 0, 0
    while missing and rounds < (cfg.max_rounds if cfg.dynamic_sampling else 1):
        rounds += 1
        asked = [(problem, prompt_of(chat, problem)) for problem in problems.take(missing)]
        fitting = [(problem, prompt) for problem, prompt in asked if len(prompt) <= cfg.max_prompt_tokens]
        too_long += len(asked) - len(fitting)
        fresh = [score_rollout(r, chat, score) for r in draw(generate, fitting, counter, cfg)]
        drawn += fresh
        groups = [group for group in by_group(fresh) if not cfg.dynamic_sampling or is_mixed(group)]
        kept += [rollout for group in groups for rollout in group]
        missing -= len(groups)
    if not kept:
        log.warning("no group of %d rounds had answers of different reward; the step learns nothing", rounds)
    return RolloutStep(trainable=kept, rollouts=drawn, rounds=rounds, too_long=too_long)


def prompt_of(chat: ChatFormat, problem: Problem) -> tuple[int, ...]:
    """The ids that put a problem to the model."""
    return tuple(chat.prompt([Message(role="user", content=problem.question)]))


def draw(
    generate: Generate, asked: Sequence[tuple[Problem, Any]], counter: Counter, cfg: RolloutConfig
) -> list[Rollout]:
    """One group of answers for each problem, unscored."""
    ids = [counter.next() for _ in asked]
    samplings = [replace(cfg.sampling, seed=digest("rollout", cfg.seed, group) % 2**63) for group in ids]
    answers = generate([prompt for _, prompt in asked], samplings)
    return [
        Rollout(problem=problem, group_id=group, prompt_token_ids=prompt, completion=completion)
        for (problem, prompt), group, completions in zip(asked, ids, answers, strict=True)
        for completion in completions
    ]


def score_rollout(rollout: Rollout, chat: ChatFormat, score: ScoreFunction) -> Rollout:
    """The rollout with the score of its text."""
    return replace(rollout, score=score(rollout.problem, chat.text_of(rollout.completion.token_ids)))
