"""DeepSeek's own layout: `model{rank}-mp{N}.safetensors`, one shard of the weights for each of N processes.

Names are derived from the Hugging Face names. Each rank has some rows of column-parallel matrices, some columns of
row-parallel matrices (attention output, w2), and some complete routed experts; latent projections, router and norms are
on every rank. Scales are split like their matrices. Source: DeepSeek-V3, inference/convert.py and model.py.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thinkstack.checkpoint.deepseek.config import CONFIG, config_of, read_config
from thinkstack.checkpoint.hf.files import SCALE, WritePlan, scaled_source
from thinkstack.checkpoint.hf.tensors import check_tensors, shapes_on_disk, tensor_entries
from thinkstack.checkpoint.source import OutputFormat, TensorSource
from thinkstack.checkpoint.tensor_file import TensorFiles, TensorInfo, read_header, write_file
from thinkstack.models.config import ModelConfig
from thinkstack.quant.fp8 import BLOCK, FP8Blocks
from thinkstack.types import ConfigError

FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
ROWS, COLUMNS = 0, 1
# The second to last part of a Hugging Face name -> DeepSeek's name, and the dimension that is split over the ranks.
DEEPSEEK_NAMES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", ROWS),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", ROWS),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", ROWS),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", ROWS),
    "o_proj": ("wo", COLUMNS),
    "gate": ("gate", None),
    "gate_proj": ("w1", ROWS),
    "down_proj": ("w2", COLUMNS),
    "up_proj": ("w3", ROWS),
    "norm": ("norm", None),
    "lm_head": ("head", ROWS),
}
PART_NAMES = {"self_attn": "attn", "mlp": "ffn", f"weight{SCALE}": "scale", "e_score_correction_bias": "bias"}
EXPERT = re.compile(r"\.experts\.(\d+)\.")

_log = logging.getLogger(__name__)


class Placement(NamedTuple):
    """The location of a tensor."""

    name: str
    """Name in the files."""
    dim: int | None
    """The dimension that is split over the ranks; None: not split."""
    ranks: tuple[int, ...]
    """The ranks that have the tensor or a part of it."""


def placement_of(name: str, cfg: ModelConfig, num_ranks: int) -> Placement:
    """Return the placement of the tensor with that Hugging Face name in `num_ranks` files."""
    *front, owner, leaf = name.removeprefix("model.").split(".")
    word, dim = DEEPSEEK_NAMES[owner]
    there = ".".join((*(PART_NAMES.get(part, part) for part in front), word, PART_NAMES.get(leaf, leaf)))
    expert = EXPERT.search(name)
    if expert is None:
        return Placement(there, dim, tuple(range(num_ranks)))
    assert cfg.moe is not None
    return Placement(there, None, (int(expert[1]) // (cfg.moe.num_experts // num_ranks),))


def is_deepseek(folder: Path) -> bool:
    """Whether the folder contains files of this layout."""
    return any(FILE.fullmatch(path.name) for path in folder.glob("*.safetensors"))


class ShardedTensors:
    """The tensors of all ranks under Hugging Face names; parts are concatenated when read."""

    def __init__(self, placements: Mapping[str, Placement], files: list[TensorFiles]):
        """Raises ConfigError if a rank lacks its part."""
        self.placements, self.files = placements, files
        self.infos: dict[str, TensorInfo] = {}
        for name, placement in placements.items():
            rank_infos = [files[rank].infos[placement.name] for rank in placement.ranks]
            shape = list(rank_infos[0].shape)
            if placement.dim is not None:
                shape[placement.dim] = sum(info.shape[placement.dim] for info in rank_infos)
            self.infos[name] = TensorInfo(rank_infos[0].dtype, tuple(shape))

    def path_of(self, name: str) -> Path:
        """Return the first file that contains the tensor."""
        placement = self.placements[name]
        return self.files[placement.ranks[0]].paths[placement.name]

    def read(self, name: str) -> Tensor:
        """Read a complete tensor."""
        placement = self.placements[name]
        if placement.dim is None:
            return self.files[placement.ranks[0]].read(placement.name)
        return torch.cat([self.files[rank].read(placement.name) for rank in placement.ranks], placement.dim)


def open_deepseek(folder: Path) -> TensorSource:
    """Open a folder in DeepSeek's layout: headers are read, weights are not. The layout has no MTP modules.

    Raises ConfigError with file and tensor for missing or unexpected ranks, tensors or parts.
    """
    cfg, quantization = read_config(folder)
    counts = sorted({int(match[2]) for path in folder.iterdir() if (match := FILE.fullmatch(path.name))})
    num_ranks = counts[-1]
    paths = [folder / f"model{rank}-mp{num_ranks}.safetensors" for rank in range(num_ranks)]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path} is missing: the checkpoint has {num_ranks} ranks; fetch the folder again")
    _check_division(cfg, num_ranks, None)
    files = [TensorFiles(dict.fromkeys(read_header(path)[1], path)) for path in paths]
    names = [entry.name for entry in tensor_entries(cfg)]
    placements: dict[str, Placement] = {}
    for name in (*names, *(f"{name}{SCALE}" for name in names)):
        placement = placement_of(name, cfg, num_ranks)
        rank_infos = [rank for rank in range(num_ranks) if placement.name in files[rank].infos]
        if rank_infos and not set(placement.ranks) <= set(rank_infos):
            lost = min(set(placement.ranks) - set(rank_infos))
            raise ConfigError(f"{paths[lost]} lacks the tensor {placement.name}; fetch the folder again")
        if rank_infos:
            placements[name] = placement
    known = {placement.name for placement in placements.values()}
    for rank, file in enumerate(files):
        for name in sorted(file.infos.keys() - known):
            raise ConfigError(f"{paths[rank]} has the unexpected tensor {name}; use the config.json of these weights")
    joined = ShardedTensors(placements, files)
    shapes = {name: info.shape for name, info in joined.infos.items() if not name.endswith(SCALE)}
    check_tensors(folder, cfg, shapes, joined.path_of)
    return scaled_source(folder, cfg, quantization, joined)


def write_deepseek(
    source: TensorSource,
    folder: Path,
    output_format: OutputFormat,
    num_ranks: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the files of `num_ranks` ranks and config.json into an existing folder, one tensor at a time.

    output_format: bf16 or FP8. Raises ConfigError for a model that DeepSeek's code does not support or that `num_ranks`
    does not divide; OSError is not caught here.
    """
    quantization = output_format.quantization
    assert quantization is None or isinstance(quantization, FP8Blocks)
    cfg = source.cfg
    config = config_of(cfg, quantization)
    if cfg.mtp_layers:
        _log.info("DeepSeek's layout does not store MTP modules; leaving out %d of them", cfg.mtp_layers)
    cfg = replace(cfg, mtp_layers=0)
    _check_division(cfg, num_ranks, quantization)
    plan = WritePlan(replace(source, cfg=cfg), output_format)
    rank_infos: list[dict[str, TensorInfo]] = [{} for _ in range(num_ranks)]
    for entry in plan.entries:
        for name, info in plan.infos(entry).items():
            placement = placement_of(name, cfg, num_ranks)
            shape = list(info.shape)
            if placement.dim is not None:
                shape[placement.dim] //= num_ranks
            for rank in placement.ranks:
                rank_infos[rank][placement.name] = TensorInfo(info.dtype, tuple(shape))
    (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    with ExitStack() as stack:
        files = [folder / f"model{rank}-mp{num_ranks}.safetensors" for rank in range(num_ranks)]
        writers = [stack.enter_context(write_file(file, infos)) for file, infos in zip(files, rank_infos, strict=True)]
        for entry in plan.entries:
            for name, tensor in plan.tensors(entry):
                placement = placement_of(name, cfg, num_ranks)
                cuts = [tensor] * num_ranks if placement.dim is None else tensor.chunk(num_ranks, placement.dim)
                for rank in placement.ranks:
                    writers[rank].put(placement.name, cuts[rank])
                advance(tensor.nbytes)


def _check_division(cfg: ModelConfig, num_ranks: int, quantization: FP8Blocks | None) -> None:
    """Raise ConfigError unless `num_ranks` divides experts, heads and all split dimensions (FP8: in entire blocks)."""
    assert cfg.moe is not None
    if num_ranks < 1:
        raise ConfigError(f"model-parallel={num_ranks} must be at least 1")
    for what, count in (("routed experts", cfg.moe.num_experts), ("heads", cfg.attention.num_heads)):
        if count % num_ranks:
            raise ConfigError(
                f"{count} {what} do not divide among {num_ranks} ranks; choose a model-parallel that divides it"
            )
    shapes = shapes_on_disk(cfg)
    for entry in tensor_entries(cfg):
        placement, shape = placement_of(entry.name, cfg, num_ranks), shapes[entry.name]
        if placement.dim is None or num_ranks == 1:
            continue
        unit = num_ranks * (BLOCK if quantization is not None and entry.is_matrix else 1)
        if shape[placement.dim] % unit:
            raise ConfigError(
                f"{entry.name} of shape {shape} does not divide among {num_ranks} ranks: dimension {placement.dim} "
                f"must be a multiple of {unit}; choose another model-parallel"
                + (" or dtype=bf16" if quantization else "")
            )
