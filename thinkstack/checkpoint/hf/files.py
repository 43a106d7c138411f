"""Folders in Hugging Face layout as a Source, and a Source as the files of such a folder.

FP8 files (quant_method fp8) hold for each matrix of a block e4m3 numbers and, beside them, `weight_scale_inv`: the
factor of each block of 128 x 128, by which one multiplies whatever the name says.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from thinkstack.checkpoint.hf.config import from_hf, quantization_keys, read_quantization, to_hf
from thinkstack.checkpoint.hf.tensors import Stored, check_tensors, shapes_on_disk, source_of, stored_tensors
from thinkstack.checkpoint.json_reader import read_json
from thinkstack.checkpoint.source import OutputFormat, TensorSource
from thinkstack.checkpoint.tensor_file import Entry, Files, read_header, write_file
from thinkstack.kernels.dequantize import dequantize_
from thinkstack.models.config import ModelConfig
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import BLOCK, E4M3, FP8Blocks
from thinkstack.quant.scheme import Parts
from thinkstack.types import ConfigError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""File types whose reading can run code; they are never opened."""
SCALE = "_scale_inv"
"""What the name of a matrix's scales has behind the matrix's."""
T = TypeVar("T", Tensor, Entry)
MAX_SHARD_BYTES = 5 * 10**9

_log = logging.getLogger(__name__)


def open_hf(folder: Path) -> TensorSource:
    """A checkpoint folder; headers are read and compared with config.json, weights are not.

    Raises ConfigError, naming file and tensor, for a config.json that is not understood, pickled weights, a file that
    is missing, cut off or not safetensors, and a tensor that is missing, unexpected, of another shape or type.
    """
    where = folder / CONFIG
    config = read_json(where)
    cfg, quantization = from_hf(config, str(where)), read_quantization(config, str(where))
    files = Files({name: folder / file for name, file in tensor_files(folder).items() if not _is_derived(name)})
    files.entries = {name: entry for name, entry in files.entries.items() if 0 not in entry.shape}  # no shared experts
    if cfg.mtp_layers and not any(name.startswith(f"model.layers.{cfg.num_layers}.") for name in files.entries):
        _log.warning("%s announces %d MTP layers that the weights lack; loaded without", where, cfg.mtp_layers)
        cfg = replace(cfg, mtp_layers=0)
    shapes = {name: entry.shape for name, entry in files.entries.items() if not name.endswith(SCALE)}
    check_tensors(folder, cfg, shapes, files.path_of)
    source = scaled_source(folder, cfg, quantization, files)
    return replace(source, direct=_direct(source, files))


def _direct(source: TensorSource, files: Files) -> dict[tuple[str, str], Callable[[Tensor], None]]:
    """Every tensor of a folder in Hugging Face layout lies in one piece."""
    found: dict[tuple[str, str], Callable[[Tensor], None]] = {}
    for name in source.tensors:
        parts = {"qweight": name, "scale": f"{name}{SCALE}"} if name in source.packed else {"": name}
        kept = source.quantization.scale_dtype if isinstance(source.quantization, FP8Blocks) else None
        if "scale" in parts and files.entries[parts["scale"]].dtype != kept:
            continue  # its scales are cast on the way
        found |= {(name, part): partial(files.read_into, stored) for part, stored in parts.items()}
    return found


def _is_derived(name: str) -> bool:
    """Whether it is a table of rotations, which old files keep and nobody needs."""
    return name.endswith("rotary_emb.inv_freq")


class Table(Protocol):
    """Tensors by Hugging Face name, scales beside the matrices, wherever they lie."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Type and shape of each."""

    def path_of(self, name: str) -> Path:
        """The file that holds it, or its first part."""

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""


