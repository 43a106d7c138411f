"""Drawing groups: refill, caps and counts."""

from dataclasses import replace

from tests.rl.bandit import ARMS, ArmChat, ArmStream, arm_config, arm_reward, verify_arm
from thinkstack.rl.rollout import GroupIds, RolloutStep, collect_rollouts
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.types import Completion, Score


def collect(script: "Script", verify=verify_arm, group_ids: GroupIds | None = None, **changes: object) -> RolloutStep:
    """The rollouts of a step of two groups of two."""
    cfg = arm_config(prompts_per_step=2, group_size=2, dynamic_sampling=True, max_rounds=3, max_tokens=2)
    reward, pool = arm_reward(verify), VerifierPool()  # which starts no process: this verifier cannot hang
    return collect_rollouts(
        script, ArmChat(), reward, pool, ArmStream(0), group_ids or GroupIds(), replace(cfg, **changes)
    )


class Script:
    """Answers round by round: "mixed" gives each prompt one right and one wrong answer, "wrong" two wrong ones."""

    def __init__(self, *rounds: str, max_model_len: int = 10):
        self.rounds, self.batch_sizes, self.max_model_len = list(rounds), [], max_model_len

    def generate(self, prompts, samplings):
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
    found = collect(script, group_ids=group_ids)
    assert found.num_rounds == 2 and script.batch_sizes == [2, 2]
    assert sum(r.is_trainable for r in found.rollouts) == 4 and len(found.rollouts) == 8
    assert len({r.group_id for r in found.rollouts}) == 4 == group_ids.next_id


def test_refilling_gives_up_after_max_rounds():
    """A solved task once made the loop sample for ever."""
    found = collect(Script("wrong", "wrong"), max_rounds=2)
    assert found.num_rounds == 2 and len(found.rollouts) == 8
    assert not any(r.is_trainable for r in found.rollouts)


def test_without_refill_every_group_is_kept():
    found = collect(Script("wrong"), dynamic_sampling=False)
    assert found.num_rounds == 1 and [r.is_trainable for r in found.rollouts] == [True] * 4


def test_a_prompt_too_long_for_the_context_is_left_out_and_counted():
    found = collect(Script("mixed", max_model_len=3), dynamic_sampling=False)
    assert found.num_prompts_too_long == 2 and found.rollouts == []


def test_unscorable_completions_do_not_make_a_group_worth_training():
    def broken(problem, response):
        right = verify_arm(problem, response)
        return right if right.total else Score(total=0.0, unscorable="time-out")

    found = collect(Script("mixed"), broken, max_rounds=1)
    assert [r.is_trainable for r in found.rollouts] == [False] * 4
