"""Experts chosen by the engine are used again in training."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.rl.bandit import ARMS
from tests.rl.test_batches import rollout
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.checkpoint.state import load_state
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.config import MoEConfig
from thinkstack.models.transformer import Transformer
from thinkstack.rl.batches import pack_rollouts, scatter_tokens
from thinkstack.rl.replay import replay
from thinkstack.rl.rollout_log import tensor_from_dict, tensor_to_dict
from thinkstack.train.balance import moe_layers
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch, ConfigError, SamplingParams

IN_KERNELS = replace(MLA_TINY, moe=replace(MLA_TINY.moe, moe_intermediate_size=16))
"""Wide enough for the compiled kernels, which MLA_TINY is not."""
BANDIT = replace(IN_KERNELS, vocab_size=2 + ARMS, max_positions=64, mtp_layers=0, init_std=0.1)
REPLAY = EngineConfig(max_num_seqs=16, return_routed_experts=True)
PLAIN = TrainerConfig(dtype="fp32", micro_batch_tokens=64, mtp_weight=0.0, balance_weight=0.0, bias_speed=0.0)


def sampled_completions(model: Transformer, max_num_seqs: int = 16) -> list:
    """Groups of completions to three prompts of different length, which meet in prefills and decoding steps."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
    how = [SamplingParams(max_tokens=6 + 5 * index, seed=index, n=4) for index in range(3)]
    answers = Engine(model, replace(REPLAY, max_num_seqs=max_num_seqs)).generate(prompts, how)
    made = []
    for group, (prompt, completions) in enumerate(zip(prompts, answers, strict=True)):
        given = rollout(group, 1.0, (1,), prompt_token_ids=tuple(prompt))
        made += [replace(given, segments=(completion,)) for completion in completions]
    return made


def batch_of(rollouts: list, with_experts: bool = True) -> Batch:
    batch = pack_rollouts(rollouts, range(len(rollouts)), 24, with_experts)
    rows = [[0.5 - index % 2] * len(rollout.token_ids) for index, rollout in enumerate(rollouts)]
    return replace(batch, advantages=scatter_tokens(rows, batch))


def mismatch(model: Transformer, batch: Batch) -> torch.Tensor:
    """Trainer's against engine's log-probabilities of the trained tokens, in nats."""
    found = batch_logprobs(model, batch, 1.0, 64)
    return (found - batch.rollout_logprobs)[batch.loss_mask > 0].abs()


