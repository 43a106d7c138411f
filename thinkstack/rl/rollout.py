"""Sampling and scoring of the rollouts of one step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from thinkstack.evals.runner import Generate, ScoreFunction
from thinkstack.rl.groups import by_group, is_mixed
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.chat import ChatFormat
from thinkstack.types import Message, Problem, Rollout, SamplingParams

log = logging.getLogger(__name__)


class Problems(Protocol):
    """A source of training problems, such as tasks/table.ProblemStream."""

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""


@dataclass
class GroupIds:
    """A counter of group ids; `next_id` is part of the training state."""

    next_id: int = 0

    def next(self) -> int:
        """A group id that was not used before."""
        self.next_id += 1
        return self.next_id - 1


@dataclass(frozen=True, kw_only=True)
class RolloutStep:
    """The rollouts of one step."""

    rollouts: list[Rollout]
    """All rollouts, for metrics and the rollout log."""
    trainable: list[Rollout]
    """The rollouts to train on; with dynamic sampling, without zero-variance groups."""
    num_rounds: int
    """Number of sampling rounds; more than one if dynamic sampling replaced zero-variance groups."""
    num_prompts_too_long: int
    """Number of problems skipped because the prompt exceeds the context."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Settings of the rollouts of a step."""

    sampling: SamplingParams
    """Sampling parameters; n is the group size; the seed is replaced for each group."""
    seed: int
    prompts_per_step: int
    """Number of groups per step."""
    dynamic_sampling: bool
    """Replace zero-variance groups, whose completions all have the same reward (arXiv:2503.14476, section 3.2)."""
    max_rounds: int
    """Maximum number of sampling rounds; after them the step trains on the groups found so far."""
    max_prompt_tokens: int


def collect_rollouts(
    generate: Generate,
    chat: ChatFormat,
    score: ScoreFunction,
    problems: Problems,
    group_ids: GroupIds,
    cfg: RolloutConfig,
) -> RolloutStep:
    """Sample and score groups until `cfg.prompts_per_step` groups are trainable, in at most `cfg.max_rounds` rounds."""
    trainable: list[Rollout] = []
    rollouts: list[Rollout] = []
    num_missing, num_rounds, num_prompts_too_long = cfg.prompts_per_step, 0, 0
    while num_missing and num_rounds < (cfg.max_rounds if cfg.dynamic_sampling else 1):
        num_rounds += 1
        prompts = [(problem, encode_prompt(chat, problem)) for problem in problems.take(num_missing)]
        fitting = [(problem, prompt) for problem, prompt in prompts if len(prompt) <= cfg.max_prompt_tokens]
        num_prompts_too_long += len(prompts) - len(fitting)
        sampled = [score_rollout(r, chat, score) for r in sample_groups(generate, fitting, group_ids, cfg)]
        rollouts += sampled
        groups = [group for group in by_group(sampled) if not cfg.dynamic_sampling or is_mixed(group)]
        trainable += [rollout for group in groups for rollout in group]
        num_missing -= len(groups)
    if not trainable:
        log.warning("all groups of %d sampling rounds had zero variance; the step has no training data", num_rounds)
    return RolloutStep(
        rollouts=rollouts, trainable=trainable, num_rounds=num_rounds, num_prompts_too_long=num_prompts_too_long
    )


def encode_prompt(chat: ChatFormat, problem: Problem) -> tuple[int, ...]:
    """The prompt token ids of a problem."""
    return tuple(chat.prompt([Message(role="user", content=problem.question)]))


def sample_groups(
    generate: Generate, prompts: Sequence[tuple[Problem, tuple[int, ...]]], group_ids: GroupIds, cfg: RolloutConfig
) -> list[Rollout]:
    """One group of unscored rollouts for each problem and its prompt token ids."""
    ids = [group_ids.next() for _ in prompts]
    params = [replace(cfg.sampling, seed=digest("rollout", cfg.seed, group_id) % 2**63) for group_id in ids]
    outputs = generate([prompt for _, prompt in prompts], params)
    return [
        Rollout(problem=problem, group_id=group_id, prompt_token_ids=prompt, completion=completion)
        for (problem, prompt), group_id, completions in zip(prompts, ids, outputs, strict=True)
        for completion in completions
    ]


def score_rollout(rollout: Rollout, chat: ChatFormat, score: ScoreFunction) -> Rollout:
    """The rollout with the score of its text."""
    return replace(rollout, score=score(rollout.problem, chat.text_of(rollout.completion.token_ids)))
