"""Routing against a plain loop and worked examples; experts against autograd of a plain loop."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import MLA_TINY
from thinkstack.kernels.reference import dispatch_tokens, padded_experts
from thinkstack.kernels.sizes import ROW_TILE
from thinkstack.models.config import MoEConfig
from thinkstack.models.moe import MoE, route
from thinkstack.types import ConfigError

GROUPED = MoEConfig(
    num_experts=12, num_experts_per_tok=3, moe_intermediate_size=4, num_groups=4, top_groups=2, route_scale=2.5
)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def route_one(scores: list[float], bias: list[float], cfg: MoEConfig) -> dict[int, float]:
    """The report's rule for one token, without tensors: expert -> weight."""
    choice = [score + offset for score, offset in zip(scores, bias, strict=True)]
    size = cfg.num_experts // cfg.num_groups
    best = 2 if cfg.group_score == "top2" else 1
    groups = [range(g * size, (g + 1) * size) for g in range(cfg.num_groups)]
    ranked = sorted(groups, key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[:best]))
    allowed = [expert for group in ranked[: cfg.top_groups] for expert in group]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: cfg.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if cfg.norm_topk_prob else 1.0
    return {e: scores[e] / total * cfg.route_scale for e in chosen}


@pytest.mark.parametrize(
    "cfg",
    [
        GROUPED,
        replace(GROUPED, group_score="max", norm_topk_prob=False, scoring="softmax"),
        replace(GROUPED, num_groups=1, top_groups=1),
        replace(GROUPED, top_groups=4),
    ],
    ids=["v3", "v2", "one group", "all groups"],
)
def test_routing_agrees_with_a_plain_loop(cfg):
    scores, bias = random_tensor(50, 12).sigmoid(), random_tensor(12, seed=1) / 4
    weights, experts = route(scores, bias, cfg)
    for row in range(50):
        found = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(route_one(scores[row].tolist(), bias.tolist(), cfg), rel=1e-5)


def test_bias_steers_the_choice_but_not_the_weight():
    cfg = MoEConfig(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=1, num_groups=2, top_groups=1)
    weights, experts = route(torch.tensor([[0.9, 0.1, 0.2, 0.3]]), torch.tensor([0.0, 0.0, 0.0, 1.0]), cfg)
    assert experts.tolist() == [[3]]
    assert weights.tolist() == [[1.0]]


def test_weights_come_from_the_scores_without_bias():
    """Weights come from the scores without bias: 0.6 and 0.2 scaled to a sum of 2 are 1.5 and 0.5 for any bias."""
    cfg = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=1, route_scale=2.0)
    weights, experts = route(torch.tensor([[0.6, 0.1, 0.2, 0.3]]), torch.tensor([5.0, 0.0, 9.0, 0.0]), cfg)
    assert dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx({0: 1.5, 2: 0.5})


def test_closed_groups_stay_closed_when_open_scores_are_negative():
    """A mask of 0.0 instead of -inf selects masked experts as soon as biased scores are negative (a bug of litgpt)."""
    cfg = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=1, num_groups=2, top_groups=1)
    _, experts = route(torch.tensor([[0.5, 0.4, 0.3, 0.2]]), torch.tensor([-2.0, -2.0, -4.0, -4.0]), cfg)
    assert sorted(experts[0].tolist()) == [0, 1]


def test_all_scores_at_zero_give_no_nan():
    weights, _ = route(torch.zeros(1, 12), torch.zeros(12), GROUPED)
    assert torch.equal(weights, torch.zeros(1, 3))


def test_router_gradients_come_through_the_weights_not_the_choice():
    scores, bias = random_tensor(5, 12).sigmoid().requires_grad_(), torch.zeros(12)
    weights, experts = route(scores, bias, replace(GROUPED, norm_topk_prob=False, route_scale=1.0))
    weights.sum().backward()
    assert torch.equal(scores.grad, torch.zeros(5, 12).scatter(1, experts, 1.0))


def test_dispatch_gives_every_pair_a_row_of_its_expert():
    experts = torch.tensor([[0, 2], [2, 1], [2, 0]])
    plan = dispatch_tokens(experts, 4)
    assert plan.capacity == ROW_TILE
    assert len(set(plan.slot.tolist())) == 6
    assert (plan.slot // plan.capacity).tolist() == experts.flatten().tolist()
    assert plan.source[plan.slot].tolist() == [0, 0, 1, 1, 2, 2]


def test_no_token_is_dropped_when_all_choose_one_expert():
    plan = dispatch_tokens(torch.full((40, 1), 3), 4)
    assert plan.capacity == 48
    assert sorted(plan.slot.tolist()) == list(range(3 * 48, 3 * 48 + 40))


def plain_experts(x, weights, experts, w_in, w_out):
    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            gate, up = (w_in[expert] @ x[token]).chunk(2)
            total = total + weight * (w_out[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_experts_and_their_gradients_agree_with_autograd_of_a_loop(num_tokens):
    """fp64, so that only a wrong formula can differ. Expert 3 gets no token."""
    x, w_in, w_out = (
        random_tensor(num_tokens, 6).double(),
        random_tensor(4, 10, 6, seed=1).double(),
        random_tensor(4, 6, 5, seed=2).double(),
    )
    weights = random_tensor(num_tokens, 2, seed=3).double()
    experts = torch.stack(
        [torch.randperm(3, generator=torch.Generator().manual_seed(t))[:2] for t in range(num_tokens)]
    )
    leaves = [tensor.requires_grad_() for tensor in (x, weights, w_in, w_out)]
    fast = padded_experts(x, weights, experts, w_in, w_out)
    plain = plain_experts(x, weights, experts, w_in, w_out)
    torch.testing.assert_close(fast, plain)
    grad = random_tensor(num_tokens, 6, seed=4).double()
    pairs = zip(torch.autograd.grad(fast, leaves, grad), torch.autograd.grad(plain, leaves, grad), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_router_scores_are_fp32_in_a_bf16_model():
    """bf16 scores would tie, and rollout and trainer would use different experts."""
    layer = MoE(MLA_TINY).to(torch.bfloat16)
    torch.nn.init.normal_(layer.router, generator=torch.Generator().manual_seed(0))
    _, routing = layer(random_tensor(1, 4, 32).to(torch.bfloat16))
    assert routing.scores.dtype == torch.float32


def test_routing_is_batch_invariant():
    """In fp32 a row of a matrix product must not depend on the number of rows."""
    layer, x = MoE(MLA_TINY), random_tensor(8, 16, 32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    together, routing = layer(x)
    for row in range(8):
        alone, chosen = layer(x[row : row + 1])
        assert torch.equal(chosen.experts[0], routing.experts[row])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_groups": 5}, "does not split"),
        ({"top_groups": 5}, "must lie in"),
        ({"num_experts_per_tok": 7}, "cannot come from"),
        ({"num_groups": 12, "top_groups": 12}, "needs two experts"),
    ],
)
def test_impossible_shapes_of_experts_are_refused(changes, part):
    with pytest.raises(ConfigError, match=part):
        replace(GROUPED, **changes)
