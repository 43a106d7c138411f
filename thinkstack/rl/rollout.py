"""Sampling and scoring of the rollouts of one step."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinkstack.engine.interface import AnyEngine
from thinkstack.rl.config import RLConfig
from thinkstack.tasks.mixture import Stream
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.reward import Reward, score
from thinkstack.tasks.task import encode_prompt
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.chat import ChatFormat
from thinkstack.text.parse import parse_response
from thinkstack.types import Problem, Rollout, SamplingParams

log = logging.getLogger(__name__)

REWARD_TOLERANCE = 1e-6
"""Rewards that differ from their mean by at most this count as equal."""


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
    num_rounds: int
    """Number of sampling rounds; more than one if dynamic sampling replaced zero-variance groups."""
    num_prompts_too_long: int
    """Number of problems skipped because the prompt exceeds the context."""


def collect_rollouts(
    engine: AnyEngine,
    chat: ChatFormat,
    reward: Reward,
    pool: VerifierPool,
    problems: Stream,
    group_ids: GroupIds,
    cfg: RLConfig,
) -> RolloutStep:
    """Sample and score groups of cfg.group_size rollouts until cfg.prompts_per_step groups are trainable.

    With cfg.dynamic_sampling, zero-variance groups are replaced in at most cfg.max_rounds rounds (arXiv:2503.14476,
    section 3.2); after them the step has the groups found so far.
    """
    rollouts: list[Rollout] = []
    num_missing, num_rounds, num_prompts_too_long = cfg.prompts_per_step, 0, 0
    while num_missing and num_rounds < (cfg.max_rounds if cfg.dynamic_sampling else 1):
        num_rounds += 1
        taken = problems.take(num_missing)
        prompts = [(problem, encode_prompt(chat, reward.tasks[problem.task], problem)) for problem in taken]
        fitting = [
            (problem, prompt) for problem, prompt in prompts if len(prompt) + cfg.max_tokens <= engine.max_model_len
        ]
        num_prompts_too_long += len(prompts) - len(fitting)
        sampled = score_rollouts(sample_groups(engine, chat, fitting, group_ids, cfg), chat, reward, pool)
        for group in by_group(sampled):
            is_trainable = not cfg.dynamic_sampling or is_mixed(group)
            rollouts += [replace(rollout, is_trainable=is_trainable) for rollout in group]
            num_missing -= is_trainable
    if not any(rollout.is_trainable for rollout in rollouts):
        log.warning("all groups of %d sampling rounds had zero variance; the step has no training data", num_rounds)
    return RolloutStep(rollouts=rollouts, num_rounds=num_rounds, num_prompts_too_long=num_prompts_too_long)


def sample_groups(
    engine: AnyEngine,
    chat: ChatFormat,
    prompts: Sequence[tuple[Problem, tuple[int, ...]]],
    group_ids: GroupIds,
    cfg: RLConfig,
) -> list[Rollout]:
    """One group of unscored rollouts for each problem and its prompt token ids."""
    sampling = SamplingParams(
        temperature=cfg.loss.temperature,
        max_tokens=cfg.max_tokens,
        stop_token_ids=chat.stop_token_ids,
        n=cfg.group_size,
    )
    ids = [group_ids.next() for _ in prompts]
    params = [replace(sampling, seed=digest("rollout", cfg.seed, group_id) % 2**63) for group_id in ids]
    outputs = engine.generate([prompt for _, prompt in prompts], params)
    return [
        Rollout(problem=problem, group_id=group_id, prompt_token_ids=prompt, segments=(completion,))
        for (problem, prompt), group_id, completions in zip(prompts, ids, outputs, strict=True)
        for completion in completions
    ]


def score_rollouts(rollouts: Sequence[Rollout], chat: ChatFormat, reward: Reward, pool: VerifierPool) -> list[Rollout]:
    """The rollouts with their scores."""
    pairs = [(r.problem, parse_response(chat, r.completion, reward.cfg.thinking_format)) for r in rollouts]
    return [replace(r, score=found) for r, found in zip(rollouts, score(pairs, reward, pool), strict=True)]


def by_group(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts of each group id, in the order in which the ids first appear."""
    groups: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.group_id].append(rollout)
    return list(groups.values())


def is_mixed(group: Sequence[Rollout]) -> bool:
    """Whether the scored rollouts of a group have different rewards (not a zero-variance group)."""
    rewards = [rollout.reward for rollout in group if rollout.reward is not None]
    return bool(rewards) and max(rewards) - min(rewards) > REWARD_TOLERANCE
