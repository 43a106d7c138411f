"""A step that was cut off is taken again with the answers and verdicts that are on the disk."""

from pathlib import Path

import pytest
import torch

from tests.rl.bandit import arm_score
from thinkstack.checkpoint.state import load_state
from thinkstack.rl.rollout import Counter
from thinkstack.rl.rollout_log import read_rollouts
from thinkstack.rl.saved_rollouts import load_rollouts, numbers_of, path_of
from thinkstack.rl.trainer import RLTrainer
from thinkstack.types import Problem, Score, TrainingError


class SlowOnce:
    """A checker that runs out of time on every 20th call of its first `slow` calls, and never again."""

    def __init__(self, slow: int):
        self.calls, self.slow = 0, slow

    def __call__(self, problem: Problem, text: str) -> Score:
        self.calls += 1
        if self.calls <= self.slow and self.calls % 20 == 0:
            return Score(total=0.0, unscorable="ran over 1 s")
        return arm_score(problem, text)


def weights_of(zero: RLTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in zero.trainer.model.state_dict().items()}


def resumed(make_bandit, name: str, **changes: object) -> RLTrainer:
    zero = make_bandit(name=name, **changes)
    state = load_state(zero.run.folder / "state")
    if state is not None:
        zero.restore(*state)
    return zero


@pytest.mark.parametrize("saved_after", [0, 1, 2])
def test_a_verdict_of_the_clock_is_replayed_not_judged_again(make_bandit, saved_after: int):
    """The checker times out only the first time it is asked; a run killed after that must not ask it again."""
    straight = make_bandit(name="straight")
    straight.score = SlowOnce(1000)
    for _ in range(3):
        last = straight.step()
    assert last["rollout/unscorable"] > 0
    killed = make_bandit(name="killed")
    killed.score = SlowOnce(1000)
    for step in range(1, 4):
        killed.step()
        if step == saved_after:
            killed.save()
    again = resumed(make_bandit, "killed")
    again.score = judge = SlowOnce(0)
    while again.trainer.step_count < 3:
        metrics = again.step()
    assert judge.calls == 0
    timed = {"rollout/tokens_per_second", "time/rollout_seconds", "time/train_seconds"}
    assert {k: v for k, v in metrics.items() if k not in timed} == {k: v for k, v in last.items() if k not in timed}
    expected = weights_of(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(again).items())


def test_without_the_disk_that_verdict_would_have_changed_the_weights(make_bandit):
    straight, other = make_bandit(name="straight"), make_bandit(name="other")
    straight.score, other.score = SlowOnce(1000), SlowOnce(0)
    straight.step()
    other.step()
    expected = weights_of(straight)
    assert not all(torch.equal(value, expected[name]) for name, value in weights_of(other).items())


def test_a_drawing_comes_back_as_it_was(make_bandit):
    zero = make_bandit(dynamic_sampling=True)
    zero.score = SlowOnce(1000)
    drawn, _ = zero.collect_rollouts()
    assert len(drawn.trainable) < len(drawn.rollouts), "some groups taught nothing and were replaced"
    stream, counter = make_bandit(name="other").stream, Counter()
    assert load_rollouts(zero.run.folder, 0, stream, counter) == drawn
    assert counter.value == zero.counter.value and stream.state() == zero.stream.state()
    assert load_rollouts(zero.run.folder, 1, stream, counter) is None


def test_drawings_of_a_saved_state_are_dropped_and_those_of_another_past_too(make_bandit):
    """A drawing made anew may differ from the one that later drawings followed from."""
    zero = make_bandit()
    for _ in range(3):
        zero.step()
    assert numbers_of(zero.run.folder) == [0, 1, 2]
    path_of(zero.run.folder, 1).unlink()
    resumed(make_bandit, "run").step()
    again = resumed(make_bandit, "run")
    again.step()
    again.step()
    assert numbers_of(zero.run.folder) == [0, 1]
    again.save()
    assert numbers_of(zero.run.folder) == []


def test_a_drawing_that_was_refused_is_judged_again(make_bandit):
    """The run says: repair the checker, then resume. The verdicts of the broken one must not come back."""
    zero = make_bandit()
    zero.score = lambda problem, text: Score(total=0.0, unscorable="checker died")
    with pytest.raises(TrainingError, match="repair the checker, then resume"):
        zero.step()
    repaired = resumed(make_bandit, "run")
    assert repaired.step()["rollout/unscorable"] == 0


def test_without_states_nothing_is_kept(make_bandit):
    zero = make_bandit(save_steps=0)
    zero.step()
    assert numbers_of(zero.run.folder) == []


def test_a_fruitless_drawing_does_not_overwrite_the_step_before(make_bandit):
    """It was written under the number of the last step, whose answers were lost."""
    zero = make_bandit(rollout_steps=1)
    zero.step()
    taught = read_rollouts(zero.run.folder, 1)
    zero.score = lambda problem, text: Score(total=0.0, parts={"accuracy": 0.0, "format": 0.0})
    zero.step()
    assert zero.trainer.step_count == 1 and zero.steps_without_signal == 1
    assert read_rollouts(zero.run.folder, 1) == taught
    assert read_rollouts(zero.run.folder, 2)[0]["answers"][0]["reward"] == 0


def test_how_many_drawings_were_fruitless_survives(make_bandit, tmp_path: Path):
    """The count began anew, so that a run killed now and then never gave up."""
    zero = make_bandit(name="flat")
    zero.score = lambda problem, text: Score(total=0.0, parts={"accuracy": 0.0, "format": 0.0})
    zero.step()
    zero.step()
    zero.save()
    assert resumed(make_bandit, "flat").steps_without_signal == 2
