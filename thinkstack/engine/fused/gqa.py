"""The fused pass of dense models with grouped-query attention.

In bf16, one kernel call runs up to SMALL_M tokens through all layers. More tokens, and any number of tokens in fp32,
use oneDNN's matmuls, with one kernel call for the operations between two matmuls.
"""

# Shapes in this file: N tokens, D hidden size, L blocks, H heads, G key/value heads, W head width, I intermediate size.

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from thinkstack.engine.fused import calls
from thinkstack.engine.fused.blocks import BLOCK_MODULES, FusedHead, refused_dtype, refused_module
from thinkstack.kernels.conditions import fits_small_m, on_cpu
from thinkstack.kernels.cpu import rows
from thinkstack.kernels.cpu.mkldnn import prepack
from thinkstack.kernels.cpu.prepacked import can_prepack_all, is_batch_invariant, prepacked_linear
from thinkstack.kernels.ops import Matrix
from thinkstack.kernels.paging import Pages
from thinkstack.kernels.sizes import LANES, SMALL_M
from thinkstack.models.attention import GQA
from thinkstack.models.block import Block
from thinkstack.models.layers import Linear, QuantizedLinear, QuantizedWeight, RMSNorm, RopeCache, SwiGLU
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.quant.int8 import Int8
from thinkstack.quant.scheme import QuantizedTensor

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


class FusedGQA(FusedHead):
    """The trunk of a dense model with grouped-query attention; must be rebuilt after a change of weights."""

    def __init__(self, model: Transformer):
        """`refusal(model)` must be None."""
        super().__init__(model.head.weight)
        self.model, self.blocks = model, model.blocks()[: model.cfg.num_layers]
        blocks = self.blocks
        attention, ffn = _parts(blocks[0])
        shape = attention.shape
        self.numbers: dict[str, float] = {"H": shape.num_heads, "G": shape.num_kv_heads, "W": shape.head_dim}
        self.numbers |= {"interleaved": attention.interleaved, "scale": attention.scale, "eps": model.cfg.norm_eps}
        self.weights = [] if _small_m_refusal(blocks) else [_small_m_weights(block) for block in blocks]
        self.small_m_layers = calls.layer_array(calls.GQALayer, self.weights) if self.weights else None
        self.pass_numbers = self.numbers | {"I": ffn.w1.out_features}
        self.is_int8 = bool(self.weights) and "sq" in self.weights[0]
        self.gemm_weights: list[GemmWeights] = []
        """Weights of each block, prepacked at the first call with more than SMALL_M tokens."""
        has_gemm = _gemm_refusal(blocks) is None
        self.max_num_tokens = 1 << 40 if has_gemm else SMALL_M
        self.ignores_threads = has_gemm and self.prepacked_head is not None
        self.rope = RopeCache(model.cfg.attention.rope_dim, model.cfg.rope)

    @staticmethod
    def refusal(model: Transformer) -> str | None:
        """Why the pass does not run this model; None if it does, at least for up to SMALL_M tokens."""
        blocks = model.blocks()[: model.cfg.num_layers]
        if any(not isinstance(block.attention, GQA) for block in blocks):
            return "attention other than grouped-query attention"
        if any(not isinstance(block.ffn, SwiGLU) for block in blocks):
            return "experts"
        if reason := refused_dtype(model, blocks):
            return reason
        small_m, gemm = _small_m_refusal(blocks), _gemm_refusal(blocks)
        if small_m is None or gemm is None:
            return None
        return small_m if small_m == gemm else f"{small_m}; {gemm}"

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """As in FusedPass."""
        x, rope = self.model.embed(ids), self.rope.lookup(positions)
        if self.small_m_layers is None or len(ids) > SMALL_M:
            return self._forward_gemm(x, positions, pages, cache, rope), None
        kernel = "gqa_pass_int8" if self.is_int8 else "gqa_pass_bf16"
        calls.run_pass(kernel, self.small_m_layers, self.pass_numbers, x, rope, positions, pages, cache)
        return self.model.norm(x), None

    def _forward_gemm(self, x: Tensor, positions: Tensor, pages: Pages, cache: Tensor, rope: Tensor) -> Tensor:
        """Run x (N, D) through all blocks, in place. Returns the result of the final norm."""
        self.gemm_weights = self.gemm_weights or [_gemm_weights(block) for block in self.blocks]
        eps = self.model.cfg.norm_eps
        following = [part.norms[0] for part in self.gemm_weights[1:]] + [self.model.norm.weight.detach().float()]
        normed, _ = rows.rms_norm(x, self.gemm_weights[0].norms[0], eps, return_inverse=False)
        for layer, (w, last_norm) in enumerate(zip(self.gemm_weights, following, strict=True)):
            qkv, own = prepacked_linear(normed, w.qkv, w.qkv_bias), pages._replace(entries=cache[layer])
            heads = calls.attend_gqa(qkv, w.head_norms, self.numbers, rope, positions, own)
            normed = rows.add_norm(x, prepacked_linear(heads, w.out, w.out_bias), w.norms[1], eps)
            inner = rows.swiglu_halves(prepacked_linear(normed, w.gate_up))
            normed = rows.add_norm(x, prepacked_linear(inner, w.down), last_norm, eps)
        return normed

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """As in FusedPass."""
        return None


