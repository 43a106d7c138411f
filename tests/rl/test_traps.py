"""Known mistakes of RL trainers that only several parts of the package together can make; docs/algorithms/grpo.md lists
all known ones."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.rl.test_batches import packed, rollout
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.state import load_state
from thinkstack.data import Example, collate
from thinkstack.rl.health import rollout_metrics
from thinkstack.rl.rollout import RolloutStep
from thinkstack.text.chat import chat_format
from thinkstack.train.loss import token_weights
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch, Message

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "grpo.md"
PLAIN = TrainerConfig(dtype="fp32", micro_batch_tokens=64, mtp_weight=0.0, balance_weight=0.0, bias_speed=0.0)


def test_the_page_lists_every_known_mistake_once_with_its_tests():
    """A list that quietly drops its hard entries looks complete."""
    rows = re.findall(r"^\| (.+) \| ((?:`tests/[^`]+`(?:, )?)+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({mistake for mistake, _ in rows}) == len(rows) == 70
    named = [name.split("::") for _, tests in rows for name in re.findall(r"`([^`]+)`", tests)]
    root = PAGE.parents[2]
    assert [n for path, n in named if f"def {n}(" not in (root / path).read_text(encoding="utf-8")] == []


def test_groups_all_right_and_all_wrong_are_counted_apart():
    """One number for both hides whether the problems are too easy or too hard."""
    rollouts = [rollout(0, 1.0), rollout(0, 1.0), rollout(1, 0.0), rollout(1, 0.0), rollout(2, 0.0), rollout(2, 0.0)]
    metrics = rollout_metrics(RolloutStep(rollouts=rollouts, num_rounds=1, num_prompts_too_long=0))
    assert metrics["group/all_high"] == pytest.approx(1 / 3) and metrics["group/all_zero"] == pytest.approx(2 / 3)


def with_tool(inserted: tuple[int, ...]) -> Batch:
    """A prompt of two tokens, two sampled tokens, a tool's reply (not learned), three sampled tokens."""
    ids = (3, 4, 7, 8, *inserted, 9, 10, 1)
    batch = collate([Example(ids, (0, 0, 1, 1, *(0,) * len(inserted), 1, 1, 1))], [[0]], len(ids) - 1)
    sampled = torch.full(batch.ids.shape, -3.0)
    return replace(batch, advantages=batch.loss_mask, rollout_logprobs=sampled, reference_logprobs=sampled)


def test_a_tools_tokens_are_read_but_never_trained():
    """Trained on, a tool's reply teaches the model to invent replies; counted, it shrinks every other token's share."""
    model = tiny_model(GQA_TINY)
    batch = with_tool((20, 21, 22))
    assert batch.loss_mask.sum() == 5 and token_weights(batch, "token").max() == pytest.approx(1 / 5)
    seen = []
    loss = partial(policy_loss, cfg=PolicyLossConfig(kl=0.1))

    def looking(tokens):
        seen.append(tokens)
        return loss(tokens)

    Trainer(tiny_model(GQA_TINY), PLAIN, 1).step(batch, looking, with_entropy=True)
    (tokens,) = seen
    for name in ("logprobs", "entropy", "advantages", "rollout_logprobs", "reference_logprobs"):
        assert getattr(tokens, name).numel() == 5, name
    here, there = (batch_logprobs(model, with_tool(reply), 1.0, 64)[0] for reply in ((20, 21, 22), (30, 31, 32)))
    assert torch.equal(here[:3], there[:3]), "what was drawn before the reply does not know it"
    assert not torch.allclose(here[6:], there[6:], atol=1e-3), "what was drawn after it does"


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
def test_a_completion_beside_padding_and_others_has_the_logprobs_it_has_alone(cfg):
    """Left padding without position ids shifted every rotation. Rows here are padded on the right, positions given."""
    model = tiny_model(cfg)
    made = [rollout(0, 1.0, (5, 9, 1)), rollout(0, 0.0, (6, 7, 8, 9, 10, 1))]
    alone = batch_logprobs(model, packed(made[:1], 1), 1.0, 64)
    together = packed(made, 24)
    found = batch_logprobs(model, together, 1.0, 64)
    assert found.shape == (1, 24)
    mine = found[(together.branches == 1) & (together.loss_mask > 0)]
    torch.testing.assert_close(mine, alone[alone != 0], atol=1e-5, rtol=1e-5)


