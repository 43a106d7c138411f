"""A moving average of the weights: an early estimate of the model after learning-rate decay."""

from itertools import chain

import torch
from torch import Tensor, nn

from thinkstack.types import ConfigError


class MovingAverage:
    """Exponential moving average of a model's parameters and balance biases, fp32 on the CPU.

    After n updates the weights of step i <= n have a share proportional to decay ** (n - i). The first update sets the
    average, so that the initial weights are excluded. DeepSeek-V3 uses a moving average in CPU memory (V3 report,
    section 3.2.3); the report does not state the decay.
    """

    def __init__(self, model: nn.Module, decay: float):
        """decay: between 0 and 1; averages about 1 / (1 - decay) steps."""
        if not 0 < decay < 1:
            raise ConfigError(
                f"ema_decay={decay} must lie between 0 and 1, such as 0.999; ema_decay=0 disables the average"
            )
        self.decay = decay
        self.values = {
            name: torch.zeros_like(value, dtype=torch.float32, device="cpu") for name, value in _named_tensors(model)
        }

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Add the weights of the model to the average. updates: number of updates including this one, from 1."""
        share = (1 - self.decay) / (1 - self.decay**updates)
        values = [value.detach().to("cpu", torch.float32) for _, value in _named_tensors(model)]
        torch._foreach_lerp_(list(self.values.values()), values, share)

    @torch.no_grad()
    def write_to(self, model: nn.Module) -> None:
        """Copy the average into `model`, which must have the same shapes."""
        for name, value in _named_tensors(model):
            value.copy_(self.values[name])

    def state(self) -> dict[str, Tensor]:
        """The average as tensors for a training state, not copied."""
        return {f"average.{name}": value for name, value in self.values.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors returned by `state`; other tensors are ignored."""
        for name, value in self.values.items():
            value.copy_(tensors[f"average.{name}"])


def _named_tensors(model: nn.Module) -> chain[tuple[str, Tensor]]:
    """Parameters and buffers by name; tied parameters are listed once."""
    return chain(model.named_parameters(), model.named_buffers())
