"""GGUF files as a Source under Hugging Face names, their tokenizer, and their chat format."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from thinkstack.checkpoint.gguf.config import BOS, ENDS, config_of, ends_of, token_of
from thinkstack.checkpoint.gguf.file import PLAIN, GGUFFile
from thinkstack.checkpoint.gguf.tensors import ROPE_FREQS, Laid, is_cut, laid_out, unpack
from thinkstack.checkpoint.gguf.tokenizer import tokenizer_of
from thinkstack.checkpoint.hf.side_files import TOOL_USE
from thinkstack.checkpoint.source import TensorSource
from thinkstack.text.chat import ChatFormat, PlainText, TemplateFormat, chat_format
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
"""Where a Jinja template stands, and the names of more of them, which stand under TEMPLATE.name."""
CHAT_FORMAT = "thinkstack.chat_format"
"""Our own key: the name of the format the model was trained with."""


def open_gguf(path: Path) -> TensorSource:
    """A GGUF file; its header is read and checked, weights are not: they are widened when they are read.

    Raises ConfigError for a damaged file, another architecture or variant, and metadata that the tensors contradict.
    """
    file = GGUFFile(path)
    shapes = {name: info.shape for name, info in file.tensors.items() if 0 not in info.shape}  # no shared experts
    cfg = config_of(file.meta, shapes, file.read(ROPE_FREQS) if ROPE_FREQS in shapes else None)
    try:
        laids = laid_out(cfg, is_cut(shapes))
    except RuntimeError as error:  # torch, of a shape with more numbers than can be counted
        raise ConfigError(f"{path}: its metadata describe an impossible model ({error}); fetch it again") from error
    left = shapes.keys() - {ROPE_FREQS}
    parts: dict[str, list[tuple[Laid, int | None]]] = {}
    for laid in laids:
        if laid.name not in shapes:
            if laid.is_copy:
                continue
            raise ConfigError(f"{path} lacks the tensor {laid.name}; fetch another conversion")
        if shapes[laid.name] != laid.shape:
            raise ConfigError(
                f"{path}: {laid.name} has shape {shapes[laid.name]}, its metadata ask for {laid.shape}; fetch another "
                "conversion"
            )
        left -= {laid.name}
        for index, origin in enumerate(laid.origins):
            parts.setdefault(origin, []).append((laid, index if laid.is_stack else None))
    if left:
        raise ConfigError(
            f"{path} has the tensor {sorted(left)[0]}, which a plain {cfg.family} lacks; this variant is not supported"
        )

    def read(origin: list[tuple[Laid, int | None]]) -> Tensor:
        return unpack([laid for laid, _ in origin], [file.read(laid.name, index) for laid, index in origin])

    tensors: dict[str, Callable[[], Tensor]] = {name: partial(read, origin) for name, origin in parts.items()}
    kinds = {name: {file.tensors[laid.name].kind for laid, _ in origin} for name, origin in parts.items()}
    dtypes = {name: PLAIN[kind.pop()] for name, kind in kinds.items() if len(kind) == 1 and kind <= PLAIN.keys()}
    return TensorSource(path=path, cfg=cfg, tensors=tensors, dtypes=dtypes)


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The byte-level BPE in a GGUF. Raises ConfigError for another kind of tokenizer."""
    return tokenizer_of(GGUFFile(path).meta)


def load_gguf_chat(path: Path) -> ChatFormat:
    """The chat format in a GGUF: ours by its key, else the shipped template, else plain text, as model.load_chat."""
    meta = GGUFFile(path).meta
    tokenizer = tokenizer_of(meta)
    name = meta.find(CHAT_FORMAT, str)
    if name is not None:
        try:
            return chat_format(name, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{path}: {CHAT_FORMAT}: {error}") from None
    names = set(tokenizer.control.values())
    bos, end_token_ids = token_of(meta, BOS), ends_of(meta)
    if (eos := token_of(meta, ENDS[0])) is not None and eos not in names:
        raise ConfigError(f"{path}: {ENDS[0]}={eos} is no control token; fetch another conversion")
    template = meta.find(TEMPLATE, str)
    if not template:
        return PlainText(tokenizer, end_token_ids, _no_template(path))
    bos_token, eos_token = ("" if token is None else tokenizer.decode([token]) for token in (bos, eos))
    tool_template = meta.find(f"{TEMPLATE}.{TOOL_USE}", str) or ""
    return TemplateFormat(tokenizer, template, bos_token, eos_token, tool_template, end_token_ids)


def _no_template(path: Path) -> str:
    return (
        f"{path} has no {TEMPLATE}: this is a base model, which continues plain text; for conversations make a folder "
        f"of it (thinkstack convert {path} OUT --to hf) and put a chat_template.jinja there"
    )
