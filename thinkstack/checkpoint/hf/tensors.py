"""The names and shapes of Hugging Face checkpoints, one table per family, and models filled from and read through it.

Rotary layout: a Hugging Face Llama pairs dimension i with i + d/2 as our non-interleaved rotation does, and the
DeepSeek files pair neighbors as our interleaved one does, so no row is permuted. Experts lie one by one on disk and
fused here.

MTP modules are written as in the released V3 files: block `num_layers + depth`, with its own copies of embedding and
head (`embed_tokens.weight`, `shared_head.head.weight`). On reading, copies must equal the main model's tensors, which
they are shared with here, and may be missing. So a released file comes back byte for byte, copies included. The head
of a model with tied embeddings is not written; where another program wrote it, it must equal the embedding.
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
from thinkstack.kernels.dequantize import dequantize_
from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import (
    EXPERT_STACKS,
    QuantizedWeight,
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
"""Whose biases are stored, where a model has them."""
DENSE = {"ffn.w1": "mlp.gate_proj", "ffn.w3": "mlp.up_proj", "ffn.w2": "mlp.down_proj"}
SHARED = {
    "ffn.shared.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared.w3": "mlp.shared_experts.up_proj",
    "ffn.shared.w2": "mlp.shared_experts.down_proj",
}
MTP = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "merge": "eh_proj", "norm": "shared_head.norm"}


class Stored(NamedTuple):
    """One tensor on disk and the part of ours that it is."""

    name: str
    """On disk."""
    source: str
    """In Transformer.state_dict()."""
    part: tuple[int, ...] = ()
    """Expert and place in its stack (gate 0, up 1), where the source is a stack of experts; () is all of it."""
    is_copy: bool = False
    """Repeats a tensor stored elsewhere; may be missing on disk, must be equal if present."""
    is_written: bool = True
    """Whether our own files have it."""
    is_matrix: bool = False
    """Whether it is a matrix of a block, router aside: what is kept in few bits where anything is."""


def stored_tensors(cfg: ModelConfig) -> list[Stored]:
    """Every tensor of a checkpoint of `cfg`, bottom up."""
    tied = cfg.tie_embeddings
    names = [Stored("model.embed_tokens.weight", "embed.weight")]
    for layer in range(cfg.num_layers):
        names += _block(cfg, layer, f"layers.{layer}.")
    names.append(Stored("model.norm.weight", "norm.weight"))
    names.append(Stored("lm_head.weight", "head.weight", is_copy=tied, is_written=not tied))
    for depth in range(cfg.mtp_layers):
        there = f"model.layers.{cfg.num_layers + depth}."
        names.append(Stored(f"{there}embed_tokens.weight", "embed.weight", is_copy=True))
        names += [Stored(f"{there}{hf}.weight", f"mtp.{depth}.{ours}.weight") for ours, hf in MTP.items()]
        names += _block(cfg, cfg.num_layers + depth, f"mtp.{depth}.block.")
        names.append(Stored(f"{there}shared_head.head.weight", "head.weight", is_copy=True))
    return names


def _block(cfg: ModelConfig, layer: int, ours: str) -> Iterator[Stored]:
    """The tensors of block `layer`, called `ours` here."""
    there = f"model.layers.{layer}."
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
        yield Stored(f"{there}{hf}.weight", f"{ours}{name}.weight", is_matrix=not name.endswith("norm"))
    for name in biases:
        yield Stored(f"{there}{table[name]}.bias", f"{ours}{name}.bias")
    if moe is not None:
        yield Stored(f"{there}mlp.gate.weight", f"{ours}ffn.router")
        if cfg.family == "deepseek_v3":  # the others balance by losses and store no bias
            yield Stored(f"{there}mlp.gate.e_score_correction_bias", f"{ours}ffn.bias")
        for expert in range(moe.num_experts):
            file = f"{there}mlp.experts.{expert}."
            yield Stored(f"{file}gate_proj.weight", f"{ours}ffn.w_in", (expert, 0), is_matrix=True)  # (I, D)
            yield Stored(f"{file}up_proj.weight", f"{ours}ffn.w_in", (expert, 1), is_matrix=True)
            yield Stored(f"{file}down_proj.weight", f"{ours}ffn.w_out", (expert, 0), is_matrix=True)  # (D, I)


def shapes_on_disk(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of `stored_tensors`."""
    with torch.device("meta"):
        state = Transformer(cfg).state_dict()
    return {item.name: _shape(tuple(state[item.source].shape), item) for item in stored_tensors(cfg)}


