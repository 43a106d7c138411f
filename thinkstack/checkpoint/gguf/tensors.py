"""Names and layouts of tensors in GGUF files: one table for both directions.

llama.cpp rotates queries and keys of a Llama in neighboring pairs, so the rows of their projections have another order
than in Hugging Face files. Experts are one stack per layer. kv_b_proj, which computes keys and values from MLA's
latents, is split into a stack of heads for keys (transposed, as in attention on latents) and one for values; old files
have the unsplit matrix.
Source: llama.cpp, convert_hf_to_gguf.py (conversion/*.py) and src/llama-arch.cpp.
"""

# Shapes in this file: H heads, R width of a head, D hidden size, N and V widths of a key without position and of a
# value, L width of the latent.

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from thinkstack.checkpoint.hf.tensors import shapes_on_disk, tensor_entries
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
"""general.architecture by family."""

TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.experts.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.down_proj.weight": "ffn_down_exps.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "embed_tokens.weight": "nextn.embed_tokens.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
}
"""Name within model.layers.N, without the number of an expert -> name within blk.N."""
KV_B, K_B, V_B = "attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"
ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the frequencies in Llama 3's context extension."""

_BLOCK_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class TensorLayout:
    """Name, shape and origin of a tensor in a GGUF."""

    name: str
    origins: tuple[str, ...]
    """The Hugging Face tensors that it contains: one, or all experts in order."""
    shape: tuple[int, ...]
    order: Literal["", "pairs", "keys", "values"] = ""
    """Transformation of each origin: none, rows of rotated pairs adjacent, or one of the two parts of kv_b_proj."""
    heads: int = 0
    """Number of heads whose rows are permuted; 0 for none."""
    is_copy: bool = False
    """Whether it repeats another tensor; copies are read if present and never written."""

    @property
    def is_stack(self) -> bool:
        return self.name.endswith("_exps.weight")


def tensor_layouts(cfg: ModelConfig, splits_kv_b: bool = True) -> list[TensorLayout]:
    """Return the layout of every tensor of a GGUF of `cfg`, without rope_freqs, from embedding to head.

    splits_kv_b: whether kv_b_proj is split into keys and values.
    """
    shapes, found = shapes_on_disk(cfg), dict[str, TensorLayout]()
    for entry in tensor_entries(cfg):
        if entry.name == "lm_head.weight" and cfg.tie_embeddings:
            continue
        name, shape = gguf_name(entry.name), shapes[entry.name]
        if name in found:
            stack = found[name]
            origins = (*stack.origins, entry.name)
            found[name] = TensorLayout(name, origins, (len(origins), *shape))
        elif _EXPERT.search(entry.name):
            found[name] = TensorLayout(name, (entry.name,), (1, *shape))
        elif name.endswith(KV_B) and splits_kv_b:
            for layout in _kv_b_layouts(cfg, name.removesuffix(KV_B), entry.name):
                found[layout.name] = layout
        else:
            heads = _permuted_heads(cfg, entry.name)
            found[name] = TensorLayout(name, (entry.name,), shape, "pairs" if heads else "", heads, entry.is_copy)
    return list(found.values())


def gguf_name(name: str) -> str:
    """Return the name of the GGUF tensor that contains a Hugging Face tensor."""
    block = _BLOCK_NAME.fullmatch(name)
    if block is None:
        return TOP_NAMES[name]
    layer, rest = block[1], _EXPERT.sub(".experts.", block[2])
    if rest in BLOCK_NAMES:
        return f"blk.{layer}.{BLOCK_NAMES[rest]}"
    stem, _, leaf = rest.rpartition(".")  # matrices that may have biases
    return f"blk.{layer}.{BLOCK_NAMES[stem]}.{leaf}"


def _kv_b_layouts(cfg: ModelConfig, block: str, origin: str) -> tuple[TensorLayout, TensorLayout]:
    mla = cfg.attention
    assert isinstance(mla, MLAConfig)
    keys = (mla.num_heads, mla.kv_lora_rank, mla.qk_nope_head_dim)
    values = (mla.num_heads, mla.v_head_dim, mla.kv_lora_rank)
    return TensorLayout(block + K_B, (origin,), keys, "keys"), TensorLayout(block + V_B, (origin,), values, "values")


def _permuted_heads(cfg: ModelConfig, name: str) -> int:
    """Return the number of heads whose rows llama.cpp permutes; 0 for none."""
    if cfg.family != "llama":
        return 0
    assert isinstance(cfg.attention, GQAConfig)
    heads = {"q_proj": cfg.attention.num_heads, "k_proj": cfg.attention.num_kv_heads}
    return heads.get(name.split(".")[-2], 0)


def to_gguf(layout: TensorLayout, cfg: ModelConfig, tensor: Tensor) -> Tensor:
    """Convert one origin (a Hugging Face tensor) to its order in the GGUF."""
    if layout.order == "pairs":  # pairs (i, i + R/2) of each head side by side
        return tensor.unflatten(0, (layout.heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    if layout.order:
        keys, values = _split_kv_b(cfg, tensor)
        return keys.transpose(1, 2) if layout.order == "keys" else values
    return tensor


def from_gguf(layouts: Sequence[TensorLayout], tensors: Sequence[Tensor]) -> Tensor:
    """Convert GGUF tensors (one, or keys and values) back to the Hugging Face tensor."""
    layout, tensor = layouts[0], tensors[0]
    if layout.order == "pairs":
        return tensor.unflatten(0, (layout.heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
    if layout.order:
        keys, values = tensors
        dtype = torch.promote_types(keys.dtype, values.dtype)
        return torch.cat([keys.transpose(1, 2).to(dtype), values.to(dtype)], 1).flatten(0, 1)  # (H * (N + V), L)
    return tensor


def _split_kv_b(cfg: ModelConfig, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """kv_b_proj (H * (N + V), L) -> keys (H, N, L), values (H, V, L)."""
    mla = cfg.attention
    assert isinstance(mla, MLAConfig)
    keys, values = tensor.unflatten(0, (mla.num_heads, -1)).split([mla.qk_nope_head_dim, mla.v_head_dim], 1)
    return keys, values


def splits_kv_b(tensors: Mapping[str, Any]) -> bool:
    """Whether kv_b_proj is split into keys and values, as in all but old files."""
    return f"blk.0.{KV_B}" not in tensors
