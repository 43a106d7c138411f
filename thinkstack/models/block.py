"""One pre-norm transformer block: attention, then a dense or a mixture-of-experts feed-forward."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinkstack.models.attention import GQA, MLA, AttentionContext
from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.layers import RMSNorm, SwiGLU
from thinkstack.models.moe import MoE, Routing


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)).

    With `checkpoints_activations` (activation checkpointing, arXiv:1604.06174), training saves only x for the backward
    pass, which recomputes other activations: identical results with a third more operations.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.checkpoints_activations = False
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attention = MLA(cfg, layer) if isinstance(cfg.attention, MLAConfig) else GQA(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.ffn = MoE(cfg) if cfg.is_moe_layer(layer) else SwiGLU(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self, x: Tensor, ctx: AttentionContext, routed_experts: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """x: (B, T, D). routed_experts: as in MoE. Returns (x (B, T, D); the routing, or None in a dense block)."""
        if self.checkpoints_activations and torch.is_grad_enabled():
            # no operation of a block uses random numbers, so no generator state is saved
            return checkpoint(self.compute, x, ctx, routed_experts, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, ctx, routed_experts)

    def compute(self, x: Tensor, ctx: AttentionContext, routed_experts: Tensor | None) -> tuple[Tensor, Routing | None]:
        """`forward` without activation checkpointing."""
        x = x + self.attention(self.attention_norm(x), ctx)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            out, routing = self.ffn(normed, routed_experts)
            return x + out, routing
        return x + self.ffn(normed), None
