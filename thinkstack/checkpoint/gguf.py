"""Llama models out of a GGUF file: config, weights (dequantised once), tokenizer and chat template.

GGUF keeps the query and key rows of a Llama in the order of an interleaved rotation; here they are put back into
Hugging Face's order, so that a model read from GGUF is the same as one read from safetensors.
"""

# Shapes in this file: H heads, R width of a head, D hidden size.

import json
from pathlib import Path
from typing import Any

import numpy
import torch

from thinkstack.checkpoint.hf import empty_model
from thinkstack.models.config import GQAConfig, ModelConfig, RopeConfig
from thinkstack.models.transformer import Transformer
from thinkstack.text.chat import TemplateFormat
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

BLOCK = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.w1": "ffn_gate",
    "ffn.w3": "ffn_up",
    "ffn.w2": "ffn_down",
}
"""Our name within a block -> the name within blk.N."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}
"""How text is cut before byte-pair merging, by tokenizer.ggml.pre, in the words of tokenizer.json."""

CONTROL_TYPES = (3, 4)
"""tokenizer.ggml.token_type of control and of user-defined tokens; both are found by spelling, never by merging."""


class _File:
    """An open GGUF: typed metadata and dequantised tensors; every complaint names the file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ConfigError("reading GGUF needs the package gguf; install it with: pip install gguf") from error
        try:
            reader = GGUFReader(path)
            self.fields = reader.fields
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(f"{path} is cut off or not a GGUF file ({error}); fetch it again") from error

    def find(self, key: str, default: Any = None) -> Any:
        """Metadata under `key`, of whatever type. Raises ConfigError if they are damaged."""
        try:
            return self.fields[key].contents() if key in self.fields else default
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{self.path}: {key} cannot be read ({error}); fetch it again") from error

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Metadata under `key`. Raises ConfigError if it is missing without a default or of another type."""
        value = self.find(key, default)
        if value is None:
            raise ConfigError(f"{self.path} has no {key}; it is not a complete Llama GGUF: fetch another conversion")
        if not isinstance(value, kind):
            raise ConfigError(f"{self.path}: {key}={value!r} has an unexpected type; fetch another conversion")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A width or a count. Raises ConfigError if it is missing or below 1."""
        value = self.get(key, int, default)
        if value < 1:
            raise ConfigError(f"{self.path}: {key}={value} is below 1; fetch another conversion")
        return value

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in fp32. Raises ConfigError if it is missing or its quantisation is unknown."""
        from gguf.quants import dequantize

        tensor = self.tensors.get(name)
        if tensor is None:
            raise ConfigError(f"{self.path} lacks the tensor {name}; fetch another conversion")
        try:
            return torch.from_numpy(numpy.array(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32))
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ConfigError(
                f"{self.path}: {name} is quantised as {kind}, which gguf cannot undo; use Q8_0 or F16"
            ) from error


def load_gguf_model(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The Llama in a GGUF, weights dequantised in fp32 and then cast to `dtype`. Raises ConfigError for other
    files.
    """
    file = _File(path)
    cfg = gguf_config(file)
    model = empty_model(cfg, dtype)
    state, left = model.state_dict(), set(file.tensors)

    def take(ours: str, theirs: str, num_heads: int | None = None) -> None:
        target, tensor = state[ours], file.tensor(theirs)
        if num_heads:
            tensor = half_order(tensor, num_heads)
        if tensor.shape != target.shape:
            raise ConfigError(
                f"{path}: {theirs} has shape {tuple(tensor.shape)}, its metadata ask for {tuple(target.shape)}; fetch "
                "another conversion"
            )
        target.copy_(tensor)
        left.discard(theirs)

    take("embed.weight", "token_embd.weight")
    take("norm.weight", "output_norm.weight")
    if not cfg.tie_embeddings:
        take("head.weight", "output.weight")
    assert isinstance(cfg.attention, GQAConfig)
    heads = {"attn_q": cfg.attention.num_heads, "attn_k": cfg.attention.num_kv_heads}
    for layer in range(cfg.num_layers):
        for ours, theirs in BLOCK.items():
            take(f"layers.{layer}.{ours}.weight", f"blk.{layer}.{theirs}.weight", heads.get(theirs))
    if left:
        raise ConfigError(
            f"{path} has the tensor {sorted(left)[0]}, which a plain Llama lacks; this variant is not supported"
        )
    return model


