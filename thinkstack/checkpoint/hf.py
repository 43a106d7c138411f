"""Weights in Hugging Face layout: one table of names per family, read and written through the same list.

Rotary layout: a Hugging Face Llama pairs dimension i with i + d/2 as our non-interleaved rotation does, and the
DeepSeek files pair neighbours as our interleaved one does, so no row is permuted. Experts lie one by one on disk and
fused here.

MTP modules are written as in the released V3 files: block `num_layers + depth`, with its own copies of embedding and
head (`embed_tokens.weight`, `shared_head.head.weight`). On reading, copies must equal the main model's tensors, which
they are shared with here, and may be missing. So a released file comes back byte for byte, copies included. The head
of a model with tied embeddings is not written; where another program wrote it, it must equal the embedding.
"""

# Shapes in this file: E experts, I intermediate size of one expert, D hidden size.

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""File types whose reading can run code; they are never opened."""

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
    part: tuple[int | slice, ...] = ()
    """Index into the source; () is all of it."""
    is_copy: bool = False
    """Repeats a tensor stored elsewhere; may be missing on disk, must be equal if present."""
    is_written: bool = True
    """Whether our own files have it."""


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
        yield Stored(f"{there}{hf}.weight", f"{ours}{name}.weight")
    for name in biases:
        yield Stored(f"{there}{table[name]}.bias", f"{ours}{name}.bias")
    if moe is not None:
        yield Stored(f"{there}mlp.gate.weight", f"{ours}ffn.router")
        if cfg.family == "deepseek_v3":  # the others balance by losses and store no bias
            yield Stored(f"{there}mlp.gate.e_score_correction_bias", f"{ours}ffn.bias")
        gate, up = slice(0, moe.expert_size), slice(moe.expert_size, None)
        for expert in range(moe.num_experts):
            file = f"{there}mlp.experts.{expert}."
            yield Stored(f"{file}gate_proj.weight", f"{ours}ffn.w_in", (expert, gate))  # (I, D) of (E, 2I, D)
            yield Stored(f"{file}up_proj.weight", f"{ours}ffn.w_in", (expert, up))
            yield Stored(f"{file}down_proj.weight", f"{ours}ffn.w_out", (expert,))  # (D, I) of (E, D, I)


def empty_model(cfg: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> Transformer:
    """A model with uninitialised parameters in `dtype`; buffers (the balance bias) are fp32 zeros.

    Raises ConfigError if the machine has not the memory for it.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    try:
        model.to_empty(device=device)
    except RuntimeError as error:
        size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
        raise ConfigError(f"a model of {size:,.1f} GB does not fit into memory ({error}); use a smaller one") from error
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight  # to_empty gives each module its own tensor
    for buffer in model.buffers():
        buffer.zero_()
    return model


