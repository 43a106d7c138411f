"""Learning rates by hand, and who decays."""

import pytest
import torch

from tests.tiny import tiny_model
from thinkstack.train.optim import OptimConfig, gradient_norm, learning_rate, make_optimizer
from thinkstack.types import ConfigError


def rates(cfg: OptimConfig, total: int) -> list[float]:
    return [learning_rate(cfg, step, step / total) for step in range(total)]


def test_warm_up_climbs_to_the_peak_and_never_starts_at_zero():
    assert rates(OptimConfig(learning_rate=1.0, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_schedule_falls_to_its_final_share():
    cfg = OptimConfig(learning_rate=1.0, schedule="linear", decay_share=0.5, final_share=0.0)
    assert rates(cfg, 8) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate(cfg, 8, 1.0) == learning_rate(cfg, 20, 2.5) == 0.0


def test_a_cosine_schedule_is_half_way_in_the_middle():
    cfg = OptimConfig(learning_rate=1.0, schedule="cosine", final_share=0.2)
    assert learning_rate(cfg, 50, 0.5) == pytest.approx(0.6)
    assert learning_rate(cfg, 100, 1.0) == pytest.approx(0.2)


def test_a_schedule_that_never_falls_keeps_the_peak_to_the_end():
    cfg = OptimConfig(learning_rate=1.0, schedule="cosine", decay_share=0.0)
    assert set(rates(cfg, 10)) == {1.0}


def test_the_schedule_of_v3_gives_the_published_rates_at_the_published_tokens():
    """V3 report, section 4.2: 2.2e-4 to 10T tokens, a cosine over 4.3T to 2.2e-5, 333B there, 167B at 7.3e-6."""
    cfg = OptimConfig(learning_rate=2.2e-4, warmup_steps=2000, schedule="v3")
    published = {0.0: 2.2e-4, 9.99: 2.2e-4, 12.15: 1.21e-4, 14.3: 2.2e-5, 14.63: 2.2e-5, 14.64: 7.3e-6, 14.8: 7.3e-6}
    for trillions, rate in published.items():
        assert learning_rate(cfg, 10**6, trillions / 14.8) == pytest.approx(rate, rel=1e-6), trillions
    assert learning_rate(cfg, 999, 0.0) == pytest.approx(1.1e-4)


def test_phases_can_be_left_out_or_set():
    cfg = OptimConfig(learning_rate=1.0, schedule="v3", phases=(2, 0, 1, 1), final_share=0.5, last_share=0.25)
    assert rates(cfg, 8) == [1.0] * 4 + [0.5] * 2 + [0.25] * 2


def test_matrices_decay_and_vectors_do_not():
    optimizer = make_optimizer(tiny_model(), OptimConfig(weight_decay=0.3))
    for group in optimizer.param_groups:
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.3}


def test_balance_biases_are_not_in_the_optimizer():
    """Weight decay would pull them to 0, and a gradient must never move them."""
    model = tiny_model()
    known = {id(p) for group in make_optimizer(model, OptimConfig()).param_groups for p in group["params"]}
    assert {id(buffer) for buffer in model.buffers()}.isdisjoint(known)
    assert known == {id(parameter) for parameter in model.parameters()}


def test_the_gradient_norm_spans_all_parameters():
    first, second, third = (torch.zeros(2, requires_grad=True) for _ in range(3))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_norm([first, second, third]).item() == 5.0


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"decay_share": 1.5},
        {"clip_norm": 0.0},
        {"phases": (0, 0, 0, 0)},
        {"phases": (3, -1, 1, 1)},
    ],
)
def test_settings_that_train_nothing_are_refused(changes):
    with pytest.raises(ConfigError):
        OptimConfig(**changes)


def test_moments_in_bf16_are_those_of_fp32_rounded():
    """Two elements, gradients by hand: after a step the moments are 0.1 g and 0.05 g^2 in bf16, and the first update is
    the rate, as AdamW's always is."""
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    weight.grad = torch.tensor([[0.3, -0.7]])
    optimizer = make_optimizer(
        torch.nn.ParameterList([weight]), OptimConfig(learning_rate=0.01, moments="bf16", weight_decay=0.0)
    )
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.tensor([[0.99, -1.99]]))
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert torch.equal(state["exp_avg"], torch.tensor([[0.03, -0.07]]).bfloat16())
    assert torch.equal(state["exp_avg_sq"], torch.tensor([[0.0045, 0.0245]]).bfloat16())


def test_moments_in_bf16_stay_near_those_of_fp32():
    """200 noisy steps on a quadratic end within 2 % of each other's distance travelled."""
    ends = []
    for moments in ("fp32", "bf16"):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(40, 30))
        optimizer = make_optimizer(torch.nn.ParameterList([weight]), OptimConfig(learning_rate=0.01, moments=moments))
        for _ in range(200):
            weight.grad = weight.detach() + torch.randn(40, 30, generator=generator)
            optimizer.step()
        ends.append(weight.detach())
    assert float((ends[0] - ends[1]).norm()) < 0.02 * float((ends[0] - 1).norm())


def test_a_beta_that_bf16_cannot_follow_is_refused():
    """Above 127/128 a moment's change is smaller than half its last bit, and it would stand still."""
    with pytest.raises(ConfigError, match=r"beta2=0\.999"):
        make_optimizer(
            torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2))]), OptimConfig(moments="bf16", beta2=0.999)
        )
