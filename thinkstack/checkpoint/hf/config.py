"""ModelConfig to and from the config.json of DeepseekV3, DeepseekV2, Llama, Qwen2 (2.5), Qwen3 and Qwen3Moe.

Both key sets of transformers are read: version 4 (rope_theta, rope_scaling) and 5 (rope_parameters). Version 4 is
written, as in the released files; both versions read it. A value that would change the computation in a way that this
package does not support raises ConfigError with its name; keys without effect here (use_cache, ep_size,
aux_loss_alpha, ...) are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from thinkstack.checkpoint.hf.rope import read_rope, rope_keys
from thinkstack.checkpoint.json_reader import REQUIRED, JsonReader
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.quant.scheme import QuantScheme
from thinkstack.types import ConfigError

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""Class name in transformers, by family (model_type)."""

DEEPSEEK = ("deepseek_v3", "deepseek_v2")
"""Families with latent attention."""

EMBED_INIT_STD = "thinkstack_embed_init_std"
"""Our own key for ModelConfig.embed_init_std, which Hugging Face lacks."""

# Keys of which only one value is supported: (key, supported value, advice).
_REQUIRED_VALUES: tuple[tuple[str, Any, str], ...] = (
    ("hidden_act", "silu", "use a model with SwiGLU"),
    ("mlp_bias", False, "use a model without biases in the feed-forward layers"),
    ("attention_dropout", 0, "set it to 0; this package trains without dropout"),
    ("moe_layer_freq", 1, "use a model in which every layer from first_k_dense_replace on has experts"),
    ("partial_rotary_factor", 1, "use a model without partial rotary embeddings"),
    ("decoder_sparse_step", 1, "use a model in which every layer after the first dense ones has experts"),
    ("use_sliding_window", False, "use a model with full attention"),
    ("dual_chunk_attention_config", None, "remove the key; it changes nothing up to the trained context length"),
)

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""The only supported quantization_config, apart from scale_fmt."""


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the ModelConfig of a config.json. where: its path, for messages.

    Raises ConfigError for an unsupported family, value or combination.
    """
    reader = JsonReader(config, where)
    family = reader.text("model_type")
    if family not in ARCHITECTURES:
        raise ConfigError(f"{where}: model_type={family!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    read_quantization(config, where)
    for key, allowed, way_out in _REQUIRED_VALUES:
        reader.require(key, allowed, way_out)
    _require_full_attention(family, reader)
    try:
        return _read_model(family, reader)
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None


def read_quantization(config: Mapping[str, Any], where: str) -> FP8Blocks | None:
    """Return the quantization of a config.json: None for floats, or e4m3 in blocks of 128 x 128.

    Raises ConfigError for any other quantization.
    """
    if config.get("quantization_config") is None:
        return None
    reader = JsonReader(config, where).object("quantization_config")
    for key, allowed in _FP8.items():
        reader.require(key, allowed, "use a checkpoint in bf16, or in DeepSeek's FP8")
    for key in ("quant_method", "weight_block_size"):
        if reader.values.get(key) is None:
            raise ConfigError(f"{reader.where} has no {key}; use the config.json of these weights")
    scale_fmt = reader.text("scale_fmt", "")
    if scale_fmt not in ("", "ue8m0"):
        raise ConfigError(f"{reader.where}: scale_fmt={scale_fmt!r} is not supported; known: none, ue8m0")
    return FP8Blocks(power_of_two=scale_fmt == "ue8m0")


def quantization_keys(quantization: QuantScheme | None) -> dict[str, Any]:
    """Return the config.json keys of a quantization; the inverse of `read_quantization`.

    Raises ConfigError for an unsupported scheme.
    """
    if quantization is None:
        return {}
    if not isinstance(quantization, FP8Blocks):
        raise ConfigError(f"Hugging Face files do not support {quantization.name} quantization; write bf16 or fp8")
    scale_fmt = {"scale_fmt": "ue8m0"} if quantization.power_of_two else {}
    return {"quantization_config": dict(sorted((_FP8 | scale_fmt).items()))}


def _require_full_attention(family: str, reader: JsonReader) -> None:
    """Raise ConfigError for sliding-window attention. Qwen files have a window and a separate switch for it; in other
    files a window is always used."""
    if not family.startswith("qwen"):
        reader.require("sliding_window", None, "use a model with full attention")
    kinds = reader.values.get("layer_types") or []
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise ConfigError(
            f"{reader.where}: layer_types has {other[0]!r}, which is not supported (only 'full_attention'); use a "
            "model with full attention"
        )


def _read_model(family: str, reader: JsonReader) -> ModelConfig:
    attention = _read_mla(reader) if family in DEEPSEEK else _read_gqa(family, reader)
    return ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        attention=attention,
        intermediate_size=reader.integer("intermediate_size"),
        moe=_read_experts(family, reader),
        mtp_layers=reader.integer("num_nextn_predict_layers", 0, least=0),
        rope=read_rope(family, reader),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        max_positions=reader.integer("max_position_embeddings"),
        bos_id=read_bos(reader),
        eos_ids=read_eos(reader),
        init_std=reader.number("initializer_range", 0.02),
        embed_init_std=reader.number(EMBED_INIT_STD, 0.0),
    )


