"""Writing of a TensorSource as a GGUF file, one tensor at a time, for llama.cpp and tools based on it.

Tensor types follow llama.cpp's rules: norms, biases, routers and all other vectors are F32; a matrix whose row length
is not a multiple of the block size is F16. With Q4_0, embedding and head are Q8_0: an error there affects every token.
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
from thinkstack.checkpoint.gguf.file import TORCH_DTYPES, require_gguf
from thinkstack.checkpoint.gguf.metadata import metadata_of
from thinkstack.checkpoint.gguf.read import CHAT_FORMAT, TEMPLATE, TEMPLATES
from thinkstack.checkpoint.gguf.tensors import ROPE_FREQS, tensor_layouts, to_gguf
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
"""general.file_type: the type of most matrices."""
EMBEDDING_KINDS = {"Q4_0": "Q8_0"}
"""Type of embedding and head, by the type of the other matrices."""
QUANTIZATION_VERSION = 2
ALIGNMENT = 32
CHUNK_NUMBERS = 2**20
"""Number of values that are quantized at once."""
F16_MAX = torch.finfo(torch.float16).max

_log = logging.getLogger(__name__)


class _OutputTensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    kind: str
    parts: list[Callable[[], Tensor]]
    """Functions that return the parts of its data, in order."""


def write_gguf(
    source: TensorSource,
    path: Path,
    kind: str,
    tokenizer: Tokenizer | None = None,
    chat: ChatFormat | None = None,
    with_mtp: bool = True,
) -> None:
    """Write a checkpoint as one file, atomically; an existing file is replaced.

    kind: type of the matrices, one of KINDS. with_mtp: whether to write MTP modules, which only newer versions of
    llama.cpp support. Raises ConfigError for a model, tokenizer or format that llama.cpp does not support, and for a
    disk error.
    """
    require_gguf()
    if kind not in KINDS:
        raise ConfigError(f"GGUF kind {kind!r} is not known; known: {', '.join(KINDS)}")
    if not with_mtp:
        source = replace(source, cfg=replace(source.cfg, mtp_layers=0))
    values = _metadata(source, path, kind, tokenizer, chat)
    items = _items(source, kind)
    temporary = path.with_name(path.name + ".writing")
    try:
        _write_header(temporary, values, items)
        with temporary.open("ab") as file, Progress(f"{path.name} [tensors]", len(items)) as progress:
            for item in items:
                file.write(bytes(-file.tell() % ALIGNMENT))
                _write_tensor(file, item, path)
                progress.advance()
            file.write(bytes(-file.tell() % ALIGNMENT))
        flush(temporary)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _metadata(
    source: TensorSource, path: Path, kind: str, tokenizer: Tokenizer | None, chat: ChatFormat | None
) -> dict[str, Any]:
    cfg = _with_tokenizer_bos(tokenizer, source.cfg)
    end_token_ids = tuple(dict.fromkeys((*(chat.stop_token_ids if chat else ()), *cfg.eos_ids)))
    values = {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        **metadata_of(cfg, end_token_ids),
    }
    if tokenizer is None:
        if chat is not None:
            raise ConfigError("a chat format cannot be written without its tokenizer; give both")
        return values | {MODEL: "no_vocab"}
    check_vocabulary(tokenizer, cfg.vocab_size)
    values |= tokenizer_values(tokenizer, cfg.vocab_size)
    pad = tokenizer.control.get(PAD, end_token_ids[0] if end_token_ids else None)
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
            _log.warning(
                "no Jinja template gives the token ids of the chat format %s; the GGUF has no template", chat.name
            )
        else:
            values[TEMPLATE] = template
    return values


def _with_tokenizer_bos(tokenizer: Tokenizer | None, cfg: ModelConfig) -> ModelConfig:
    """Return the config with the BOS token that the tokenizer prepends; llama.cpp prepends it too."""
    begin = tokenizer.begin_ids if tokenizer else []
    if len(begin) > 1:
        raise ConfigError(
            f"the tokenizer prepends the tokens {begin} to every text, but a GGUF supports only one; write the hf "
            "format instead"
        )
    return replace(cfg, bos_id=begin[0]) if begin else cfg


def _items(source: TensorSource, kind: str) -> list[_OutputTensor]:
    """Return the tensors of the file, in order."""
    cfg, items = source.cfg, []
    if cfg.rope.llama3 is not None:
        factors = rope_factors_of(cfg.attention.rope_dim, cfg.rope)
        items.append(_OutputTensor(ROPE_FREQS, tuple(factors.shape), "F32", [lambda: factors]))
    f16_names = []
    for layout in tensor_layouts(cfg):
        if layout.is_copy:
            continue

        def make(origin: str, layout: Any = layout) -> Tensor:
            return to_gguf(layout, cfg, source.tensors[origin]())

        tensor_kind = output_kind(layout.name, layout.shape, kind)
        if tensor_kind == "F16" and kind not in ("F16", "F32"):
            f16_names.append(layout.name)
        items.append(
            _OutputTensor(layout.name, layout.shape, tensor_kind, [partial(make, origin) for origin in layout.origins])
        )
    if f16_names:
        _log.warning(
            "%d matrices stay F16: their row length is not a multiple of the block size of %s (for example %s)",
            len(f16_names),
            kind,
            f16_names[0],
        )
    return items


def output_kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return the type of a tensor in a file of `kind`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or not name.endswith(".weight") or name.endswith(("_norm.weight", ".ffn_gate_inp.weight")):
        return "F32"
    if name in ("token_embd.weight", "output.weight"):
        kind = EMBEDDING_KINDS.get(kind, kind)
    return "F16" if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] else kind


def _write_header(path: Path, values: dict[str, Any], items: list[_OutputTensor]) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    logging.getLogger("gguf").setLevel(logging.WARNING)  # its messages are irrelevant to the user
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


def _write_tensor(file: BinaryIO, item: _OutputTensor, path: Path) -> None:
    for part in item.parts:
        tensor = part()
        for chunk in _chunks(tensor):
            if item.kind == "F16" and bool((chunk.abs() > F16_MAX).any()):
                raise ConfigError(
                    f"{path}: {item.name} has values beyond {F16_MAX:,.0f}, the largest F16 value; write BF16 instead"
                )
            file.write(encode_rows(chunk, item.kind).data)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a tensor in chunks of bounded memory: (rows, width) fp32."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    for chunk in rows.split(max(CHUNK_NUMBERS // rows.shape[1], 1)):
        yield chunk.float().cpu().contiguous()


def encode_rows(rows: Tensor, kind: str) -> numpy.ndarray:
    """Encode rows (R, W) fp32 as bytes of type `kind`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind in TORCH_DTYPES:
        return rows.to(TORCH_DTYPES[kind]).view(torch.uint8).numpy()
    return quantize(rows.numpy().reshape(1, -1), GGMLQuantizationType[kind])
