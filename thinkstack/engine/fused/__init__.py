"""Forward passes over a cache that are written for a kind of model, where calling a module's operators one by one would
take longer than their work: dense models (dense.py), and small ones with latent attention (latent.py).
"""

# Shapes in this file: N tokens, D hidden size, L blocks, M blocks with experts, K experts per token, W entry width.

import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from thinkstack import kernels
from thinkstack.engine.fused.gqa import FusedGQA, is_dense
from thinkstack.engine.fused.mla import FusedMLA, is_latent
from thinkstack.kernels.paging import Pages
from thinkstack.models.block import Block
from thinkstack.models.transformer import Transformer


class FusedPass(Protocol):
    """The trunk of a model over a cache, with the weights that it had when this was made."""

    max_tokens: int
    """Tokens of a call."""
    head: Tensor | None
    """The head's matrix, blocked, where its products are exact in any company."""

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `Transformer.trunk` makes of tokens ids (N,) at positions (N,) of their sequences.

        pages: of the N tokens, in the first layer. cache: (L, blocks, P, W), of all layers; written to. Returns (hidden
        states (N, D), normed; experts (M, N, K) int64 or None).
        """

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """What `Transformer.draft` makes of (N, D), (N,) and (N,): states (N, D), or None where none can."""


@torch.no_grad()
def fused_pass(model: Transformer) -> FusedPass | None:
    """A kernel for the whole of `model`; None where there is none for it."""
    blocks = [block for block in model.layers if isinstance(block, Block)]
    if any(has_hooks(module) for module in blocks):  # shares of ranks
        return None
    if is_dense(blocks):
        return FusedGQA(model, blocks)
    return FusedMLA(model, blocks) if _is_small_latent(model, model.embed.weight) else None


@torch.no_grad()
def widened(model: Transformer) -> Transformer:
    """A model in bf16, or, where one kernel then takes the whole of it, a copy with the same numbers in fp32: at such
    sizes the calls are what takes the time, not the bytes of the weights. More exact than bf16, less so than fp32."""
    weight = model.embed.weight
    if weight.dtype != torch.bfloat16 or not _is_small_latent(model, weight.new_empty(0, dtype=torch.float32)):
        return model
    return copy.deepcopy(model).float()


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is done around a module's own work: ranks share it."""
    return any(part._forward_hooks for part in module.modules())


def _is_small_latent(model: Transformer, like: Tensor) -> bool:
    """Whether FusedMLA takes a model of numbers like `like`, drafting modules too; shares of ranks it does not."""
    blocks = model.blocks()
    if any(has_hooks(block) for block in blocks) or not all(is_latent(block) for block in blocks):
        return False
    return kernels.takes_steps(like, model.cfg.hidden_size, "fused_latent")
