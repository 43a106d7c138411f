"""Models of dense blocks with grouped queries: in bf16 a few tokens in one call of a kernel, many, and any number in
fp32, by oneDNN's products and one call for all that lies between two of them.
"""

# Shapes in this file: N tokens, D hidden size, L blocks, H heads, G key/value heads, W head width, I intermediate size.

from typing import NamedTuple

import torch
from torch import Tensor

from thinkstack import kernels
from thinkstack.engine.fused import calls
from thinkstack.kernels.cpu.prepacked import exact, fits_prepacked, is_batch_invariant, multiply, prepacked
from thinkstack.kernels.paging import Pages
from thinkstack.models.attention import GQA
from thinkstack.models.block import BLOCK_MODULES, Block, has_only_modules
from thinkstack.models.layers import Linear, RMSNorm, RopeCache, SwiGLU
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import QuantizedLinear, QuantizedWeight
from thinkstack.models.transformer import Transformer

PACKED = BLOCK_MODULES - {Linear, MoE} | {QuantizedLinear, QuantizedWeight}
"""What a block consists of whose matrices are packed."""
Weights = dict[str, Tensor | None]


class Parts(NamedTuple):
    """One block's matrices as oneDNN multiplies them, those of one input in one, biases, and norms in fp32."""

    qkv: Tensor
    """(D, (H + 2 G) W)."""
    out: Tensor
    """(H W, D)."""
    gate_up: Tensor
    """(D, 2 I)."""
    down: Tensor
    """(I, D)."""
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    norms: tuple[Tensor, Tensor]
    """Before attention and before the feed-forward, (D,)."""
    head_norms: tuple[Tensor | None, Tensor | None]
    """Of queries and keys, (W,)."""


class FusedGQA:
    """The trunk of such a model; made anew when weights have changed."""

    def __init__(self, model: Transformer, blocks: list[Block]):
        """blocks: the model's, of which `is_dense` holds."""
        self.model, self.blocks = model, blocks
        attention, ffn = blocks[0].attention, blocks[0].ffn
        assert isinstance(attention, GQA) and isinstance(ffn, SwiGLU)
        shape = attention.shape
        self.heads = {"H": shape.num_heads, "G": shape.num_kv_heads, "W": shape.head_dim}
        self.heads["interleaved"] = int(attention.interleaved)
        self.scales = {"scale": attention.scale, "eps": model.cfg.norm_eps}
        self.kept = [_weights(block) for block in blocks] if _takes_few(blocks) else []
        self.few = calls.rows_of(calls.GQALayer, self.kept) if self.kept else None
        self.sizes = self.heads | {"I": ffn.w1.out_features}
        self.is_packed = bool(self.kept) and "sq" in self.kept[0]
        self.parts: list[Parts] = []
        """Of all blocks, once many tokens have come."""
        self.max_tokens = 1 << 40 if _takes_many(blocks) else kernels.SMALL_M
        self.head = exact(model.head.weight)
        self.rotations = RopeCache(model.cfg.attention.rope_dim, model.cfg.rope)

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """As FusedPass says."""
        x, rope = self.model.embed(ids), self.rotations.at(positions)
        if self.few is None or len(ids) > kernels.SMALL_M:
            return self._many(x, positions, pages, cache, rope), None
        calls.gqa_pass(x, self.few, self.sizes, rope, positions, pages, cache, self.scales, self.is_packed)
        return self.model.norm(x), None

    def _many(self, x: Tensor, positions: Tensor, pages: Pages, cache: Tensor, rope: Tensor) -> Tensor:
        """Take x (N, D) through all blocks, in place. Returns the norm of what it becomes."""
        self.parts = self.parts or [_parts(block) for block in self.blocks]
        eps = self.scales["eps"]
        following = [part.norms[0] for part in self.parts[1:]] + [self.model.norm.weight.detach().float()]
        normed, _ = kernels.rms_norm(x, self.parts[0].norms[0], eps, keep=False)
        for layer, (part, last_norm) in enumerate(zip(self.parts, following, strict=True)):
            qkv, own = multiply(normed, part.qkv, part.qkv_bias), pages._replace(entries=cache[layer])
            read = calls.attend_gqa(qkv, part.head_norms, self.heads, rope, positions, own, self.scales)
            normed = kernels.add_norm(x, multiply(read, part.out, part.out_bias), part.norms[1], eps)
            wide = kernels.swiglu_halves(multiply(normed, part.gate_up))
            normed = kernels.add_norm(x, multiply(wide, part.down), last_norm, eps)
        return normed

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """As FusedPass says."""
        return None


