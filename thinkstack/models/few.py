"""A dense model for a few tokens at a time, in bf16 on a CPU: all its blocks in one call of a kernel."""

# Shapes in this file: N tokens, D hidden size, L blocks.

import torch
from torch import Tensor

from thinkstack.models import kernels
from thinkstack.models.attention import GQA
from thinkstack.models.block import Block
from thinkstack.models.kernels.calls import address
from thinkstack.models.layers import Projection, SwiGLU, rope_table
from thinkstack.models.pages import Pages
from thinkstack.models.transformer import Transformer

MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class FewTokens:
    """The blocks of a model, ready for the kernel. Weights may change in place, not be replaced."""

    def __init__(self, model: Transformer):
        """Take `few_tokens`, which asks whether the model is one for the kernel."""
        self.model, self.kept = model, [_weights(block) for block in _blocks(model)]
        rows = [kernels.BlockWeights(**{name: address(x) for name, x in held.items()}) for held in self.kept]
        self.blocks = (kernels.BlockWeights * len(rows))(*rows)
        attention, ffn = model.layers[0].attention, model.layers[0].ffn
        assert isinstance(attention, GQA) and isinstance(ffn, SwiGLU)
        shape = attention.shape
        self.sizes = {"H": shape.num_heads, "G": shape.num_kv_heads, "W": shape.head_dim, "I": ffn.w1.out_features}
        self.sizes["interleaved"] = int(attention.interleaved)
        self.scale, self.eps = attention.scale, model.cfg.norm_eps

    @torch.no_grad()
    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor:
        """What the model's trunk makes of tokens ids (N,) at positions (N,) of their sequences: (N, D), normed.

        pages: of the N tokens, in the first layer. cache: (L, blocks, P, W), of all layers; written to.
        """
        cfg, x = self.model.cfg, self.model.embed(ids)
        rope = rope_table(positions.unsqueeze(1), cfg.attention.rope_dim, cfg.rope)
        kernels.block_steps(x, self.blocks, self.sizes, rope, positions, pages, cache, self.scale, self.eps)
        normed: Tensor = self.model.norm(x)
        return normed


@torch.no_grad()
def few_tokens(model: Transformer) -> FewTokens | None:
    """The model's blocks for the kernel; None unless they are dense with grouped queries, plain, in bf16 on a CPU."""
    return FewTokens(model) if all(_is_plain(block) for block in _blocks(model)) else None


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.layers if isinstance(block, Block)]


def _is_plain(block: Block) -> bool:
    a, ffn = block.attention, block.ffn
    if not isinstance(a, GQA) or not isinstance(ffn, SwiGLU):
        return False
    linears = (a.wq, a.wk, a.wv, a.wo, ffn.w1, ffn.w2, ffn.w3)
    if any(type(linear) is not Projection for linear in linears):  # packed, adapted or in FP8
        return False
    if any(module._forward_hooks for module in (block, a, ffn, *linears)):  # shares of ranks
        return False
    weights = [linear.weight for linear in linears]
    return kernels.takes_few(weights[0].new_empty(1, kernels.LANES), *weights)


def _weights(block: Block) -> dict[str, Tensor | None]:
    """What BlockWeights points to; vectors that are fp32 already are the model's own."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)
    linears = (a.wq, a.wk, a.wv, a.wo, ffn.w1, ffn.w2, ffn.w3)
    found: dict[str, Tensor | None] = {name: linear.weight for name, linear in zip(MATRICES, linears, strict=True)}
    vectors = {
        "attention_norm": block.attention_norm.weight,
        "ffn_norm": block.ffn_norm.weight,
        "q_norm": None if a.q_norm is None else a.q_norm.weight,
        "k_norm": None if a.k_norm is None else a.k_norm.weight,
        **{f"b{name[1]}": linear.bias for name, linear in zip(MATRICES[:4], linears, strict=False)},
    }
    return found | {name: None if vector is None else vector.detach().float() for name, vector in vectors.items()}
