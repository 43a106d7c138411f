"""DeepSeekMoE: routing, and experts as two batched matmuls.

`route` chooses experts, `ExpertMLP` computes them, `MoE` adds the shared experts. Load counts and balance loss are
computed from the returned Routing by train/balance.py.
"""

# Shapes in this file: B rows, T tokens, N = B*T, D hidden size, E experts, G groups, K experts per token,
# I intermediate size, C capacity: rows per expert, a multiple of ROW_TILE.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkstack import kernels
from thinkstack.kernels import triton as cuda
from thinkstack.models.config import ModelConfig, MoEConfig
from thinkstack.models.layers import ROW_TILE, SwiGLU, swiglu, swiglu_backward


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
    scores_per_group = 2 if cfg.group_score == "top2" else 1
    if kernels.takes_steps(scores, 0, "route"):
        groups = (cfg.num_groups, cfg.top_groups, scores_per_group)
        return kernels.route(scores, bias.float(), cfg.num_experts_per_tok, groups, cfg.norm_topk_prob, cfg.route_scale)
    choice = scores.detach() + bias
    if cfg.top_groups < cfg.num_groups:
        grouped = choice.unflatten(-1, (cfg.num_groups, -1))  # (N, G, E/G)
        group_score = grouped.topk(scores_per_group, dim=-1).values.sum(-1)  # (N, G)
        group_idx = group_score.topk(cfg.top_groups, dim=-1).indices
        masked = torch.ones_like(group_score, dtype=torch.bool).scatter(1, group_idx, False)
        choice = grouped.masked_fill(masked[..., None], -math.inf).flatten(1)
    experts = choice.topk(cfg.num_experts_per_tok, dim=-1).indices  # (N, K)
    return expert_weights(scores, experts, cfg), experts


def expert_weights(scores: Tensor, experts: Tensor, cfg: MoEConfig) -> Tensor:
    """Weights (N, K) fp32 of the chosen experts (N, K) int64, from the scores (N, E)."""
    weights = scores.gather(1, experts)
    if cfg.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # as in transformers: all scores may be 0
    return weights * cfg.route_scale


class TokenDispatch(NamedTuple):
    """The row of each (token, choice) pair in the padded input of the experts."""

    slot: Tensor
    """(N*K,) row of each pair among the (E*C) rows of expert input."""
    source: Tensor
    """(E*C,) token of each row; 0 for unused rows."""
    capacity: int
    """C."""


