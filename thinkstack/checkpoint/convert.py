"""Conversion of checkpoints between formats, one tensor at a time: any reader with any writer."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.deepseek.files import is_deepseek, write_deepseek
from thinkstack.checkpoint.gguf.file import is_gguf
from thinkstack.checkpoint.hf.files import CONFIG, PICKLES, config_json, output_bytes, write_weights
from thinkstack.checkpoint.hf.side_files import GENERATION, make_side_files, side_files
from thinkstack.checkpoint.json_reader import read_json
from thinkstack.checkpoint.model import load_chat, load_tokenizer, locate, open_source
from thinkstack.checkpoint.source import OutputFormat, TensorSource
from thinkstack.checkpoint.state import write_folder
from thinkstack.log import Progress
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.text.chat import ChatFormat
from thinkstack.text.tokenizer import FILE as TOKENIZER
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

OUTPUT_FORMATS = {
    "fp32": OutputFormat(torch.float32),
    "fp16": OutputFormat(torch.float16),
    "bf16": OutputFormat(torch.bfloat16),
    "fp8": OutputFormat(torch.bfloat16, FP8Blocks()),
    "fp8-ue8m0": OutputFormat(torch.bfloat16, FP8Blocks(power_of_two=True)),
}
"""Output formats by --dtype. fp8, fp8-ue8m0: the matrices of all transformer blocks in FP8, everything else in bf16;
the other formats: all tensors in that dtype."""
DTYPES = {
    "hf": tuple(OUTPUT_FORMATS),
    "deepseek": ("bf16", "fp8", "fp8-ue8m0"),
    "gguf": ("F32", "F16", "BF16", "Q8_0", "Q4_0"),
}
"""Values of --dtype by format."""
GGUF_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Default type of the matrices in a GGUF, by the dtype of the embedding in the source."""
EMBEDDING = "model.embed_tokens.weight"

_log = logging.getLogger(__name__)


