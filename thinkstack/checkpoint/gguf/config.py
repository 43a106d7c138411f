"""ModelConfig from the metadata and tensors of a GGUF.

Source of the keys: llama.cpp, conversion/base.py, conversion/deepseek.py, src/models/*.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from thinkstack.checkpoint.gguf.file import Metadata
from thinkstack.checkpoint.gguf.tensors import ARCHITECTURES
from thinkstack.models.config import (
    GQAConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
    yarn_mscale,
)
from thinkstack.models.layers import rope_frequencies
from thinkstack.types import ConfigError

BOS_KEY, END_KEYS = (
    "tokenizer.ggml.bos_token_id",
    tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")),
)
"""Metadata keys of the BOS token and of the stop tokens."""
NO_TOKEN = 2**32 - 1
"""-1 as uint32, llama.cpp's value for a missing token."""
LLAMA3 = "thinkstack.rope.llama3"
"""Our own key: the settings that produce rope_freqs, [factor, low_freq_factor, high_freq_factor,
original_max_positions]."""
GATING_FUNCS = {1: "softmax", 2: "sigmoid"}
"""Values of expert_gating_func."""
# Keys (after "{architecture}.") of which only these values are supported.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}


class _ArchitectureKeys:
    """Access to the metadata keys of one architecture."""

    def __init__(self, meta: Metadata):
        self.meta, self.arch = meta, meta.get("general.architecture", str)

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a width or a count. Raises ConfigError if it is missing or below `least`."""
        name = f"{self.arch}.{key}"
        value = self.meta.get(name, int) if default is None else self.meta.find(name, int)
        value = default if value is None else value
        assert value is not None
        if value < least:
            raise ConfigError(f"{self.meta.path}: {name}={value} is below {least}; fetch another conversion")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32 rounded to its shortest decimal: 9.999999747378752e-06 becomes 1e-05."""
        name = f"{self.arch}.{key}"
        value = self.meta.get(name, float) if default is None else self.meta.find(name, float)
        value = default if value is None else value
        assert value is not None
        if not math.isfinite(value):
            raise ConfigError(f"{self.meta.path}: {name}={value} is not a finite number; fetch another conversion")
        return float(numpy.format_float_positional(numpy.float32(value)))

    def text(self, key: str) -> str:
        return self.meta.find(f"{self.arch}.{key}", str) or ""

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.meta.values


def config_of(
    meta: Metadata, tensors: Mapping[str, tuple[int, ...]], rope_factors: Tensor | None = None
) -> ModelConfig:
    """Return the ModelConfig for metadata and tensors (shapes by name). rope_factors: contents of rope_freqs.weight.

    Raises ConfigError for an unsupported architecture or variant, and for metadata that contradict the tensors.
    """
    keys = _ArchitectureKeys(meta)
    known = dict.fromkeys(ARCHITECTURES.values())
    if keys.arch not in known:
        raise ConfigError(
            f"{meta.path} contains a {keys.arch!r} model, which is not supported; known: {', '.join(known)}"
        )
    for key, allowed in _REQUIRED_VALUES.items():
        value = meta.values.get(f"{keys.arch}.{key}")
        if value is not None and value not in allowed:
            raise ConfigError(
                f"{meta.path}: {keys.arch}.{key}={value!r} is not supported (only {allowed[0]!r}); use another model"
            )
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"]) != 2:
        raise ConfigError(f"{meta.path} lacks the matrix token_embd.weight; fetch another conversion")
    _check_counts(keys, tensors)
    try:
        return _read_model(keys, tensors, rope_factors)
    except ConfigError as error:
        raise error if str(meta.path) in str(error) else ConfigError(f"{meta.path}: {error}") from None


