"""Fused forward passes over a cache, for models where the overhead of single operators exceeds their computation: dense
models with grouped-query attention (gqa.py) and small models with latent attention (mla.py).
"""

# Shapes in this file: N tokens, D hidden size, L layers, M layers with experts, K experts per token, P tokens per cache
# block, W entry width.

import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from thinkstack import kernels
from thinkstack.engine.fused.gqa import FusedGQA, supports_fused_gqa
from thinkstack.engine.fused.mla import FusedMLA, supports_fused_mla
from thinkstack.kernels.paging import Pages
from thinkstack.models.block import Block
from thinkstack.models.transformer import Transformer


class FusedPass(Protocol):
    """The trunk of a model over a cache, with the weights that the model had at construction."""

    max_num_tokens: int
    """Maximum number of tokens per call."""
    prepacked_head: Tensor | None
    """The prepacked matrix of the head if its matmuls are batch-invariant, otherwise None."""

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """`Transformer.trunk` of tokens ids (N,) at positions (N,) of their sequences.

        pages: pages of the N tokens in the first layer. cache: (L, blocks, P, W), the cache of all layers; the entries
        of the tokens are written to it. Returns (hidden states (N, D), normed; experts (M, N, K) int64 or None)."""

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """`Transformer.draft` of (N, D), (N,) and (N,): hidden states (N, D), or None if the pass does not support
        it."""


@torch.no_grad()
def fused_pass(model: Transformer) -> FusedPass | None:
    """The fused pass of `model`; None if no pass supports it."""
    blocks = [block for block in model.layers if isinstance(block, Block)]
    if any(has_hooks(module) for module in blocks):  # sharded across ranks
        return None
    if supports_fused_gqa(blocks):
        return FusedGQA(model, blocks)
    return FusedMLA(model, blocks) if _uses_fused_mla(model, model.embed.weight) else None


@torch.no_grad()
def upcast_small_model(model: Transformer) -> Transformer:
    """The model or, for a bf16 model that FusedMLA supports in fp32, a copy with the same weights in fp32. In such
    small models the overhead of calls dominates, not the bytes of the weights. Results are more accurate than in bf16,
    and less accurate than with fp32 weights."""
    weight = model.embed.weight
    if weight.dtype != torch.bfloat16 or not _uses_fused_mla(model, weight.new_empty(0, dtype=torch.float32)):
        return model
    return copy.deepcopy(model).float()


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, which means that it is sharded across ranks."""
    return any(part._forward_hooks for part in module.modules())


def _uses_fused_mla(model: Transformer, like: Tensor) -> bool:
    """Whether to use FusedMLA for a model, MTP modules included, with weights of the dtype and device of `like`; False
    for models that are sharded across ranks."""
    blocks = model.blocks()
    if any(has_hooks(block) for block in blocks) or not all(supports_fused_mla(block) for block in blocks):
        return False
    return kernels.takes_steps(like, model.cfg.hidden_size, "fused_mla")
