"""A Source as a GGUF file, a tensor at a time, for llama.cpp and what is built on it.

Kinds are by llama.cpp's rules: norms, biases, routers and all else of one dimension stay F32; a matrix whose rows are
no multiple of a block stays F16. With Q4_0, embedding and head are Q8_0: an error there reaches every token.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy
import torch
from torch import Tensor

from thinkstack.checkpoint.gguf.config import rope_factors_of
from thinkstack.checkpoint.gguf.file import PLAIN, require_gguf
from thinkstack.checkpoint.gguf.metadata import metadata_of
from thinkstack.checkpoint.gguf.read import CHAT_FORMAT, TEMPLATE, TEMPLATES
from thinkstack.checkpoint.gguf.tensors import ROPE_FREQS, laid_out, pack
from thinkstack.checkpoint.gguf.tokenizer import MODEL, tokenizer_values
from thinkstack.checkpoint.hf import chat_template
from thinkstack.checkpoint.hf.side_files import TOOL_USE, check_vocabulary
from thinkstack.checkpoint.source import TensorSource
from thinkstack.checkpoint.state import flush
from thinkstack.log import Progress
from thinkstack.models.config import ModelConfig
from thinkstack.text.chat import ChatFormat, TemplateFormat
from thinkstack.text.tokenizer import PAD, Tokenizer
from thinkstack.types import ConfigError

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""general.file_type: what most matrices are."""
CAREFUL = {"Q4_0": "Q8_0"}
"""What embedding and head are instead."""
QUANTIZATION_VERSION = 2
ALIGNMENT = 32
PIECE = 2**20
"""Numbers that are quantized at once."""
F16_MAX = torch.finfo(torch.float16).max

_log = logging.getLogger(__name__)


