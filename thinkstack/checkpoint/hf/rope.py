"""RopeConfig to and from the rotary keys of a Hugging Face config.json, for transformers 4 and 5."""

from typing import Any

from thinkstack.checkpoint.json_reader import JsonReader
from thinkstack.models.attention_config import yarn_mscale
from thinkstack.models.config import Llama3RopeConfig, RopeConfig, YarnConfig
from thinkstack.types import ConfigError

DEEPSEEK_ROPE_TYPES, ROPE_TYPES = ("default", "yarn"), ("default", "linear", "llama3", "yarn")
"""Supported context extensions of latent attention, and of the other families."""


def read_rope(family: str, reader: JsonReader) -> RopeConfig:
    """Read the rotary settings of transformers 4 or 5; version 5 takes precedence if a file has both.

    Raises ConfigError for an extension that this package or the family does not support.
    """
    rope = reader.object("rope_parameters" if reader.values.get("rope_parameters") else "rope_scaling")
    rope.require("partial_rotary_factor", 1, "use a model without partial rotary embeddings")
    is_deepseek = family.startswith("deepseek")
    kind, known = (
        rope.text("rope_type", rope.text("type", "default")),
        DEEPSEEK_ROPE_TYPES if is_deepseek else ROPE_TYPES,
    )
    if kind not in known:
        raise ConfigError(f"{rope.where}: rope type {kind!r} is not supported in {family}; known: {', '.join(known)}")
    if family == "deepseek_v2":
        reader.require("rope_interleave", True, "DeepseekV2 rotates neighboring dimensions in pairs")
    return RopeConfig(
        theta=rope.number("rope_theta", reader.number("rope_theta", 10000.0)),
        interleaved=is_deepseek and reader.flag("rope_interleave", True),
        yarn=_read_yarn(is_deepseek, rope) if kind == "yarn" else None,
        llama3=_read_llama3(rope) if kind == "llama3" else None,
        linear_factor=rope.number("factor") if kind == "linear" else 1.0,
    )


def _read_llama3(rope: JsonReader) -> Llama3RopeConfig:
    return Llama3RopeConfig(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
    )


def _read_yarn(is_deepseek: bool, rope: JsonReader) -> YarnConfig:
    rope.require("truncate", True, "use a model whose YaRN ramp has integer bounds")
    mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if all_dim == 0 and mscale in (0, 1):
        mscale = 1.0  # without mscale_all_dim, the amplitude is the one for mscale = 1
    elif mscale == 0 or all_dim == 0:
        raise ConfigError(
            f"{rope.where}: programs interpret mscale={mscale} with mscale_all_dim={all_dim} differently; "
            "give both or neither"
        )
    elif not is_deepseek:
        raise ConfigError(
            f"{rope.where}: mscale_all_dim={all_dim} scales the softmax in DeepSeek models only; remove mscale and "
            "mscale_all_dim"
        )
    yarn = YarnConfig(
        factor=rope.number("factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    amplitude = yarn_mscale(yarn.factor, mscale) / yarn_mscale(yarn.factor, all_dim)
    if abs(rope.number("attention_factor", amplitude) - amplitude) > 1e-6:
        raise ConfigError(
            f"{rope.where}: attention_factor={rope.values['attention_factor']} is not supported (only "
            f"{amplitude:.7g}, as computed from the other keys); set mscale and mscale_all_dim instead"
        )
    return yarn


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """Return the rotary keys of a config.json, as in the released files."""
    keys: dict[str, Any] = {"rope_scaling": None, "rope_theta": rope.theta}
    if rope.yarn is not None:
        keys["rope_scaling"] = _yarn_keys(rope.yarn)
    if rope.llama3 is not None:
        keys["rope_scaling"] = {
            "factor": rope.llama3.factor,
            "high_freq_factor": rope.llama3.high_freq_factor,
            "low_freq_factor": rope.llama3.low_freq_factor,
            "original_max_position_embeddings": rope.llama3.original_max_positions,
            "rope_type": "llama3",
        }
    if rope.linear_factor != 1:
        keys["rope_scaling"] = {"factor": rope.linear_factor, "type": "linear"}
    return keys


def _yarn_keys(yarn: YarnConfig) -> dict[str, Any]:
    """Return the YaRN keys. With mscale_all_dim = 0, mscale is left out: programs agree only on the value 1."""
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