def _check_counts(keys: _ArchitectureKeys, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError for counts that the tensors contradict, before memory is allocated for these counts."""
    path, rows = keys.meta.path, tensors["token_embd.weight"][0]
    layers = keys.size("block_count")
    last = f"blk.{layers - 1}.attn_norm.weight"
    if last not in tensors:
        raise ConfigError(
            f"{path}: {keys.arch}.block_count={layers}, but the file lacks the tensor {last}; fetch it again"
        )
    if (size := keys.size("vocab_size", rows)) != rows:
        raise ConfigError(f"{path}: {keys.arch}.vocab_size={size}, but token_embd.weight has {rows} rows")
    experts = keys.size("expert_count", 0, least=0)
    for name, shape in tensors.items():
        if name.endswith(".ffn_gate_inp.weight") and shape[0] != experts:
            raise ConfigError(f"{path}: {keys.arch}.expert_count={experts}, but {name} has {shape[0]} rows")
    if experts and not any(name.endswith(".ffn_gate_inp.weight") for name in tensors):
        raise ConfigError(f"{path}: {keys.arch}.expert_count={experts}, but no layer has experts")


def _read_model(
    keys: _ArchitectureKeys, tensors: Mapping[str, tuple[int, ...]], rope_factors: Tensor | None
) -> ModelConfig:
    is_mla = keys.arch == "deepseek2"
    mtp_layers = keys.size("nextn_predict_layers", 0, least=0)
    num_layers = keys.size("block_count") - mtp_layers
    attention = _read_mla(keys) if is_mla else _read_gqa(keys, tensors)
    if keys.size("rope.dimension_count", attention.rope_dim) != attention.rope_dim:
        raise ConfigError("partial rotary embeddings are not supported; use another model")
    rows = tensors["token_embd.weight"][0]
    for key in (BOS_KEY, *END_KEYS):
        token = token_id_of(keys.meta, key)
        if token is not None and token >= rows:
            raise ConfigError(f"{key}={token}, but there are {rows} tokens; fetch another conversion")
    return ModelConfig(
        family=_family(keys, tensors),  # type: ignore[arg-type]
        vocab_size=rows,
        hidden_size=keys.size("embedding_length"),
        num_layers=num_layers,
        attention=attention,
        intermediate_size=keys.size("feed_forward_length"),
        moe=_read_experts(keys, num_layers, tensors),
        mtp_layers=mtp_layers,
        rope=_read_rope(keys, attention.rope_dim, rope_factors),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensors,
        max_positions=keys.size("context_length"),
        bos_id=token_id_of(keys.meta, BOS_KEY),
        eos_ids=end_token_ids_of(keys.meta),
    )


def token_id_of(meta: Metadata, key: str) -> int | None:
    """Return a token id of the metadata; None if it is missing (Qwen has no BOS) or -1."""
    token = meta.find(key, int)
    return None if token in (None, -1, NO_TOKEN) else token


def end_token_ids_of(meta: Metadata) -> tuple[int, ...]:
    """Return the ids of the stop tokens: none, one or several."""
    tokens = (token_id_of(meta, key) for key in END_KEYS)
    return tuple(dict.fromkeys(token for token in tokens if token is not None))


def _gating_func(keys: _ArchitectureKeys, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Return the gating function of the experts, a key of GATING_FUNCS.

    If the file has no such key, router biases imply V3's sigmoid. (llama.cpp's converter omits the key for a
    config.json of transformers, and llama.cpp then uses softmax.)
    """
    has_biases = any(name.endswith(".exp_probs_b.bias") for name in tensors)
    return keys.size("expert_gating_func", 2 if has_biases else 1)


def _family(keys: _ArchitectureKeys, tensors: Mapping[str, tuple[int, ...]]) -> str:
    if keys.arch == "deepseek2":
        return "deepseek_v3" if _gating_func(keys, tensors) == 2 else "deepseek_v2"
    return next(family for family, arch in ARCHITECTURES.items() if arch == keys.arch)


def _read_gqa(keys: _ArchitectureKeys, tensors: Mapping[str, tuple[int, ...]]) -> GQAConfig:
    heads = keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", keys.size("embedding_length") // heads)
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise ConfigError("heads whose keys and values differ in width are not supported; use another model")
    return GQAConfig(
        num_heads=heads,
        num_kv_heads=keys.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )


def _read_mla(keys: _ArchitectureKeys) -> MLAConfig:
    """Read the MLA settings. In new files, key_length and value_length are the widths for attention on latents, and the
    head widths have the suffix _mla; in old files, key_length and value_length are the head widths."""
    suffix = "_mla" if keys.has("attention.key_length_mla") else ""
    rotated = keys.size("rope.dimension_count")
    width = keys.size(f"attention.key_length{suffix}", least=rotated + 1)
    return MLAConfig(
        num_heads=keys.size("attention.head_count"),
        q_lora_rank=keys.size("attention.q_lora_rank", 0, least=0),
        kv_lora_rank=keys.size("attention.kv_lora_rank"),
        qk_nope_head_dim=width - rotated,
        qk_rope_head_dim=rotated,
        v_head_dim=keys.size(f"attention.value_length{suffix}"),
    )


def _read_experts(keys: _ArchitectureKeys, num_layers: int, tensors: Mapping[str, tuple[int, ...]]) -> MoEConfig | None:
    num_experts = keys.size("expert_count", 0, least=0)
    if not num_experts:
        return None
    if keys.arch not in ("qwen3moe", "deepseek2"):
        raise ConfigError(f"{keys.arch}.expert_count={num_experts} is not supported; use a model without experts")
    is_qwen = keys.arch == "qwen3moe"
    gating_func = _gating_func(keys, tensors)
    if gating_func not in GATING_FUNCS or (is_qwen and gating_func != 1):
        raise ConfigError(
            f"{keys.arch}.expert_gating_func={gating_func} is not supported; known: 1 (softmax), 2 (sigmoid)"
        )
    groups = keys.size("expert_group_count", 1)
    return MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=keys.size("expert_used_count"),
        num_shared_experts=0 if is_qwen else keys.size("expert_shared_count", least=0),
        moe_intermediate_size=keys.size("expert_feed_forward_length"),
        num_groups=groups,
        top_groups=keys.size("expert_group_used_count", groups),
        scoring=GATING_FUNCS[gating_func],  # type: ignore[arg-type]
        group_score="top2" if gating_func == 2 else "max",
        norm_topk_prob=is_qwen or bool(keys.meta.find(f"{keys.arch}.expert_weights_norm", bool)),
        route_scale=keys.number("expert_weights_scale", 1.0) or 1.0,  # llama.cpp uses 0 for none
        first_dense_layers=min(keys.size("leading_dense_block_count", 0, least=0), num_layers),
    )


