"""A moving average of the weights: what a run would score with its learning rate decayed, without decaying it."""

from itertools import chain

import torch
from torch import Tensor, nn

from thinkstack.types import ConfigError


class MovingAverage:
    """Exponential moving average of a model's parameters and balance biases, fp32 on the CPU.

    After n updates the weights of step i <= n count in proportion to decay ** (n - i): the first update sets the
    average, so the drawn initial weights never enter it. DeepSeek-V3 keeps one in CPU memory (V3 report, section 3.2.3)
    without saying its decay.
    """

    def __init__(self, model: nn.Module, decay: float):
        """decay: between 0 and 1; about 1 / (1 - decay) steps are averaged."""
        if not 0 < decay < 1:
            raise ConfigError(f"ema_decay={decay} must lie between 0 and 1, such as 0.999; 0 keeps no average")
        self.decay = decay
        self.values = {
            name: torch.zeros_like(value, dtype=torch.float32, device="cpu") for name, value in _named(model)
        }

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in the model's weights. updates: how many there are with this one, from 1."""
        share = (1 - self.decay) / (1 - self.decay**updates)
        now = [value.detach().to("cpu", torch.float32) for _, value in _named(model)]
        torch._foreach_lerp_(list(self.values.values()), now, share)

    @torch.no_grad()
    def write_to(self, model: nn.Module) -> None:
        """Replace the weights of `model`, one of the same shape, by the average."""
        for name, value in _named(model):
            value.copy_(self.values[name])

    def state(self) -> dict[str, Tensor]:
        """The average as tensors for a training state, not copied."""
        return {f"average.{name}": value for name, value in self.values.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave; other tensors are left alone."""
        for name, value in self.values.items():
            value.copy_(tensors[f"average.{name}"])


def _named(model: nn.Module) -> chain[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones once."""
    return chain(model.named_parameters(), model.named_buffers())
