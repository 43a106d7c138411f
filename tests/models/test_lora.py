"""Low-rank adapters: initially zero, the only trained parameters, merged without changing the base."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.lora import LoRAConfig, adapt, adapters, adapters_off, merge_adapters, merged_tensors
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.train.loss import next_token_loss
from thinkstack.train.optim import OptimConfig
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError, SamplingParams

IN_KERNELS = replace(MLA_TINY, moe=replace(MLA_TINY.moe, moe_intermediate_size=16))
ALL = LoRAConfig(rank=4, targets=("attention", "feed_forward", "experts"))
PLAIN = TrainerConfig(
    dtype="fp32", micro_batch_tokens=32, mtp_weight=0.0, balance_weight=0.0, bias_speed=0.0, lora=ALL,
    optim=OptimConfig(learning_rate=1e-2),
)  # fmt: skip
EVERY = pytest.mark.parametrize("cfg", [MLA_TINY, IN_KERNELS, GQA_TINY], ids=["mla", "kernels", "gqa"])
LENGTHS = [9, 5, 12, 3, 11, 7, 4, 8]


def logprobs(model: Transformer) -> torch.Tensor:
    return batch_logprobs(model, random_batch(LENGTHS, 16), 1.0, 64)


def trained(cfg=MLA_TINY, steps: int = 3, settings: TrainerConfig = PLAIN) -> Trainer:
    trainer = Trainer(tiny_model(cfg), settings, 10)
    for step in range(steps):
        trainer.step(random_batch(LENGTHS, 16, seed=step), next_token_loss)
    return trainer


@EVERY
def test_zero_adapters_change_no_bit_so_the_first_ratio_is_one(cfg):
    plain, model = tiny_model(cfg), tiny_model(cfg)
    before = logprobs(plain)
    adapt(model, ALL)
    assert torch.equal(logprobs(model), before) and torch.equal(logprobs(merge_adapters(model)), before)


@EVERY
def test_the_engine_samples_from_base_and_adapters(cfg):
    """The engine merges adapters, the trainer adds their output; both give the same log-probabilities."""
    trainer = trained(cfg)
    engine = Engine(tiny_model(cfg), EngineConfig(max_num_seqs=16))
    engine.load_weights(trainer.weights(), version=3)
    prompt = [3, 1, 4, 1]
    for found in engine.generate([prompt], [SamplingParams(max_tokens=12, n=4)])[0]:
        ids = torch.tensor([[*prompt, *found.token_ids]])
        with torch.enable_grad():  # the path of training, not the merged matrices of inference
            logits = trainer.model(ids[:, :-1])[0, len(prompt) - 1 :]
        expected = torch.log_softmax(logits.detach(), -1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=1e-4, rtol=0)
    assert (logprobs(trainer.model) - logprobs(tiny_model(cfg))).abs().max() > 1e-2, "nothing was trained"


@EVERY
def test_merging_again_and_again_never_touches_the_base(cfg):
    """Merging in place and subtracting again would round the base at every step."""
    start, trainer = tiny_model(cfg), Trainer(tiny_model(cfg), PLAIN, 10)
    engine = Engine(trainer.model)
    for step in range(4):
        trainer.step(random_batch(LENGTHS, 16, seed=step), next_token_loss)
        engine.load_weights(trainer.weights(), version=step + 1)
        now = merge_adapters(trainer.model).state_dict()
        assert all(torch.equal(value, now[name]) for name, value in engine.runner._model.state_dict().items())
    with adapters_off(trainer.model) as base:
        assert torch.equal(logprobs(base), logprobs(start))
        assert all(torch.equal(value, start.state_dict()[name]) for name, value in merged_tensors(base))
    with torch.no_grad():
        for adapter in adapters(trainer.model).values():
            adapter.lora_b.zero_()
    engine.load_weights(trainer.weights(), version=5)
    assert all(
        torch.equal(value, start.state_dict()[name]) for name, value in engine.runner._model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("cfg", "settings"),
    [
        (MLA_TINY, PLAIN),
        (GQA_TINY, PLAIN),
        (IN_KERNELS, replace(PLAIN, dtype="bf16")),
        (IN_KERNELS, replace(PLAIN, workers=2)),
    ],
    ids=["mla", "gqa", "bf16", "workers"],
)
def test_only_adapters_change_and_only_they_have_optimizer_state(cfg, settings):
    start, trainer = tiny_model(cfg), trained(cfg, settings=settings)
    mine = [p for adapter in adapters(trainer.model).values() for p in adapter.parameters()]
    assert {id(p) for p in trainer.optimizer.state} == {id(p) for p in mine}
    assert {id(p) for p in trainer.model.parameters() if p.requires_grad} == {id(p) for p in mine}
    assert all(bool(adapter.lora_b.any()) for adapter in adapters(trainer.model).values())
    with adapters_off(trainer.model) as base:
        assert all(torch.equal(value, start.state_dict()[name]) for name, value in merged_tensors(base))


def test_gradients_are_those_of_the_merged_matrix():
    """dW of the whole matrix, projected: dB = s dW A^T, dA = s B^T dW; also for experts, with gate and up separate."""
    settings = replace(PLAIN, optim=OptimConfig(learning_rate=1e-2, clip_norm=1e9))
    model = trained(settings=settings).model
    copied, batch = merge_adapters(model), random_batch(LENGTHS, 16)
    for found in (model, copied):
        logits = found(batch.ids, batch.positions, batch.document_ids)
        F.cross_entropy(logits[batch.loss_mask > 0], batch.targets[batch.loss_mask > 0]).backward()
    parameters = dict(copied.named_parameters())
    for name, adapter in adapters(model).items():
        a, b = adapter.lora_a, adapter.lora_b
        grad = parameters[name].grad.view(*b.shape[:-1], a.shape[-1])
        torch.testing.assert_close(b.grad, adapter.scale * grad @ a.mT, atol=1e-5, rtol=1e-3, msg=name)
        torch.testing.assert_close(a.grad, adapter.scale * b.mT @ grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("attention",), 3 * 5), (("feed_forward",), 3 + 2 * 3), (("experts",), 2 * 2)],
)
def test_targets_name_what_is_adapted(targets, count):
    model = tiny_model()
    adapt(model, LoRAConfig(rank=2, targets=targets))
    assert len(adapters(model)) == count
    assert not any(name.startswith("mtp") for name in adapters(model))
    assert not any(isinstance(m, MoE) and m.adapters for m in model.modules()) or targets == ("experts",)


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    assert LoRAConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoRAConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


def test_initial_adapters_depend_on_the_seed_only():
    found = []
    for seed in (0, 0, 1):
        model = tiny_model()
        adapt(model, replace(ALL, seed=seed))
        found.append(adapters(model)["layers.0.attention.wo.weight"].lora_a)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert float(found[0].detach().abs().max()) <= found[0].shape[-1] ** -0.5


def test_a_run_with_adapters_resumes_bit_for_bit_and_its_state_is_small():
    straight, first = trained(steps=4), trained(steps=2)
    tensors, numbers = trainer_state(first)
    tensors = {name: value.clone() for name, value in tensors.items()}
    assert not any(".base." in name or name == "model.embed.weight" for name in tensors)
    second = Trainer(tiny_model(), PLAIN, 10)
    restore_trainer(second, tensors, numbers)
    for step in (2, 3):
        second.step(random_batch(LENGTHS, 16, seed=step), next_token_loss)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_activation_checkpointing_changes_no_bit():
    plain, checkpointed = trained(IN_KERNELS), trained(IN_KERNELS, settings=replace(PLAIN, checkpoint_layers=True))
    assert torch.equal(logprobs(plain.model), logprobs(checkpointed.model))


def test_adapters_learn():
    trainer, batch = Trainer(tiny_model(), PLAIN, 60), random_batch(LENGTHS, 16)
    losses = [trainer.step(batch, next_token_loss)["loss/next_token_nats"] for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def test_a_merged_model_is_a_plain_one():
    model = trained().model
    plain, copied = tiny_model(), merge_adapters(model)
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert merge_adapters(plain) is plain
    torch.testing.assert_close(logprobs(copied), logprobs(model), atol=1e-5, rtol=1e-5)
    assert copy.deepcopy(copied).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(LoRAConfig, rank=-1), "rank=-1"),
        (partial(LoRAConfig, rank=2, alpha=0.0), "alpha=0.0"),
        (partial(LoRAConfig, rank=2, targets=()), "adapts nothing"),
        (partial(TrainerConfig, lora=ALL), "bias_speed=0.001"),
        (partial(adapt, tiny_model(GQA_TINY), LoRAConfig(rank=2, targets=("experts",))), "matches no parameter"),
    ],
)
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