def half_order(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows (H * R, D) with rotated pairs side by side -> pairs (i, i + R/2), as Hugging Face keeps them.

    Undoes LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py.
    """
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def gguf_config(file: _File) -> ModelConfig:
    """The model that the metadata describe. Raises ConfigError for another architecture or a variant of Llama."""
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise ConfigError(f"{file.path} holds a {architecture!r} model; only 'llama' GGUF files are supported")
    for key in ("llama.rope.scaling.type", "llama.expert_count"):
        value = file.find(key)
        if value not in (None, 0, "none"):
            raise ConfigError(f"{file.path}: {key}={value!r} is not supported; use a plain Llama")
    hidden, heads = file.size("llama.embedding_length"), file.size("llama.attention.head_count")
    head_dim = file.size("llama.attention.key_length", hidden // heads)
    if file.size("llama.rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(f"{file.path}: only part of each head is rotated; this variant is not supported")
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{file.path} lacks the tensor token_embd.weight; fetch another conversion")
    return ModelConfig(
        family="llama",
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        num_layers=file.size("llama.block_count"),
        attention=GQAConfig(
            num_heads=heads, num_kv_heads=file.size("llama.attention.head_count_kv", heads), head_dim=head_dim
        ),
        dense_size=file.size("llama.feed_forward_length"),
        rope=RopeConfig(theta=round(file.get("llama.rope.freq_base", float, 10000.0), 3), interleaved=False),
        # kept as fp32 in the file: 9.999999747378752e-06 was 1e-05
        norm_eps=float(
            numpy.format_float_positional(numpy.float32(file.get("llama.attention.layer_norm_rms_epsilon", float)))
        ),
        tie_embeddings="output.weight" not in file.tensors,
        max_positions=file.size("llama.context_length"),
        bos_id=file.get("tokenizer.ggml.bos_token_id", int),
        eos_ids=(file.get("tokenizer.ggml.eos_token_id", int),),
    )


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The byte-level BPE in a GGUF. Raises ConfigError for another kind of tokenizer."""
    return _tokenizer(_File(path))


def _tokenizer(file: _File) -> Tokenizer:
    """tokenizer.json written from tokenizer.ggml.*; control tokens become added tokens."""
    kind, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2":
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.model={kind!r} is not supported; only byte-level BPE ('gpt2') is"
        )
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ConfigError(f"{file.path}: tokenizer.ggml.pre={pre!r} is not supported; known: {known}")
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise ConfigError(
            f"{file.path} has {len(tokens)} tokens and {len(types)} token types; fetch another conversion"
        )
    merges = [merge.split(" ", 1) for merge in file.get("tokenizer.ggml.merges", list)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": token, **plain, "special": types[index] == CONTROL_TYPES[0]}
        for index, token in enumerate(tokens)
        if types[index] in CONTROL_TYPES
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": model,
    }
    try:
        return Tokenizer(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # tokenizers raises plain Exception for merges it cannot use
        raise ConfigError(f"{file.path} holds a damaged tokenizer ({error}); fetch another conversion") from error


def load_gguf_chat(path: Path) -> TemplateFormat:
    """The chat template in a GGUF. Raises ConfigError if it has none."""
    file = _File(path)
    tokenizer = _tokenizer(file)
    names = {token_id: token for token, token_id in tokenizer.control.items()}
    keys = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    for key in keys:
        if file.get(key, int) not in names:
            raise ConfigError(f"{path}: {key}={file.get(key, int)} is no control token; fetch another conversion")
    bos, eos = (names[file.get(key, int)] for key in keys)
    return TemplateFormat(tokenizer, file.get("tokenizer.chat_template", str), bos, eos)