def scaled_source(path: Path, cfg: ModelConfig, quantization: FP8Blocks | None, table: Table) -> TensorSource:
    """A Source of tensors, some of them e4m3 with scales, which `quantization` announces.

    Raises ConfigError for e4m3 that is not announced or lacks its scales, and for scales of another shape.
    """
    entries = {name: entry for name, entry in table.entries.items() if not name.endswith(SCALE)}
    eight = {name: None for name, entry in entries.items() if entry.dtype == E4M3}
    for name in table.entries:
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in eight:
            raise ConfigError(
                f"{table.path_of(name)} has {name}, scales of a matrix that is not {E4M3}; delete them if it was "
                "widened with them, else take files that belong together"
            )
    if quantization is None or not eight:
        for name in eight:
            raise ConfigError(
                f"{table.path_of(name)}: {name} is {E4M3}, and the configuration does not say in which blocks; take "
                "the config.json of these weights, with its quantization_config"
            )
        return TensorSource(
            path=path,
            cfg=cfg,
            tensors={name: partial(table.read, name) for name in entries},
            dtypes={name: entry.dtype for name, entry in entries.items()},
        )
    scale_dtypes = {_check_scale(table, name) for name in eight}
    is_short = scale_dtypes == {torch.float8_e8m0fnu}  # all else is held as fp32, which every program reads
    known = replace(quantization, scale_dtype=torch.float8_e8m0fnu if is_short else torch.float32)

    def parts(name: str) -> Parts:
        return {"qweight": table.read(name), "scale": table.read(f"{name}{SCALE}").to(known.scale_dtype)}

    def widened(name: str) -> Tensor:
        out = torch.empty(entries[name].shape)
        dequantize_(known, parts(name), out)
        return out

    return TensorSource(
        path=path,
        cfg=cfg,
        tensors={name: partial(widened if name in eight else table.read, name) for name in entries},
        dtypes={name: torch.bfloat16 if entry.dtype == E4M3 else entry.dtype for name, entry in entries.items()},
        quantization=known,
        packed={name: partial(parts, name) for name in eight},
    )


