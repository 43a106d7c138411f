"""Fused forward passes over a cache, for models where the overhead of single operators exceeds their computation: dense
models with grouped-query attention (gqa.py) and small models with latent attention (mla.py).
"""

# Shapes in this file: N tokens, D hidden size, L layers, M layers with experts, K experts per token, P tokens per cache
# block, W entry width, V vocabulary size.

import copy
import logging
from typing import Protocol

import torch
from torch import Tensor

from thinkstack.engine.fused.gqa import FusedGQA
from thinkstack.engine.fused.mla import FusedMLA
from thinkstack.kernels.paging import Pages
from thinkstack.models.transformer import Transformer

log = logging.getLogger(__name__)


class FusedPass(Protocol):
    """The trunk of a model over a cache, with the weights that the model had at construction."""

    max_num_tokens: int
    """Maximum number of tokens per call."""
    ignores_threads: bool
    """Whether results of every step are bit for bit independent of torch's number of threads."""

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """`Transformer.trunk` of tokens ids (N,) at positions (N,) of their sequences.

        pages: pages of the N tokens in the first layer. cache: (L, blocks, P, W), the cache of all layers; the entries
        of the tokens are written to it. Returns (hidden states (N, D), normed; experts (M, N, K) int64 or None)."""

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """`Transformer.draft` of (N, D), (N,) and (N,): hidden states (N, D), or None if the pass does not support
        it."""

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Logits (N, V) of hidden states (N, D), batch-invariant; None if the model's head computes them."""


PASSES: tuple[type[FusedGQA] | type[FusedMLA], ...] = (FusedGQA, FusedMLA)


@torch.no_grad()
def fused_pass(model: Transformer) -> FusedPass | None:
    """The fused pass of `model`; None if all refuse it, for reasons that are logged."""
    for kind in PASSES:
        reason = kind.refusal(model)
        if reason is None:
            return kind(model)
        log.debug("%s: %s", kind.__name__, reason)
    return None


@torch.no_grad()
def upcast_small_model(model: Transformer) -> Transformer:
    """The model or, for a bf16 model that FusedMLA runs in fp32, a copy with the same weights in fp32. In such small
    models the overhead of calls dominates, not the bytes of the weights. Results are more accurate than in bf16, and
    less accurate than with fp32 weights."""
    if model.embed.weight.dtype != torch.bfloat16 or FusedMLA.refusal(model, torch.float32) is not None:
        return model
    return copy.deepcopy(model).float()