def test_a_second_turn_is_trained_on_its_sampled_ids():
    """The template leaves earlier thinking out. Rendered again after the fact, the conversation with this answer in it
    has other ids at other places, and old offsets point into other words."""
    chat = chat_format("r1", tiny_tokenizer())
    messages = [
        Message(role="user", content="1+2?"),
        Message(role="assistant", content="3", reasoning="1+2=3"),
        Message(role="user", content="2+2?"),
    ]
    prompt, sampled = tuple(chat.prompt(messages)), tuple(chat.answer("<think>\n2+2=4\n</think>4"))
    again = chat.prompt([*messages, Message(role="assistant", content="4", reasoning="2+2=4"), messages[-1]])
    assert tuple(again[: len(prompt) + len(sampled)]) != prompt + sampled, "encoding again gives other ids"
    batch = packed([rollout(0, 1.0, sampled, prompt_token_ids=prompt)], 8)
    assert batch.targets[batch.loss_mask > 0].tolist() == list(sampled)
    assert batch.ids[0].tolist() == [*prompt, *sampled][:-1]


def test_weights_that_do_not_arrive_stop_the_run(make_bandit, monkeypatch):
    """A peer's bare `except` around the hand-over hid a dead connection: rollouts came from step 0 for days."""
    rl = make_bandit()

    def broken(model, version):
        raise ConnectionError("engine is gone")

    monkeypatch.setattr(rl.engine, "load_weights", broken)
    with pytest.raises(ConnectionError):
        rl.step()
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="completions of weights"):
        rl.step()  # even if somebody swallows it: completions of the old weights are not trained on


def test_a_rollout_ends_without_an_end_token(make_bandit):
    """An engine waiting for an end token that never comes looks like a hang of the trainer."""
    rl = make_bandit(max_tokens=5)
    with torch.no_grad():
        rl.trainer.model.head.weight[1].fill_(0.0)  # the end token is as unlikely as any other
        rl.trainer.model.head.weight[2:].mul_(50.0)
    rl.engine.load_weights(rl.trainer.model, version=0)
    metrics = rl.step()
    assert metrics["rollout/max_tokens"] == 5 and metrics["rollout/truncated"] > 0


def test_the_reference_is_replaced_though_minibatches_step_over_the_mark(make_bandit):
    """With 4 steps a rollout step and a refresh every 3 the count was never a multiple of both before step 12."""
    rl = make_bandit(minibatches=4, reference_steps=3, loss=PolicyLossConfig(kl=0.01))
    rl.step()
    policy = rl.trainer.model.embed.weight.clone()
    rl.step()
    assert torch.equal(rl.reference.embed.weight, policy)


def test_a_resumed_run_restores_the_step_of_its_reference(make_bandit):
    """Refreshed at step 3 and saved at 4, a run that forgets it would refresh again at once and drift from there."""
    given = {"reference_steps": 3, "loss": PolicyLossConfig(kl=0.05)}
    straight, first = make_bandit(name="straight", **given), make_bandit(name="halves", **given)
    for _ in range(4):
        straight.step()
        first.step()
    first.save()
    second = make_bandit(name="halves", **given)
    second.restore(*load_state(second.run.folder / "state"))
    straight.step()
    second.step()
    for mine, theirs in ((straight.reference, second.reference), (straight.trainer.model, second.trainer.model)):
        assert torch.equal(mine.embed.weight, theirs.embed.weight)
