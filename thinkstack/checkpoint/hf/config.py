"""ModelConfig to and from the config.json of DeepseekV3, DeepseekV2, Llama, Qwen2 (2.5), Qwen3 and Qwen3Moe.

Read are the spellings of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters); written is the former, the
one of the released files, which both versions read. A value that would change the numbers and that this package does
not compute is refused by name; keys that change nothing here (use_cache, ep_size, aux_loss_alpha, ...) are passed
over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from thinkstack.checkpoint.hf.rope import read_rope, rope_keys
from thinkstack.checkpoint.json_reader import REQUIRED, Reader
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
"""Families by model_type, with the class name of each in transformers."""

DEEPSEEK = ("deepseek_v3", "deepseek_v2")
"""Families with latent attention."""

EMBED_INIT_STD = "thinkstack_embed_init_std"
"""Our own key: ModelConfig.embed_init_std, which Hugging Face has no word for."""

# Keys whose other values would need arithmetic that the model does not have: (key, the one value, the way out).
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("hidden_act", "silu", "use a model with SwiGLU"),
    ("mlp_bias", False, "use a model without biases in the feed-forward"),
    ("attention_dropout", 0, "set it to 0; this package trains without dropout"),
    ("moe_layer_freq", 1, "use a model whose layers from first_k_dense_replace on all have experts"),
    ("partial_rotary_factor", 1, "use a model that rotates whole heads"),
    ("decoder_sparse_step", 1, "use a model whose layers all have experts but for the first ones"),
    ("use_sliding_window", False, "use a model with full attention"),
    ("dual_chunk_attention_config", None, "remove it; up to the trained context it changes nothing"),
)

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""The one quantization_config that is read and written, scale_fmt aside."""


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes. where: its path, for messages.

    Raises ConfigError for a family, a value or a combination that this package does not compute.
    """
    read = Reader(config, where)
    family = read.text("model_type")
    if family not in ARCHITECTURES:
        raise ConfigError(f"{where}: model_type={family!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    read_quantization(config, where)
    for key, allowed, way_out in _FIXED:
        read.require(key, allowed, way_out)
    _require_full_attention(family, read)
    try:
        return _read_model(family, read)
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None


def read_quantization(config: Mapping[str, Any], where: str) -> FP8Blocks | None:
    """How a config.json says that matrices are kept: as floats (None) or in e4m3 by blocks of 128 x 128.

    Raises ConfigError for every other quantization.
    """
    if config.get("quantization_config") is None:
        return None
    read = Reader(config, where).object("quantization_config")
    for key, allowed in _FP8.items():
        read.require(key, allowed, "take a checkpoint in bf16, or in DeepSeek's FP8")
    for key in ("quant_method", "weight_block_size"):
        if read.values.get(key) is None:
            raise ConfigError(f"{read.where} has no {key}; take the config.json of these weights")
    scale_fmt = read.text("scale_fmt", "")
    if scale_fmt not in ("", "ue8m0"):
        raise ConfigError(f"{read.where}: scale_fmt={scale_fmt!r} is not supported; known: none, ue8m0")
    return FP8Blocks(power_of_two=scale_fmt == "ue8m0")


def quantization_keys(quantization: QuantScheme | None) -> dict[str, Any]:
    """The keys of a config.json for what `read_quantization` returns. Raises ConfigError for another storage."""
    if quantization is None:
        return {}
    if not isinstance(quantization, FP8Blocks):
        raise ConfigError(f"Hugging Face files cannot keep matrices as {quantization.name}; write them as bf16 or fp8")
    scale_fmt = {"scale_fmt": "ue8m0"} if quantization.power_of_two else {}
    return {"quantization_config": dict(sorted((_FP8 | scale_fmt).items()))}


def _require_full_attention(family: str, read: Reader) -> None:
    """Qwen files name a window and then say whether it is used; elsewhere naming it is using it."""
    if not family.startswith("qwen"):
        read.require("sliding_window", None, "use a model with full attention")
    kinds = read.values.get("layer_types") or []
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise ConfigError(
            f"{read.where}: layer_types has {other[0]!r}, which is not supported (only 'full_attention'); use a model "
            "with full attention"
        )


def _read_model(family: str, read: Reader) -> ModelConfig:
    attention = _read_mla(read) if family in DEEPSEEK else _read_gqa(family, read)
    return ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        num_layers=read.integer("num_hidden_layers"),
        attention=attention,
        intermediate_size=read.integer("intermediate_size"),
        moe=_read_experts(family, read),
        mtp_layers=read.integer("num_nextn_predict_layers", 0, least=0),
        rope=read_rope(family, read),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        tie_embeddings=read.flag("tie_word_embeddings", False),
        max_positions=read.integer("max_position_embeddings"),
        bos_id=read_bos(read),
        eos_ids=read_eos(read),
        init_std=read.number("initializer_range", 0.02),
        embed_init_std=read.number(EMBED_INIT_STD, 0.0),
    )


def _read_gqa(family: str, read: Reader) -> GQAConfig:
    """Qwen files must give what a Llama's may leave out: transformers' defaults there follow no other key."""
    heads, width = read.integer("num_attention_heads"), read.integer("hidden_size")
    is_llama, is_qwen2 = family == "llama", family == "qwen2"
    if is_qwen2:
        read.require("attention_bias", True, "Qwen2 has biases on queries, keys and values")
    has_biases = read.flag("attention_bias", False)
    return GQAConfig(
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", heads if is_llama else REQUIRED),
        head_dim=read.integer("head_dim", width // heads if is_llama or is_qwen2 else REQUIRED),
        qkv_bias=is_qwen2 or has_biases,
        out_bias=has_biases and not is_qwen2,
        qk_norm=family.startswith("qwen3"),
    )


def _read_mla(read: Reader) -> MLAConfig:
    heads = read.integer("num_attention_heads")
    read.require("attention_bias", False, "use a model without biases in latent attention")
    # transformers norms the latents with 1e-6 whatever the key says, other programs by the key
    read.require("rms_norm_eps", 1e-6, "programs disagree on the norms of the latents with another value")
    read.require("num_key_value_heads", heads, "latent attention has as many key/value heads as query heads")
    return MLAConfig(
        num_heads=heads,
        q_lora_rank=read.integer("q_lora_rank", 0, least=0),
        kv_lora_rank=read.integer("kv_lora_rank"),
        qk_nope_head_dim=read.integer("qk_nope_head_dim"),
        qk_rope_head_dim=read.integer("qk_rope_head_dim"),
        v_head_dim=read.integer("v_head_dim"),
    )


def _read_experts(family: str, read: Reader) -> MoEConfig | None:
    """The mixture of experts of any family; None in a dense one."""
    if family in DEEPSEEK:
        return _read_deepseek_experts(family, read)
    return _read_qwen_experts(read) if family == "qwen3_moe" else None


def _read_qwen_experts(read: Reader) -> MoEConfig | None:
    """Routing of Qwen3Moe: softmax, no groups, no shared experts; dense layers by their list."""
    key = "num_local_experts" if "num_local_experts" in read.values else "num_experts"  # transformers 5 and 4
    if not read.integer(key, least=0):
        return None
    dense = read.values.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        raise ConfigError(f"mlp_only_layers={dense!r} is not supported; dense layers must be the first ones: 0, 1, ...")
    return MoEConfig(
        num_experts=read.integer(key),
        num_experts_per_tok=read.integer("num_experts_per_tok"),
        num_shared_experts=0,
        moe_intermediate_size=read.integer("moe_intermediate_size"),
        scoring="softmax",
        group_score="max",
        norm_topk_prob=read.flag("norm_topk_prob", False),
        first_dense_layers=len(dense),
    )


def _read_deepseek_experts(family: str, read: Reader) -> MoEConfig | None:
    """Routing of V3 (sigmoid, bias, two best of a group) or V2 (softmax, best of a group); None without experts."""
    if not read.integer("n_routed_experts", 0, least=0):
        return None
    num_groups, top_groups = read.integer("n_group", 1), read.integer("topk_group", 1)
    if family == "deepseek_v3":
        read.require("scoring_func", "sigmoid", "DeepseekV3 scores experts by sigmoid")
        read.require("topk_method", "noaux_tc", "DeepseekV3 chooses experts by bias (noaux_tc)")
    else:
        read.require("scoring_func", "softmax", "DeepseekV2 scores experts by softmax")
        # DeepSeek's own code and transformers disagree on what true would mean here; no released model has it
        read.require("norm_topk_prob", False, "DeepseekV2 uses the weights of the experts as they are")
        method = read.text("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(f"topk_method={method!r} is not supported; DeepseekV2 has greedy, group_limited_greedy")
        if method == "greedy":
            num_groups = top_groups = 1
    is_v3 = family == "deepseek_v3"
    return MoEConfig(
        num_experts=read.integer("n_routed_experts"),
        num_experts_per_tok=read.integer("num_experts_per_tok"),
        num_shared_experts=read.integer("n_shared_experts", 0, least=0),
        moe_intermediate_size=read.integer("moe_intermediate_size"),
        num_groups=num_groups,
        top_groups=top_groups,
        scoring="sigmoid" if is_v3 else "softmax",
        group_score="top2" if is_v3 else "max",
        norm_topk_prob=read.flag("norm_topk_prob", is_v3),
        route_scale=read.number("routed_scaling_factor", 1.0),
        first_dense_layers=read.integer("first_k_dense_replace", 0, least=0),
    )


def read_bos(read: Reader, rows: int | None = None) -> int | None:
    """`bos_token_id` of a file: None where it is missing, null or -1. rows: as in `read_eos`."""
    ids = _tokens(read, "bos_token_id", rows)
    if len(ids) > 1:
        raise ConfigError(
            f"{read.where}: bos_token_id={list(ids)} names several tokens; name the one that texts begin with"
        )
    return ids[0] if ids else None


def read_eos(read: Reader, rows: int | None = None) -> tuple[int, ...]:
    """`eos_token_id` of a file, one or a list; empty where it is missing, null or -1. rows: rows of the embedding, if
    not what the file itself gives as vocab_size. Raises ConfigError for anything else.
    """
    return _tokens(read, "eos_token_id", rows)


def _tokens(read: Reader, key: str, rows: int | None) -> tuple[int, ...]:
    value = read.values.get(key)
    rows = read.values.get("vocab_size") if rows is None else rows
    found = [token for token in (value if isinstance(value, list) else [value]) if token not in (None, -1)]
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"{read.where}: {key} holds {token!r}, which is no token id; correct it (null is none)")
        if isinstance(rows, int) and token >= rows:
            raise ConfigError(
                f"{read.where}: {key} holds {token}, beyond the {rows:,} rows of the embedding; take the file that "
                "belongs to these weights, or take the token out"
            )
    return tuple(dict.fromkeys(found))


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, keys as in the released files. Raises ConfigError for what the family cannot
    express.
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
    """Ids of tokens as files have them: one alone, several in a list, none as null."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _check_expressed(cfg: ModelConfig, config: dict[str, Any]) -> None:
    """Read back what was written: whatever got lost on the way has no place in this family's config.json."""
    again = from_hf(config, f"a {cfg.family} config.json")
    lost = differences(cfg, again)
    if lost:
        raise ConfigError(f"a {cfg.family} config.json cannot express {'; '.join(lost)}; choose another family")


def differences(cfg: ModelConfig, again: ModelConfig) -> list[str]:
    """What a configuration lost on its way through a file, field by field."""
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