def _parts(block: Block) -> tuple[GQA, SwiGLU]:
    """Attention and feed-forward of a block."""
    assert isinstance(block.attention, GQA) and isinstance(block.ffn, SwiGLU)
    return block.attention, block.ffn


def _small_m_refusal(blocks: list[Block]) -> str | None:
    """Why the small-M kernel does not run these blocks; None if it does."""
    weights: list[Tensor] = []
    for block in blocks:
        matrices = [part.matrix for part in block.modules() if isinstance(part, Linear)]
        if any(isinstance(matrix, QuantizedTensor) for matrix in matrices):
            reason = refused_module([block], QUANTIZED_BLOCK_MODULES)
            int8 = [matrix.parts["qweight"] for matrix in matrices if _is_int8(matrix)]
            if reason is not None or len(int8) < len(matrices):
                return reason or "quantized weights other than int8 for matmuls in bf16"
            weights += int8
        elif reason := refused_module([block], BLOCK_MODULES):
            return reason
        else:
            weights += [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    if fits_small_m(weights[0].new_empty(1, LANES, dtype=torch.bfloat16), *weights):
        return None
    return f"no small-M kernel for these matrices in {weights[0].dtype}"


def _is_int8(matrix: Matrix) -> TypeGuard[QuantizedTensor]:
    """Whether a matrix is int8 for matmuls in bf16."""
    return isinstance(matrix, QuantizedTensor) and isinstance(matrix.scheme, Int8) and matrix.dtype == torch.bfloat16


def _gemm_refusal(blocks: list[Block]) -> str | None:
    """Why prepacked matrices do not run these blocks; None if they do."""
    if reason := refused_module(blocks, BLOCK_MODULES):
        return reason
    weights = [part.weight for block in blocks for part in block.modules() if isinstance(part, Linear)]
    if not on_cpu(weights[0], "fused_gqa"):
        return f"no kernels for {weights[0].dtype} on {weights[0].device.type}"
    if not can_prepack_all(*weights):
        return "no memory or no oneDNN for prepacked matrices"
    shapes = [] if weights[0].dtype == torch.bfloat16 else [shape for block in blocks for shape in _shapes(block)]
    if varying := [shape for shape in shapes if not is_batch_invariant(*shape, torch.get_num_threads())]:
        return f"matmuls with a matrix {varying[0]} are not batch-invariant"
    return None


def _shapes(block: Block) -> list[tuple[int, int]]:
    """(outputs, inputs) of each matrix of GemmWeights."""
    a, ffn = _parts(block)
    groups = ((a.wq, a.wk, a.wv), (a.wo,), (ffn.w1, ffn.w3), (ffn.w2,))
    return [(sum(layer.out_features for layer in group), group[0].in_features) for group in groups]


def _small_m_weights(block: Block) -> SmallMWeights:
    """The weights of a GQALayer, by field; fp32 vectors are shared with the model."""
    a, ffn = _parts(block)
    found: SmallMWeights = {}
    for module, names in ((a, ("wq", "wk", "wv", "wo")), (ffn, ("w1", "w2", "w3"))):
        for name in names:
            layer = getattr(module, name)
            if isinstance(layer, QuantizedLinear):
                parts = layer.quantized.tensor.parts
                found |= {name: parts["qweight"], f"s{name[1]}": parts["scale"]}
            else:
                found[name] = layer.weight
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
    a, ffn = _parts(block)

    def concatenated(*layers: Linear) -> tuple[Tensor, Tensor | None]:
        biases = [layer.bias.to(layer.weight.dtype) for layer in layers if layer.bias is not None]
        return prepack(torch.cat([layer.weight for layer in layers])), torch.cat(biases) if biases else None

    def fp32(norm: RMSNorm | None) -> Tensor | None:
        return None if norm is None else norm.weight.detach().float()

    (qkv, qkv_bias), (out, out_bias) = concatenated(a.wq, a.wk, a.wv), concatenated(a.wo)
    gate_up, down = concatenated(ffn.w1, ffn.w3)[0], concatenated(ffn.w2)[0]
    norms = block.attention_norm.weight.detach().float(), block.ffn_norm.weight.detach().float()
    return GemmWeights(qkv, out, gate_up, down, qkv_bias, out_bias, norms, (fp32(a.q_norm), fp32(a.k_norm)))
