"""DeepSeekMoE: routed and shared experts.

`route` chooses experts, `MoE` adds their outputs and those of the shared experts. Load counts and balance loss are
computed from the returned Routing by train/balance.py.
"""

# Shapes in this file: B rows, T tokens, N = B*T, D hidden size, E experts, K experts per token, I intermediate size.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkstack.kernels import ops
from thinkstack.kernels.ops import Matrix
from thinkstack.kernels.reference import expert_weights
from thinkstack.models.config import ModelConfig, MoEConfig
from thinkstack.models.layers import QuantizedWeight, SwiGLU


class Routing(NamedTuple):
    """A router's output for a batch of tokens."""

    scores: Tensor
    """(B, T, E) fp32 affinities, without bias; the balance loss has a gradient through them."""
    experts: Tensor
    """(B, T, K) int64 chosen experts."""


def route(scores: Tensor, bias: Tensor, cfg: MoEConfig) -> tuple[Tensor, Tensor]:
    """Choose experts for each token by group-limited top-k.

    scores: (N, E) affinities, fp32. bias: (E,) balance bias, fp32; affects the choice of experts but not the
    weights. Returns (weights (N, K) fp32, experts (N, K) int64).
    Source: DeepSeek-V3 report, arXiv:2412.19437, section 2.1.2; V2 report, arXiv:2405.04434, section 2.2.
    """
    groups = cfg.num_groups, cfg.top_groups, 2 if cfg.group_score == "top2" else 1
    return ops.route(scores, bias, cfg.num_experts_per_tok, groups, cfg.norm_topk_prob, cfg.route_scale)


class MoE(nn.Module):
    """Sum of the shared experts and of the num_experts_per_tok routed experts of each token."""

    bias: Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        assert cfg.moe is not None
        self.cfg = moe = cfg.moe
        self.router = nn.Parameter(torch.empty(moe.num_experts, cfg.hidden_size))
        # fp32 in every dtype of the model: near 1, bf16 would round a bias step of 1e-3 away
        self.register_buffer("bias", torch.zeros(moe.num_experts))
        self.w_in = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.moe_intermediate_size, cfg.hidden_size))
        self.w_out = nn.Parameter(torch.empty(moe.num_experts, cfg.hidden_size, moe.moe_intermediate_size))
        self.shared = SwiGLU(cfg.hidden_size, moe.shared_size) if moe.num_shared_experts else None
        self.adapters = nn.ModuleDict()  # models/lora.py: the adapters of w_in and w_out, by parameter name
        self.expert_module: nn.Module | None = None  # replaces `ops.experts`: train/fp8.py, parallel/inference.py

    def forward(self, x: Tensor, routed_experts: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x: (B, T, D), normed. routed_experts: (B, T, K) integers, experts to use instead of the router's choice; -1
        uses the router. Expert weights are always computed from the current scores. Returns (output (B, T, D),
        routing)."""
        flat = x.flatten(0, 1)  # (N, D)
        logits = F.linear(flat.float(), self.router.float())  # fp32, so that ties and rankings are stable
        scores = logits.sigmoid() if self.cfg.scoring == "sigmoid" else logits.softmax(-1)
        weights, experts = route(scores, self.bias, self.cfg)
        if routed_experts is not None:
            given = routed_experts.flatten(0, 1).long()
            experts = torch.where(given < 0, experts, given)
            weights = expert_weights(scores, experts, self.cfg.norm_topk_prob, self.cfg.route_scale)
        compute = ops.experts if self.expert_module is None else self.expert_module
        out = compute(flat, weights, experts, self.stack("w_in"), self.stack("w_out"))
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x), Routing(scores.unflatten(0, x.shape[:2]), experts.unflatten(0, x.shape[:2]))

    def stack(self, name: str) -> Matrix:
        """The matrices "w_in" or "w_out" of all experts, as they are stored, with the adapter merged."""
        stored = getattr(self, name)
        matrix: Matrix = stored.tensor if isinstance(stored, QuantizedWeight) else stored
        return self.adapters[name](matrix) if name in self.adapters else matrix
