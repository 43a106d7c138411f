"""Names and shapes of the tensors of Hugging Face checkpoints, one table per family; loading models through the table.

Rotary layout: Hugging Face Llama files pair dimension i with i + d/2, as our non-interleaved rotation does, and the
DeepSeek files pair neighbors, as our interleaved rotation does, so no row is permuted. Experts are separate tensors on
disk and stacked here.

MTP modules are written as in the released V3 files: block `num_layers + depth`, with its own copies of embedding and
head (`embed_tokens.weight`, `shared_head.head.weight`). When read, copies may be missing and must equal the main
model's tensors, since they are shared here. So a released file round-trips byte for byte, including copies. The head of
a model with tied embeddings is not written; if another program wrote it, it must equal the embedding.
"""

# Shapes in this file: E experts, I intermediate size of one expert, D hidden size, P matrices of an expert in a stack.

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thinkstack.checkpoint.source import TensorSource
from thinkstack.kernels.ops import dequantize_
from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.layers import QuantizedWeight
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import (
    EXPERT_STACKS,
    quantizable_matrices,
    quantize_model,
    quantized_weights,
)
from thinkstack.models.transformer import Transformer
from thinkstack.quant.scheme import Parts, QuantScheme
from thinkstack.types import ConfigError

# Our name within a block -> the name within model.layers.N, by part of the block.
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
MLA_DIRECT = {"attention.wq": "self_attn.q_proj"}
MLA_LATENT = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
}
MLA = {
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
}
GQA = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
}
GQA_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
QKV_BIASES, OUT_BIAS = ("attention.wq", "attention.wk", "attention.wv"), ("attention.wo",)
"""Projections whose biases are stored, if a model has biases."""
DENSE = {"ffn.w1": "mlp.gate_proj", "ffn.w3": "mlp.up_proj", "ffn.w2": "mlp.down_proj"}
SHARED = {
    "ffn.shared.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared.w3": "mlp.shared_experts.up_proj",
    "ffn.shared.w2": "mlp.shared_experts.down_proj",
}
MTP = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "merge": "eh_proj", "norm": "shared_head.norm"}


class TensorEntry(NamedTuple):
    """One tensor on disk and the corresponding part of our model."""

    name: str
    """Name on disk."""
    source: str
    """Name in Transformer.state_dict()."""
    part: tuple[int, ...] = ()
    """Expert and index in its stack (gate 0, up 1), if the source is a stack of experts; () is the complete tensor."""
    is_copy: bool = False
    """Whether it repeats another stored tensor; a copy may be missing on disk, and must be equal if present."""
    is_written: bool = True
    """Whether our files contain it."""
    is_matrix: bool = False
    """Whether it is a matrix of a transformer block, but not the router; these matrices can be quantized."""


def tensor_entries(cfg: ModelConfig) -> list[TensorEntry]:
    """Return every tensor of a checkpoint of `cfg`, from embedding to head."""
    tied = cfg.tie_embeddings
    names = [TensorEntry("model.embed_tokens.weight", "embed.weight")]
    for layer in range(cfg.num_layers):
        names += _block(cfg, layer, f"layers.{layer}.")
    names.append(TensorEntry("model.norm.weight", "norm.weight"))
    names.append(TensorEntry("lm_head.weight", "head.weight", is_copy=tied, is_written=not tied))
    for depth in range(cfg.mtp_layers):
        prefix = f"model.layers.{cfg.num_layers + depth}."
        names.append(TensorEntry(f"{prefix}embed_tokens.weight", "embed.weight", is_copy=True))
        names += [TensorEntry(f"{prefix}{hf}.weight", f"mtp.{depth}.{ours}.weight") for ours, hf in MTP.items()]
        names += _block(cfg, cfg.num_layers + depth, f"mtp.{depth}.block.")
        names.append(TensorEntry(f"{prefix}shared_head.head.weight", "head.weight", is_copy=True))
    return names


