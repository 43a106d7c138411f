"""Drawing groups: refill, caps and counts."""

from tests.rl.bandit import ARMS, ArmChat, ArmStream, arm_reward, verify_arm
from thinkstack.rl.rollout import GroupIds, RolloutConfig, collect_rollouts
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.types import Completion, SamplingParams, Score

POOL = VerifierPool()
"""Starts no process: the bandit's verifier cannot hang."""


def rollout_config(**changes: object) -> RolloutConfig:
    settings: dict[str, object] = {
        "sampling": SamplingParams(n=2, max_tokens=2),
        "seed": 0,
        "prompts_per_step": 2,
        "dynamic_sampling": True,
        "max_rounds": 3,
        "max_prompt_tokens": 8,
    }
    return RolloutConfig(**(settings | changes))  # type: ignore[arg-type]


class Script:
    """Answers round by round: "mixed" gives each prompt one right and one wrong answer, "wrong" two wrong ones."""

    def __init__(self, *rounds: str):
        self.rounds, self.batch_sizes = list(rounds), []

    def __call__(self, prompts, samplings):
        kind = self.rounds.pop(0)
        self.batch_sizes.append(len(prompts))
        right = ArmStream(0).right
        out = []
        for prompt in prompts:
            good, bad = right[prompt[1] - 2], (right[prompt[1] - 2] + 1) % ARMS
            digits = [good, bad] if kind == "mixed" else [bad, bad]
            out.append(
                [
                    Completion(token_ids=(2 + d, 1), logprobs=(-1.0, -1.0), finish_reason="stop", weights_version=0)
                    for d in digits
                ]
            )
        return out


def test_groups_without_contrast_are_replaced_up_to_prompts_per_step():
    """Filtering without refilling let the batch shrink as the model got better."""
    script, group_ids = Script("wrong", "mixed"), GroupIds()
    found = collect_rollouts(script, ArmChat(), arm_reward(), POOL, ArmStream(0), group_ids, rollout_config())
    assert found.num_rounds == 2 and script.batch_sizes == [2, 2]
    assert len(found.trainable) == 4 and len(found.rollouts) == 8
    assert len({r.group_id for r in found.rollouts}) == 4 == group_ids.next_id


def test_refilling_gives_up_after_max_rounds():
    """A solved task once made the loop sample for ever."""
    found = collect_rollouts(
        Script("wrong", "wrong"), ArmChat(), arm_reward(), POOL, ArmStream(0), GroupIds(), rollout_config(max_rounds=2)
    )
    assert found.num_rounds == 2 and found.trainable == [] and len(found.rollouts) == 8


def test_without_refill_every_group_is_kept():
    found = collect_rollouts(
        Script("wrong"), ArmChat(), arm_reward(), POOL, ArmStream(0), GroupIds(), rollout_config(dynamic_sampling=False)
    )
    assert found.num_rounds == 1 and len(found.trainable) == 4


def test_a_prompt_too_long_for_the_context_is_left_out_and_counted():
    found = collect_rollouts(
        Script("mixed"),
        ArmChat(),
        arm_reward(),
        POOL,
        ArmStream(0),
        GroupIds(),
        rollout_config(dynamic_sampling=False, max_prompt_tokens=1),
    )
    assert found.num_prompts_too_long == 2 and found.rollouts == []


def test_unscorable_completions_do_not_make_a_group_worth_training():
    def broken(problem, response):
        right = verify_arm(problem, response)
        return right if right.total else Score(total=0.0, unscorable="time-out")

    reward = arm_reward(broken)
    found = collect_rollouts(
        Script("mixed"), ArmChat(), reward, POOL, ArmStream(0), GroupIds(), rollout_config(max_rounds=1)
    )
    assert found.trainable == [] and len(found.rollouts) == 4
