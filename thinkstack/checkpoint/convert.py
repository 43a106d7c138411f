"""Checkpoints from one format into another: any reader with any writer, a tensor at a time."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.deepseek.files import is_deepseek, write_deepseek
from thinkstack.checkpoint.gguf.file import is_gguf
from thinkstack.checkpoint.hf.files import CONFIG, PICKLES, config_json, write_weights, written_bytes
from thinkstack.checkpoint.hf.side_files import GENERATION, companions, side_files
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

FORMS = {
    "fp32": OutputFormat(torch.float32),
    "fp16": OutputFormat(torch.float16),
    "bf16": OutputFormat(torch.bfloat16),
    "fp8": OutputFormat(torch.bfloat16, FP8Blocks()),
    "fp8-ue8m0": OutputFormat(torch.bfloat16, FP8Blocks(power_of_two=True)),
}
"""What --dtype means: of the matrices of blocks in FP8, with the rest in bf16, or of everything."""
DTYPES = {
    "hf": tuple(FORMS),
    "deepseek": ("bf16", "fp8", "fp8-ue8m0"),
    "gguf": ("F32", "F16", "BF16", "Q8_0", "Q4_0"),
}
"""Values of --dtype by format."""
GGUF_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What a GGUF keeps matrices as where nothing else is asked for."""
EMBEDDING = "model.embed_tokens.weight"

_log = logging.getLogger(__name__)