def _read_gqa(family: str, reader: JsonReader) -> GQAConfig:
    """Read the GQA settings. Some keys are optional for Llama and required for Qwen, for which transformers uses fixed
    defaults that do not depend on other keys."""
    heads, width = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    is_llama, is_qwen2 = family == "llama", family == "qwen2"
    if is_qwen2:
        reader.require("attention_bias", True, "Qwen2 has biases on queries, keys and values")
    has_biases = reader.flag("attention_bias", False)
    return GQAConfig(
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads if is_llama else REQUIRED),
        head_dim=reader.integer("head_dim", width // heads if is_llama or is_qwen2 else REQUIRED),
        qkv_bias=is_qwen2 or has_biases,
        out_bias=has_biases and not is_qwen2,
        qk_norm=family.startswith("qwen3"),
    )


def _read_mla(reader: JsonReader) -> MLAConfig:
    heads = reader.integer("num_attention_heads")
    reader.require("attention_bias", False, "use a model without biases in latent attention")
    # transformers always uses 1e-6 for the norms of the latents, other programs use the key
    reader.require("rms_norm_eps", 1e-6, "with another value, programs compute the norms of the latents differently")
    reader.require("num_key_value_heads", heads, "latent attention has as many key/value heads as query heads")
    return MLAConfig(
        num_heads=heads,
        q_lora_rank=reader.integer("q_lora_rank", 0, least=0),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
    )


def _read_experts(family: str, reader: JsonReader) -> MoEConfig | None:
    """Read the MoE settings of any family; None for a dense model."""
    if family in DEEPSEEK:
        return _read_deepseek_experts(family, reader)
    return _read_qwen_experts(reader) if family == "qwen3_moe" else None


def _read_qwen_experts(reader: JsonReader) -> MoEConfig | None:
    """Read the MoE settings of Qwen3Moe: softmax, no groups, no shared experts, a list of dense layers."""
    key = "num_local_experts" if "num_local_experts" in reader.values else "num_experts"  # transformers 5 and 4
    if not reader.integer(key, least=0):
        return None
    dense = reader.values.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        raise ConfigError(f"mlp_only_layers={dense!r} is not supported; dense layers must come first: 0, 1, ...")
    return MoEConfig(
        num_experts=reader.integer(key),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        num_shared_experts=0,
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        scoring="softmax",
        group_score="max",
        norm_topk_prob=reader.flag("norm_topk_prob", False),
        first_dense_layers=len(dense),
    )