def is_dense(blocks: list[Block]) -> bool:
    """Whether FusedGQA takes them, a few tokens at least."""
    if any(not isinstance(block.attention, GQA) or not isinstance(block.ffn, SwiGLU) for block in blocks):
        return False
    return _takes_few(blocks) or _takes_many(blocks)


def _takes_few(blocks: list[Block]) -> bool:
    """Whether a kernel reads all matrices as they are stored, in bf16 or int8, of widths that it takes."""
    weights: list[Tensor] = []
    for block in blocks:
        if has_only_modules(block, BLOCK_MODULES):
            weights += [part.weight for part in block.modules() if isinstance(part, Linear)]
            continue
        layers = [part for part in block.modules() if isinstance(part, QuantizedLinear)]
        packed = [layer.int8_parts() for layer in layers if layer.quantized.dtype == torch.bfloat16]
        if not has_only_modules(block, PACKED) or len(packed) < len(layers) or None in packed:
            return False
        weights += [parts["qweight"] for parts in packed if parts is not None]
    return kernels.takes_small_m(weights[0].new_empty(1, kernels.LANES, dtype=torch.bfloat16), *weights)


def _takes_many(blocks: list[Block]) -> bool:
    """Whether their matrices may be kept as oneDNN multiplies them; in fp32, where a row's company does not matter."""
    if not all(has_only_modules(block, BLOCK_MODULES) for block in blocks):
        return False
    weights = [part.weight for block in blocks for part in block.modules() if isinstance(part, Linear)]
    if not kernels.takes(weights[0], "fused_dense") or len({weight.dtype for weight in weights}) > 1:
        return False
    if not fits_prepacked(*weights):
        return False
    return weights[0].dtype == torch.bfloat16 or all(
        is_batch_invariant(*shape) for block in blocks for shape in _shapes(block)
    )


def _shapes(block: Block) -> list[tuple[int, int]]:
    """Of the matrices of Parts, outputs first."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)
    groups = ((a.wq, a.wk, a.wv), (a.wo,), (ffn.w1, ffn.w3), (ffn.w2,))
    return [(sum(layer.out_features for layer in group), group[0].in_features) for group in groups]


def _weights(block: Block) -> Weights:
    """What GQALayer points to; vectors that are fp32 already are the model's own."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)
    found: Weights = {}
    for seq_index, names in ((a, ("wq", "wk", "wv", "wo")), (ffn, ("w1", "w2", "w3"))):
        for name in names:
            layer = getattr(seq_index, name)
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


def _parts(block: Block) -> Parts:
    """What many tokens are multiplied with."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)

    def together(*layers: Linear) -> tuple[Tensor, Tensor | None]:
        biases = [layer.bias.to(layer.weight.dtype) for layer in layers if layer.bias is not None]
        return prepacked(torch.cat([layer.weight for layer in layers])), torch.cat(biases) if biases else None

    def fp32(norm: RMSNorm | None) -> Tensor | None:
        return None if norm is None else norm.weight.detach().float()

    (qkv, qkv_bias), (out, out_bias) = together(a.wq, a.wk, a.wv), together(a.wo)
    gate_up, down = together(ffn.w1, ffn.w3)[0], together(ffn.w2)[0]
    norms = block.attention_norm.weight.detach().float(), block.ffn_norm.weight.detach().float()
    return Parts(qkv, out, gate_up, down, qkv_bias, out_bias, norms, (fp32(a.q_norm), fp32(a.k_norm)))
