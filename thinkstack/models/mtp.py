"""Multi-token prediction: one more block, which sees a hidden state and the next token, and predicts the one after.

Embedding and head are the main model's (DeepSeek-V3 report, arXiv:2412.19437, section 2.2).
"""

import torch
from torch import Tensor, nn

from thinkstack.models.attention import AttentionContext
from thinkstack.models.block import Block
from thinkstack.models.config import ModelConfig
from thinkstack.models.layers import Projection, RMSNorm
from thinkstack.models.moe import Routing


class MTPModule(nn.Module):
    """h'_i = Block(M [norm(embedding of token i+1) ; norm(h_i)]); released weights put the embedding first."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.embedding_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.hidden_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.merge = Projection(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.block = Block(cfg, layer)
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def forward(self, hidden: Tensor, next_embedding: Tensor, ctx: AttentionContext) -> tuple[Tensor, Routing | None]:
        """hidden (B, T, D): the main model's, after its final norm. next_embedding (B, T, D): of the following token.

        Returns (normed hidden (B, T, D), ready for the head; routing).
        """
        out, routing = self.block(self.merged(hidden, next_embedding), ctx)
        return self.norm(out), routing

    def merged(self, hidden: Tensor, next_embedding: Tensor) -> Tensor:
        """What the block is given, (..., D)."""
        merged: Tensor = self.merge(torch.cat((self.embedding_norm(next_embedding), self.hidden_norm(hidden)), -1))
        return merged
