"""ModelConfig to and from the config.json of DeepseekV3, DeepseekV2 and Llama.

Read are the spellings of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters); written is the former, the
one of the released files, which both versions read. A value that would change the numbers and that this package does
not compute is refused by name; keys that change nothing here (use_cache, ep_size, aux_loss_alpha, ...) are passed
over.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from thinkstack.types import ConfigError

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""Families by model_type, with the class name of each in transformers."""

EMBED_INIT_STD = "thinkstack_embed_init_std"
"""Our own key: ModelConfig.embed_init_std, which Hugging Face has no word for."""

REQUIRED = object()

# Keys whose other values would need arithmetic that the model does not have: (key, the one value, the way out).
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("hidden_act", "silu", "use a model with SwiGLU"),
    ("attention_bias", False, "use a model without biases in attention"),
    ("mlp_bias", False, "use a model without biases in the feed-forward"),
    ("attention_dropout", 0, "set it to 0; this package trains without dropout"),
    ("moe_layer_freq", 1, "use a model whose layers from first_k_dense_replace on all have experts"),
    ("partial_rotary_factor", 1, "use a model that rotates whole heads"),
    ("sliding_window", None, "use a model with full attention"),
)


class _Reader:
    """Typed access to one JSON object; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], kind_name: str) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise ConfigError(f"{self.where} has no {key!r}; take the complete file of the checkpoint")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self.where}: {key}={value!r} is not {kind_name}; correct it")
        return value

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1) -> int:
        value = self._get(key, default, (int,), "a whole number")
        if value < least:
            raise ConfigError(f"{self.where}: {key}={value} is below {least}; correct it")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = float(self._get(key, default, (int, float), "a number"))
        if not 0 <= value < math.inf:
            raise ConfigError(f"{self.where}: {key}={value} is negative or not finite; correct it")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = REQUIRED) -> str:
        return self._get(key, default, (str,), "a string")

    def object(self, key: str) -> "_Reader":
        """The object under `key`, empty if there is none."""
        return _Reader(self._get(key, {}, (dict,), "an object"), f"{self.where}: {key}")

    def require(self, key: str, allowed: Any, way_out: str) -> None:
        """Refuse a key that is present with another value than `allowed`."""
        value = self.values.get(key)
        if value is not None and value != allowed:
            raise ConfigError(f"{self.where}: {key}={value!r} is not supported (only {allowed!r}); {way_out}")


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes. where: its path, for messages.

    Raises ConfigError for a family, a value or a combination that this package does not compute.
    """
    read = _Reader(config, where)
    family = read.text("model_type")
    if family not in ARCHITECTURES:
        raise ConfigError(f"{where}: model_type={family!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    if config.get("quantization_config") is not None:
        method = read.object("quantization_config").values.get("quant_method")
        raise ConfigError(
            f"{where}: quantization_config (quant_method {method!r}) is not supported; cast the weights to bf16 first, "
            "for DeepSeek's FP8 files with fp8_cast_bf16.py of the DeepSeek-V3 repository, and remove the key"
        )
    for key, allowed, way_out in _FIXED:
        read.require(key, allowed, way_out)
    try:
        return _read_model(family, read)
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None


def _read_model(family: str, read: _Reader) -> ModelConfig:
    attention = _read_gqa(read) if family == "llama" else _read_mla(read)
    return ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        num_layers=read.integer("num_hidden_layers"),
        attention=attention,
        dense_size=read.integer("intermediate_size"),
        moe=None if family == "llama" else _read_moe(family, read),
        mtp_layers=read.integer("num_nextn_predict_layers", 0, least=0),
        rope=_read_rope(family, read),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        tie_embeddings=read.flag("tie_word_embeddings", False),
        max_positions=read.integer("max_position_embeddings"),
        bos_id=read.integer("bos_token_id", least=0),
        eos_ids=_read_eos(read),
        init_std=read.number("initializer_range", 0.02),
        embed_init_std=read.number(EMBED_INIT_STD, 0.0),
    )


def _read_gqa(read: _Reader) -> GQAConfig:
    heads, width = read.integer("num_attention_heads"), read.integer("hidden_size")
    return GQAConfig(
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", heads),
        head_dim=read.integer("head_dim", width // heads),
    )


def _read_mla(read: _Reader) -> MLAConfig:
    heads = read.integer("num_attention_heads")
    read.require("num_key_value_heads", heads, "latent attention has as many key/value heads as query heads")
    return MLAConfig(
        num_heads=heads,
        q_lora_rank=read.integer("q_lora_rank", 0, least=0),
        kv_lora_rank=read.integer("kv_lora_rank"),
        qk_nope_head_dim=read.integer("qk_nope_head_dim"),
        qk_rope_head_dim=read.integer("qk_rope_head_dim"),
        v_head_dim=read.integer("v_head_dim"),
    )


def _read_moe(family: str, read: _Reader) -> MoEConfig | None:
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
        top_k=read.integer("num_experts_per_tok"),
        num_shared_experts=read.integer("n_shared_experts", 0, least=0),
        expert_size=read.integer("moe_intermediate_size"),
        num_groups=num_groups,
        top_groups=top_groups,
        scoring="sigmoid" if is_v3 else "softmax",
        group_score="top2" if is_v3 else "max",
        normalise_weights=read.flag("norm_topk_prob", is_v3),
        route_scale=read.number("routed_scaling_factor", 1.0),
        first_dense_layers=read.integer("first_k_dense_replace", 0, least=0),
    )