def _shape(shape: tuple[int, ...], item: Stored) -> tuple[int, ...]:
    return (shape[1] // EXPERT_STACKS[item.source.rpartition(".")[2]], shape[2]) if item.part else shape


def check_tensors(
    where: Path, cfg: ModelConfig, found: Mapping[str, tuple[int, ...]], file_of: Callable[[str], Path]
) -> None:
    """Raise ConfigError unless the tensors `found`, shapes by name, are those of a model of `cfg`.

    where: the checkpoint; file_of: the file that holds a tensor; for messages.
    """
    shapes = shapes_on_disk(cfg)
    missing = [item.name for item in stored_tensors(cfg) if item.name not in found and not item.is_copy]
    if missing:
        way_out = "the download is incomplete or its configuration belongs to other weights; fetch it again"
        if missing == ["lm_head.weight"]:
            way_out = (
                "if the head is the embedding, set tie_word_embeddings to true in config.json, else fetch it again"
            )
        raise ConfigError(f"{where} lacks the tensor {missing[0]}{_more(missing)}: {way_out}")
    unexpected = sorted(found.keys() - shapes.keys())
    if unexpected:
        raise ConfigError(
            f"{file_of(unexpected[0])} has the unexpected tensor {unexpected[0]}{_more(unexpected)}: the configuration "
            f"describes another model ({_counts(cfg)}); use the config.json that belongs to these weights"
        )
    for name, shape in found.items():
        if shape != shapes[name]:
            raise ConfigError(
                f"{file_of(name)}: {name} has shape {shape}, the configuration asks for {shapes[name]} "
                f"({_counts(cfg)}); use the config.json that belongs to these weights"
            )


def _counts(cfg: ModelConfig) -> str:
    """What a configuration says, where weights may say otherwise."""
    tied = "tied" if cfg.tie_embeddings else "untied"
    return f"{cfg.num_layers} layers, width {cfg.hidden_size}, {cfg.attention.num_heads} heads, {tied} head"


def allocate(model: Transformer) -> None:
    """Give a model on the meta device memory, with whatever numbers are in it; each module gets a tensor of its own.

    What torch has for this, to_empty, imports its compiler, half a second of every start.
    """
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def empty_model(
    cfg: ModelConfig, dtype: torch.dtype, quantization: QuantScheme | None = None, packed: list[str] | None = None
) -> Transformer:
    """A model with uninitialized parameters in `dtype`, on the CPU; balance biases are fp32 zeros.

    storage: how the parameters named in `packed` are kept, by default the matrices of all blocks.
    Raises ConfigError if the machine has not the memory for it.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if quantization is not None:
        quantize_model(model, quantization, quantizable_matrices(model) if packed is None else packed)
    try:
        allocate(model)
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e9
        raise ConfigError(f"a model of {size:,.1f} GB does not fit into memory ({error}); use a smaller one") from error
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight  # each module has got a tensor of its own
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.zero_()
    return model


def check_storable(model: Transformer) -> None:
    """Raise ConfigError if the family has no place on disk for what the model holds: only V3 stores balance biases."""
    if model.cfg.family == "deepseek_v3":
        return
    for name, module in model.named_modules():
        if isinstance(module, MoE) and bool(module.bias.any()):
            raise ConfigError(
                f"{name}.bias is not zero, and {model.cfg.family} files have no place for it; train with "
                "bias_speed=0, or use family deepseek_v3"
            )


def source_of(model: Transformer, path: Path = Path("the model")) -> TensorSource:
    """A model as a Source. Raises ConfigError for what the family's files cannot hold."""
    check_storable(model)
    state, packed = model.state_dict(), quantized_weights(model)
    tensors: dict[str, Callable[[], Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}
    parts: dict[str, Callable[[], Parts]] = {}
    for item in stored_tensors(model.cfg):
        owner = packed.get(item.source)
        if owner is not None:
            tensors[item.name] = partial(owner.dequantize, item.part)
            parts[item.name] = partial(owner.parts, item.part)
            dtypes[item.name] = owner.dtype
        elif item.is_written:
            tensors[item.name] = partial(part_of, state[item.source], item)
            dtypes[item.name] = state[item.source].dtype
    quantizations = {owner.quantization for owner in packed.values()}
    assert len(quantizations) < 2, quantizations
    quantization = quantizations.pop() if quantizations else None
    return TensorSource(
        path=path, cfg=model.cfg, tensors=tensors, dtypes=dtypes, quantization=quantization, packed=parts
    )


def packed_names(source: TensorSource) -> list[str]:
    """Parameters all of whose tensors the checkpoint keeps packed."""
    items = stored_tensors(source.cfg)
    plain = {item.source for item in items if item.name not in source.packed and not item.is_copy}
    found = dict.fromkeys(item.source for item in items if item.source not in plain and not item.is_copy)
    return [name for name in found if plain.isdisjoint(_together(name))]


def _together(name: str) -> list[str]:
    """What is packed with a parameter: of experts both stacks, else it alone."""
    owner, _, leaf = name.rpartition(".")
    return [f"{owner}.{stack}" for stack in EXPERT_STACKS] if leaf in EXPERT_STACKS else [name]


def part_of(whole: Tensor, item: Stored) -> Tensor:
    """The view of one of the model's tensors that a tensor on disk is."""
    return whole.unflatten(1, (EXPERT_STACKS[item.source.rpartition(".")[2]], -1))[item.part] if item.part else whole


@torch.no_grad()
def fill(model: Transformer, source: TensorSource) -> None:
    """Copy the tensors of a checkpoint into `model`, in its own dtypes and storage; as many at once as there are
    threads of torch, each by one of them.

    Raises ConfigError, naming path and tensor, for another shape, or a copy that differs from its original.
    """
    state, packed = model.state_dict(), quantized_weights(model)
    items = [item for item in stored_tensors(model.cfg) if item.name in source.tensors]

    def take(item: Stored) -> None:
        owner = packed.get(item.source)
        if owner is not None:
            _fill_packed(owner, item, source)
        else:
            _fill_plain(part_of(state[item.source], item), item, source)

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(take, [item for item in items if not item.is_copy]):
            pass
    for item in items:
        if item.is_copy:
            _compare(state[item.source], item, source)


def _fill_packed(owner: QuantizedWeight, item: Stored, source: TensorSource) -> None:
    """Parts as they are where the checkpoint keeps them so, else packed here."""
    if item.name in source.packed and source.quantization == owner.quantization:
        parts = owner.parts(item.part)
        if (item.name, next(iter(parts))) in source.direct:
            for part, target in parts.items():
                source.direct[item.name, part](target)
        else:
            owner.put(item.part, source.packed[item.name]())
    else:
        owner.put(item.part, owner.quantization.quantize(source.tensors[item.name]()))


def _fill_plain(target: Tensor, item: Stored, source: TensorSource) -> None:
    if item.name in source.packed:
        assert source.quantization is not None
        dequantize_(source.quantization, source.packed[item.name](), target)
        return
    if (item.name, "") in source.direct and source.dtype_of(item.name) == target.dtype:
        source.direct[item.name, ""](target)
        return
    tensor = source.tensors[item.name]()
    if tensor.shape != target.shape:
        raise ConfigError(
            f"{source.path}: {item.name} has shape {tuple(tensor.shape)}, its configuration asks for "
            f"{tuple(target.shape)}; use the configuration that belongs to these weights"
        )
    target.copy_(tensor)


def _compare(target: Tensor, item: Stored, source: TensorSource) -> None:
    if not torch.equal(source.tensors[item.name]().to(target.dtype), target.cpu()):
        raise ConfigError(
            f"{source.path}: {item.name} differs from the main model's tensor that it should repeat; only shared "
            "embeddings and heads are supported: set tie_word_embeddings to false if it is a head of its own, or "
            "delete that tensor if the main model's is meant"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
