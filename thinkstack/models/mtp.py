"""Multi-token prediction: an additional block that predicts token i+2 from hidden state i and token i+1.

The module shares embedding and head with the main model (DeepSeek-V3 report, arXiv:2412.19437, section 2.2).
"""

import torch
from torch import Tensor, nn

from thinkstack.models.attention import AttentionContext
from thinkstack.models.block import Block
from thinkstack.models.config import ModelConfig
from thinkstack.models.layers import Linear, RMSNorm
from thinkstack.models.moe import Routing


class MTPModule(nn.Module):
    """h'_i = Block(M [norm(embedding of token i+1) ; norm(h_i)]); the embedding comes first, as in released weights."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.embedding_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.hidden_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.merge = Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.block = Block(cfg, layer)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def forward(self, hidden: Tensor, next_embedding: Tensor, ctx: AttentionContext) -> tuple[Tensor, Routing | None]:
        """hidden: (B, T, D), hidden states of the main model after the final norm. next_embedding: (B, T, D), embedding
        of the next token.

        Returns (normed hidden states (B, T, D) for the head; routing).
        """
        out, routing = self.block(self.merged(hidden, next_embedding), ctx)
        return self.norm(out), routing

    def merged(self, hidden: Tensor, next_embedding: Tensor) -> Tensor:
        """The input of the block, (..., D)."""
        merged: Tensor = self.merge(torch.cat((self.embedding_norm(next_embedding), self.hidden_norm(hidden)), -1))
        return merged
