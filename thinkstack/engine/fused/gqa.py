"""The fused pass of dense models with grouped-query attention.

In bf16, one kernel call runs up to SMALL_M tokens through all layers. More tokens, and any number of tokens in fp32,
use oneDNN's matmuls, with one kernel call for the operations between two matmuls.
"""

# Shapes in this file: N tokens, D hidden size, L blocks, H heads, G key/value heads, W head width, I intermediate size.

from typing import NamedTuple

import torch
from torch import Tensor

from thinkstack import kernels
from thinkstack.engine.fused import calls
from thinkstack.kernels.cpu.prepacked import (
    fits_prepacked,
    is_batch_invariant,
    prepack,
    prepack_batch_invariant,
    prepacked_linear,
)
from thinkstack.kernels.paging import Pages
from thinkstack.models.attention import GQA
from thinkstack.models.block import BLOCK_MODULES, Block, has_only_modules
from thinkstack.models.layers import Linear, RMSNorm, RopeCache, SwiGLU
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import QuantizedLinear, QuantizedWeight
from thinkstack.models.transformer import Transformer

QUANTIZED_BLOCK_MODULES = BLOCK_MODULES - {Linear, MoE} | {QuantizedLinear, QuantizedWeight}
"""The module types of a block with quantized matrices."""
SmallMWeights = dict[str, Tensor | None]


class GemmWeights(NamedTuple):
    """Prepacked matrices of a block (matrices with the same input are concatenated), biases, and norms in fp32."""

    qkv: Tensor
    """Queries, keys and values, (D, (H + 2 G) W)."""
    out: Tensor
    """Output projection, (H W, D)."""
    gate_up: Tensor
    """Gate and up projection, (D, 2 I)."""
    down: Tensor
    """Down projection, (I, D)."""
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    norms: tuple[Tensor, Tensor]
    """Norms before attention and before the feed-forward, (D,) each."""
    head_norms: tuple[Tensor | None, Tensor | None]
    """Norms of query heads and of key heads, (W,) each."""


class FusedGQA:
    """The trunk of a dense model with grouped-query attention; must be rebuilt after a change of weights."""

    def __init__(self, model: Transformer, blocks: list[Block]):
        """blocks: the blocks of the model; `supports_fused_gqa(blocks)` must be true."""
        self.model, self.blocks = model, blocks
        attention, ffn = blocks[0].attention, blocks[0].ffn
        assert isinstance(attention, GQA) and isinstance(ffn, SwiGLU)
        shape = attention.shape
        self.attention_sizes = {"H": shape.num_heads, "G": shape.num_kv_heads, "W": shape.head_dim}
        self.attention_sizes["interleaved"] = int(attention.interleaved)
        self.scales = {"scale": attention.scale, "eps": model.cfg.norm_eps}
        self.weights = [_small_m_weights(block) for block in blocks] if _supports_small_m(blocks) else []
        self.small_m_layers = calls.layer_array(calls.GQALayer, self.weights) if self.weights else None
        self.sizes = self.attention_sizes | {"I": ffn.w1.out_features}
        self.is_int8 = bool(self.weights) and "sq" in self.weights[0]
        self.gemm_weights: list[GemmWeights] = []
        """Weights of each block, prepacked at the first call with more than SMALL_M tokens."""
        self.max_num_tokens = 1 << 40 if _supports_gemm(blocks) else kernels.SMALL_M
        self.prepacked_head = prepack_batch_invariant(model.head.weight)
        self.rope = RopeCache(model.cfg.attention.rope_dim, model.cfg.rope)

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """As in FusedPass."""
        x, rope = self.model.embed(ids), self.rope.lookup(positions)
        if self.small_m_layers is None or len(ids) > kernels.SMALL_M:
            return self._forward_gemm(x, positions, pages, cache, rope), None
        calls.gqa_pass(x, self.small_m_layers, self.sizes, rope, positions, pages, cache, self.scales, self.is_int8)
        return self.model.norm(x), None

    def _forward_gemm(self, x: Tensor, positions: Tensor, pages: Pages, cache: Tensor, rope: Tensor) -> Tensor:
        """Run x (N, D) through all blocks, in place. Returns the result of the final norm."""
        self.gemm_weights = self.gemm_weights or [_gemm_weights(block) for block in self.blocks]
        eps = self.scales["eps"]
        following = [part.norms[0] for part in self.gemm_weights[1:]] + [self.model.norm.weight.detach().float()]
        normed, _ = kernels.rms_norm(x, self.gemm_weights[0].norms[0], eps, return_inverse=False)
        for layer, (w, last_norm) in enumerate(zip(self.gemm_weights, following, strict=True)):
            qkv, own = prepacked_linear(normed, w.qkv, w.qkv_bias), pages._replace(entries=cache[layer])
            heads = calls.attend_gqa(qkv, w.head_norms, self.attention_sizes, rope, positions, own, self.scales)
            normed = kernels.add_norm(x, prepacked_linear(heads, w.out, w.out_bias), w.norms[1], eps)
            inner = kernels.swiglu_halves(prepacked_linear(normed, w.gate_up))
            normed = kernels.add_norm(x, prepacked_linear(inner, w.down), last_norm, eps)
        return normed

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """As in FusedPass."""
        return None


