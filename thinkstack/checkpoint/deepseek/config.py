"""ModelConfig to and from the configuration of DeepSeek's own code: inference/configs/*.json, the fields of ModelArgs.

Missing fields have the defaults of ModelArgs. Settings that DeepSeek's code does not support raise ConfigError.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from thinkstack.checkpoint.hf.config import differences, read_bos, read_eos
from thinkstack.checkpoint.json_reader import JsonReader, read_json
from thinkstack.models.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
NOT_IN_CONFIG = ("bos_id", "eos_ids", "init_std", "embed_init_std", "mtp_layers")
"""Fields of ModelConfig that the format lacks: token ids are in other files, and the other fields do not affect
inference."""


def read_config(folder: Path) -> tuple[ModelConfig, FP8Blocks | None]:
    """Return the ModelConfig of a folder in DeepSeek's layout, and the quantization of its matrices.

    Raises ConfigError if config.json is missing or has another format.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing; copy the file for these weights from DeepSeek's inference/configs to this path"
        )
    reader = JsonReader(read_json(path), str(path))
    bos, eos = _token_ids(folder, reader.integer("vocab_size"))
    cfg = _model(reader, bos, eos)
    if reader.text("dtype", "bf16") == "bf16":
        return cfg, None
    reader.require("dtype", "fp8", "use bf16 or fp8")
    return cfg, FP8Blocks(power_of_two=reader.text("scale_fmt", "") == "ue8m0")


def _model(reader: JsonReader, bos: int | None, eos: tuple[int, ...]) -> ModelConfig:
    is_v3 = reader.text("score_func", "softmax") == "sigmoid"
    original, factor = reader.integer("original_seq_len", 4096), reader.number("rope_factor", 40.0)
    max_positions, mscale = reader.integer("max_seq_len", 16384), reader.number("mscale", 1.0)
    yarn = YarnConfig(
        factor=factor,
        original_max_positions=original,
        beta_fast=reader.number("beta_fast", 32.0),
        beta_slow=reader.number("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale,
    )
    is_extended = max_positions > original
    if is_extended and "max_seq_len" not in reader.values:
        max_positions = int(factor * original)  # the default is a cache size, not the limit of the model
    return ModelConfig(
        family="deepseek_v3" if is_v3 else "deepseek_v2",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("dim"),
        num_layers=reader.integer("n_layers"),
        attention=MLAConfig(
            num_heads=reader.integer("n_heads"),
            q_lora_rank=reader.integer("q_lora_rank", 0, least=0),
            kv_lora_rank=reader.integer("kv_lora_rank", 512),
            qk_nope_head_dim=reader.integer("qk_nope_head_dim", 128),
            qk_rope_head_dim=reader.integer("qk_rope_head_dim", 64),
            v_head_dim=reader.integer("v_head_dim", 128),
        ),
        intermediate_size=reader.integer("inter_dim"),
        moe=MoEConfig(
            num_experts=reader.integer("n_routed_experts"),
            num_experts_per_tok=reader.integer("n_activated_experts"),
            num_shared_experts=reader.integer("n_shared_experts", 2),
            moe_intermediate_size=reader.integer("moe_inter_dim"),
            num_groups=reader.integer("n_expert_groups", 1),
            top_groups=reader.integer("n_limited_groups", 1),
            scoring="sigmoid" if is_v3 else "softmax",
            group_score="top2" if is_v3 else "max",
            norm_topk_prob=is_v3,
            route_scale=reader.number("route_scale", 1.0),
            first_dense_layers=reader.integer("n_dense_layers", 1, least=0),
        ),
        rope=RopeConfig(theta=reader.number("rope_theta", 10000.0), yarn=yarn if is_extended else None),
        max_positions=max_positions,
        bos_id=bos,
        eos_ids=eos,
    )


def _token_ids(folder: Path, rows: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the BOS id and the EOS ids from generation_config.json, else from the tokenizer, if they are defined.

    rows: number of rows of the embedding.
    """
    if (folder / GENERATION).is_file():
        reader = JsonReader(read_json(folder / GENERATION), str(folder / GENERATION))
        return read_bos(reader, rows), read_eos(reader, rows)
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None, ()
    names, tokenizer = read_json(folder / TOKENIZER_CONFIG), Tokenizer.load(folder)
    tokens = (names.get(key) for key in ("bos_token", "eos_token"))
    token_texts = (token["content"] if isinstance(token, dict) else token for token in tokens)
    bos, eos = (tokenizer.control_id(token) if token else None for token in token_texts)
    return bos, () if eos is None else (eos,)


def config_of(cfg: ModelConfig, quantization: FP8Blocks | None) -> dict[str, Any]:
    """Return the configuration of a model. Raises ConfigError for a model that DeepSeek's code does not support."""
    a, moe = cfg.attention, cfg.moe
    if not isinstance(a, MLAConfig) or moe is None:
        raise ConfigError(
            f"DeepSeek's layout supports DeepSeek-V2 and V3, not {cfg.family}; write the hf or gguf format instead"
        )
    config: dict[str, Any] = {
        "vocab_size": cfg.vocab_size,
        "dim": cfg.hidden_size,
        "inter_dim": cfg.intermediate_size,
        "moe_inter_dim": moe.moe_intermediate_size,
        "n_layers": cfg.num_layers,
        "n_dense_layers": moe.first_dense_layers,
        "n_heads": a.num_heads,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "n_activated_experts": moe.num_experts_per_tok,
        "n_expert_groups": moe.num_groups,
        "n_limited_groups": moe.top_groups,
        "route_scale": moe.route_scale,
        "score_func": moe.scoring,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "rope_theta": cfg.rope.theta,
        "dtype": "fp8" if quantization else "bf16",
        **_rope_fields(cfg),
    }
    if quantization is not None and quantization.power_of_two:
        config["scale_fmt"] = "ue8m0"
    _check_expressed(cfg, config)
    return config


def _rope_fields(cfg: ModelConfig) -> dict[str, Any]:
    yarn = cfg.rope.yarn
    if yarn is None:
        return {"max_seq_len": cfg.max_positions, "original_seq_len": cfg.max_positions}
    found: dict[str, Any] = {
        "original_seq_len": yarn.original_max_positions,
        "rope_factor": yarn.factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
    }
    is_default = cfg.max_positions == int(yarn.factor * yarn.original_max_positions)
    return found if is_default else found | {"max_seq_len": cfg.max_positions}


def _check_expressed(cfg: ModelConfig, config: dict[str, Any]) -> None:
    """Read the generated configuration back, and raise ConfigError if a setting was lost."""
    again = _model(JsonReader(config, "DeepSeek's configuration"), cfg.bos_id, cfg.eos_ids)
    again = replace(again, **{name: getattr(cfg, name) for name in NOT_IN_CONFIG})
    lost = differences(cfg, again)
    if lost:
        raise ConfigError(
            f"DeepSeek's configuration cannot express {'; '.join(lost)}; write the hf or gguf format instead"
        )