def _check_scale(table: Table, name: str) -> torch.dtype:
    """The type of a matrix's scales. Raises ConfigError if they are missing or do not fit it."""
    scale = f"{name}{SCALE}"
    if scale not in table.entries:
        raise ConfigError(f"{table.path_of(name)}: {name} is {E4M3} and {scale} is missing; fetch it with its scales")
    dtype, shape = table.entries[scale]
    expected = tuple(-(-size // BLOCK) for size in table.entries[name].shape)
    if shape != expected or len(shape) != 2:
        raise ConfigError(
            f"{table.path_of(scale)}: {scale} is {shape}, blocks of {BLOCK} x {BLOCK} of {name} need {expected}; "
            "take the scales that belong to these weights"
        )
    if dtype == E4M3:
        raise ConfigError(f"{table.path_of(scale)}: {scale} is {E4M3}, too coarse for a scale; store it as fp32")
    return dtype


def tensor_files(folder: Path) -> dict[str, str]:
    """Which file of a checkpoint folder holds which tensor. Raises ConfigError for an incomplete folder."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(read_header(folder / WEIGHTS)[1], WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ConfigError(_no_weights(folder))
    weight_map = _weight_map(folder / INDEX)
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / file} is missing, but {INDEX} names it; fetch the folder again")
    return weight_map


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigError(f"{path}: weight_map is not a table of file names; fetch it again")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{path} names {file!r}, which is not a safetensors file beside it; fetch it again")
    return weight_map


def _no_weights(folder: Path) -> str:
    pickles = (
        sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES) if folder.is_dir() else []
    )
    if pickles:
        return (
            f"{folder / pickles[0]} is a pickle, which can run code when read and is never opened; convert it to "
            "safetensors on a machine you trust (transformers: save_pretrained)"
        )
    return f"{folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a complete checkpoint"


class Plan:
    """What a Source becomes in a form: entries by name on disk, and tensors one at a time."""

    def __init__(self, source: TensorSource, form: OutputFormat):
        self.source, self.form = source, form
        self.shapes = shapes_on_disk(source.cfg)
        self.items = [item for item in stored_tensors(source.cfg) if item.is_written]
        self._parts: dict[tuple[int, ...], dict[str, Entry]] = {}

    def entries(self, item: Stored) -> dict[str, Entry]:
        """What one item of the table becomes."""
        shape = self.shapes[item.name]
        if not self.is_packed(item):
            return {item.name: Entry(self.dtype_of(item), shape)}
        assert self.form.quantization is not None
        if shape not in self._parts:
            parts = self.form.quantization.quantize(torch.empty(shape, device="meta"))
            self._parts[shape] = {name: Entry(part.dtype, tuple(part.shape)) for name, part in parts.items()}
        return dict(_named(item, self._parts[shape]))

    def tensors(self, item: Stored) -> Iterator[tuple[str, Tensor]]:
        """The contents of `entries`."""
        source, quantization = self.source, self.form.quantization
        if not self.is_packed(item):
            yield item.name, source.tensors[origin_of(item, source)]().to(self.dtype_of(item))
        elif item.name in source.packed and source.quantization == quantization:
            yield from _named(item, source.packed[item.name]())
        else:
            assert quantization is not None
            yield from _named(item, quantization.quantize(source.tensors[item.name]()))

    def is_packed(self, item: Stored) -> bool:
        """Whether it is kept in few bits: the matrices of blocks, or where nothing changes those that are."""
        if self.form.quantization is None:
            return False
        is_kept = self.form.quantization == self.source.quantization and self.form.dtype is None
        return item.name in self.source.packed if is_kept else item.is_matrix

    def dtype_of(self, item: Stored) -> torch.dtype:
        """fp32 for the balance bias, near 1, where bf16 would round steps of 1e-3 away."""
        if item.source.endswith("ffn.bias"):
            return torch.float32
        return self.form.dtype or self.source.dtype_of(origin_of(item, self.source))


def origin_of(item: Stored, source: TensorSource) -> str:
    """The tensor to write: the item's own, or the original of a copy that the source lacks."""
    if item.name in source.tensors or not item.is_copy:
        return item.name
    return {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}[item.source]


def _named(item: Stored, parts: Mapping[str, T]) -> list[tuple[str, T]]:
    return [(item.name, parts["qweight"]), (f"{item.name}{SCALE}", parts["scale"])]


def write_weights(
    source: TensorSource,
    folder: Path,
    form: OutputFormat,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write model.safetensors into an existing folder, or numbered shards with an index if one file would exceed
    `max_shard_bytes`; no more than a tensor is held at once. advance: told the bytes that were written.

    OSError is left to the caller, who knows what else goes into the folder (state.write_folder).
    """
    plan = Plan(source, form)
    shards = _cut(plan, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries = {name: entry for item in shard for name, entry in plan.entries(item).items()}
        weight_map |= dict.fromkeys(entries, file)
        with write_file(folder / file, entries) as writer:
            for item in shard:
                for name, tensor in plan.tensors(item):
                    writer.put(name, tensor)
                    advance(tensor.nbytes)
    if len(shards) > 1:
        total = written_bytes(source, form)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def written_bytes(source: TensorSource, form: OutputFormat) -> int:
    """Bytes of all tensors in that form."""
    plan = Plan(source, form)
    return sum(entry.num_bytes for item in plan.items for entry in plan.entries(item).values())


def _cut(plan: Plan, max_shard_bytes: int) -> list[list[Stored]]:
    """Cut the list of tensors into files: each as full as it may be, at least one tensor in it."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for item in plan.items:
        num_bytes = sum(entry.num_bytes for entry in plan.entries(item).values())
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += num_bytes
    return shards


def save_weights(model: Transformer, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """`write_weights` of a model as it is. Raises ConfigError for what the family's files cannot hold."""
    source = source_of(model)
    write_weights(source, folder, OutputFormat(quantization=source.quantization), max_shard_bytes)


def config_json(source: TensorSource, form: OutputFormat) -> dict[str, Any]:
    """The config.json of what `write_weights` writes."""
    dtype = form.dtype or source.dtype_of("model.embed_tokens.weight")
    config = to_hf(source.cfg) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    return config | quantization_keys(form.quantization)
