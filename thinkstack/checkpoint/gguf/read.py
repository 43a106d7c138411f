"""Reading of GGUF files: weights as a TensorSource with Hugging Face names, tokenizer, and chat format."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from thinkstack.checkpoint.gguf.config import BOS_KEY, END_KEYS, config_of, end_token_ids_of, token_id_of
from thinkstack.checkpoint.gguf.file import TORCH_DTYPES, GGUFFile
from thinkstack.checkpoint.gguf.tensors import ROPE_FREQS, TensorLayout, from_gguf, splits_kv_b, tensor_layouts
from thinkstack.checkpoint.gguf.tokenizer import tokenizer_of
from thinkstack.checkpoint.hf.side_files import TOOL_USE
from thinkstack.checkpoint.source import TensorSource
from thinkstack.text.chat import ChatFormat, PlainText, TemplateFormat, chat_format
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
"""Metadata keys of the Jinja template, and of the list of additional templates (each under the key TEMPLATE.name)."""
CHAT_FORMAT = "thinkstack.chat_format"
"""Our own key: the chat format that the model was trained with."""


def open_gguf(path: Path) -> TensorSource:
    """Open a GGUF file: the header is read and checked; weights are read and dequantized later.

    Raises ConfigError for a damaged file, an unsupported architecture or variant, and metadata that contradict the
    tensors.
    """
    file = GGUFFile(path)
    shapes = {name: info.shape for name, info in file.tensors.items() if 0 not in info.shape}  # no shared experts
    cfg = config_of(file.meta, shapes, file.read(ROPE_FREQS) if ROPE_FREQS in shapes else None)
    try:
        layouts = tensor_layouts(cfg, splits_kv_b(shapes))
    except RuntimeError as error:  # torch raises it for a shape with too many elements
        raise ConfigError(f"{path}: its metadata describe an impossible model ({error}); fetch it again") from error
    left = shapes.keys() - {ROPE_FREQS}
    parts: dict[str, list[tuple[TensorLayout, int | None]]] = {}
    for layout in layouts:
        if layout.name not in shapes:
            if layout.is_copy:
                continue
            raise ConfigError(f"{path} lacks the tensor {layout.name}; fetch another conversion")
        if shapes[layout.name] != layout.shape:
            raise ConfigError(
                f"{path}: {layout.name} has shape {shapes[layout.name]}, but the metadata require {layout.shape}; "
                "fetch another conversion"
            )
        left -= {layout.name}
        for index, origin in enumerate(layout.origins):
            parts.setdefault(origin, []).append((layout, index if layout.is_stack else None))
    if left:
        raise ConfigError(
            f"{path} has the unexpected tensor {sorted(left)[0]}; this variant of {cfg.family} is not supported"
        )

    def read(origin: list[tuple[TensorLayout, int | None]]) -> Tensor:
        return from_gguf([layout for layout, _ in origin], [file.read(layout.name, index) for layout, index in origin])

    tensors: dict[str, Callable[[], Tensor]] = {name: partial(read, origin) for name, origin in parts.items()}
    kinds = {name: {file.tensors[layout.name].kind for layout, _ in origin} for name, origin in parts.items()}
    dtypes = {
        name: TORCH_DTYPES[kind.pop()] for name, kind in kinds.items() if len(kind) == 1 and kind <= TORCH_DTYPES.keys()
    }
    return TensorSource(path=path, cfg=cfg, tensors=tensors, dtypes=dtypes)


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Load the byte-level BPE in a GGUF. Raises ConfigError for another kind of tokenizer."""
    return tokenizer_of(GGUFFile(path).meta)


def load_gguf_chat(path: Path) -> ChatFormat:
    """Load the chat format in a GGUF: our format under CHAT_FORMAT, else the Jinja template, else plain text; see
    model.load_chat."""
    meta = GGUFFile(path).meta
    tokenizer = tokenizer_of(meta)
    name = meta.find(CHAT_FORMAT, str)
    if name is not None:
        try:
            return chat_format(name, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{path}: {CHAT_FORMAT}: {error}") from None
    names = set(tokenizer.control.values())
    bos, end_token_ids = token_id_of(meta, BOS_KEY), end_token_ids_of(meta)
    if (eos := token_id_of(meta, END_KEYS[0])) is not None and eos not in names:
        raise ConfigError(f"{path}: {END_KEYS[0]}={eos} is not a control token; fetch another conversion")
    template = meta.find(TEMPLATE, str)
    if not template:
        return PlainText(tokenizer, end_token_ids, _no_template(path))
    bos_token, eos_token = ("" if token is None else tokenizer.decode([token]) for token in (bos, eos))
    tool_template = meta.find(f"{TEMPLATE}.{TOOL_USE}", str) or ""
    return TemplateFormat(tokenizer, template, bos_token, eos_token, tool_template, end_token_ids)


def _no_template(path: Path) -> str:
    return (
        f"{path} has no {TEMPLATE}: this is a base model, which continues plain text; for conversations convert it "
        f"to a folder (thinkstack convert {path} OUT --to hf) and add a chat_template.jinja there"
    )
