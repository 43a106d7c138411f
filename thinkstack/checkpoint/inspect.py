"""What a model is made of, in a table for people."""

from pathlib import Path

from thinkstack.checkpoint.hf_config import from_hf
from thinkstack.checkpoint.hf_files import CONFIG
from thinkstack.checkpoint.json_reader import read_json
from thinkstack.checkpoint.model import load_model, locate
from thinkstack.models.config import NAMED, MLAConfig, ModelConfig, named
from thinkstack.models.counts import (
    cache_bytes_per_token,
    count_active_parameters,
    count_parameters,
    flops_per_token,
    mtp_parameters,
    training_bytes,
    weight_bytes,
)
from thinkstack.models.memory import TrainingShape, training_memory

CONTEXT = 4096
"""Tokens of context for the figures that depend on it, if the model takes as many."""


def describe_model(source: str) -> str:
    """Shape and counts of a named size or of a checkpoint; weights are not read unless they stand in a GGUF file.

    Raises ConfigError for anything else.
    """
    cfg = config_of(source)
    context = min(CONTEXT, cfg.max_positions)
    heads = f"{cfg.attention.num_heads} heads"
    kind = "latent attention" if isinstance(cfg.attention, MLAConfig) else "grouped-query attention"
    rows = [
        ("family", cfg.family),
        ("shape", f"{cfg.num_layers} layers of width {cfg.hidden_size:,}, {heads}, {kind}, {cfg.vocab_size:,} tokens"),
        ("context", f"{cfg.max_positions:,} tokens"),
        ("parameters", f"{count_parameters(cfg):,}"),
        ("active per token", f"{count_active_parameters(cfg):,}"),
        ("MTP modules", f"{mtp_parameters(cfg):,} parameters in {cfg.mtp_layers}"),
        ("forward pass", f"{flops_per_token(cfg, context):,.0f} FLOP per token at context {context:,}"),
        ("weights", f"{size_of(weight_bytes(cfg))} in bf16"),
        ("cache", f"{cache_bytes_per_token(cfg):,} bytes per token in bf16"),
        ("training", f"{size_of(training_bytes(cfg))} for weights, gradients and AdamW in fp32, without activations"),
    ]
    if cfg.moe is not None:
        moe = cfg.moe
        routed = f"{moe.top_k} of {moe.num_experts} routed + {moe.num_shared_experts} shared"
        rows.insert(2, ("experts", f"{routed}, {moe.top_groups} of {moe.num_groups} groups, width {moe.expert_size:,}"))
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def describe_training(source: str, shape: TrainingShape) -> str:
    """Memory of a training step of that model, by part. Raises ConfigError as `describe_model`."""
    parts = training_memory(config_of(source), shape)
    path = "C++ kernels" if shape.with_kernels else "torch's operators"
    micro = f"{shape.rows} rows of {shape.row_tokens:,} tokens, {shape.passes} for each of {shape.workers} workers"
    kept = "of each block its input" if shape.checkpoint_layers else "all activations"
    rows = [("micro-batch", micro), ("computed", f"in {shape.dtype} by {path}, keeping {kept}")]
    rows += [(name, size_of(size)) for name, size in parts.items()]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def size_of(num_bytes: float) -> str:
    """Bytes in the unit that leaves at most three digits before the point: 1,342 GB is 1.3 TB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def config_of(source: str) -> ModelConfig:
    """The configuration of a named size or of a checkpoint."""
    if source in NAMED:
        return named(source)
    path = locate(source)
    if path.suffix == ".gguf":
        return load_model(source).cfg
    return from_hf(read_json(Path(path) / CONFIG), str(path / CONFIG))
