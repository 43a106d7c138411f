"""AdamW with both moments in bf16, as in DeepSeek-V3's training (V3 report, arXiv:2412.19437, section 3.3)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from thinkstack.types import ConfigError

CHUNK = 2**20
"""Number of elements converted to fp32 at a time."""


class LowMomentAdamW(torch.optim.Optimizer):
    """Weights, gradients and arithmetic are fp32; both moments are rounded to bf16 between steps. This needs 8 bytes
    per parameter instead of 12, not counting the gradient."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float):
        """params: parameter groups with weight_decay. Raises ConfigError for a beta too close to 1 for bf16."""
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            if 1 - beta < 2**-7:
                raise ConfigError(
                    f"{name}={beta} changes a moment by less than the resolution of bf16 (1/128); use at most 0.99, or "
                    "moments='fp32'"
                )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of arXiv:1711.05101, algorithm 2, on every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in "mv")
        state["step"] += 1
        (beta1, beta2), count = group["betas"], float(state["step"])
        flat = [x.view(-1).split(CHUNK) for x in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        for weight, gradient, first, second in zip(*flat, strict=True):
            mean = first.float().lerp_(gradient, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            first.copy_(mean)
            second.copy_(square)
            scale = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**count))