def _read_rope(keys: _ArchitectureKeys, width: int, factors: Tensor | None) -> RopeConfig:
    interleaved = keys.arch == "deepseek2"
    plain = RopeConfig(theta=keys.number("rope.freq_base", 10000.0), interleaved=interleaved)
    has_factor = keys.has("rope.scaling.factor")
    kind = keys.text("rope.scaling.type") or ("linear" if has_factor else "none")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"{keys.arch}.rope.scaling.type={kind!r} is not supported; known: none, linear, yarn")
    if factors is not None:
        return _read_llama3(keys, plain, width, factors)
    if kind == "linear" and has_factor:
        return replace(plain, linear_factor=keys.number("rope.scaling.factor"))
    return replace(plain, yarn=_read_yarn(keys)) if kind == "yarn" else plain


def _read_yarn(keys: _ArchitectureKeys) -> YarnConfig:
    """Read YaRN. The log multiplier is mscale_all_dim / 10; in DeepSeek's models mscale equals mscale_all_dim."""
    mscale = round(keys.number("rope.scaling.yarn_log_multiplier", 0.0) * 10, 6)
    if (mscale != 0) != (keys.arch == "deepseek2"):
        raise ConfigError(
            f"{keys.arch}.rope.scaling.yarn_log_multiplier={mscale / 10} is not supported: deepseek2 requires the key, "
            "and the other architectures do not have it; fetch another conversion"
        )
    yarn = YarnConfig(
        factor=keys.number("rope.scaling.factor"),
        original_max_positions=keys.size("rope.scaling.original_context_length"),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=mscale or 1.0,
        mscale_all_dim=mscale,
    )
    plain = yarn_mscale(yarn.factor, 1.0)  # explicit in some files; llama.cpp always uses it
    amplitude = keys.number("rope.scaling.yarn_attn_factor", 1.0)
    if amplitude != 1 and not math.isclose(amplitude, plain, rel_tol=1e-5):
        raise ConfigError(
            f"{keys.arch}.rope.scaling.yarn_attn_factor={amplitude} is not supported (only 1.0, or {plain:.7g} as "
            "computed from the factor); use another model"
        )
    return yarn


def _read_llama3(keys: _ArchitectureKeys, plain: RopeConfig, width: int, factors: Tensor) -> RopeConfig:
    """Find the settings that produce rope_freqs: from our own key, else by trying the settings of the released models
    with their original context length and with powers of two."""
    published = Llama3RopeConfig()
    low, high, original = published.low_freq_factor, published.high_freq_factor, published.original_max_positions
    known = keys.meta.find(LLAMA3, list)
    if known is not None and not (
        len(known) == 4 and all(isinstance(value, float | int) and math.isfinite(value) for value in known)
    ):
        raise ConfigError(f"{LLAMA3}={known!r} is not a list of four numbers; fetch another conversion")
    contexts = (original, *(2**power for power in range(5, 21)))
    for numbers in [known] if known else [[float(factors.max()), low, high, context] for context in contexts]:
        factor, least, most = (float(numpy.format_float_positional(numpy.float32(value))) for value in numbers[:3])
        llama3 = Llama3RopeConfig(
            factor=factor, low_freq_factor=least, high_freq_factor=most, original_max_positions=int(numbers[3])
        )
        rope = replace(plain, llama3=llama3)
        expected = rope_factors_of(width, rope)
        if factors.shape == expected.shape and torch.allclose(factors.float(), expected, rtol=1e-4):
            return rope
    raise ConfigError("rope_freqs.weight does not match Llama 3's context extension; use another model")


def rope_factors_of(width: int, rope: RopeConfig) -> Tensor:
    """Return the divisors of the frequencies in Llama 3's context extension: (width / 2,) fp32."""
    return rope_frequencies(width, replace(rope, llama3=None)) / rope_frequencies(width, rope)
