"""Description of a model or checkpoint as table rows (label, text). Weights are not read."""

from thinkstack.checkpoint.model import load_chat, load_tokenizer, open_source
from thinkstack.checkpoint.source import TensorSource
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
from thinkstack.types import ConfigError

CONTEXT = 4096
"""Context length, in tokens, for numbers that depend on it; limited to the maximum of the model."""
MAX_SHOWN_TOKENS = 12
"""Maximum number of control tokens to list."""
Rows = list[tuple[str, str]]


def shape_rows(cfg: ModelConfig) -> Rows:
    """Describe the configuration."""
    context = min(CONTEXT, cfg.max_positions)
    heads = f"{cfg.attention.num_heads} heads"
    kind = "latent attention" if isinstance(cfg.attention, MLAConfig) else "grouped-query attention"
    tied = ", tied head" if cfg.tie_embeddings else ""
    rows = [
        ("family", cfg.family),
        (
            "shape",
            f"{cfg.num_layers} layers of width {cfg.hidden_size:,}, {heads}, {kind}, {cfg.vocab_size:,} tokens{tied}",
        ),
        ("context", f"{cfg.max_positions:,} tokens"),
        ("parameters", f"{count_parameters(cfg):,}"),
        ("active per token", f"{count_active_parameters(cfg):,}, including the head, without the embedding"),
        ("MTP modules", f"{mtp_parameters(cfg):,} parameters in {cfg.mtp_layers}"),
        ("forward pass", f"{flops_per_token(cfg, context):,.0f} FLOP per token at context {context:,}"),
        ("weights", f"{size_of(weight_bytes(cfg))} in bf16"),
        ("cache", f"{cache_bytes_per_token(cfg):,} bytes per token in bf16"),
        ("training", f"{size_of(training_bytes(cfg))} for weights, gradients and AdamW in fp32, without activations"),
    ]
    if cfg.moe is not None:
        moe = cfg.moe
        routed = f"{moe.num_experts_per_tok} of {moe.num_experts} routed + {moe.num_shared_experts} shared"
        rows.insert(
            2,
            ("experts", f"{routed}, {moe.top_groups} of {moe.num_groups} groups, width {moe.moe_intermediate_size:,}"),
        )
    return rows


def stored_rows(source: TensorSource) -> Rows:
    """Describe the files."""
    folder = source.path if source.path.is_dir() else source.path.parent
    files = folder.glob("*.safetensors") if source.path.is_dir() else [source.path]
    sizes = [file.stat().st_size for file in files]
    dtypes = (source.dtypes.get(name) for name in source.tensors if name not in source.quantized)
    dtype_names = {
        str(dtype).removeprefix("torch.") if dtype else "quantized, dequantized when read" for dtype in dtypes
    }
    rows = [("stored", f"{size_of(sum(sizes))} in {len(sizes)} files: {', '.join(sorted(dtype_names))}")]
    if source.quantization is not None:
        share = f"{len(source.quantized):,} of {len(source.tensors):,} tensors"
        rows.append(("quantized", f"{source.quantization.name}: {share}"))
    return rows


def text_rows(source: str) -> Rows:
    """Describe the tokenizer and the chat format."""
    try:
        tokenizer = load_tokenizer(source)
    except ConfigError as error:
        return [("tokenizer", f"none: {error}")]
    control = sorted(tokenizer.control, key=tokenizer.control.__getitem__)
    more = f" and {len(control) - MAX_SHOWN_TOKENS} more" if len(control) > MAX_SHOWN_TOKENS else ""
    rows = [
        ("tokenizer", f"{tokenizer.vocab_size:,} tokens, {len(control)} of them control tokens"),
        ("control tokens", f"{' '.join(control[:MAX_SHOWN_TOKENS])}{more}"),
    ]
    try:
        chat = load_chat(source)
    except ConfigError as error:
        return [*rows, ("chat format", f"none: {error}")]
    ends = " ".join(tokenizer.decode([token]) for token in chat.stop_token_ids) or "no token"
    if not chat.has_template:
        return [*rows, ("chat format", f"none: a base model, which continues plain text; a text ends with {ends}")]
    name = "the checkpoint's Jinja template" if chat.name == "template" else chat.name
    return [*rows, ("chat format", f"{name}; a turn ends with {ends}")]


def size_of(num_bytes: float) -> str:
    """Format bytes in the unit with at most three digits before the point: 1,342 GB is 1.3 TB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def config_of(source: str) -> ModelConfig:
    """Return the configuration of a named size or of a checkpoint."""
    return named(source) if source in NAMED else open_source(source).cfg
