"""Muon: momentum updates that are orthogonalized per matrix (Keller Jordan, 2024, kellerjordan.github.io/posts/muon),
with the scale and decay of Moonlight (arXiv:2502.16982); AdamW for all other parameters.

Matrices are split as in a released checkpoint: one matrix per expert of a stack, gate and up projection separate.
"""

# Shapes in this file: N matrices of R rows and C columns each.

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinkstack.models.moe import MoE

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic a s + b s^3 + c s^5, which is steep at 0; five iterations bring singular values of 0.01
to 1 near 1."""
STEPS = 5
"""Number of Newton-Schulz iterations."""
BATCH_ELEMENTS = 1 << 24
"""Maximum number of elements of a batched call (unless one parameter has more), which bounds the memory of a step."""


@dataclass(frozen=True)
class MatrixStack:
    """A parameter as a stack of matrices: leading dimensions are stacked, and rows are split into `pieces` equal
    blocks."""

    parameter: Tensor
    pieces: int

    def view(self, values: Tensor) -> Tensor:
        """A view of `values` as (N, R, C); `values` has the shape of the parameter."""
        return values.unflatten(-2, (self.pieces, -1)).flatten(0, -3)


def hidden_matrices(model: nn.Module) -> list[MatrixStack]:
    """The parameters for Muon: projections of attention and feed-forward, experts included, and the MTP modules'
    `merge`.

    AdamW trains embedding and head (one row per token), the router (one row per expert), norms and biases. `merge` maps
    hidden states to hidden states like any projection.
    """
    routers = {id(module.router) for module in model.modules() if isinstance(module, MoE)}
    gates = {id(module.w_in) for module in model.modules() if isinstance(module, MoE)}
    stacks = []
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name.startswith(("layers.", "mtp.")) and id(parameter) not in routers:
            stacks.append(MatrixStack(parameter, 2 if id(parameter) in gates else 1))
    return stacks


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately U V^T of each U S V^T in `matrices` (N, R, C): singular values between about 0.7 and 1.2.

    dtype: precision of the matmuls. Returns (N, R, C) in `dtype`; a zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    norms = torch.linalg.matrix_norm(wide, keepdim=True)  # at least the largest singular value
    x = (wide / norms.clamp(min=1e-7)).to(dtype)
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide is not matrices else x


def match_adamw(rows: int, columns: int) -> float:
    """Moonlight's scale: the root mean square of the update is 0.2, as is typical of AdamW, so that AdamW's learning
    rate and weight decay apply."""
    return 0.2 * math.sqrt(max(rows, columns))


def original(rows: int, columns: int) -> float:
    """Keller Jordan's scale: updates of tall and square matrices change the outputs by the same amount."""
    return math.sqrt(max(1.0, rows / columns))


SCALES: dict[str, Callable[[int, int], float]] = {"match_rms_adamw": match_adamw, "original": original}
"""Factor of the orthogonalized update, by the names that torch uses."""


class Muon(torch.optim.Optimizer):
    """Muon for `stacks` and AdamW for all other parameters, as one optimizer with one learning rate.

    param_groups has the groups of both, `state` the moments of both.
    """

    def __init__(
        self,
        stacks: list[MatrixStack],
        adamw: torch.optim.Optimizer,
        weight_decay: float,
        momentum: float = 0.95,
        scale: str = "match_rms_adamw",
        dtype: torch.dtype = torch.bfloat16,
    ):
        """adamw: the optimizer of the other parameters. scale: a key of SCALES. dtype: precision of the matmuls of
        `orthogonalize`."""
        rate = adamw.param_groups[0]["lr"]
        defaults = {"lr": rate, "weight_decay": weight_decay, "momentum": momentum, "scale": scale}
        super().__init__([stack.parameter for stack in stacks], defaults)
        self.stacks, self.adamw, self.dtype = stacks, adamw, dtype
        self.hidden = self.param_groups[0]
        self.param_groups += adamw.param_groups  # shared: a learning rate set here applies to both
        self.state = adamw.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for batch in self._batches():
            self._update(batch)
        self.adamw.step()

    def _batches(self) -> Iterator[list[MatrixStack]]:
        """Stacks whose matrices have the same shape, with up to BATCH_ELEMENTS elements, in the order of the model."""
        groups: dict[tuple[int, int], list[MatrixStack]] = {}
        for stack in self.stacks:
            if stack.parameter.grad is None:
                continue
            rows, columns = stack.view(stack.parameter).shape[1:]
            group = groups.setdefault((rows, columns), [])
            if group and sum(member.parameter.numel() for member in (*group, stack)) > BATCH_ELEMENTS:
                yield groups.pop((rows, columns))
                group = groups.setdefault((rows, columns), [])
            group.append(stack)
        yield from groups.values()

    def _update(self, batch: list[MatrixStack]) -> None:
        """Nesterov momentum, orthogonalized; then weight decay and step."""
        momentum, rate = self.hidden["momentum"], self.hidden["lr"]
        gradients = [stack.parameter.grad for stack in batch if stack.parameter.grad is not None]
        for stack in batch:
            if not self.state[stack.parameter]:
                self.state[stack.parameter]["momentum_buffer"] = torch.zeros_like(stack.parameter)
        buffers = [self.state[stack.parameter]["momentum_buffer"] for stack in batch]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, buffers, momentum)
        views = [stack.view(values) for stack, values in zip(batch, nesterov, strict=True)]
        updates = orthogonalize(torch.cat(views), self.dtype).float().split([len(view) for view in views])
        step = -rate * SCALES[self.hidden["scale"]](*views[0].shape[1:])
        for stack, update in zip(batch, updates, strict=True):
            stack.parameter.mul_(1 - rate * self.hidden["weight_decay"])
            stack.view(stack.parameter).add_(update, alpha=step)