def perturbed(model: Transformer, router: float = 0.0, bias: float = 0.0) -> Transformer:
    """A trainer's model whose routers see something else than the engine's."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in moe_layers(twin):
            layer.router.add_(torch.randn(layer.router.shape, generator=generator), alpha=router)
            layer.bias.add_(torch.randn(layer.bias.shape, generator=generator), alpha=bias)
    return twin


@pytest.mark.parametrize("cfg", [MLA_TINY, IN_KERNELS], ids=["operators", "kernels"])
@pytest.mark.parametrize("max_num_seqs", [4, 16])
def test_replayed_experts_make_engine_and_trainer_agree_for_any_router(cfg, max_num_seqs):
    """A balance bias decides who is chosen and nothing else, so with the choice replayed it changes nothing at all."""
    model = tiny_model(cfg)
    made = sampled_completions(model, max_num_seqs)
    with_experts, without = batch_of(made), batch_of(made, with_experts=False)
    other = perturbed(model, bias=1.0)
    assert mismatch(other, without).max() > 1e-2, "the perturbation sends tokens to other experts"
    assert mismatch(other, with_experts).max() < 1e-5
    assert mismatch(model, with_experts).max() < 1e-5


def test_a_little_noise_in_the_routers_stays_a_little_noise():
    """Rounding that flips a choice changes the output by an expert; with the choice replayed, by a rounding."""
    model = tiny_model(IN_KERNELS)
    made = sampled_completions(model)
    other = perturbed(model, router=0.01)
    free, held = mismatch(other, batch_of(made, with_experts=False)), mismatch(other, batch_of(made))
    assert held.max() < 0.3 * free.max() and held.mean() < 0.5 * free.mean()


def test_the_engine_returns_what_the_model_chooses_for_prompt_and_answer():
    model = tiny_model(MLA_TINY)
    for made in sampled_completions(model):
        ids = torch.tensor([[*made.prompt_token_ids, *made.completion.token_ids[:-1]]])
        expected = torch.stack([layer.experts[0] for layer in model.trunk(ids).routing], 1)
        experts = made.completion.experts
        assert experts.dtype == torch.uint8 and torch.equal(experts.long(), expected)


def test_a_plain_engine_returns_none_and_a_dense_model_is_refused():
    (found,) = Engine(tiny_model(MLA_TINY)).generate([[3]], [SamplingParams(max_tokens=2)])[0]
    assert found.experts is None
    with pytest.raises(ConfigError, match="no experts"):
        Engine(tiny_model(GQA_TINY), REPLAY)


def test_many_experts_take_two_bytes():
    many_experts = MoEConfig(num_experts=258, num_experts_per_tok=2, moe_intermediate_size=4)
    (found,) = Engine(tiny_model(MLA_TINY, moe=many_experts), REPLAY).generate(
        [[3, 4]], [SamplingParams(max_tokens=3)]
    )[0]
    assert found.experts.dtype == torch.int16 and 0 <= int(found.experts.min()) <= int(found.experts.max()) < 258


def test_the_gradient_of_a_replayed_choice_reaches_the_routers():
    """Only the choice is fixed; the weights of the chosen are learned."""
    model = tiny_model(IN_KERNELS)
    batch, seen = batch_of(sampled_completions(model)), {}
    trainer = Trainer(model, PLAIN, 1)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    )
    trainer.step(batch, partial(policy_loss, cfg=PolicyLossConfig()))
    routers = [value for name, value in seen.items() if name.endswith("router") and not name.startswith("mtp")]
    assert len(routers) == 2 and all(float(value.abs().max()) > 0 for value in routers)


def test_replaying_ones_own_choice_is_the_step_without_it():
    ends = []
    for with_experts in (False, True):
        model = tiny_model(IN_KERNELS)
        made = batch_of(sampled_completions(tiny_model(IN_KERNELS)), with_experts)
        Trainer(model, PLAIN, 1).step(made, partial(policy_loss, cfg=PolicyLossConfig()))
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_padding_routes_itself():
    """One expert for all padding would have to compute every padded row of the batch."""
    model, batch = tiny_model(MLA_TINY), batch_of(sampled_completions(tiny_model(MLA_TINY)))
    padding = batch.document_ids == 0
    assert padding.any() and (batch.experts[padding] == -1).all() and (batch.experts[~padding] >= 0).all()
    own = model.trunk(batch.ids, batch.positions, batch.document_ids).routing
    replayed = model.trunk(batch.ids, batch.positions, batch.document_ids, experts=batch.experts).routing
    for free, held in zip(own, replayed, strict=True):
        assert torch.equal(free.experts[padding], held.experts[padding])


@pytest.mark.parametrize("changes", [{}, {"minibatches": 4}, {"loss": PolicyLossConfig(kl=0.05)}])
def test_a_run_with_replay_learns_from_the_engines_experts(make_bandit, changes):
    """Refilled groups, split steps and a KL term included; the biases of the trainer are moved between the two."""
    rl = make_bandit(shape=BANDIT, router_replay=True, **changes)
    rl.trainer.workers.copies[0] = rl.trainer.model = perturbed(rl.trainer.model, bias=1.0)
    sampled, _ = rl.collect_rollouts()
    trained = [index for index, rollout in enumerate(sampled) if rollout.is_trainable]
    batch = rl.with_logprobs(pack_rollouts(sampled, trained, 16, with_experts=True))
    assert mismatch(rl.trainer.model, batch).max() < 1e-5
    if batch.old_logprobs is not None:
        assert (batch.old_logprobs - batch.rollout_logprobs).abs().max() < 1e-5
    assert mismatch(rl.trainer.model, pack_rollouts(sampled, trained, 16)).max() > 1e-4


def test_the_reference_chooses_its_own_experts(make_bandit):
    """It is another model: the engine's choice would make it one that nobody trained."""
    rl = make_bandit(shape=BANDIT, router_replay=True, loss=PolicyLossConfig(kl=0.05))
    rl.reference = perturbed(rl.reference, bias=1.0)
    sampled = rl.collect_rollouts()[0]
    batch = rl.with_logprobs(pack_rollouts(sampled, range(len(sampled)), 16, with_experts=True))
    own = rl.logprobs(rl.reference, replace(batch, experts=None))
    assert torch.equal(batch.reference_logprobs, own)
    assert not torch.equal(own, rl.logprobs(rl.reference, batch))


def test_a_run_with_replay_resumes_bit_for_bit_from_a_rollout_step_on_disk(make_bandit):
    straight = make_bandit(name="straight", shape=BANDIT, router_replay=True)
    halves = make_bandit(name="halves", shape=BANDIT, router_replay=True)
    halves.save()
    sampled = [answer.completion.experts for answer in halves.collect_rollouts()[0]]
    again = make_bandit(name="halves", shape=BANDIT, router_replay=True)
    again.restore(*load_state(again.run.folder / "state"))
    assert all(map(torch.equal, sampled, [answer.completion.experts for answer in again.collect_rollouts()[0]]))
    again.restore(*load_state(again.run.folder / "state"))
    for rl in (straight, again):
        rl.step()
    for name, value in straight.trainer.model.state_dict().items():
        assert torch.equal(value, again.trainer.model.state_dict()[name]), name


def test_a_logged_step_is_replayed_with_its_experts(make_bandit):
    rl = make_bandit(shape=BANDIT, router_replay=True, rollout_steps=1)
    initial = copy.deepcopy(rl.trainer.model)
    rl.step()
    assert replay(rl.run.folder, 1, perturbed(initial, bias=1.0)).max_abs < 1e-5
    rl = make_bandit(name="free", shape=BANDIT, rollout_steps=1)
    rl.step()
    assert replay(rl.run.folder, 1, perturbed(initial, bias=1.0)).max_abs > 1e-4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_experts_on_disk_come_back(dtype):
    experts = torch.arange(24).view(3, 4, 2).to(dtype)
    again = tensor_from_dict(json.loads(json.dumps(tensor_to_dict(experts))))
    assert again.dtype == dtype and torch.equal(again, experts)