class _Item(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    kind: str
    parts: list[Callable[[], Tensor]]
    """What makes it, one behind the other."""


def write_gguf(
    source: TensorSource,
    path: Path,
    kind: str,
    tokenizer: Tokenizer | None = None,
    chat: ChatFormat | None = None,
    with_mtp: bool = True,
) -> None:
    """Write a checkpoint as one file, whole or not at all; an older one of that name is replaced.

    kind: of matrices, one of KINDS. with_mtp: whether to write MTP modules, which only newer versions of llama.cpp
    know. Raises ConfigError for a model, tokenizer or format that llama.cpp has nothing like, and if the disk refuses.
    """
    require_gguf()
    if kind not in KINDS:
        raise ConfigError(f"GGUF kind {kind!r} is not known; known: {', '.join(KINDS)}")
    if not with_mtp:
        source = replace(source, cfg=replace(source.cfg, mtp_layers=0))
    values = _metadata(source, path, kind, tokenizer, chat)
    items = _items(source, kind)
    fresh = path.with_name(path.name + ".writing")
    try:
        _write_header(fresh, values, items)
        with fresh.open("ab") as file, Progress(f"{path.name} [tensors]", len(items)) as progress:
            for item in items:
                file.write(bytes(-file.tell() % ALIGNMENT))
                _write_tensor(file, item, path)
                progress.advance()
            file.write(bytes(-file.tell() % ALIGNMENT))
        flush(fresh)
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _metadata(
    source: TensorSource, path: Path, kind: str, tokenizer: Tokenizer | None, chat: ChatFormat | None
) -> dict[str, Any]:
    cfg = _beginning_with(tokenizer, source.cfg)
    ends = tuple(dict.fromkeys((*(chat.stop_token_ids if chat else ()), *cfg.eos_ids)))
    values = {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        **metadata_of(cfg, ends),
    }
    if tokenizer is None:
        if chat is not None:
            raise ConfigError("a chat format cannot be written without the tokenizer that it writes tokens of")
        return values | {MODEL: "no_vocab"}
    check_vocabulary(tokenizer, cfg.vocab_size)
    values |= tokenizer_values(tokenizer, cfg.vocab_size)
    pad = tokenizer.control.get(PAD, ends[0] if ends else None)
    if pad is not None:
        values["tokenizer.ggml.padding_token_id"] = pad
    if isinstance(chat, TemplateFormat):
        values[TEMPLATE] = chat.template
        if chat.tool_template:
            values |= {TEMPLATES: [TOOL_USE], f"{TEMPLATE}.{TOOL_USE}": chat.tool_template}
    elif chat is not None:
        values[CHAT_FORMAT] = chat.name
        template = chat_template.template_of(chat.name, tokenizer)
        if template is None:
            _log.warning("no Jinja template gives the ids of %s with this tokenizer; the GGUF has none", chat.name)
        else:
            values[TEMPLATE] = template
    return values


def _beginning_with(tokenizer: Tokenizer | None, cfg: ModelConfig) -> ModelConfig:
    """The model with the BOS that its tokenizer puts first, which is what llama.cpp begins texts with."""
    begin = tokenizer.begin_ids if tokenizer else []
    if len(begin) > 1:
        raise ConfigError(f"the tokenizer begins texts with tokens {begin}; a GGUF has room for one: write hf instead")
    return replace(cfg, bos_id=begin[0]) if begin else cfg


def _items(source: TensorSource, kind: str) -> list[_Item]:
    """What the file will hold, in order."""
    cfg, items = source.cfg, []
    if cfg.rope.llama3 is not None:
        factors = rope_factors_of(cfg.attention.rope_dim, cfg.rope)
        items.append(_Item(ROPE_FREQS, tuple(factors.shape), "F32", [lambda: factors]))
    odd = []
    for laid in laid_out(cfg):
        if laid.is_copy:
            continue

        def make(origin: str, laid: Any = laid) -> Tensor:
            return pack(laid, cfg, source.tensors[origin]())

        theirs = kind_of(laid.name, laid.shape, kind)
        if theirs == "F16" and kind not in ("F16", "F32"):
            odd.append(laid.name)
        items.append(_Item(laid.name, laid.shape, theirs, [partial(make, origin) for origin in laid.origins]))
    if odd:
        _log.warning("%d matrices stay F16: their rows are no multiple of %s's blocks (%s)", len(odd), kind, odd[0])
    return items


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """What a tensor becomes in a file of `kind`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or not name.endswith(".weight") or name.endswith(("_norm.weight", ".ffn_gate_inp.weight")):
        return "F32"
    if name in ("token_embd.weight", "output.weight"):
        kind = CAREFUL.get(kind, kind)
    return "F16" if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] else kind


def _write_header(path: Path, values: dict[str, Any], items: list[_Item]) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    logging.getLogger("gguf").setLevel(logging.WARNING)  # its plan and its byte order help nobody
    writer = GGUFWriter(path, values["general.architecture"])
    add: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        bool: writer.add_bool,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in values.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    for item in items:
        kind = GGMLQuantizationType[item.kind]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = math.prod(item.shape) // block * block_bytes
        writer.add_tensor_info(item.name, item.shape, numpy.dtype(numpy.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_tensor(file: BinaryIO, item: _Item, path: Path) -> None:
    for part in item.parts:
        tensor = part()
        for piece in _pieces(tensor):
            if item.kind == "F16" and bool((piece.abs() > F16_MAX).any()):
                raise ConfigError(
                    f"{path}: {item.name} has numbers beyond {F16_MAX:,.0f}, the largest in F16; write BF16 instead"
                )
            file.write(encode(piece, item.kind).data)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The rows of a tensor, so many at once that memory stays small: (rows, width) fp32."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    for some in rows.split(max(PIECE // rows.shape[1], 1)):
        yield some.float().cpu().contiguous()


def encode(rows: Tensor, kind: str) -> numpy.ndarray:
    """Rows (R, W) fp32 as the bytes of `kind`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind in PLAIN:
        return rows.to(PLAIN[kind]).view(torch.uint8).numpy()
    return quantize(rows.numpy().reshape(1, -1), GGMLQuantizationType[kind])
