"""A step that was cut off is taken again with the completions and scores that are on the disk."""

import json
from pathlib import Path

import pytest
import torch

from tests.rl.bandit import ArmChat, arm_reward, verify_arm
from tests.rl.test_batches import rollout
from thinkstack.checkpoint.state import load_state
from thinkstack.rl.rollout import GroupIds
from thinkstack.rl.rollout_log import group_from_dict, groups_to_dicts, read_rollouts
from thinkstack.rl.saved_rollouts import load_rollouts, path_of, saved_numbers
from thinkstack.rl.trainer import RLTrainer
from thinkstack.types import Completion, GivenTokens, Problem, Response, Score, TrainingError


class SlowOnce:
    """A verifier that runs out of time on every 20th call of its first `slow` calls, and never again."""

    def __init__(self, slow: int):
        self.calls, self.slow = 0, slow

    def __call__(self, problem: Problem, response: Response) -> Score:
        self.calls += 1
        if self.calls <= self.slow and self.calls % 20 == 0:
            return Score(total=0.0, unscorable="ran longer than 1 s")
        return verify_arm(problem, response)


def weights_of(rl: RLTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in rl.trainer.model.state_dict().items()}


def resumed(make_bandit, name: str, **changes: object) -> RLTrainer:
    rl = make_bandit(name=name, **changes)
    state = load_state(rl.run.folder / "state")
    if state is not None:
        rl.restore(*state)
    return rl


@pytest.mark.parametrize("saved_after", [0, 1, 2])
def test_a_score_that_depended_on_timing_is_reused_after_a_kill(make_bandit, saved_after: int):
    """The verifier times out only the first time it is asked; a run killed after that must not ask it again."""
    straight = make_bandit(name="straight")
    straight.reward = arm_reward(SlowOnce(1000))
    for _ in range(3):
        last = straight.step()
    assert last["rollout/unscorable"] > 0
    killed = make_bandit(name="killed")
    killed.reward = arm_reward(SlowOnce(1000))
    for step in range(1, 4):
        killed.step()
        if step == saved_after:
            killed.save()
    again = resumed(make_bandit, "killed")
    verifier = SlowOnce(0)
    again.reward = arm_reward(verifier)
    while again.trainer.step_count < 3:
        metrics = again.step()
    assert verifier.calls == 0
    timed = {"rollout/tokens_per_second", "time/rollout_seconds", "time/train_seconds"}
    assert {k: v for k, v in metrics.items() if k not in timed} == {k: v for k, v in last.items() if k not in timed}
    expected = weights_of(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(again).items())


def test_without_saved_rollouts_that_score_changes_the_weights(make_bandit):
    straight, other = make_bandit(name="straight"), make_bandit(name="other")
    straight.reward, other.reward = arm_reward(SlowOnce(1000)), arm_reward(SlowOnce(0))
    straight.step()
    other.step()
    expected = weights_of(straight)
    assert not all(torch.equal(value, expected[name]) for name, value in weights_of(other).items())


def test_a_saved_rollout_step_loads_unchanged(make_bandit):
    rl = make_bandit(dynamic_sampling=True)
    rl.reward = arm_reward(SlowOnce(1000))
    rollouts, _ = rl.collect_rollouts()
    assert {r.is_trainable for r in rollouts} == {True, False}, "some groups were replaced"
    stream, group_ids = make_bandit(name="other").stream, GroupIds()
    assert load_rollouts(rl.run.folder, 0, stream, group_ids).rollouts == rollouts
    assert group_ids.next_id == rl.group_ids.next_id and stream.state() == rl.stream.state()
    assert load_rollouts(rl.run.folder, 1, stream, group_ids) is None


def test_saved_rollouts_are_deleted_with_a_saved_state_and_after_an_earlier_step_is_sampled_anew(make_bandit):
    """A rollout step made anew may differ from the one that later rollout steps followed from."""
    rl = make_bandit()
    for _ in range(3):
        rl.step()
    assert saved_numbers(rl.run.folder) == [0, 1, 2]
    path_of(rl.run.folder, 1).unlink()
    resumed(make_bandit, "run").step()
    again = resumed(make_bandit, "run")
    again.step()
    again.step()
    assert saved_numbers(rl.run.folder) == [0, 1]
    again.save()
    assert saved_numbers(rl.run.folder) == []


def test_a_rollout_step_that_failed_the_run_is_scored_again(make_bandit):
    """The run says: fix the verifier, then resume. The scores of the broken one must not come back."""
    rl = make_bandit()
    rl.reward = arm_reward(lambda problem, response: Score(total=0.0, unscorable="verifier died"))
    with pytest.raises(TrainingError, match="fix the verifier, then resume"):
        rl.step()
    repaired = resumed(make_bandit, "run")
    assert repaired.step()["rollout/unscorable"] == 0


def test_without_saved_states_no_rollouts_are_saved(make_bandit):
    rl = make_bandit(save_steps=0)
    rl.step()
    assert saved_numbers(rl.run.folder) == []


def test_a_rollout_step_without_signal_does_not_overwrite_the_step_before(make_bandit):
    """It was written under the number of the last step, whose completions were lost."""
    rl = make_bandit(rollout_steps=1)
    rl.step()
    taught = read_rollouts(rl.run.folder, 1)
    rl.reward = arm_reward(lambda problem, response: Score(total=0.0))
    rl.step()
    assert rl.trainer.step_count == 1 and rl.steps_without_signal == 1
    assert read_rollouts(rl.run.folder, 1) == taught
    assert read_rollouts(rl.run.folder, 2)[0]["completions"][0]["reward"] == 0


def test_the_number_of_steps_without_signal_survives_a_resume(make_bandit, tmp_path: Path):
    """The count began anew, so that a run killed now and then never gave up."""
    rl = make_bandit(name="flat")
    rl.reward = arm_reward(lambda problem, response: Score(total=0.0))
    rl.step()
    rl.step()
    rl.save()
    assert resumed(make_bandit, "flat").steps_without_signal == 2


def test_a_rollout_of_several_segments_comes_back(make_bandit):
    turn = Completion(token_ids=(5, 1), logprobs=(-1.0, -2.0), finish_reason="stop", weights_version=3)
    made = rollout(4, 1.0, segments=(turn, GivenTokens((7, 8)), turn), is_trainable=False)
    (row,) = json.loads(json.dumps(groups_to_dicts([made], {0: 0.5}, ArmChat())))
    assert row["completions"][0]["advantage"] == 0.5 and len(row["completions"][0]["earlier"]) == 2
    assert group_from_dict(row) == [made]
