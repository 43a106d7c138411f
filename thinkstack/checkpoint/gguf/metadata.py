"""The metadata of a model's GGUF.

The generated metadata are read back at once, so a setting that llama.cpp has no key for, or that it computes
differently, raises ConfigError. Source: llama.cpp, conversion/base.py, conversion/deepseek.py, src/models/*.cpp.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from thinkstack.checkpoint.gguf.config import BOS_KEY, END_KEYS, LLAMA3, config_of, rope_factors_of
from thinkstack.checkpoint.gguf.file import Metadata
from thinkstack.checkpoint.gguf.tensors import ARCHITECTURES, tensor_layouts
from thinkstack.checkpoint.hf.config import differences
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig
from thinkstack.types import ConfigError

_log = logging.getLogger(__name__)


def metadata_of(cfg: ModelConfig, end_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """Return the metadata of a model, without the tokenizer; ints are written as uint32, floats as float32.

    end_token_ids: stop tokens. Raises ConfigError for settings that llama.cpp computes differently or has no key for.
    """
    arch = ARCHITECTURES[cfg.family]
    values: dict[str, Any] = {
        "block_count": cfg.num_layers + cfg.mtp_layers,
        "context_length": cfg.max_positions,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "vocab_size": cfg.vocab_size,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "attention.head_count": cfg.attention.num_heads,
        "rope.dimension_count": cfg.attention.rope_dim,
        "rope.freq_base": float(cfg.rope.theta),
        **_attention_values(cfg.attention),
        **_expert_values(cfg),
        **_rope_values(cfg),
    }
    if cfg.mtp_layers:
        values["nextn_predict_layers"] = cfg.mtp_layers
    named = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in values.items()}
    if (llama3 := cfg.rope.llama3) is not None:
        numbers = (llama3.factor, llama3.low_freq_factor, llama3.high_freq_factor, llama3.original_max_positions)
        named[LLAMA3] = [float(number) for number in numbers]
    if len(end_token_ids) > len(END_KEYS):
        _log.warning(
            "a GGUF supports at most %d stop tokens; %s are left out",
            len(END_KEYS),
            end_token_ids[len(END_KEYS) :],
        )
    begin = {} if cfg.bos_id is None else {BOS_KEY: cfg.bos_id}
    named |= begin | dict(zip(END_KEYS, end_token_ids, strict=False))
    _check_expressed(cfg, named)
    return named


def _attention_values(attention: MLAConfig | GQAConfig) -> dict[str, Any]:
    """Return the attention metadata. In llama.cpp all MLA heads share one key and value head, the latent."""
    if isinstance(attention, GQAConfig):
        return {
            "attention.head_count_kv": attention.num_kv_heads,
            "attention.key_length": attention.head_dim,
            "attention.value_length": attention.head_dim,
        }
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": attention.cache_width,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.q_lora_rank": attention.q_lora_rank,
    }


def _expert_values(cfg: ModelConfig) -> dict[str, Any]:
    moe, is_deepseek = cfg.moe, cfg.family.startswith("deepseek")
    gating_func = 2 if cfg.family == "deepseek_v3" else 1
    if moe is None:
        dense = {
            "leading_dense_block_count": cfg.num_layers,
            "expert_feed_forward_length": cfg.intermediate_size,
            "expert_shared_count": 0,
            "expert_gating_func": gating_func,
        }
        return dense if is_deepseek else {}
    values: dict[str, Any] = {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_feed_forward_length": moe.moe_intermediate_size,
    }
    if not is_deepseek:
        return values
    values |= {
        "leading_dense_block_count": moe.first_dense_layers,
        "expert_shared_count": moe.num_shared_experts,
        "expert_weights_scale": float(moe.route_scale),
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_gating_func": gating_func,
    }
    if moe.top_groups < moe.num_groups:
        values |= {"expert_group_count": moe.num_groups, "expert_group_used_count": moe.top_groups}
    return values


def _rope_values(cfg: ModelConfig) -> dict[str, Any]:
    rope = cfg.rope
    if rope.linear_factor != 1:
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.linear_factor)}
    if rope.yarn is None:
        return {}
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.yarn.factor),
        "rope.scaling.original_context_length": rope.yarn.original_max_positions,
        "rope.scaling.yarn_beta_fast": float(rope.yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.yarn.beta_slow),
    }
    if rope.yarn.mscale_all_dim:
        values["rope.scaling.yarn_log_multiplier"] = rope.yarn.mscale_all_dim / 10
    return values


def _check_expressed(cfg: ModelConfig, values: Mapping[str, Any]) -> None:
    """Raise ConfigError unless llama.cpp supports this model, and reading the metadata back gives the same config."""
    arch = ARCHITECTURES[cfg.family]
    for is_other, what in _missing_there(cfg):
        if is_other:
            raise ConfigError(f"llama.cpp's {arch} has no {what}; write the hf format instead")
    shapes = {layout.name: layout.shape for layout in tensor_layouts(cfg)}
    factors = rope_factors_of(cfg.attention.rope_dim, cfg.rope) if cfg.rope.llama3 else None
    again = config_of(Metadata(Path("GGUF metadata"), values), shapes, factors)
    free = {"init_std": cfg.init_std, "embed_init_std": cfg.embed_init_std, "eos_ids": cfg.eos_ids}
    lost = differences(_plain_groups(cfg), replace(again, **free))  # type: ignore[arg-type]
    if lost:
        raise ConfigError(f"a {arch} GGUF cannot express {'; '.join(lost)}; write the hf format instead")


def _missing_there(cfg: ModelConfig) -> list[tuple[bool, str]]:
    """Return (whether the model has the feature, its name) for each feature that llama.cpp lacks."""
    attention, moe, yarn = cfg.attention, cfg.moe, cfg.rope.yarn
    if moe is not None and moe.group_score == "max" and moe.top_groups < moe.num_groups:
        _log.warning("llama.cpp ranks groups by their two best experts, %s by the best expert", cfg.family)
    rows = [(yarn is not None and (yarn.beta_fast, yarn.beta_slow) != (32, 1), "YaRN with other betas than 32 and 1")]
    if isinstance(attention, GQAConfig):
        is_odd = attention.num_heads * attention.head_dim != cfg.hidden_size
        rows += [
            (cfg.family == "qwen2" and is_odd, "heads whose total width differs from hidden_size"),
            (cfg.family != "llama" and attention.out_bias, "bias on the output of attention"),
            (cfg.family == "qwen3_moe" and (moe is None or moe.first_dense_layers > 0), "dense layers"),
        ]
        return rows
    lite = cfg.num_layers in (26, 27) or (cfg.num_layers == 48 and cfg.vocab_size == 128256)
    return [
        *rows,
        (moe is not None and moe.num_shared_experts == 0, "layers without a shared expert"),
        (lite and attention.q_lora_rank > 0, f"query latent in a model of {cfg.num_layers} layers"),
        (yarn is not None and yarn.mscale != yarn.mscale_all_dim, "YaRN with mscale different from mscale_all_dim"),
    ]


def _plain_groups(cfg: ModelConfig) -> ModelConfig:
    """Return the config with a single group if its groups exclude no expert."""
    moe = cfg.moe
    if moe is None or moe.top_groups < moe.num_groups:
        return cfg
    return replace(cfg, moe=replace(moe, num_groups=1, top_groups=1))
