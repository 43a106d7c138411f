"""ModelConfig to and from the configuration of DeepSeek's own code: inference/configs/*.json, fields of its ModelArgs.

Its defaults stand where a file leaves a field out. What its code cannot compute is refused by name.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from thinkstack.checkpoint.hf.config import differences, read_bos, read_eos
from thinkstack.checkpoint.json_reader import Reader, read_json
from thinkstack.models.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
ELSEWHERE = ("bos_id", "eos_ids", "init_std", "embed_init_std", "mtp_layers")
"""Fields of ModelConfig that the format has no word for: tokens lie in other files, the rest does no harm."""


def read_config(folder: Path) -> tuple[ModelConfig, FP8Blocks | None]:
    """The model of a folder in DeepSeek's layout, and how its matrices are kept.

    Raises ConfigError if config.json is missing or no such file.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing; put the file of inference/configs that belongs to these weights there, under that name"
        )
    read = Reader(read_json(path), str(path))
    bos, eos = _tokens(folder, read.integer("vocab_size"))
    cfg = _model(read, bos, eos)
    if read.text("dtype", "bf16") == "bf16":
        return cfg, None
    read.require("dtype", "fp8", "use bf16 or fp8")
    return cfg, FP8Blocks(power_of_two=read.text("scale_fmt", "") == "ue8m0")


def _model(read: Reader, bos: int | None, eos: tuple[int, ...]) -> ModelConfig:
    is_v3 = read.text("score_func", "softmax") == "sigmoid"
    original, factor = read.integer("original_seq_len", 4096), read.number("rope_factor", 40.0)
    longest, mscale = read.integer("max_seq_len", 16384), read.number("mscale", 1.0)
    yarn = YarnConfig(
        factor=factor,
        original_max_positions=original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale,
    )
    is_stretched = longest > original
    if is_stretched and "max_seq_len" not in read.values:
        longest = int(factor * original)  # the default is what fits a cache, not what the model takes
    return ModelConfig(
        family="deepseek_v3" if is_v3 else "deepseek_v2",
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("dim"),
        num_layers=read.integer("n_layers"),
        attention=MLAConfig(
            num_heads=read.integer("n_heads"),
            q_lora_rank=read.integer("q_lora_rank", 0, least=0),
            kv_lora_rank=read.integer("kv_lora_rank", 512),
            qk_nope_head_dim=read.integer("qk_nope_head_dim", 128),
            qk_rope_head_dim=read.integer("qk_rope_head_dim", 64),
            v_head_dim=read.integer("v_head_dim", 128),
        ),
        intermediate_size=read.integer("inter_dim"),
        moe=MoEConfig(
            num_experts=read.integer("n_routed_experts"),
            num_experts_per_tok=read.integer("n_activated_experts"),
            num_shared_experts=read.integer("n_shared_experts", 2),
            moe_intermediate_size=read.integer("moe_inter_dim"),
            num_groups=read.integer("n_expert_groups", 1),
            top_groups=read.integer("n_limited_groups", 1),
            scoring="sigmoid" if is_v3 else "softmax",
            group_score="top2" if is_v3 else "max",
            norm_topk_prob=is_v3,
            route_scale=read.number("route_scale", 1.0),
            first_dense_layers=read.integer("n_dense_layers", 1, least=0),
        ),
        rope=RopeConfig(theta=read.number("rope_theta", 10000.0), yarn=yarn if is_stretched else None),
        max_positions=longest,
        bos_id=bos,
        eos_ids=eos,
    )


def _tokens(folder: Path, rows: int) -> tuple[int | None, tuple[int, ...]]:
    """Tokens that begin and end a text: of generation_config.json, else of the tokenizer, as far as these name them.
    rows: of the embedding.
    """
    if (folder / GENERATION).is_file():
        read = Reader(read_json(folder / GENERATION), str(folder / GENERATION))
        return read_bos(read, rows), read_eos(read, rows)
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None, ()
    names, tokenizer = read_json(folder / TOKENIZER_CONFIG), Tokenizer.load(folder)
    tokens = (names.get(key) for key in ("bos_token", "eos_token"))
    spelt = (token["content"] if isinstance(token, dict) else token for token in tokens)
    bos, eos = (tokenizer.control_id(token) if token else None for token in spelt)
    return bos, () if eos is None else (eos,)


def config_of(cfg: ModelConfig, quantization: FP8Blocks | None) -> dict[str, Any]:
    """The configuration file of a model. Raises ConfigError for one that DeepSeek's code does not compute."""
    a, moe = cfg.attention, cfg.moe
    if not isinstance(a, MLAConfig) or moe is None:
        raise ConfigError(f"DeepSeek's layout holds DeepSeek-V2 and V3 models, not {cfg.family}; write hf or gguf")
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
    """Read back what was written; see hf_config."""
    again = _model(Reader(config, "DeepSeek's configuration"), cfg.bos_id, cfg.eos_ids)
    again = replace(again, **{name: getattr(cfg, name) for name in ELSEWHERE})
    lost = differences(cfg, again)
    if lost:
        raise ConfigError(f"DeepSeek's configuration cannot express {'; '.join(lost)}; write hf or gguf instead")
