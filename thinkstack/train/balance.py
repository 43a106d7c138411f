"""Expert load balancing: the auxiliary-loss-free bias and the sequence-wise balance loss.

Both use the Routing that the model returns. The bias is updated once after each optimizer step, from token counts over
all micro-batches and ranks.
"""

# Shapes in this file: R rows, T tokens per row, E experts, K experts per token, L layers with experts.

import torch
from torch import Tensor

from thinkstack.models.moe import MoE, Routing
from thinkstack.models.transformer import Transformer


def expert_counts(routing: Routing, real: Tensor) -> Tensor:
    """Number of tokens routed to each expert, (E,) fp32. real: (R, T) bool, False for padding."""
    chosen = routing.experts[real].flatten()
    return torch.bincount(chosen, minlength=routing.scores.shape[-1]).float()


def sequence_balance_loss(routing: Routing, real: Tensor) -> Tensor:
    """Sum over rows of (number of real tokens) * sum_i f_i P_i; 1 per token for a uniform load.

    f_i: load of expert i in the row relative to a uniform load, without gradient. P_i: mean normalized affinity. The
    caller divides by the number of real tokens of the step. Source: DeepSeek-V3 report, section 2.1.2, equations 17-20.
    """
    E, K = routing.scores.shape[-1], routing.experts.shape[-1]
    real = real.unsqueeze(-1).float()  # (R, T, 1)
    num_real = real.sum(1).clamp(min=1)  # (R, 1)
    chosen = torch.zeros_like(routing.scores).scatter_(-1, routing.experts, 1.0)
    frequency = (chosen * real).sum(1) * E / (K * num_real)  # (R, E)
    affinity = routing.scores / routing.scores.sum(-1, keepdim=True)
    mean_affinity = (affinity * real).sum(1) / num_real  # (R, E)
    return ((frequency * mean_affinity).sum(-1) * real.sum((1, 2))).sum()


def moe_layers(model: Transformer) -> list[MoE]:
    """All layers with experts in the order of the routings: bottom up, multi-token-prediction modules last."""
    return [block.ffn for block in model.blocks() if isinstance(block.ffn, MoE)]


@torch.no_grad()
def update_bias(layer: MoE, counts: Tensor, speed: float) -> None:
    """Raise the bias of underloaded experts by `speed` and lower the bias of overloaded experts; the sum is constant.

    counts: (E,) tokens per expert over the entire step. Source: arXiv:2408.15664, algorithm 1. The update is centered,
    so that the mean of the bias, which does not affect the choice of experts, cannot drift.
    """
    delta = speed * torch.sign(counts.mean() - counts)
    layer.bias += delta - delta.mean()


def max_violation(counts: Tensor) -> Tensor:
    """Load of the busiest expert over the mean load, minus 1, for counts (..., E) (arXiv:2408.15664, section 4.1)."""
    return counts.amax(-1) / counts.mean(-1).clamp(min=1e-9) - 1
