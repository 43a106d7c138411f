"""What llama.cpp calls our tensors, and how it lays them out: one table, read in both directions.

Queries and keys of a Llama are rotated in neighboring pairs there, so their rows stand in another order than in
Hugging Face files. Experts lie in one stack per layer. The matrix that makes keys and values of MLA's latents is cut
into two stacks of heads, the keys' transposed, as attention on latents uses them; old files have it whole.
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

from thinkstack.checkpoint.hf.tensors import shapes_on_disk, stored_tensors
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

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK = {
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
"""Name within model.layers.N, the number of an expert left out -> name within blk.N."""
WHOLE, KEYS, VALUES = "attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"
ROPE_FREQS = "rope_freqs.weight"
"""What the frequencies of Llama 3's rotation are divided by."""

_BLOCK_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Laid:
    """A tensor of a GGUF."""

    name: str
    origins: tuple[str, ...]
    """The Hugging Face tensors it is made of: one, or all experts in order."""
    shape: tuple[int, ...]
    order: Literal["", "pairs", "keys", "values"] = ""
    """What is done to each: nothing, rows of rotated pairs side by side, or one of the two cuts of kv_b_proj."""
    heads: int = 0
    """Heads whose rows are reordered."""
    is_copy: bool = False
    """Repeats another tensor: read where it is there, never written."""

    @property
    def is_stack(self) -> bool:
        return self.name.endswith("_exps.weight")


def laid_out(cfg: ModelConfig, is_cut: bool = True) -> list[Laid]:
    """Every tensor of a GGUF of `cfg`, bottom up; rope_freqs aside. is_cut: whether kv_b_proj is."""
    shapes, found = shapes_on_disk(cfg), dict[str, Laid]()
    for item in stored_tensors(cfg):
        if item.name == "lm_head.weight" and cfg.tie_embeddings:
            continue
        name, shape = gguf_name(item.name), shapes[item.name]
        if name in found:
            stack = found[name]
            origins = (*stack.origins, item.name)
            found[name] = Laid(name, origins, (len(origins), *shape))
        elif _EXPERT.search(item.name):
            found[name] = Laid(name, (item.name,), (1, *shape))
        elif name.endswith(WHOLE) and is_cut:
            for laid in _cut_heads(cfg, name.removesuffix(WHOLE), item.name):
                found[laid.name] = laid
        else:
            heads = _turned_heads(cfg, item.name)
            found[name] = Laid(name, (item.name,), shape, "pairs" if heads else "", heads, item.is_copy)
    return list(found.values())


def gguf_name(name: str) -> str:
    """The GGUF tensor that one of Hugging Face's is, or is a part of."""
    block = _BLOCK_NAME.fullmatch(name)
    if block is None:
        return TOP[name]
    layer, rest = block[1], _EXPERT.sub(".experts.", block[2])
    if rest in BLOCK:
        return f"blk.{layer}.{BLOCK[rest]}"
    stem, _, leaf = rest.rpartition(".")  # matrices that may have biases
    return f"blk.{layer}.{BLOCK[stem]}.{leaf}"


def _cut_heads(cfg: ModelConfig, block: str, origin: str) -> tuple[Laid, Laid]:
    mla = cfg.attention
    assert isinstance(mla, MLAConfig)
    keys = (mla.num_heads, mla.kv_lora_rank, mla.qk_nope_head_dim)
    values = (mla.num_heads, mla.v_head_dim, mla.kv_lora_rank)
    return Laid(block + KEYS, (origin,), keys, "keys"), Laid(block + VALUES, (origin,), values, "values")


def _turned_heads(cfg: ModelConfig, name: str) -> int:
    """Heads whose rows llama.cpp keeps in its own order; 0 for none."""
    if cfg.family != "llama":
        return 0
    assert isinstance(cfg.attention, GQAConfig)
    heads = {"q_proj": cfg.attention.num_heads, "k_proj": cfg.attention.num_kv_heads}
    return heads.get(name.split(".")[-2], 0)


def pack(laid: Laid, cfg: ModelConfig, tensor: Tensor) -> Tensor:
    """One of the origins as it stands in the GGUF."""
    if laid.order == "pairs":  # pairs (i, i + R/2) of each head side by side
        return tensor.unflatten(0, (laid.heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    if laid.order:
        keys, values = _heads_of(cfg, tensor)
        return keys.transpose(1, 2) if laid.order == "keys" else values
    return tensor


def unpack(laids: Sequence[Laid], tensors: Sequence[Tensor]) -> Tensor:
    """A Hugging Face tensor out of the GGUF tensors that it became: one, or keys and values."""
    laid, tensor = laids[0], tensors[0]
    if laid.order == "pairs":
        return tensor.unflatten(0, (laid.heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
    if laid.order:
        keys, values = tensors
        dtype = torch.promote_types(keys.dtype, values.dtype)
        return torch.cat([keys.transpose(1, 2).to(dtype), values.to(dtype)], 1).flatten(0, 1)  # (H * (N + V), L)
    return tensor


def _heads_of(cfg: ModelConfig, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """kv_b_proj (H * (N + V), L) -> keys (H, N, L), values (H, V, L)."""
    mla = cfg.attention
    assert isinstance(mla, MLAConfig)
    keys, values = tensor.unflatten(0, (mla.num_heads, -1)).split([mla.qk_nope_head_dim, mla.v_head_dim], 1)
    return keys, values


def is_cut(tensors: Mapping[str, Any]) -> bool:
    """Whether kv_b_proj is cut into keys and values, as in all but old files."""
    return f"blk.0.{WHOLE}" not in tensors
