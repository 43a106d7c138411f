"""One pre-norm transformer block: attention, then a dense or a mixture-of-experts feed-forward."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinkstack.models.attention import GQA, MLA, AttentionContext
from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.layers import Projection, RMSNorm, SwiGLU
from thinkstack.models.moe import MoE, Routing


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)).

    Where `keeps_input_only` is set, training keeps x alone for the backward pass, which computes everything else again
    (arXiv:1604.06174): the same numbers for a third more operations.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.keeps_input_only = False
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attention = MLA(cfg, layer) if isinstance(cfg.attention, MLAConfig) else GQA(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.ffn = MoE(cfg) if cfg.is_moe_layer(layer) else SwiGLU(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self, x: Tensor, ctx: AttentionContext, replayed: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """x: (B, T, D). replayed: as in MoE. Returns (x (B, T, D), what the router chose or None in a dense block)."""
        if self.keeps_input_only and torch.is_grad_enabled():
            # nothing in a block draws random numbers, so no generator is kept
            return checkpoint(self.compute, x, ctx, replayed, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, ctx, replayed)

    def compute(self, x: Tensor, ctx: AttentionContext, replayed: Tensor | None) -> tuple[Tensor, Routing | None]:
        """`forward` without the choice of what is kept."""
        x = x + self.attention(self.attention_norm(x), ctx)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            out, routing = self.ffn(normed, replayed)
            return x + out, routing
        return x + self.ffn(normed), None


PLAIN: set[type[nn.Module]] = {Block, GQA, MLA, SwiGLU, MoE, RMSNorm, Projection, nn.ModuleDict}
"""What a block consists of as it was built."""


def consists_of(block: Block, kinds: set[type[nn.Module]]) -> bool:
    """Whether nothing else is part of a block: no adapter, no share of a layer."""
    return all(type(part) in kinds for part in block.modules())
