"""Keeping experts even: hand-worked loads, losses and bias steps."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import MLA_TINY, random_batch, tiny_model
from thinkstack.models.moe import MoE, Routing
from thinkstack.train.balance import expert_counts, max_violation, moe_layers, sequence_balance_loss, update_bias


def routed(scores: list[list[list[float]]], experts: list[list[list[int]]]) -> Routing:
    return Routing(torch.tensor(scores), torch.tensor(experts))


def test_counts_leave_out_padding():
    routing = routed([[[0.5, 0.5, 0.5]] * 3], [[[0, 1], [0, 2], [0, 1]]])
    assert expert_counts(routing, torch.tensor([[True, True, False]])).tolist() == [2, 1, 1]


def test_the_balance_loss_of_a_worked_row():
    """V3 report, equations 17-20: E = 2, K = 1, both tokens choose expert 0: f = (2, 0), P = (0.7, 0.3)."""
    routing = routed([[[0.6, 0.2], [0.65, 0.35]]], [[[0], [0]]])
    loss = sequence_balance_loss(routing, torch.tensor([[True, True]]))
    assert loss.item() == pytest.approx(2 * (2 * (0.75 + 0.65) / 2))


def test_even_use_costs_one_per_token():
    routing = routed([[[0.5, 0.5], [0.5, 0.5]]], [[[0], [1]]])
    assert sequence_balance_loss(routing, torch.tensor([[True, True]])).item() == pytest.approx(2.0)


def test_padding_changes_no_balance_loss():
    row = routed([[[0.6, 0.2], [0.65, 0.35], [0.1, 0.9]]], [[[0], [0], [1]]])
    short = Routing(row.scores[:, :2], row.experts[:, :2])
    padded = sequence_balance_loss(row, torch.tensor([[True, True, False]]))
    assert padded.item() == pytest.approx(sequence_balance_loss(short, torch.tensor([[True, True]])).item())


def test_rows_are_balanced_one_by_one():
    """Two rows that lean opposite ways cost as much as each alone; only a batch-wise loss would call them even."""
    one = routed([[[0.9, 0.1]]], [[[0]]])
    two = routed([[[0.9, 0.1]], [[0.1, 0.9]]], [[[0]], [[1]]])
    real = torch.ones(2, 1, dtype=torch.bool)
    single = sequence_balance_loss(one, real[:1]).item()
    assert sequence_balance_loss(two, real).item() == pytest.approx(2 * single)


def test_the_gradient_of_the_balance_loss_reaches_the_router():
    """It once went through the detached frequencies only, and trained nothing (Automodel#1408)."""
    model, batch = tiny_model(), random_batch([12, 9], 16)
    routing = model.trunk(batch.ids, batch.positions, batch.document_ids).routing[0]
    sequence_balance_loss(routing, batch.document_ids > 0).backward()
    assert float(model.layers[1].ffn.router.grad.abs().sum()) > 0


def test_layers_with_experts_are_listed_in_the_order_of_their_routings():
    """The MTP module's experts are counted as well, last."""
    model, batch = tiny_model(), random_batch([12], 12)
    trunk = model.trunk(batch.ids)
    _, ahead = model.mtp_hidden_states(trunk, batch.ids)
    layers = moe_layers(model)
    assert layers == [model.layers[1].ffn, model.layers[2].ffn, model.mtp[0].block.ffn]
    assert len(trunk.routing) + len(ahead) == len(layers)


def test_bias_rises_for_the_idle_and_falls_for_the_busy():
    layer = MoE(replace(MLA_TINY, moe=replace(MLA_TINY.moe, num_experts=4, num_groups=1, top_groups=1)))
    update_bias(layer, torch.tensor([4.0, 0.0, 2.0, 2.0]), speed=0.5)
    assert layer.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_bias_steps_keep_the_sum():
    """The delta is centered; three idle experts and one busy one move by +0.25 and -0.75 of two steps."""
    layer = MoE(replace(MLA_TINY, moe=replace(MLA_TINY.moe, num_experts=4, num_groups=1, top_groups=1)))
    update_bias(layer, torch.tensor([9.0, 1.0, 1.0, 1.0]), speed=1.0)
    assert layer.bias.tolist() == [-1.5, 0.5, 0.5, 0.5]


def test_bias_steps_even_out_the_load():
    """A router that sends nearly all to expert 0 is led to even use by the bias alone."""
    layer = MoE(
        replace(MLA_TINY, moe=replace(MLA_TINY.moe, num_experts=4, num_experts_per_tok=1, num_groups=1, top_groups=1))
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    x = torch.randn(1, 400, 32, generator=generator)
    x[..., 0] = 3.0
    with torch.no_grad():
        layer.router[0, 0] = 0.3
    violations = []
    for _ in range(60):
        routing = layer(x)[1]
        counts = expert_counts(routing, torch.ones(1, 400, dtype=torch.bool))
        violations.append(float(max_violation(counts)))
        update_bias(layer, counts, speed=0.01)
    assert violations[0] > 1.5
    assert violations[-1] < 0.3


def test_max_violation_of_a_worked_load():
    assert max_violation(torch.tensor([[3.0, 1.0], [2.0, 2.0]])).tolist() == [0.5, 0.0]
    assert max_violation(torch.zeros(2)).item() == -1.0