def _read_eos(read: _Reader) -> tuple[int, ...]:
    value = read.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(
            f"eos_token_id={value!r} is not a token id or a list of them; name the token that ends a turn"
        )
    return tuple(ids)


def _read_rope(family: str, read: _Reader) -> RopeConfig:
    """Rotary settings in either spelling; transformers 5 wins where a file has both."""
    rope = read.object("rope_parameters" if read.values.get("rope_parameters") else "rope_scaling")
    rope.require("partial_rotary_factor", 1, "use a model that rotates whole heads")
    kind = rope.text("rope_type", rope.text("type", "default"))
    yarn = None
    if kind == "yarn":
        yarn = _read_yarn(family, rope)
    elif kind != "default":
        raise ConfigError(f"{rope.where}: rope type {kind!r} is not supported; known: default, yarn")
    interleaved = family != "llama" and read.flag("rope_interleave", True)
    return RopeConfig(
        theta=rope.number("rope_theta", read.number("rope_theta", 10000.0)), interleaved=interleaved, yarn=yarn
    )


def _read_yarn(family: str, rope: _Reader) -> YarnConfig:
    rope.require("attention_factor", None, "give mscale and mscale_all_dim instead")
    rope.require("truncate", True, "use whole pair indices as the bounds of the blend")
    mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if all_dim == 0 and mscale in (0, 1):
        mscale = 1.0  # without mscale_all_dim the amplitude is that of mscale 1
    elif mscale == 0 or all_dim == 0:
        raise ConfigError(
            f"{rope.where}: mscale={mscale} with mscale_all_dim={all_dim} is read differently by different programs; "
            "give both or neither"
        )
    elif family == "llama":
        raise ConfigError(
            f"{rope.where}: mscale_all_dim={all_dim} scales the softmax in DeepSeek models only; leave mscale and "
            "mscale_all_dim out of a Llama"
        )
    return YarnConfig(
        factor=rope.number("factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, keys as in the released files. Raises ConfigError for what the family cannot
    express.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.family]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids),
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.dense_size,
        "max_position_embeddings": cfg.max_positions,
        "model_type": cfg.family,
        "num_hidden_layers": cfg.num_layers,
        "rms_norm_eps": cfg.norm_eps,
        "rope_scaling": None,
        "rope_theta": cfg.rope.theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "use_cache": True,
        "vocab_size": cfg.vocab_size,
        **_attention_keys(cfg),
        **(_moe_keys(cfg.family, cfg.moe) if cfg.moe else {}),
    }
    if cfg.rope.yarn:
        config["rope_scaling"] = _yarn_keys(cfg.rope.yarn)
    if cfg.mtp_layers or cfg.family == "deepseek_v3":
        config["num_nextn_predict_layers"] = cfg.mtp_layers
    if cfg.embed_init_std:
        config[EMBED_INIT_STD] = cfg.embed_init_std
    _check_expressed(cfg, config)
    return config


def _check_expressed(cfg: ModelConfig, config: dict[str, Any]) -> None:
    """Read back what was written: whatever got lost on the way has no place in this family's config.json."""
    again = from_hf(config, f"a {cfg.family} config.json")
    lost = [
        f"{field.name}={getattr(cfg, field.name)!r} would become {getattr(again, field.name)!r}"
        for field in fields(cfg)
        if getattr(cfg, field.name) != getattr(again, field.name)
    ]
    if lost:
        raise ConfigError(f"a {cfg.family} config.json cannot express {'; '.join(lost)}; choose another family")


def _attention_keys(cfg: ModelConfig) -> dict[str, Any]:
    a = cfg.attention
    if isinstance(a, GQAConfig):
        return {
            "head_dim": a.head_dim,
            "mlp_bias": False,
            "num_attention_heads": a.num_heads,
            "num_key_value_heads": a.num_kv_heads,
        }
    keys: dict[str, Any] = {
        "kv_lora_rank": a.kv_lora_rank,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads,
        "q_lora_rank": a.q_lora_rank or None,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
    }
    return keys if cfg.rope.interleaved else {**keys, "rope_interleave": False}


def _moe_keys(family: str, moe: MoEConfig) -> dict[str, Any]:
    v2_method = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return {
        "first_k_dense_replace": moe.first_dense_layers,
        "moe_intermediate_size": moe.expert_size,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "norm_topk_prob": moe.normalise_weights,
        "num_experts_per_tok": moe.top_k,
        "routed_scaling_factor": moe.route_scale,
        "scoring_func": moe.scoring,
        "topk_group": moe.top_groups,
        "topk_method": "noaux_tc" if family == "deepseek_v3" else v2_method,
    }


def _yarn_keys(yarn: YarnConfig) -> dict[str, Any]:
    """mscale is left out with mscale_all_dim 0, where only the value 1 has a meaning that all programs share."""
    keys = {
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_positions,
        "type": "yarn",
    }
    amplitude = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    is_plain = yarn.mscale_all_dim == 0 and yarn.mscale == 1
    return dict(sorted((keys if is_plain else {**keys, **amplitude}).items()))