def supports_fused_gqa(blocks: list[Block]) -> bool:
    """Whether FusedGQA supports these blocks, at least for up to SMALL_M tokens."""
    if any(not isinstance(block.attention, GQA) or not isinstance(block.ffn, SwiGLU) for block in blocks):
        return False
    return _supports_small_m(blocks) or _supports_gemm(blocks)


def _supports_small_m(blocks: list[Block]) -> bool:
    """Whether the small-M kernel supports dtype (bf16 or int8) and widths of all matrices."""
    weights: list[Tensor] = []
    for block in blocks:
        if has_only_modules(block, BLOCK_MODULES):
            weights += [part.weight for part in block.modules() if isinstance(part, Linear)]
            continue
        layers = [part for part in block.modules() if isinstance(part, QuantizedLinear)]
        int8 = [layer.int8_parts() for layer in layers if layer.quantized.dtype == torch.bfloat16]
        if not has_only_modules(block, QUANTIZED_BLOCK_MODULES) or len(int8) < len(layers) or None in int8:
            return False
        weights += [parts["qweight"] for parts in int8 if parts is not None]
    return kernels.takes_small_m(weights[0].new_empty(1, kernels.LANES, dtype=torch.bfloat16), *weights)


def _supports_gemm(blocks: list[Block]) -> bool:
    """Whether all matrices can be prepacked and, in fp32, whether their matmuls are batch-invariant."""
    if not all(has_only_modules(block, BLOCK_MODULES) for block in blocks):
        return False
    weights = [part.weight for block in blocks for part in block.modules() if isinstance(part, Linear)]
    if not kernels.takes(weights[0], "fused_gqa") or len({weight.dtype for weight in weights}) > 1:
        return False
    if not fits_prepacked(*weights):
        return False
    return weights[0].dtype == torch.bfloat16 or all(
        is_batch_invariant(*shape) for block in blocks for shape in _shapes(block)
    )


def _shapes(block: Block) -> list[tuple[int, int]]:
    """(outputs, inputs) of each matrix of GemmWeights."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)
    groups = ((a.wq, a.wk, a.wv), (a.wo,), (ffn.w1, ffn.w3), (ffn.w2,))
    return [(sum(layer.out_features for layer in group), group[0].in_features) for group in groups]


def _small_m_weights(block: Block) -> SmallMWeights:
    """The weights of a GQALayer, by field; fp32 vectors are shared with the model."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)
    found: SmallMWeights = {}
    for module, names in ((a, ("wq", "wk", "wv", "wo")), (ffn, ("w1", "w2", "w3"))):
        for name in names:
            layer = getattr(module, name)
            parts = layer.int8_parts() if isinstance(layer, QuantizedLinear) else None
            if parts is None:
                found[name] = layer.weight
            else:
                found |= {name: parts["qweight"], f"s{name[1]}": parts["scale"]}
    vectors = {
        "attention_norm": block.attention_norm.weight,
        "ffn_norm": block.ffn_norm.weight,
        "q_norm": None if a.q_norm is None else a.q_norm.weight,
        "k_norm": None if a.k_norm is None else a.k_norm.weight,
        **{"bq": a.wq.bias, "bk": a.wk.bias, "bv": a.wv.bias, "bo": a.wo.bias},
    }
    return found | {name: None if vector is None else vector.detach().float() for name, vector in vectors.items()}


def _gemm_weights(block: Block) -> GemmWeights:
    """The weights of a block for more than SMALL_M tokens."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)

    def concatenated(*layers: Linear) -> tuple[Tensor, Tensor | None]:
        biases = [layer.bias.to(layer.weight.dtype) for layer in layers if layer.bias is not None]
        return prepack(torch.cat([layer.weight for layer in layers])), torch.cat(biases) if biases else None

    def fp32(norm: RMSNorm | None) -> Tensor | None:
        return None if norm is None else norm.weight.detach().float()

    (qkv, qkv_bias), (out, out_bias) = concatenated(a.wq, a.wk, a.wv), concatenated(a.wo)
    gate_up, down = concatenated(ffn.w1, ffn.w3)[0], concatenated(ffn.w2)[0]
    norms = block.attention_norm.weight.detach().float(), block.ffn_norm.weight.detach().float()
    return GemmWeights(qkv, out, gate_up, down, qkv_bias, out_bias, norms, (fp32(a.q_norm), fp32(a.k_norm)))
