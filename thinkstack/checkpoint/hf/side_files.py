"""Side files of a checkpoint: tokenizer, chat template, generation settings; generated, or copied from the source."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkstack.checkpoint.hf import chat_template
from thinkstack.checkpoint.hf.config import one_or_list
from thinkstack.checkpoint.hf.files import CONFIG, INDEX, PICKLES
from thinkstack.checkpoint.json_reader import read_json
from thinkstack.files import read_text
from thinkstack.models.config import ModelConfig
from thinkstack.text.chat import FORMATS, ChatFormat, TemplateFormat, chat_format
from thinkstack.text.tokenizer import FILE as TOKENIZER
from thinkstack.text.tokenizer import PAD, Tokenizer
from thinkstack.types import ConfigError

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES, TOOL_USE = "additional_chat_templates", "tool_use"
"""Folder of additional templates by name, and the name of the tool template."""
CHAT_FORMAT = "thinkstack_chat_format"
"""Our own key in tokenizer_config.json: the chat format that the model was trained with."""
CHAT_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
"""Default sampling settings of models with our chat formats, from R1's generation_config.json."""


def side_files(folder: Path) -> list[Path]:
    """Return all files of a checkpoint folder except weights and config.json."""
    weights = (".safetensors", ".gguf", *PICKLES)  # case-insensitive
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path in files if path.suffix.lower() not in weights and path.name not in (INDEX, CONFIG)]


def make_side_files(
    cfg: ModelConfig, tokenizer: Tokenizer | None, chat: str | ChatFormat | None, like: Path | None = None
) -> dict[str, str]:
    """Return the text files of a checkpoint folder, by name.

    like: the checkpoint folder that the model was trained from; its other settings (pad token, added tokens, sampling)
    are copied. Raises ConfigError for a mismatch of model, tokenizer and format.
    """
    if tokenizer is None:
        if chat is not None:
            raise ConfigError("a chat format cannot be saved without its tokenizer; give both")
        return {GENERATION: _json(_generation_config(cfg, None, {}))}
    check_vocabulary(tokenizer, cfg.vocab_size)
    format_ = chat_format(chat, tokenizer) if isinstance(chat, str) else chat
    shipped = _shipped(like, tokenizer)
    texts = {name: text for name, text in shipped.items() if name not in (TEMPLATE, GENERATION, TOKENIZER_CONFIG)}
    if TEMPLATE in shipped and isinstance(format_, TemplateFormat) and format_.template == shipped[TEMPLATE]:
        texts[TEMPLATE] = shipped[TEMPLATE]
    configs = {name: json.loads(shipped.get(name, "{}")) for name in (GENERATION, TOKENIZER_CONFIG)}
    tokenizer_config = _tokenizer_config(cfg, tokenizer, format_, configs[TOKENIZER_CONFIG], TEMPLATE in texts)
    return texts | {
        GENERATION: _json(_generation_config(cfg, format_, configs[GENERATION])),
        TOKENIZER_CONFIG: _json(tokenizer_config),
        TOKENIZER: tokenizer.spec,
    }


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str = "the tokenizer") -> None:
    """Raise ConfigError if a tokenizer has more tokens than the model has embeddings."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{where} has {tokenizer.vocab_size:,} tokens, but the model has only {vocab_size:,}; use the tokenizer of "
            f"these weights, or train a model with at least {tokenizer.vocab_size:,} tokens"
        )


def _shipped(like: Path | None, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the text files of a folder if it has the same tokenizer, else {}."""
    if like is None or not (like / TOKENIZER).is_file():
        return {}
    if Tokenizer.load(like).spec != tokenizer.spec:
        return {}
    for name in (GENERATION, TOKENIZER_CONFIG):
        if (like / name).is_file():
            read_json(like / name)
    texts = (path for path in side_files(like) if path.suffix in (".json", ".jinja", ".txt"))
    return {path.name: read_text(path) for path in texts}


def _generation_config(cfg: ModelConfig, chat: ChatFormat | None, shipped: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json with the end tokens of the model, of the chat format and of the source file."""
    known = shipped.get("eos_token_id")
    ends = [*cfg.eos_ids, *(chat.stop_token_ids if chat else ()), *(known if isinstance(known, list) else [known])]
    ids = [token for token in dict.fromkeys(ends) if token is not None]
    tokens = {"bos_token_id": cfg.bos_id, "eos_token_id": one_or_list(ids)}
    own = {key: value for key, value in tokens.items() if value is not None}
    if chat is None:
        return {"_from_model_config": True} | dict(shipped) | own
    sampling = CHAT_SAMPLING if chat.name in FORMATS else {}
    pad = chat.tokenizer.control.get(PAD, ids[0] if ids else None)
    return sampling | ({} if pad is None else {"pad_token_id": pad}) | dict(shipped) | own


def _tokenizer_config(
    cfg: ModelConfig, tokenizer: Tokenizer, chat: ChatFormat | None, shipped: Mapping[str, Any], has_file: bool
) -> dict[str, Any]:
    """Return tokenizer_config.json, without a chat template if the template is in a separate file or cannot give the
    ids of our format."""
    config = {key: value for key, value in shipped.items() if key not in (CHAT_FORMAT, "chat_template")}
    if not shipped:
        begin = tokenizer.begin_ids[0] if tokenizer.begin_ids else cfg.bos_id
        bos, eos = (control_token(tokenizer, token_id) for token_id in (begin, (*cfg.eos_ids, None)[0]))
        config = {
            "bos_token": bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "model_max_length": cfg.max_positions,
            "pad_token": PAD if PAD in tokenizer.control else eos,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    if isinstance(chat, TemplateFormat):
        return config if has_file else config | {"chat_template": _template_key(chat, shipped.get("chat_template"))}
    if chat is not None and chat.has_template:
        config[CHAT_FORMAT] = chat.name
        template = chat_template.template_of(chat.name, tokenizer)
        if template is not None:
            config["chat_template"] = template
    return config


def _template_key(chat: TemplateFormat, shipped: Any) -> str | list[dict[str, str]]:
    """Return the value of chat_template: the source's value if it contains this template, else a generated value."""
    known = [entry.get("template") for entry in shipped] if isinstance(shipped, list) else [shipped]
    if chat.template in known:
        return shipped
    if not chat.tool_template:
        return chat.template
    named = {"default": chat.template, TOOL_USE: chat.tool_template}
    return [{"name": name, "template": template} for name, template in named.items()]


def control_token(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    """Return the text of a control token; None for None. Raises ConfigError for an ordinary token."""
    if token_id is None:
        return None
    for token, known in tokenizer.control.items():
        if known == token_id:
            return token
    raise ConfigError(
        f"the model begins or ends sequences with token {token_id}, which is not a control token of this tokenizer; "
        "set bos_id and eos_ids of the model to control tokens of the tokenizer"
    )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