def save_weights(model: Transformer, folder: Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write model.safetensors into an existing folder, or numbered shards with an index if one file would exceed
    `max_shard_bytes`. Tensors keep the model's dtype; the balance bias is fp32.

    Raises ConfigError for a model that the family's files cannot hold; OSError and SafetensorError are left to the
    caller, who knows what else goes into the folder (state.write_folder).
    """
    check_storable(model)
    state = model.state_dict()
    shards = _plan(model.cfg, state, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for index, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{index:05}-of-{len(shards):05}.safetensors"
        tensors = {item.name: _part(state, item).detach().cpu().clone() for item in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plan(cfg: ModelConfig, state: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[Stored]]:
    """Cut the list of tensors into files: each as full as it may be, at least one tensor in it."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for item in stored_tensors(cfg):
        if not item.is_written:
            continue
        nbytes = _part(state, item).nbytes
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    return shards


def _part(state: Mapping[str, Tensor], item: Stored) -> Tensor:
    return state[item.source][item.part] if item.part else state[item.source]


def check_storable(model: Transformer) -> None:
    """Raise ConfigError if the family has no place on disk for what the model holds: only V3 stores balance biases."""
    if model.cfg.family == "deepseek_v3":
        return
    for name, tensor in model.named_buffers():
        if bool(tensor.any()):
            raise ConfigError(
                f"{name} is not zero, and {model.cfg.family} files have no place for it; train with "
                "bias_speed=0, or use family deepseek_v3"
            )


def load_weights(model: Transformer, folder: Path) -> None:
    """Copy the weights of a checkpoint folder into `model`, in the model's own dtypes.

    Raises ConfigError, naming file and tensor, for pickled weights, a file that is missing, cut off or not
    safetensors, and a tensor that is missing, unexpected, of another shape, not of a float type, or a copy that
    differs from its original.
    """
    files = tensor_files(folder)
    expected = {item.name: item for item in stored_tensors(model.cfg)}
    missing = [name for name, item in expected.items() if name not in files and not item.is_copy]
    if missing:
        raise ConfigError(
            f"{folder} lacks the tensor {missing[0]}{_more(missing)}: the download is incomplete or config.json "
            "belongs to other weights; fetch the folder again"
        )
    unexpected = sorted(name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq"))
    if unexpected:
        raise ConfigError(
            f"{folder / files[unexpected[0]]} has the unexpected tensor {unexpected[0]}{_more(unexpected)}: "
            "config.json describes another model; use the config.json that belongs to these weights"
        )
    state = model.state_dict()
    # copies last, so that there is something to compare them with
    ordered = sorted((item for name, item in expected.items() if name in files), key=lambda item: item.is_copy)
    for item, tensor in _read(folder, files, ordered):
        _take(_part(state, item), tensor, item, folder / files[item.name])


@torch.no_grad()
def _take(target: Tensor, tensor: Tensor, item: Stored, path: Path) -> None:
    """Copy a tensor from disk to its place, or compare it if it is a copy."""
    if tensor.shape != target.shape:
        raise ConfigError(
            f"{path}: {item.name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(target.shape)}; use the "
            "config.json that belongs to these weights"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ConfigError(
            f"{path}: {item.name} is {tensor.dtype}, a quantised type; convert the checkpoint to bf16 first"
        )
    if not item.is_copy:
        target.copy_(tensor)
    elif not torch.equal(tensor.to(target.dtype), target.cpu()):
        raise ConfigError(
            f"{path}: {item.name} differs from the main model's tensor that it should repeat; only shared embeddings "
            "and heads are supported: delete that tensor if the main model's is meant"
        )


def _read(folder: Path, files: Mapping[str, str], items: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors of `items`, opening each file once for each run of neighbours in it."""
    handle, opened = None, None
    for item in items:
        path = folder / files[item.name]
        if path != opened:
            handle, opened = _open(path), path
        assert handle is not None
        yield item, handle.get_tensor(item.name)


def tensor_files(folder: Path) -> dict[str, str]:
    """Which file of a checkpoint folder holds which tensor; every file is opened and checked for completeness."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_open(folder / WEIGHTS).keys(), WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ConfigError(_no_weights(folder))
    weight_map = _weight_map(folder / INDEX)
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / file} is missing, but {INDEX} names it; fetch the folder again")
        present = set(_open(folder / file).keys())
        lost = sorted(name for name, place in weight_map.items() if place == file and name not in present)
        if lost:
            raise ConfigError(
                f"{folder / file} lacks the tensor {lost[0]}{_more(lost)} that {INDEX} names; fetch it again"
            )
    return weight_map


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not an index of weights ({error!r}); fetch it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigError(f"{path}: weight_map is not a table of file names; fetch it again")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{path} names {file!r}, which is not a safetensors file beside it; fetch it again")
    return weight_map


def _open(path: Path) -> "safe_open":
    """A safetensors file; its header is checked against its length."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is cut off or not a safetensors file ({error}); fetch it again") from error


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        return (
            f"{folder / pickles[0]} is a pickle, which can run code when read and is never opened; convert it to "
            "safetensors on a machine you trust (transformers: save_pretrained)"
        )
    return f"{folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a complete checkpoint"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
