"""Muon: momentum whose matrices are made orthogonal before they are subtracted (Keller Jordan, 2024,
kellerjordan.github.io/posts/muon), with the scale and decay of Moonlight (arXiv:2502.16982); AdamW for the rest.

A matrix is what a released checkpoint calls one: each expert of a stack by itself, its gate and its up rows apart.
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
"""Of the quintic a s + b s^3 + c s^5: steep at 0, and five turns bring singular values of 0.01 to 1 near 1."""
STEPS = 5
"""Newton-Schulz iterations."""
BATCH_ELEMENTS = 1 << 24
"""Elements of one batched call at most (or a single parameter): bounds the memory of a large model's step."""


@dataclass(frozen=True)
class Stack:
    """A parameter as matrices: its leading dimensions, and its rows cut into `pieces` equal blocks."""

    parameter: Tensor
    pieces: int

    def view(self, values: Tensor) -> Tensor:
        """values, shaped like the parameter, as (N, R, C); memory is shared."""
        return values.unflatten(-2, (self.pieces, -1)).flatten(0, -3)


def hidden_matrices(model: nn.Module) -> list[Stack]:
    """What Muon trains: projections of attention and feed-forward, experts included, and the MTP modules' `merge`.

    Embedding and head stay with AdamW (their rows are tokens, not directions that mix), as do the router, whose rows
    are one per expert, norms and biases. `merge` maps hidden states to hidden states like any projection.
    """
    routers = {id(module.router) for module in model.modules() if isinstance(module, MoE)}
    gates = {id(module.w_in) for module in model.modules() if isinstance(module, MoE)}
    found = []
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name.startswith(("layers.", "mtp.")) and id(parameter) not in routers:
            found.append(Stack(parameter, 2 if id(parameter) in gates else 1))
    return found


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly U V^T of each U S V^T in `matrices` (N, R, C): singular values between about 0.7 and 1.2.

    dtype: of the products. Returns (N, R, C) in `dtype`; a matrix of zeros stays one.
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
    """Moonlight's scale: the update's root mean square is 0.2, about AdamW's, so its rate and decay carry over."""
    return 0.2 * math.sqrt(max(rows, columns))


def original(rows: int, columns: int) -> float:
    """Keller Jordan's scale: a tall matrix moves its outputs as far as a square one."""
    return math.sqrt(max(1.0, rows / columns))


SCALES: dict[str, Callable[[int, int], float]] = {"match_rms_adamw": match_adamw, "original": original}
"""Factor on the orthogonal update, by torch's names for them."""


class Muon(torch.optim.Optimizer):
    """Muon over `stacks` and AdamW over all other parameters, as one optimizer with one learning rate.

    The groups of both stand in param_groups and their moments in `state`, by parameter.
    """

    def __init__(
        self,
        stacks: list[Stack],
        others: torch.optim.Optimizer,
        weight_decay: float,
        momentum: float = 0.95,
        scale: str = "match_rms_adamw",
        dtype: torch.dtype = torch.bfloat16,
    ):
        """others: holds the remaining parameters. scale: of SCALES. dtype: of the orthogonalizing products."""
        rate = others.param_groups[0]["lr"]
        defaults = {"lr": rate, "weight_decay": weight_decay, "momentum": momentum, "scale": scale}
        super().__init__([stack.parameter for stack in stacks], defaults)
        self.stacks, self.others, self.dtype = stacks, others, dtype
        self.hidden = self.param_groups[0]
        self.param_groups += others.param_groups  # the same tables: a rate set here holds there
        self.state = others.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "gradients are there before the step"
        for batch in self._batches():
            self._update(batch)
        self.others.step()

    def _batches(self) -> Iterator[list[Stack]]:
        """Stacks whose matrices have one shape, up to BATCH_ELEMENTS of them at a time, in the model's order."""
        groups: dict[tuple[int, int], list[Stack]] = {}
        for stack in self.stacks:
            if stack.parameter.grad is None:
                continue
            rows, columns = stack.view(stack.parameter).shape[1:]
            known = groups.setdefault((rows, columns), [])
            if known and sum(member.parameter.numel() for member in (*known, stack)) > BATCH_ELEMENTS:
                yield groups.pop((rows, columns))
                known = groups.setdefault((rows, columns), [])
            known.append(stack)
        yield from groups.values()

    def _update(self, batch: list[Stack]) -> None:
        """Momentum with Nesterov's look ahead, orthogonalized; then decay and step."""
        momentum, rate = self.hidden["momentum"], self.hidden["lr"]
        gradients = [stack.parameter.grad for stack in batch if stack.parameter.grad is not None]
        for stack in batch:
            if not self.state[stack.parameter]:
                self.state[stack.parameter]["momentum_buffer"] = torch.zeros_like(stack.parameter)
        buffers = [self.state[stack.parameter]["momentum_buffer"] for stack in batch]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        views = [stack.view(values) for stack, values in zip(batch, ahead, strict=True)]
        updates = orthogonalize(torch.cat(views), self.dtype).float().split([len(view) for view in views])
        step = -rate * SCALES[self.hidden["scale"]](*views[0].shape[1:])
        for stack, update in zip(batch, updates, strict=True):
            stack.parameter.mul_(1 - rate * self.hidden["weight_decay"])
            stack.view(stack.parameter).add_(update, alpha=step)