def _read_deepseek_experts(family: str, reader: JsonReader) -> MoEConfig | None:
    """Read the MoE settings of V3 (sigmoid, bias, top 2 of a group) or V2 (softmax, best of a group); None if dense."""
    if not reader.integer("n_routed_experts", 0, least=0):
        return None
    num_groups, top_groups = reader.integer("n_group", 1), reader.integer("topk_group", 1)
    if family == "deepseek_v3":
        reader.require("scoring_func", "sigmoid", "DeepseekV3 scores experts by sigmoid")
        reader.require("topk_method", "noaux_tc", "DeepseekV3 chooses experts by bias (noaux_tc)")
    else:
        reader.require("scoring_func", "softmax", "DeepseekV2 scores experts by softmax")
        # DeepSeek's code and transformers interpret true differently; no released model has it
        reader.require("norm_topk_prob", False, "DeepseekV2 does not normalize the expert weights")
        method = reader.text("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(f"topk_method={method!r} is not supported; DeepseekV2 has greedy, group_limited_greedy")
        if method == "greedy":
            num_groups = top_groups = 1
    is_v3 = family == "deepseek_v3"
    return MoEConfig(
        num_experts=reader.integer("n_routed_experts"),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        num_shared_experts=reader.integer("n_shared_experts", 0, least=0),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        num_groups=num_groups,
        top_groups=top_groups,
        scoring="sigmoid" if is_v3 else "softmax",
        group_score="top2" if is_v3 else "max",
        norm_topk_prob=reader.flag("norm_topk_prob", is_v3),
        route_scale=reader.number("routed_scaling_factor", 1.0),
        first_dense_layers=reader.integer("first_k_dense_replace", 0, least=0),
    )


def read_bos(reader: JsonReader, rows: int | None = None) -> int | None:
    """Return `bos_token_id` of a file: None if it is missing, null or -1. rows: as in `read_eos`."""
    ids = _token_ids(reader, "bos_token_id", rows)
    if len(ids) > 1:
        raise ConfigError(
            f"{reader.where}: bos_token_id={list(ids)} contains several tokens; set one token, the BOS token of texts"
        )
    return ids[0] if ids else None


def read_eos(reader: JsonReader, rows: int | None = None) -> tuple[int, ...]:
    """Return `eos_token_id` of a file, one or a list; empty if it is missing, null or -1.

    rows: number of rows of the embedding; None uses the vocab_size of the file. Raises ConfigError for anything else.
    """
    return _token_ids(reader, "eos_token_id", rows)


def _token_ids(reader: JsonReader, key: str, rows: int | None) -> tuple[int, ...]:
    value = reader.values.get(key)
    rows = reader.values.get("vocab_size") if rows is None else rows
    found = [token for token in (value if isinstance(value, list) else [value]) if token not in (None, -1)]
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(
                f"{reader.where}: {key} contains {token!r}, which is not a token id; correct it (null means none)"
            )
        if isinstance(rows, int) and token >= rows:
            raise ConfigError(
                f"{reader.where}: {key} contains {token}, but the embedding has only {rows:,} rows; use the file of "
                "these weights, or remove the token"
            )
    return tuple(dict.fromkeys(found))


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model, with the keys of the released files.

    Raises ConfigError for settings that the family's config.json cannot express.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.family]],
        "attention_dropout": 0.0,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": one_or_list(cfg.eos_ids),
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_positions,
        "model_type": cfg.family,
        "num_hidden_layers": cfg.num_layers,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "use_cache": True,
        "vocab_size": cfg.vocab_size,
        **rope_keys(cfg.rope),
        **_attention_keys(cfg),
        **_expert_keys(cfg),
    }
    if cfg.mtp_layers or cfg.family == "deepseek_v3":
        config["num_nextn_predict_layers"] = cfg.mtp_layers
    if cfg.embed_init_std:
        config[EMBED_INIT_STD] = cfg.embed_init_std
    _check_expressed(cfg, config)
    return config


def one_or_list(ids: Sequence[int]) -> int | list[int] | None:
    """Return token ids in the format of the files: a number, a list of several, or None."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _check_expressed(cfg: ModelConfig, config: dict[str, Any]) -> None:
    """Read the generated config.json back, and raise ConfigError if a setting was lost."""
    again = from_hf(config, f"a {cfg.family} config.json")
    lost = differences(cfg, again)
    if lost:
        raise ConfigError(f"a {cfg.family} config.json cannot express {'; '.join(lost)}; choose another family")


def differences(cfg: ModelConfig, again: ModelConfig) -> list[str]:
    """Describe the fields in which two configurations differ."""
    return [
        f"{field.name}={getattr(cfg, field.name)!r} would become {getattr(again, field.name)!r}"
        for field in fields(cfg)
        if getattr(cfg, field.name) != getattr(again, field.name)
    ]


def _attention_keys(cfg: ModelConfig) -> dict[str, Any]:
    a = cfg.attention
    if isinstance(a, GQAConfig):
        keys: dict[str, Any] = {
            "head_dim": a.head_dim,
            "num_attention_heads": a.num_heads,
            "num_key_value_heads": a.num_kv_heads,
        }
        if cfg.family == "qwen2":
            return keys | {"use_sliding_window": False}
        return keys | {"attention_bias": a.qkv_bias} | ({"mlp_bias": False} if cfg.family == "llama" else {})
    keys = {
        "attention_bias": False,
        "kv_lora_rank": a.kv_lora_rank,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads,
        "q_lora_rank": a.q_lora_rank or None,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
    }
    return keys if cfg.rope.interleaved else {**keys, "rope_interleave": False}


def _expert_keys(cfg: ModelConfig) -> dict[str, Any]:
    moe = cfg.moe
    if cfg.family == "qwen3_moe":
        keys: dict[str, Any] = {"decoder_sparse_step": 1, "num_experts": moe.num_experts if moe else 0}
        if moe is None:
            return keys
        return keys | {
            "mlp_only_layers": list(range(moe.first_dense_layers)),
            "moe_intermediate_size": moe.moe_intermediate_size,
            "norm_topk_prob": moe.norm_topk_prob,
            "num_experts_per_tok": moe.num_experts_per_tok,
        }
    return _deepseek_expert_keys(cfg.family, moe) if moe else {}


def _deepseek_expert_keys(family: str, moe: MoEConfig) -> dict[str, Any]:
    v2_method = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return {
        "first_k_dense_replace": moe.first_dense_layers,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "norm_topk_prob": moe.norm_topk_prob,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "routed_scaling_factor": moe.route_scale,
        "scoring_func": moe.scoring,
        "topk_group": moe.top_groups,
        "topk_method": "noaux_tc" if family == "deepseek_v3" else v2_method,
    }