def _block(cfg: ModelConfig, layer: int, ours: str) -> Iterator[TensorEntry]:
    """Yield the tensors of block `layer`. ours: its prefix in our state dict."""
    prefix = f"model.layers.{layer}."
    table = dict(NORMS)
    if isinstance(cfg.attention, MLAConfig):
        table |= MLA | (MLA_LATENT if cfg.attention.q_lora_rank else MLA_DIRECT)
        biases: tuple[str, ...] = ()
    else:
        table |= GQA | (GQA_NORMS if cfg.attention.qk_norm else {})
        biases = QKV_BIASES * cfg.attention.qkv_bias + OUT_BIAS * cfg.attention.out_bias
    moe = cfg.moe if cfg.is_moe_layer(layer) else None
    if moe is None:
        table |= DENSE
    elif moe.num_shared_experts:
        table |= SHARED
    for name, hf in table.items():
        yield TensorEntry(f"{prefix}{hf}.weight", f"{ours}{name}.weight", is_matrix=not name.endswith("norm"))
    for name in biases:
        yield TensorEntry(f"{prefix}{table[name]}.bias", f"{ours}{name}.bias")
    if moe is not None:
        yield TensorEntry(f"{prefix}mlp.gate.weight", f"{ours}ffn.router")
        if cfg.family == "deepseek_v3":  # the other families balance by a loss and store no bias
            yield TensorEntry(f"{prefix}mlp.gate.e_score_correction_bias", f"{ours}ffn.bias")
        for expert in range(moe.num_experts):
            file = f"{prefix}mlp.experts.{expert}."
            yield TensorEntry(f"{file}gate_proj.weight", f"{ours}ffn.w_in", (expert, 0), is_matrix=True)  # (I, D)
            yield TensorEntry(f"{file}up_proj.weight", f"{ours}ffn.w_in", (expert, 1), is_matrix=True)
            yield TensorEntry(f"{file}down_proj.weight", f"{ours}ffn.w_out", (expert, 0), is_matrix=True)  # (D, I)


