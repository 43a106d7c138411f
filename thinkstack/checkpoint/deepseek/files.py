"""DeepSeek's own layout: `model{rank}-mp{N}.safetensors`, a part of the weights for each of N processes.

Names are the Hugging Face ones with other words in them. Of column-parallel matrices every rank has some rows, of
row-parallel ones (attention output, w2) some columns, of routed experts some experts whole; latent projections, router
and norms are on every rank. Scales are cut as their matrices. Source: DeepSeek-V3, inference/convert.py and model.py.
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
from thinkstack.checkpoint.hf.files import SCALE, Plan, scaled_source
from thinkstack.checkpoint.hf.tensors import check_tensors, shapes_on_disk, stored_tensors
from thinkstack.checkpoint.source import OutputFormat, TensorSource
from thinkstack.checkpoint.tensor_file import Entry, Files, read_header, write_file
from thinkstack.models.config import ModelConfig
from thinkstack.quant.fp8 import BLOCK, FP8Blocks
from thinkstack.types import ConfigError

FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
ROWS, COLUMNS = 0, 1
# The last but one part of a Hugging Face name -> DeepSeek's word, and the dimension that ranks share out.
WORDS: dict[str, tuple[str, int | None]] = {
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
PARTS = {"self_attn": "attn", "mlp": "ffn", f"weight{SCALE}": "scale", "e_score_correction_bias": "bias"}
EXPERT = re.compile(r"\.experts\.(\d+)\.")

_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a tensor lies."""

    name: str
    """In the files."""
    dim: int | None
    """The dimension that ranks share out; None: whole."""
    ranks: tuple[int, ...]
    """Who has it, or a part of it."""


