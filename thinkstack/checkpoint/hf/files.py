"""Reading a folder in Hugging Face layout as a TensorSource, and writing a TensorSource as such a folder.

FP8 files (quant_method=fp8) store the matrices of transformer blocks as e4m3 values, each matrix with
`weight_scale_inv`: one scale per block of 128 x 128. Despite the name, dequantization multiplies by the scale.
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
from thinkstack.checkpoint.hf.tensors import TensorEntry, check_tensors, shapes_on_disk, source_of, tensor_entries
from thinkstack.checkpoint.json_reader import read_json
from thinkstack.checkpoint.source import OutputFormat, TensorSource
from thinkstack.checkpoint.tensor_file import TensorFiles, TensorInfo, read_header, write_file
from thinkstack.kernels.ops import dequantize_
from thinkstack.models.config import ModelConfig
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import BLOCK, E4M3, FP8Blocks
from thinkstack.quant.scheme import Parts
from thinkstack.types import ConfigError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""File types that can run code when loaded; they are never opened."""
SCALE = "_scale_inv"
"""Suffix of the name of a matrix's scales."""
T = TypeVar("T", Tensor, TensorInfo)
MAX_SHARD_BYTES = 5 * 10**9

_log = logging.getLogger(__name__)


def open_hf(folder: Path) -> TensorSource:
    """Open a checkpoint folder: headers are read and compared with config.json, weights are not read.

    Raises ConfigError with file and tensor for an unsupported config.json, pickled weights, a file that is missing,
    truncated or not safetensors, and a tensor that is missing, unexpected, or of a wrong shape or type.
    """
    where = folder / CONFIG
    config = read_json(where)
    cfg, quantization = from_hf(config, str(where)), read_quantization(config, str(where))
    files = TensorFiles({name: folder / file for name, file in tensor_files(folder).items() if not _is_derived(name)})
    files.infos = {name: info for name, info in files.infos.items() if 0 not in info.shape}  # no shared experts
    if cfg.mtp_layers and not any(name.startswith(f"model.layers.{cfg.num_layers}.") for name in files.infos):
        _log.warning("%s has %d MTP layers but the weights have none; loading without them", where, cfg.mtp_layers)
        cfg = replace(cfg, mtp_layers=0)
    shapes = {name: info.shape for name, info in files.infos.items() if not name.endswith(SCALE)}
    check_tensors(folder, cfg, shapes, files.path_of)
    source = scaled_source(folder, cfg, quantization, files)
    return replace(source, direct_readers=_direct_readers(source, files))


def _direct_readers(source: TensorSource, files: TensorFiles) -> dict[tuple[str, str], Callable[[Tensor], None]]:
    """Return direct readers: in Hugging Face layout every stored tensor is contiguous in one file."""
    found: dict[tuple[str, str], Callable[[Tensor], None]] = {}
    for name in source.tensors:
        parts = {"qweight": name, "scale": f"{name}{SCALE}"} if name in source.quantized else {"": name}
        scale_dtype = source.quantization.scale_dtype if isinstance(source.quantization, FP8Blocks) else None
        if "scale" in parts and files.infos[parts["scale"]].dtype != scale_dtype:
            continue  # its scales need a cast
        found |= {(name, part): partial(files.read_into, stored) for part, stored in parts.items()}
    return found


def _is_derived(name: str) -> bool:
    """Whether the tensor is a table of rotary frequencies; old files contain such tables, which are not used."""
    return name.endswith("rotary_emb.inv_freq")


