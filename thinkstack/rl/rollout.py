"""Sampling and scoring of the rollouts of one step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinkstack.evals.runner import Generate
from thinkstack.rl.groups import by_group, is_mixed
from thinkstack.tasks.mixture import Stream
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.reward import Reward, score
from thinkstack.tasks.task import encode_prompt
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import parse_response
from thinkstack.types import Problem, Rollout, SamplingParams

log = logging.getLogger(__name__)


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
    reward: Reward,
    pool: VerifierPool,
    problems: Stream,
    group_ids: GroupIds,
    cfg: RolloutConfig,
) -> RolloutStep:
    """Sample and score groups until `cfg.prompts_per_step` groups are trainable, in at most `cfg.max_rounds` rounds."""
    trainable: list[Rollout] = []
    rollouts: list[Rollout] = []
    num_missing, num_rounds, num_prompts_too_long = cfg.prompts_per_step, 0, 0
    while num_missing and num_rounds < (cfg.max_rounds if cfg.dynamic_sampling else 1):
        num_rounds += 1
        taken = problems.take(num_missing)
        prompts = [(problem, encode_prompt(chat, reward.tasks[problem.task], problem)) for problem in taken]
        fitting = [(problem, prompt) for problem, prompt in prompts if len(prompt) <= cfg.max_prompt_tokens]
        num_prompts_too_long += len(prompts) - len(fitting)
        sampled = score_rollouts(sample_groups(generate, fitting, group_ids, cfg), chat, reward, pool)
        rollouts += sampled
        groups = [group for group in by_group(sampled) if not cfg.dynamic_sampling or is_mixed(group)]
        trainable += [rollout for group in groups for rollout in group]
        num_missing -= len(groups)
    if not trainable:
        log.warning("all groups of %d sampling rounds had zero variance; the step has no training data", num_rounds)
    return RolloutStep(
        rollouts=rollouts, trainable=trainable, num_rounds=num_rounds, num_prompts_too_long=num_prompts_too_long
    )


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


def score_rollouts(rollouts: Sequence[Rollout], chat: ChatFormat, reward: Reward, pool: VerifierPool) -> list[Rollout]:
    """The rollouts with their scores."""
    pairs = [(r.problem, parse_response(chat, r.completion, reward.cfg.thinking_format)) for r in rollouts]
    return [replace(r, score=found) for r, found in zip(rollouts, score(pairs, reward, pool), strict=True)]