def convert(
    model: str, out: Path, to: str | None = None, dtype: str = "", model_parallel: int = 1, max_shard_gb: float = 5.0
) -> None:
    """Write the checkpoint `model` to `out` in another format, whole or not at all; an older one there is replaced.

    to: hf, deepseek (folders) or gguf (a file OUT.gguf, or a folder with a Modelfile beside it); None is what the name
    of `out` says: gguf for OUT.gguf, else hf. dtype: one of DTYPES; empty keeps what is stored. model_parallel: ranks
    of deepseek's layout. max_shard_gb: largest file of hf, in GB.
    Raises ConfigError for a checkpoint that cannot be read, a format that cannot hold it, a name that contradicts the
    format, and a full disk.
    """
    to = format_of(out, to)
    if dtype and dtype not in DTYPES[to]:
        raise ConfigError(f"dtype={dtype!r} is not known in {to}; known: {', '.join(DTYPES[to])}")
    if not max_shard_gb > 0:
        raise ConfigError(f"max-shard-gb={max_shard_gb} must be above 0")
    if model_parallel != 1 and to != "deepseek":
        raise ConfigError(f"model-parallel={model_parallel} is for the deepseek layout; leave it out with {to}")
    path = locate(model)
    source = open_source(path)
    if to == "gguf":
        _write_gguf(source, path, out, dtype or GGUF_KINDS.get(source.dtype_of(EMBEDDING), "F32"))
        return
    form = FORMS[dtype] if dtype else _stored_form(source, to)
    size = written_bytes(source, form)
    _check_room(out, size)

    def fill(target: Path) -> None:
        _write_companions(source, path, target)
        with Progress(f"{to} [MB]", size // 10**6) as progress:
            advance = _in_megabytes(progress)
            if to == "hf":
                config = _config_of(source, path, form)
                (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                write_weights(source, target, form, int(max_shard_gb * 10**9), advance)
            else:
                write_deepseek(source, target, form, model_parallel, advance)

    write_folder(out, fill)


def format_of(out: Path, to: str | None) -> str:
    """The format to write: what is asked for, else what the name of `out` says. Raises ConfigError for an unknown one,
    and where the two contradict each other or what is there already.
    """
    to = to or ("gguf" if is_gguf(out) else "hf")
    if to not in DTYPES:
        raise ConfigError(f"format {to!r} is not known; known: {', '.join(DTYPES)}")
    if is_gguf(out) and to != "gguf":
        raise ConfigError(
            f"{out} is the name of a GGUF, and {to} is a folder; give another name, or leave out --to {to}"
        )
    if out.suffix.lower() in (".safetensors", *PICKLES):
        raise ConfigError(f"{out} is the name of one file, and {to} makes a folder of several; leave {out.suffix} out")
    if out.is_file() and not is_gguf(out):
        raise ConfigError(f"{out} is a file, and {to} makes a folder; give another name")
    if out.is_dir() and is_gguf(out):
        raise ConfigError(f"{out} is a folder, and a file of that name was asked for; give another name")
    return to


def _stored_form(source: TensorSource, to: str) -> OutputFormat:
    """What keeps the numbers as they are; DeepSeek's code knows bf16 beside FP8."""
    if to == "hf":
        return OutputFormat(quantization=source.quantization)
    is_power = isinstance(source.quantization, FP8Blocks) and source.quantization.power_of_two
    return FORMS["bf16" if source.quantization is None else "fp8-ue8m0" if is_power else "fp8"]


def _in_megabytes(progress: Progress) -> Callable[[int], None]:
    """Passes bytes on to a progress line that counts megabytes."""
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        ahead = min(done // 10**6, progress.total) - progress.done
        if ahead:
            progress.advance(ahead)

    return advance


def _check_room(out: Path, num_bytes: int) -> None:
    """Raise ConfigError before hours of writing if the disk cannot hold the result."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ConfigError(
            f"{out} needs {num_bytes / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB free; free space, choose "
            "another folder or a smaller dtype"
        )


def _config_of(source: TensorSource, path: Path, form: OutputFormat) -> dict[str, Any]:
    """config.json: the shipped one with other types, or one that says what the model is."""
    made = config_json(source, form)
    if not path.is_dir() or is_deepseek(path):
        return made
    replaced = ("dtype", "torch_dtype", "quantization_config")
    kept = {key: value for key, value in read_json(path / CONFIG).items() if key not in replaced}
    return kept | {key: made[key] for key in replaced if key in made}


def _write_companions(source: TensorSource, path: Path, target: Path) -> None:
    """Tokenizer, template and settings: a folder's own files as they are, those of a GGUF made from its metadata."""
    if path.is_dir():
        for file in side_files(path):
            shutil.copyfile(file, target / file.name)
        if (path / TOKENIZER).is_file():
            load_tokenizer(path)
        if (path / GENERATION).is_file():
            return
        texts = companions(source.cfg, None, None)
    else:
        texts = companions(source.cfg, *_speech(path))
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")


def _speech(path: Path) -> tuple[Tokenizer | None, ChatFormat | None]:
    """Tokenizer and chat format of a checkpoint, as far as it has them."""
    if path.is_dir() and not (path / TOKENIZER).is_file():
        _log.warning("%s has no %s; the result has no tokenizer either", path, TOKENIZER)
        return None, None
    try:
        tokenizer = load_tokenizer(path)
    except ConfigError as error:
        if path.is_dir():
            raise
        _log.warning("without a tokenizer: %s", error)
        return None, None
    try:
        return tokenizer, load_chat(path)
    except ConfigError as error:
        _log.warning("without a chat format: %s", error)
        return tokenizer, None


def _write_gguf(source: TensorSource, path: Path, out: Path, kind: str) -> None:
    """A file, or a folder with the file and a Modelfile for Ollama."""
    from thinkstack.checkpoint.gguf.modelfile import write_modelfile
    from thinkstack.checkpoint.gguf.write import write_gguf

    tokenizer, chat = _speech(path)
    if is_gguf(out):
        write_gguf(source, out, kind, tokenizer, chat)
        return

    def fill(target: Path) -> None:
        name = f"{out.name}-{kind}.gguf"
        write_gguf(source, target / name, kind, tokenizer, chat)
        write_modelfile(target / "Modelfile", name, chat)

    write_folder(out, fill)