def dispatch_tokens(experts: Tensor, num_experts: int) -> TokenDispatch:
    """Sort pairs by expert, with the same number of rows for each expert. experts: (N, K) int64."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    capacity = -(-int(counts.max()) // ROW_TILE) * ROW_TILE
    shift = torch.arange(num_experts, device=flat.device) * capacity - (counts.cumsum(0) - counts)
    rows = torch.arange(flat.numel(), device=flat.device) + shift.repeat_interleave(counts)
    slot = torch.empty_like(flat).index_copy_(0, order, rows)
    source = flat.new_zeros(num_experts * capacity).index_copy_(0, rows, order // experts.shape[1])
    return TokenDispatch(slot, source, capacity)


class ExpertMLP(torch.autograd.Function):
    """Sum over a token's experts of weight * SwiGLU_expert(token), with one batched matmul per matrix.

    The rows of every expert are padded to the number of tokens of the busiest expert, so that no token is dropped.
    Tokens are moved by gathers in forward and backward pass, never by scatter-add, so that results do not depend on the
    order of threads.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:  # type: ignore[override]
        """x (N, D); weights (N, K) fp32; experts (N, K); w_in (E, 2I, D): gate rows, then up rows; w_out (E, D, I)."""
        E, K = w_in.shape[0], experts.shape[1]
        dispatched = dispatch_tokens(experts, E)
        rows = x.index_select(0, dispatched.source).view(E, dispatched.capacity, -1)  # (E, C, D)
        gate, up = torch.bmm(rows, w_in.transpose(1, 2)).chunk(2, -1)  # (E, C, I) each
        inner = F.silu(gate) * up
        out = torch.bmm(inner, w_out.transpose(1, 2)).flatten(0, 1)  # (E*C, D)
        picked = out.index_select(0, dispatched.slot).unflatten(0, (-1, K))  # (N, K, D)
        ctx.save_for_backward(rows, weights, dispatched.slot, dispatched.source, gate, up, inner, picked, w_in, w_out)
        return (picked * weights.to(x.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows, weights, slot, source, gate, up, inner, picked, w_in, w_out = ctx.saved_tensors
        E, C = rows.shape[:2]
        grad_weights = torch.linalg.vecdot(picked, grad.unsqueeze(1))  # (N, K)
        row_weights = grad.new_zeros(E * C).index_copy_(0, slot, weights.flatten().to(grad.dtype))  # 0 in unused rows
        grad_out = (grad.index_select(0, source) * row_weights.unsqueeze(-1)).view(E, C, -1)
        grad_w_out = torch.bmm(grad_out.transpose(1, 2), inner)
        grad_hidden = torch.cat(swiglu_backward(torch.bmm(grad_out, w_out), gate, up), -1)  # (E, C, 2I)
        grad_w_in = torch.bmm(grad_hidden.transpose(1, 2), rows)
        grad_rows = torch.bmm(grad_hidden, w_in).flatten(0, 1)  # (E*C, D)
        grad_x = grad_rows.index_select(0, slot).unflatten(0, weights.shape).sum(1)
        return grad_x, grad_weights.to(weights.dtype), None, grad_w_in, grad_w_out


def grouped_mm_experts(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """`ExpertMLP` with torch's grouped matmuls: without padding and without synchronization with the device."""
    E, K = w_in.shape[0], experts.shape[1]
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    ends = flat.new_zeros(E).scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0).int()
    pairs = x.unsqueeze(1).expand(-1, K, -1).flatten(0, 1)  # (N*K, D); the gradient is summed in a fixed order
    hidden = F.grouped_mm(pairs.index_select(0, order), w_in.mT, offs=ends)
    gate, up = (part.contiguous() for part in hidden.chunk(2, -1))
    out = F.grouped_mm(swiglu(gate, up), w_out.mT, offs=ends)
    picked = out.index_select(0, place).unflatten(0, (-1, K))  # (N, K, D)
    return (picked * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def takes_grouped(w_in: Tensor, w_out: Tensor) -> bool:
    """Whether torch's grouped matmuls support experts w_in (E, 2I, D), w_out (E, D, I): bf16, on CUDA, widths that are
    multiples of 8."""
    widths = w_in.shape[2], w_out.shape[2]
    return cuda.is_device(w_in) and w_in.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def expert_mlp(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The output of the experts for x (N, D), with the fastest implementation for the device; arguments as in
    `ExpertMLP`."""
    D, I = x.shape[1], w_out.shape[2]  # noqa: E741
    if kernels.takes(x, "experts") and D % kernels.LANES == 0 and I % kernels.LANES == 0:
        return kernels.expert_mlp(x, weights, experts, w_in, w_out)
    if takes_grouped(w_in, w_out):
        return grouped_mm_experts(x, weights, experts, w_in, w_out)
    return ExpertMLP.apply(x, weights, experts, w_in, w_out)


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
        self.expert_module: nn.Module | None = None  # replaces `expert_mlp`: train/fp8.py, QuantizedExperts

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
            weights = expert_weights(scores, experts, self.cfg)
        w_in, w_out = (
            self.adapters[name](weight) if name in self.adapters else weight
            for name, weight in (("w_in", self.w_in), ("w_out", self.w_out))
        )
        compute = expert_mlp if self.expert_module is None else self.expert_module
        out = compute(flat, weights, experts, w_in, w_out)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x), Routing(scores.unflatten(0, x.shape[:2]), experts.unflatten(0, x.shape[:2]))
