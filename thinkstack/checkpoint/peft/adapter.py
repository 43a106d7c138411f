"""Reading and writing of adapters as PEFT folders: adapter_config.json and adapter_model.safetensors.

Names are PEFT's: base_model.model.<module of the checkpoint>.lora_A.weight (r, inputs) and .lora_B.weight (outputs, r).
Modules are mapped through the name table of complete checkpoints, so gate and up of an expert are two modules on disk
and one parameter here. Source: huggingface.co/docs/peft, "PEFT checkpoint format".
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thinkstack.checkpoint.deepseek.files import is_deepseek
from thinkstack.checkpoint.hf.files import CONFIG as MODEL_CONFIG
from thinkstack.checkpoint.hf.files import PICKLES, save_weights
from thinkstack.checkpoint.hf.side_files import side_files
from thinkstack.checkpoint.hf.tensors import TensorEntry, tensor_entries
from thinkstack.checkpoint.json_reader import read_json
from thinkstack.checkpoint.model import ADAPTER_CONFIG as CONFIG
from thinkstack.checkpoint.model import load_model, locate
from thinkstack.checkpoint.state import write_folder
from thinkstack.models.lora import Adapter, LoRAConfig, adapters, add_adapters, merge_adapters
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.default)?\.weight$")
ALLOWED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # PiSSA, LoftQ, ... also change the base
}
"""Supported values in adapter_config.json: the values of a plain LoRA adapter. Other values change the computation."""
QUANTIZED = re.compile(
    r"(?:^|[-_./])(?:bnb|[2-8]-?bits?|gptq|awq|nf4|w?int[48]|w[48]a\d+|hqq|aqlm|exl[23]|mlx|gguf)(?:$|[-_./])",
    re.IGNORECASE,
)
"""Names of base models with quantized weights in unsupported formats (FP8 is supported)."""


def save_adapter(folder: Path, model: Transformer, cfg: LoRAConfig, base: str) -> None:
    """Write the adapters of `model` as a PEFT folder, atomically. base: path of the base checkpoint."""
    known = adapters(model)
    items = [entry for entry in tensor_entries(model.cfg) if entry.source in known and entry.is_written]
    modules = [entry.name.removesuffix(".weight") for entry in items]
    tensors = {}
    for entry, module in zip(items, modules, strict=True):
        for matrix, value in zip("AB", _matrices(known[entry.source], entry), strict=True):
            tensors[f"{PREFIX}{module}.lora_{matrix}.weight"] = value.detach().cpu().clone()
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": cfg.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": cfg.rank,
        "target_modules": _target_modules(model, modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": cfg.rslora,
    }

    def fill(target: Path) -> None:
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    write_folder(folder, fill)


def _target_modules(model: Transformer, modules: list[str]) -> list[str]:
    """Return the last parts of the module names if these match no other matrix of the checkpoint, else full names."""
    ends = {module.rpartition(".")[2] for module in modules}
    stored = (entry.name.removesuffix(".weight") for entry in tensor_entries(model.cfg))
    meant = {name for name in stored if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(modules) else modules)


def _matrices(adapter: Adapter, entry: TensorEntry) -> tuple[Tensor, Tensor]:
    """Return views of A and B of one module on disk."""
    return adapter.lora_a[entry.part], adapter.lora_b[entry.part]


def load_adapter(model: Transformer, folder: str | Path) -> LoRAConfig:
    """Add the adapters of a PEFT folder to `model` in place; the base is frozen. Returns rank, alpha and rslora.

    Raises ConfigError for a folder that is incomplete, uses more than plain LoRA, or belongs to another model.
    """
    path = Path(folder)
    config = read_json(path / CONFIG)
    for name, allowed in ALLOWED_SETTINGS.items():
        if name in config and config[name] not in allowed:
            raise ConfigError(
                f"{path / CONFIG}: {name}={config[name]!r} is not supported, only plain LoRA is; merge the adapter "
                "with PEFT (merge_and_unload) and load the merged checkpoint"
            )
    base = config.get("base_model_name_or_path") or ""
    if QUANTIZED.search(str(base)):
        raise ConfigError(
            f"{path / CONFIG}: the adapter was trained on {base}, whose weights are quantized; merge the adapter "
            "into that model with PEFT, or set base_model_name_or_path to the unquantized weights, which gives a "
            "different model"
        )
    try:
        cfg = LoRAConfig(
            rank=int(config["r"]), alpha=float(config["lora_alpha"]), rslora=bool(config.get("use_rslora"))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path / CONFIG} has no usable r and lora_alpha ({error!r}); fetch it again") from error
    if not cfg.rank:
        raise ConfigError(f"{path / CONFIG}: r=0 adapts nothing; give the folder of a trained adapter")
    found, named = _by_module(path, _read(path)), f": {base}" if base else ""
    stored = {entry.name.removesuffix(".weight"): entry for entry in tensor_entries(model.cfg)}
    for module in found:
        if module not in stored or not stored[module].is_matrix or not stored[module].source.startswith("layers."):
            raise ConfigError(
                f"{path / WEIGHTS}: {module} is not a matrix of this model that can be adapted; use the base that the "
                f"adapter was trained on{named}"
            )
    add_adapters(model, sorted({stored[module].source for module in found}), cfg.rank, cfg.scale)
    known = adapters(model)
    with torch.no_grad():
        for module, given in found.items():
            for target, matrix in zip(_matrices(known[stored[module].source], stored[module]), "AB", strict=True):
                if matrix not in given or given[matrix].shape != target.shape:
                    problem = f"has shape {tuple(given[matrix].shape)}" if matrix in given else "is missing"
                    raise ConfigError(
                        f"{path / WEIGHTS}: lora_{matrix} of {module} {problem}, but this model with r={cfg.rank} "
                        f"requires {tuple(target.shape)}; use the base that the adapter was trained on{named}"
                    )
                target.copy_(given[matrix])
    return cfg


def _by_module(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = KEY.match(key)
        if match is None:
            raise ConfigError(
                f"{path / WEIGHTS}: {key} is not a matrix of a plain LoRA adapter; merge it with PEFT first"
            )
        found.setdefault(match["module"], {})[match["matrix"]] = value
    if not found:
        raise ConfigError(f"{path / WEIGHTS} contains no adapter; fetch it again")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    if not (path / WEIGHTS).is_file():
        way_out = f"convert {pickles[0]} to safetensors" if pickles else "give the folder of a complete adapter"
        raise ConfigError(f"{path / WEIGHTS} is missing; {way_out}")
    try:
        return load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path / WEIGHTS} is truncated or not a safetensors file ({error}); fetch it again"
        ) from error


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write the checkpoint folder `base` with the adapter merged into its weights, in the dtype of the base.

    The sum is computed in fp32 and rounded once. Raises ConfigError as load_model and load_adapter do.
    """
    source = locate(base)
    if not source.is_dir() or is_deepseek(source):
        raise ConfigError(
            f"{source} is not a checkpoint folder in Hugging Face layout; convert it first: thinkstack convert {base} "
            "OUT"
        )
    config = read_json(source / MODEL_CONFIG)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    model = load_model(source)
    load_adapter(model, adapter)
    plain = merge_adapters(model)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)

    def fill(target: Path) -> None:
        for file in side_files(source):
            shutil.copy(file, target / file.name)
        config.pop("quantization_config", None)  # the merged weights are floats
        (target / MODEL_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_weights(plain, target)

    write_folder(Path(out), fill)