def convert(
    model: str, out: Path, to: str | None = None, dtype: str = "", model_parallel: int = 1, max_shard_gb: float = 5.0
) -> None:
    """Convert the checkpoint `model` to another format at `out`, atomically; an existing checkpoint is replaced.

    to: hf, deepseek (folders) or gguf (a file OUT.gguf, or a folder that also has a Modelfile); None chooses by the
    name of `out`: gguf for OUT.gguf, else hf. dtype: one of DTYPES; empty keeps the stored types. model_parallel:
    ranks of the deepseek layout. max_shard_gb: largest file of hf, in GB.
    Raises ConfigError for an unreadable checkpoint, a format that cannot represent it, a file name that contradicts the
    format, and a full disk.
    """
    to = format_of(out, to)
    if dtype and dtype not in DTYPES[to]:
        raise ConfigError(f"dtype={dtype!r} is not known in {to}; known: {', '.join(DTYPES[to])}")
    if not max_shard_gb > 0:
        raise ConfigError(f"max-shard-gb={max_shard_gb} must be above 0")
    if model_parallel != 1 and to != "deepseek":
        raise ConfigError(f"model-parallel={model_parallel} applies only to the deepseek layout; remove it for to={to}")
    path = locate(model)
    source = open_source(path)
    if to == "gguf":
        _write_gguf(source, path, out, dtype or GGUF_KINDS.get(source.dtype_of(EMBEDDING), "F32"))
        return
    output_format = OUTPUT_FORMATS[dtype] if dtype else _source_format(source, to)
    size = output_bytes(source, output_format)
    _check_disk_space(out, size)

    def fill(target: Path) -> None:
        _write_side_files(source, path, target)
        with Progress(f"{to} [MB]", size // 10**6) as progress:
            advance = _in_megabytes(progress)
            if to == "hf":
                config = _make_config(source, path, output_format)
                (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                write_weights(source, target, output_format, int(max_shard_gb * 10**9), advance)
            else:
                write_deepseek(source, target, output_format, model_parallel, advance)

    write_folder(out, fill)


def format_of(out: Path, to: str | None) -> str:
    """Return the format to write: `to`, or the format implied by the name of `out`.

    Raises ConfigError for an unknown format, and if the format contradicts the name of `out` or what exists there.
    """
    to = to or ("gguf" if is_gguf(out) else "hf")
    if to not in DTYPES:
        raise ConfigError(f"format {to!r} is not known; known: {', '.join(DTYPES)}")
    if is_gguf(out) and to != "gguf":
        raise ConfigError(
            f"{out} is the name of a GGUF file, but --to {to} writes a folder; give another name, or remove --to {to}"
        )
    if out.suffix.lower() in (".safetensors", *PICKLES):
        raise ConfigError(
            f"{out} is the name of one file, but the {to} format is a folder; remove the extension {out.suffix}"
        )
    if out.is_file() and not is_gguf(out):
        raise ConfigError(f"{out} is a file, but the {to} format is a folder; give another name")
    if out.is_dir() and is_gguf(out):
        raise ConfigError(f"{out} is a folder, but its name ends in .gguf like a file; give another name")
    return to


def _source_format(source: TensorSource, to: str) -> OutputFormat:
    """Return the output format that keeps the stored types; the deepseek layout supports only bf16 and FP8."""
    if to == "hf":
        return OutputFormat(quantization=source.quantization)
    is_power = isinstance(source.quantization, FP8Blocks) and source.quantization.power_of_two
    return OUTPUT_FORMATS["bf16" if source.quantization is None else "fp8-ue8m0" if is_power else "fp8"]


def _in_megabytes(progress: Progress) -> Callable[[int], None]:
    """Return a callback that counts bytes and advances a progress line in megabytes."""
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        ahead = min(done // 10**6, progress.total) - progress.done
        if ahead:
            progress.advance(ahead)

    return advance


def _check_disk_space(out: Path, num_bytes: int) -> None:
    """Raise ConfigError before writing if the free disk space is too small."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ConfigError(
            f"{out} needs {num_bytes / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB free; free some space, "
            "choose another folder, or use a smaller dtype"
        )


def _make_config(source: TensorSource, path: Path, output_format: OutputFormat) -> dict[str, Any]:
    """Return config.json: the source's file with new dtype keys, or a generated one."""
    generated = config_json(source, output_format)
    if not path.is_dir() or is_deepseek(path):
        return generated
    replaced = ("dtype", "torch_dtype", "quantization_config")
    unchanged = {key: value for key, value in read_json(path / CONFIG).items() if key not in replaced}
    return unchanged | {key: generated[key] for key in replaced if key in generated}


def _write_side_files(source: TensorSource, path: Path, target: Path) -> None:
    """Write tokenizer, template and settings: copied from a folder, or generated from the metadata of a GGUF."""
    if path.is_dir():
        for file in side_files(path):
            shutil.copyfile(file, target / file.name)
        if (path / TOKENIZER).is_file():
            load_tokenizer(path)
        if (path / GENERATION).is_file():
            return
        texts = make_side_files(source.cfg, None, None)
    else:
        texts = make_side_files(source.cfg, *_load_tokenizer_and_chat(path))
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")


def _load_tokenizer_and_chat(path: Path) -> tuple[Tokenizer | None, ChatFormat | None]:
    """Load the tokenizer and the chat format of a checkpoint; None for each that is missing."""
    if path.is_dir() and not (path / TOKENIZER).is_file():
        _log.warning("%s has no %s; the output has no tokenizer", path, TOKENIZER)
        return None, None
    try:
        tokenizer = load_tokenizer(path)
    except ConfigError as error:
        if path.is_dir():
            raise
        _log.warning("the output has no tokenizer: %s", error)
        return None, None
    try:
        return tokenizer, load_chat(path)
    except ConfigError as error:
        _log.warning("the output has no chat format: %s", error)
        return tokenizer, None


def _write_gguf(source: TensorSource, path: Path, out: Path, kind: str) -> None:
    """Write a GGUF file, or a folder with the file and a Modelfile for Ollama."""
    from thinkstack.checkpoint.gguf.modelfile import write_modelfile
    from thinkstack.checkpoint.gguf.write import write_gguf

    tokenizer, chat = _load_tokenizer_and_chat(path)
    if is_gguf(out):
        write_gguf(source, out, kind, tokenizer, chat)
        return

    def fill(target: Path) -> None:
        name = f"{out.name}-{kind}.gguf"
        write_gguf(source, target / name, kind, tokenizer, chat)
        write_modelfile(target / "Modelfile", name, chat)

    write_folder(out, fill)