def shapes_on_disk(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of `tensor_entries`."""
    with torch.device("meta"):
        state = Transformer(cfg).state_dict()
    return {entry.name: _shape(tuple(state[entry.source].shape), entry) for entry in tensor_entries(cfg)}


def _shape(shape: tuple[int, ...], entry: TensorEntry) -> tuple[int, ...]:
    return (shape[1] // EXPERT_STACKS[entry.source.rpartition(".")[2]], shape[2]) if entry.part else shape


def check_tensors(
    where: Path, cfg: ModelConfig, found: Mapping[str, tuple[int, ...]], file_of: Callable[[str], Path]
) -> None:
    """Raise ConfigError unless the tensors `found` (shapes by name) match a model of `cfg`.

    where: the checkpoint; file_of: returns the file of a tensor; both for messages.
    """
    shapes = shapes_on_disk(cfg)
    missing = [entry.name for entry in tensor_entries(cfg) if entry.name not in found and not entry.is_copy]
    if missing:
        way_out = "the download is incomplete or its configuration belongs to other weights; fetch it again"
        if missing == ["lm_head.weight"]:
            way_out = (
                "if the head shares the embedding, set tie_word_embeddings to true in config.json, else fetch it again"
            )
        raise ConfigError(f"{where} lacks the tensor {missing[0]}{_more(missing)}: {way_out}")
    unexpected = sorted(found.keys() - shapes.keys())
    if unexpected:
        raise ConfigError(
            f"{file_of(unexpected[0])} has the unexpected tensor {unexpected[0]}{_more(unexpected)}: the configuration "
            f"describes another model ({_counts(cfg)}); use the config.json of these weights"
        )
    for name, shape in found.items():
        if shape != shapes[name]:
            raise ConfigError(
                f"{file_of(name)}: {name} has shape {shape}, but the configuration requires {shapes[name]} "
                f"({_counts(cfg)}); use the config.json of these weights"
            )


def _counts(cfg: ModelConfig) -> str:
    """Describe the values of a configuration that determine the tensors."""
    tied = "tied" if cfg.tie_embeddings else "untied"
    return f"{cfg.num_layers} layers, width {cfg.hidden_size}, {cfg.attention.num_heads} heads, {tied} head"


def allocate(model: Transformer) -> None:
    """Allocate uninitialized memory for a model on the meta device; each module gets its own tensors.

    torch's to_empty imports the compiler, which takes half a second.
    """
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def empty_model(
    cfg: ModelConfig, dtype: torch.dtype, quantization: QuantScheme | None = None, quantized: list[str] | None = None
) -> Transformer:
    """Create a model with uninitialized parameters in `dtype`, on the CPU; balance biases are fp32 zeros.

    quantization: scheme of the parameters named in `quantized`; quantized=None means the matrices of all blocks.
    Raises ConfigError if there is not enough memory.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if quantization is not None:
        quantize_model(model, quantization, quantizable_matrices(model) if quantized is None else quantized)
    try:
        allocate(model)
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e9
        raise ConfigError(f"a model of {size:,.1f} GB does not fit into memory ({error}); use a smaller one") from error
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight  # `allocate` has given each module its own tensor
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.zero_()
    return model


def check_storable(model: Transformer) -> None:
    """Raise ConfigError if the family cannot store the model: only DeepSeek-V3 files have balance biases."""
    if model.cfg.family == "deepseek_v3":
        return
    for name, module in model.named_modules():
        if isinstance(module, MoE) and bool(module.bias.any()):
            raise ConfigError(
                f"{name}.bias is not zero, and {model.cfg.family} files cannot store it; train with "
                "bias_speed=0, or use family=deepseek_v3"
            )


def source_of(model: Transformer, path: Path = Path("the model")) -> TensorSource:
    """Return a TensorSource of a model. Raises ConfigError if the family cannot store the model."""
    check_storable(model)
    state, quantized = model.state_dict(), quantized_weights(model)
    tensors: dict[str, Callable[[], Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}
    parts: dict[str, Callable[[], Parts]] = {}
    for entry in tensor_entries(model.cfg):
        owner = quantized.get(entry.source)
        if owner is not None:
            tensors[entry.name] = partial(owner.dequantize, entry.part)
            parts[entry.name] = partial(owner.parts, entry.part)
            dtypes[entry.name] = owner.dtype
        elif entry.is_written:
            tensors[entry.name] = partial(view_of_entry, state[entry.source], entry)
            dtypes[entry.name] = state[entry.source].dtype
    quantizations = {owner.quantization for owner in quantized.values()}
    assert len(quantizations) < 2, quantizations
    quantization = quantizations.pop() if quantizations else None
    return TensorSource(
        path=path, cfg=model.cfg, tensors=tensors, dtypes=dtypes, quantization=quantization, quantized=parts
    )


def quantized_names(source: TensorSource) -> list[str]:
    """Return the names of the parameters whose tensors are all quantized in the checkpoint."""
    items = tensor_entries(source.cfg)
    plain = {entry.source for entry in items if entry.name not in source.quantized and not entry.is_copy}
    found = dict.fromkeys(entry.source for entry in items if entry.source not in plain and not entry.is_copy)
    return [name for name in found if plain.isdisjoint(_quantized_together(name))]


def _quantized_together(name: str) -> list[str]:
    """Return the names of the parameters that are quantized with `name`: both expert stacks, else only `name`."""
    owner, _, leaf = name.rpartition(".")
    return [f"{owner}.{stack}" for stack in EXPERT_STACKS] if leaf in EXPERT_STACKS else [name]


def view_of_entry(tensor: Tensor, entry: TensorEntry) -> Tensor:
    """Return the view of a model tensor that corresponds to a tensor on disk."""
    return (
        tensor.unflatten(1, (EXPERT_STACKS[entry.source.rpartition(".")[2]], -1))[entry.part] if entry.part else tensor
    )


@torch.no_grad()
def fill(model: Transformer, source: TensorSource) -> None:
    """Copy the tensors of a checkpoint into `model`, in the dtypes and quantization of the model.

    Tensors are loaded in parallel by torch.get_num_threads() threads with one torch thread each.
    Raises ConfigError with path and tensor for a wrong shape, or for a copy that differs from its original.
    """
    state, quantized = model.state_dict(), quantized_weights(model)
    items = [entry for entry in tensor_entries(model.cfg) if entry.name in source.tensors]

    def load_entry(entry: TensorEntry) -> None:
        owner = quantized.get(entry.source)
        if owner is not None:
            _fill_quantized(owner, entry, source)
        else:
            _fill_dense(view_of_entry(state[entry.source], entry), entry, source)

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(load_entry, [entry for entry in items if not entry.is_copy]):
            pass
    for entry in items:
        if entry.is_copy:
            _check_copy(state[entry.source], entry, source)


def _fill_quantized(owner: QuantizedWeight, entry: TensorEntry, source: TensorSource) -> None:
    """Copy the stored parts if the checkpoint has the same quantization, else quantize here."""
    if entry.name in source.quantized and source.quantization == owner.quantization:
        parts = owner.parts(entry.part)
        if (entry.name, next(iter(parts))) in source.direct_readers:
            for part, target in parts.items():
                source.direct_readers[entry.name, part](target)
        else:
            owner.set_parts(entry.part, source.quantized[entry.name]())
    else:
        owner.set_parts(entry.part, owner.quantization.quantize(source.tensors[entry.name]()))


def _fill_dense(target: Tensor, entry: TensorEntry, source: TensorSource) -> None:
    if entry.name in source.quantized:
        assert source.quantization is not None
        dequantize_(source.quantization, source.quantized[entry.name](), target)
        return
    if (entry.name, "") in source.direct_readers and source.dtype_of(entry.name) == target.dtype:
        source.direct_readers[entry.name, ""](target)
        return
    tensor = source.tensors[entry.name]()
    if tensor.shape != target.shape:
        raise ConfigError(
            f"{source.path}: {entry.name} has shape {tuple(tensor.shape)}, but its configuration requires "
            f"{tuple(target.shape)}; use the configuration of these weights"
        )
    target.copy_(tensor)


def _check_copy(target: Tensor, entry: TensorEntry, source: TensorSource) -> None:
    if not torch.equal(source.tensors[entry.name]().to(target.dtype), target.cpu()):
        raise ConfigError(
            f"{source.path}: {entry.name} differs from the main model's tensor that it should repeat; only shared "
            "embeddings and heads are supported: set tie_word_embeddings to false if it is a separate head, or delete "
            "that tensor to use the main model's"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
