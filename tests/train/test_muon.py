"""Muon: against torch's own for single matrices, against singular values by hand, and as part of a trainer."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.models.value_head import ValueModel
from thinkstack.train.loss import next_token_loss
from thinkstack.train.muon import COEFFICIENTS, STEPS, MatrixStack, Muon, hidden_matrices, orthogonalize
from thinkstack.train.optim import OptimConfig, make_optimizer
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

MUON = OptimConfig(optimizer="muon", muon_dtype="fp32", learning_rate=0.02, weight_decay=0.1)
CFG = TrainerConfig(dtype="fp32", micro_batch_tokens=64, optim=MUON)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The five quintics on the singular values, in fp64: what the products must come to."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24), (1, 9)])
def test_orthogonalizing_maps_the_singular_values_and_keeps_their_vectors(shape):
    matrices = random_tensor(3, *shape)
    found = orthogonalize(matrices, torch.float32)
    for matrix, mine in zip(matrices, found, strict=True):
        torch.testing.assert_close(mine.double(), by_singular_values(matrix), rtol=1e-4, atol=1e-4)


def test_an_orthogonalized_matrix_is_nearly_orthogonal():
    found = orthogonalize(random_tensor(4, 32, 64), torch.float32)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    assert float(torch.linalg.svdvals(random_tensor(4, 32, 64)).std()) > 10 * float(values.std())


def test_a_matrix_without_gradient_stays_zero_and_disturbs_no_other():
    matrices = random_tensor(2, 8, 8)
    matrices[0] = 0
    found = orthogonalize(matrices, torch.float32)
    assert torch.equal(found[0], torch.zeros(8, 8))
    torch.testing.assert_close(found[1], orthogonalize(matrices[1:], torch.float32)[0])


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_steps_equal_those_of_torch(shape, scale):
    """Torch orthogonalizes in bf16, so the two part by its rounding, at most 2 % of an update here."""
    mine, theirs = (torch.nn.Parameter(random_tensor(*shape)) for _ in range(2))
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    ours = Muon([MatrixStack(mine, 1)], adamw, weight_decay=0.3, momentum=0.9, scale=scale)
    peer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.3, momentum=0.9, adjust_lr_fn=scale)
    for step in range(4):
        before = mine.detach().clone()
        mine.grad = random_tensor(*shape, seed=step)
        theirs.grad = mine.grad.clone()
        ours.step()
        peer.step()
        change = float((mine.detach() - before).norm())
        assert float((mine - theirs).detach().norm()) < 0.02 * change * (step + 1)
    torch.testing.assert_close(ours.state[mine]["momentum_buffer"], peer.state[theirs]["momentum_buffer"])


def test_the_update_of_moonlight_has_a_root_mean_square_of_a_fifth():
    for shape in ((16, 64), (64, 16), (32, 32)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        parameter.grad = random_tensor(*shape)
        Muon([MatrixStack(parameter, 1)], adamw, weight_decay=0.0).step()
        assert 0.15 < float(parameter.detach().square().mean().sqrt()) < 0.22


def test_every_expert_is_a_matrix_of_its_own_with_gate_and_up_apart():
    """A stack of two experts, gate rows then up rows, moves like four matrices alone."""
    stacked, gradient = torch.nn.Parameter(torch.zeros(2, 12, 10)), random_tensor(2, 12, 10)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stacked.grad = gradient
    Muon([MatrixStack(stacked, 2)], adamw, weight_decay=0.0, dtype=torch.float32).step()
    for expert in range(2):
        for rows in (slice(0, 6), slice(6, 12)):
            alone = torch.nn.Parameter(torch.zeros(6, 10))
            alone.grad = gradient[expert, rows].clone()
            Muon([MatrixStack(alone, 1)], adamw, weight_decay=0.0, dtype=torch.float32).step()
            torch.testing.assert_close(stacked[expert, rows], alone)


def test_hidden_matrices_are_those_of_the_blocks_without_routers():
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(stack.parameter)] for stack in hidden_matrices(model)}
    left = {name for name, parameter in model.named_parameters() if parameter.dim() > 1} - found
    assert left == {"embed.weight", "head.weight"} | {name for name in names.values() if name.endswith("router")}
    assert {"layers.0.ffn.w1.weight", "layers.1.ffn.w_in", "mtp.0.merge.weight"} <= found
    pieces = {names[id(stack.parameter)]: stack.pieces for stack in hidden_matrices(model)}
    assert {name for name, count in pieces.items() if count == 2} == {n for n in found if n.endswith("w_in")}


@pytest.mark.parametrize("make", [tiny_model, lambda: ValueModel.from_policy(tiny_model())], ids=["policy", "critic"])
def test_every_parameter_is_in_exactly_one_group(make):
    model = make()
    known = [id(p) for group in make_optimizer(model, MUON).param_groups for p in group["params"]]
    assert sorted(known) == sorted(id(p) for p in model.parameters())


def test_large_batches_of_matrices_are_cut_without_changing_a_step(monkeypatch):
    batch, found = random_batch([9, 8, 7], 16), []
    for elements in (1 << 24, 1):
        monkeypatch.setattr("thinkstack.train.muon.BATCH_ELEMENTS", elements)
        model = tiny_model()
        Trainer(model, CFG, 1).step(batch, next_token_loss)
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_schedule_sets_the_rate_of_both_parts():
    trainer = Trainer(tiny_model(), replace(CFG, optim=replace(MUON, warmup_steps=4)), 8)
    trainer.step(random_batch([9, 8], 16), next_token_loss)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.005}
    assert len(trainer.optimizer.param_groups) == 3


def test_parameters_without_gradient_stay_as_they_are():
    """MTP modules have none where their loss has no weight; a step must not decay what it did not train."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, MUON)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cfg", [MLA_TINY, replace(GQA_TINY, tie_embeddings=True)], ids=["mla", "tied"])
def test_stopped_and_resumed_equals_straight(cfg, dtype, tmp_path):
    chosen = replace(CFG, dtype=dtype, workers=2, micro_batch_tokens=16, optim=replace(MUON, muon_dtype=dtype))

    def advance(trainer: Trainer, first: int, last: int) -> None:
        for seed in range(first, last):
            trainer.step(random_batch([9, 5, 12, 3], 16, seed=seed), next_token_loss)

    straight, stopped = (Trainer(tiny_model(cfg), chosen, 4) for _ in range(2))
    advance(straight, 0, 4)
    advance(stopped, 0, 2)
    tensors, numbers = trainer_state(stopped)
    assert any(".momentum_buffer." in name for name in tensors) and any(".exp_avg." in name for name in tensors)
    save_file(tensors, tmp_path / "state.safetensors")
    resumed = Trainer(tiny_model(cfg, seed=5), chosen, 4)
    restore_trainer(resumed, load_file(tmp_path / "state.safetensors"), numbers)
    advance(resumed, 2, 4)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_small_corpus_is_memorized():
    trainer, batch = Trainer(tiny_model(), CFG, 40), random_batch([9, 8, 7], 16)
    losses = [trainer.step(batch, next_token_loss)["loss/next_token_nats"] for _ in range(40)]
    assert losses[0] > 3.5
    assert losses[-1] < 0.1


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_that_never_forgets_is_refused(momentum):
    with pytest.raises(ConfigError, match="momentum"):
        OptimConfig(optimizer="muon", momentum=momentum)