def place_of(name: str, cfg: ModelConfig, num_ranks: int) -> Place:
    """Where the tensor of that Hugging Face name lies among `num_ranks` files."""
    *front, owner, leaf = name.removeprefix("model.").split(".")
    word, dim = WORDS[owner]
    there = ".".join((*(PARTS.get(part, part) for part in front), word, PARTS.get(leaf, leaf)))
    expert = EXPERT.search(name)
    if expert is None:
        return Place(there, dim, tuple(range(num_ranks)))
    assert cfg.moe is not None
    return Place(there, None, (int(expert[1]) // (cfg.moe.num_experts // num_ranks),))


def is_deepseek(folder: Path) -> bool:
    """Whether the folder holds files of this layout."""
    return any(FILE.fullmatch(path.name) for path in folder.glob("*.safetensors"))


class Joined:
    """The tensors of all ranks under Hugging Face names, put together when they are read."""

    def __init__(self, places: Mapping[str, Place], files: list[Files]):
        """Raises ConfigError if a rank lacks its part."""
        self.places, self.files = places, files
        self.entries: dict[str, Entry] = {}
        for name, place in places.items():
            held = [files[rank].entries[place.name] for rank in place.ranks]
            shape = list(held[0].shape)
            if place.dim is not None:
                shape[place.dim] = sum(entry.shape[place.dim] for entry in held)
            self.entries[name] = Entry(held[0].dtype, tuple(shape))

    def path_of(self, name: str) -> Path:
        """The first file that has it."""
        place = self.places[name]
        return self.files[place.ranks[0]].paths[place.name]

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        place = self.places[name]
        if place.dim is None:
            return self.files[place.ranks[0]].read(place.name)
        return torch.cat([self.files[rank].read(place.name) for rank in place.ranks], place.dim)


def open_deepseek(folder: Path) -> TensorSource:
    """A folder in DeepSeek's layout; headers are read, weights are not. Its files hold no MTP modules.

    Raises ConfigError, naming file and tensor, for ranks, tensors or parts that are missing or too many.
    """
    cfg, quantization = read_config(folder)
    counts = sorted({int(match[2]) for path in folder.iterdir() if (match := FILE.fullmatch(path.name))})
    num_ranks = counts[-1]
    paths = [folder / f"model{rank}-mp{num_ranks}.safetensors" for rank in range(num_ranks)]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path} is missing, one of {num_ranks} ranks; fetch the folder again")
    _check_division(cfg, num_ranks, None)
    files = [Files(dict.fromkeys(read_header(path)[1], path)) for path in paths]
    names = [item.name for item in stored_tensors(cfg)]
    places: dict[str, Place] = {}
    for name in (*names, *(f"{name}{SCALE}" for name in names)):
        place = place_of(name, cfg, num_ranks)
        held = [rank for rank in range(num_ranks) if place.name in files[rank].entries]
        if held and not set(place.ranks) <= set(held):
            lost = min(set(place.ranks) - set(held))
            raise ConfigError(f"{paths[lost]} lacks the tensor {place.name}; fetch the folder again")
        if held:
            places[name] = place
    known = {place.name for place in places.values()}
    for rank, file in enumerate(files):
        for name in sorted(file.entries.keys() - known):
            raise ConfigError(f"{paths[rank]} has the unexpected tensor {name}; use the config.json of these weights")
    joined = Joined(places, files)
    shapes = {name: entry.shape for name, entry in joined.entries.items() if not name.endswith(SCALE)}
    check_tensors(folder, cfg, shapes, joined.path_of)
    return scaled_source(folder, cfg, quantization, joined)


def write_deepseek(
    source: TensorSource,
    folder: Path,
    form: OutputFormat,
    num_ranks: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the files of `num_ranks` ranks and config.json into an existing folder, a tensor at a time.

    form: bf16, or FP8. Raises ConfigError for a model that DeepSeek's code does not compute or that does not divide;
    OSError is left to the caller.
    """
    quantization = form.quantization
    assert quantization is None or isinstance(quantization, FP8Blocks)
    cfg = source.cfg
    config = config_of(cfg, quantization)
    if cfg.mtp_layers:
        _log.info("DeepSeek's layout has no place for MTP modules; %d are left out", cfg.mtp_layers)
    cfg = replace(cfg, mtp_layers=0)
    _check_division(cfg, num_ranks, quantization)
    plan = Plan(replace(source, cfg=cfg), form)
    held: list[dict[str, Entry]] = [{} for _ in range(num_ranks)]
    for item in plan.items:
        for name, entry in plan.entries(item).items():
            place = place_of(name, cfg, num_ranks)
            shape = list(entry.shape)
            if place.dim is not None:
                shape[place.dim] //= num_ranks
            for rank in place.ranks:
                held[rank][place.name] = Entry(entry.dtype, tuple(shape))
    (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    with ExitStack() as stack:
        files = [folder / f"model{rank}-mp{num_ranks}.safetensors" for rank in range(num_ranks)]
        writers = [stack.enter_context(write_file(file, entries)) for file, entries in zip(files, held, strict=True)]
        for item in plan.items:
            for name, tensor in plan.tensors(item):
                place = place_of(name, cfg, num_ranks)
                cuts = [tensor] * num_ranks if place.dim is None else tensor.chunk(num_ranks, place.dim)
                for rank in place.ranks:
                    writers[rank].put(place.name, cuts[rank])
                advance(tensor.nbytes)


def _check_division(cfg: ModelConfig, num_ranks: int, quantization: FP8Blocks | None) -> None:
    """Raise ConfigError unless `num_ranks` divides experts, heads, every shared dimension; in FP8 in whole blocks."""
    assert cfg.moe is not None
    if num_ranks < 1:
        raise ConfigError(f"model-parallel={num_ranks} must be at least 1")
    for what, count in (("routed experts", cfg.moe.num_experts), ("heads", cfg.attention.num_heads)):
        if count % num_ranks:
            raise ConfigError(
                f"{count} {what} do not divide among {num_ranks} ranks; choose a model-parallel that divides it"
            )
    shapes = shapes_on_disk(cfg)
    for item in stored_tensors(cfg):
        place, shape = place_of(item.name, cfg, num_ranks), shapes[item.name]
        if place.dim is None or num_ranks == 1:
            continue
        unit = num_ranks * (BLOCK if quantization is not None and item.is_matrix else 1)
        if shape[place.dim] % unit:
            raise ConfigError(
                f"{item.name} of shape {shape} does not divide among {num_ranks} ranks in dimension {place.dim}; it "
                f"would need a multiple of {unit}: choose another model-parallel" + (" or bf16" if quantization else "")
            )