class TensorTable(Protocol):
    """Tensors by Hugging Face name, including the scales of matrices, in one or several files."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each tensor."""

    def path_of(self, name: str) -> Path:
        """Return the file of a tensor, or of its first part."""

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype."""


def scaled_source(path: Path, cfg: ModelConfig, quantization: FP8Blocks | None, table: TensorTable) -> TensorSource:
    """Build a TensorSource of tensors; e4m3 tensors have one scale per block of `quantization`.

    Raises ConfigError for e4m3 tensors without `quantization` or without scales, and for scales of a wrong shape.
    """
    infos = {name: info for name, info in table.infos.items() if not name.endswith(SCALE)}
    fp8_names = {name: None for name, info in infos.items() if info.dtype == E4M3}
    for name in table.infos:
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in fp8_names:
            raise ConfigError(
                f"{table.path_of(name)} has {name}, scales of a matrix that is not {E4M3}; delete them if the matrix "
                "was dequantized, else use matching files"
            )
    if quantization is None or not fp8_names:
        for name in fp8_names:
            raise ConfigError(
                f"{table.path_of(name)}: {name} is {E4M3}, but the configuration has no block size; use the "
                "config.json of these weights, which has a quantization_config"
            )
        return TensorSource(
            path=path,
            cfg=cfg,
            tensors={name: partial(table.read, name) for name in infos},
            dtypes={name: info.dtype for name, info in infos.items()},
        )
    scale_dtypes = {_check_scale(table, name) for name in fp8_names}
    is_e8m0 = scale_dtypes == {torch.float8_e8m0fnu}  # all other dtypes become fp32, which every program reads
    blocks = replace(quantization, scale_dtype=torch.float8_e8m0fnu if is_e8m0 else torch.float32)

    def parts(name: str) -> Parts:
        return {"qweight": table.read(name), "scale": table.read(f"{name}{SCALE}").to(blocks.scale_dtype)}

    def dequantized(name: str) -> Tensor:
        out = torch.empty(infos[name].shape)
        dequantize_(blocks, parts(name), out)
        return out

    return TensorSource(
        path=path,
        cfg=cfg,
        tensors={name: partial(dequantized if name in fp8_names else table.read, name) for name in infos},
        dtypes={name: torch.bfloat16 if info.dtype == E4M3 else info.dtype for name, info in infos.items()},
        quantization=blocks,
        quantized={name: partial(parts, name) for name in fp8_names},
    )


def _check_scale(table: TensorTable, name: str) -> torch.dtype:
    """Return the dtype of a matrix's scales. Raises ConfigError if they are missing or do not match the matrix."""
    scale = f"{name}{SCALE}"
    if scale not in table.infos:
        raise ConfigError(
            f"{table.path_of(name)}: {name} is {E4M3} and {scale} is missing; fetch the matrix with its scales"
        )
    dtype, shape = table.infos[scale]
    expected = tuple(-(-size // BLOCK) for size in table.infos[name].shape)
    if shape != expected or len(shape) != 2:
        raise ConfigError(
            f"{table.path_of(scale)}: {scale} has shape {shape}, but the blocks of {BLOCK} x {BLOCK} of {name} require "
            f"{expected}; use the scales of these weights"
        )
    if dtype == E4M3:
        raise ConfigError(f"{table.path_of(scale)}: {scale} is {E4M3}, too coarse for a scale; store it as fp32")
    return dtype


def tensor_files(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of a checkpoint folder. Raises ConfigError for an incomplete folder."""
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
            raise ConfigError(f"{path} names {file!r}, which is not a safetensors file in its folder; fetch it again")
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


class WritePlan:
    """The tensors of a TensorSource in an output format: infos by name on disk, data one tensor at a time."""

    def __init__(self, source: TensorSource, output_format: OutputFormat):
        self.source, self.output_format = source, output_format
        self.shapes = shapes_on_disk(source.cfg)
        self.entries = [entry for entry in tensor_entries(source.cfg) if entry.is_written]
        self._parts: dict[tuple[int, ...], dict[str, TensorInfo]] = {}

    def infos(self, entry: TensorEntry) -> dict[str, TensorInfo]:
        """Return dtype and shape of the stored tensors of one entry."""
        shape = self.shapes[entry.name]
        if not self.is_quantized(entry):
            return {entry.name: TensorInfo(self.dtype_of(entry), shape)}
        assert self.output_format.quantization is not None
        if shape not in self._parts:
            parts = self.output_format.quantization.quantize(torch.empty(shape, device="meta"))
            self._parts[shape] = {name: TensorInfo(part.dtype, tuple(part.shape)) for name, part in parts.items()}
        return dict(_named_parts(entry, self._parts[shape]))

    def tensors(self, entry: TensorEntry) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of `infos`."""
        source, quantization = self.source, self.output_format.quantization
        if not self.is_quantized(entry):
            yield entry.name, source.tensors[source_name_of(entry, source)]().to(self.dtype_of(entry))
        elif entry.name in source.quantized and source.quantization == quantization:
            yield from _named_parts(entry, source.quantized[entry.name]())
        else:
            assert quantization is not None
            yield from _named_parts(entry, quantization.quantize(source.tensors[entry.name]()))

    def is_quantized(self, entry: TensorEntry) -> bool:
        """Whether the entry is written quantized: every matrix of a transformer block, or, if the output keeps the
        types of the source, the matrices that are quantized in the source."""
        if self.output_format.quantization is None:
            return False
        is_kept = self.output_format.quantization == self.source.quantization and self.output_format.dtype is None
        return entry.name in self.source.quantized if is_kept else entry.is_matrix

    def dtype_of(self, entry: TensorEntry) -> torch.dtype:
        """Return the output dtype; fp32 for the balance bias: near 1, bf16 would round steps of 1e-3 away."""
        if entry.source.endswith("ffn.bias"):
            return torch.float32
        return self.output_format.dtype or self.source.dtype_of(source_name_of(entry, self.source))


def source_name_of(entry: TensorEntry, source: TensorSource) -> str:
    """Return the name of the source tensor to write: the entry, or the original of a copy that the source lacks."""
    if entry.name in source.tensors or not entry.is_copy:
        return entry.name
    return {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}[entry.source]


def _named_parts(entry: TensorEntry, parts: Mapping[str, T]) -> list[tuple[str, T]]:
    return [(entry.name, parts["qweight"]), (f"{entry.name}{SCALE}", parts["scale"])]


def write_weights(
    source: TensorSource,
    folder: Path,
    output_format: OutputFormat,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write model.safetensors into an existing folder, or numbered shards with an index if one file would exceed
    `max_shard_bytes`. At most one tensor is in memory. advance: called with the number of bytes written.

    OSError is not caught here; the caller handles it for the complete folder (state.write_folder).
    """
    plan = WritePlan(source, output_format)
    shards = _split_into_shards(plan, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        infos = {name: info for entry in shard for name, info in plan.infos(entry).items()}
        weight_map |= dict.fromkeys(infos, file)
        with write_file(folder / file, infos) as writer:
            for entry in shard:
                for name, tensor in plan.tensors(entry):
                    writer.put(name, tensor)
                    advance(tensor.nbytes)
    if len(shards) > 1:
        total = output_bytes(source, output_format)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def output_bytes(source: TensorSource, output_format: OutputFormat) -> int:
    """Return the number of bytes of all tensors in that output format."""
    plan = WritePlan(source, output_format)
    return sum(info.num_bytes for entry in plan.entries for info in plan.infos(entry).values())


def _split_into_shards(plan: WritePlan, max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Split the list of tensors into files: each as large as allowed, with at least one tensor."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in plan.entries:
        num_bytes = sum(info.num_bytes for info in plan.infos(entry).values())
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += num_bytes
    return shards


def save_weights(model: Transformer, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the weights of a model with unchanged types. Raises ConfigError if the family cannot store the model."""
    source = source_of(model)
    write_weights(source, folder, OutputFormat(quantization=source.quantization), max_shard_bytes)


def config_json(source: TensorSource, output_format: OutputFormat) -> dict[str, Any]:
    """Return the config.json for the output of `write_weights`."""
    dtype = output_format.dtype or source.dtype_of("model.embed_tokens.weight")
    config = to_hf(source.cfg) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    return config | quantization_keys(output_format.quantization)
