"""Low-rank adapters (LoRA, arXiv:2106.09685): the base model is frozen and two small matrices per layer are trained.

y = W x + scale * B (A x). B starts at zero, so that an adapted model initially equals its base. `weight` of an adapted
layer is always the merged matrix, so that code that reads `weight`, such as inference kernels, works unchanged.
"""

# Shapes in this file: O outputs, I inputs, r rank, E experts, P matrices stacked in a parameter (gate and up: 2).

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkstack.config import CountOrZero, Positive, Seed
from thinkstack.models.layers import QuantizedWeight
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import dequantize_model, quantizable_matrices, quantize_model, quantized_weights
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.quant.nf4 import NF4Blocks
from thinkstack.quant.scheme import QuantScheme
from thinkstack.types import ConfigError

M = TypeVar("M", bound=Transformer)
BASE_SCHEMES: dict[str, QuantScheme] = {"fp8": FP8Blocks(), "nf4": NF4Blocks()}
"""Quantization schemes of a frozen base."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Settings of the adapters. Fields have the names of PEFT's settings if PEFT has the setting."""

    rank: CountOrZero = 0
    """Rank r of A and B; 0: train the full model instead."""
    alpha: Positive = 16.0
    """B A is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which preserves the step size at large ranks (arXiv:2312.03732)."""
    targets: tuple[Literal["attention", "feed_forward", "experts"], ...] = ("attention", "feed_forward")
    """Adapted matrices: "attention" for the projections, "feed_forward" for dense and shared feed-forwards, "experts"
    for routed experts."""
    base: Literal["float", "fp8", "nf4"] = "float"
    """Format of the frozen matrices: "float", 8 bits ("fp8", quant/fp8.py) or 4 bits ("nf4" as in QLoRA,
    quant/nf4.py)."""
    seed: Seed = 0
    """Seed of the initial A."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0:
            raise ConfigError(f"lora.rank={self.rank} cannot be negative and lora.alpha={self.alpha} must be positive")
        if not self.targets:
            raise ConfigError("lora.targets=[] adapts nothing; use attention, feed_forward or experts, or lora.rank=0")

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module):
    """The adapter matrices A (..., r, I) and B (..., O, r), with leading dimensions for stacked matrices; without
    effect while disabled."""

    def __init__(self, like: Tensor, stacked: tuple[int, ...], rank: int, scale: float):
        """like: the matrix or stack (..., O, I) to adapt. stacked: leading dimensions into which `like` is split."""
        super().__init__()
        O, I = like.shape[-2] * like.shape[:-2].numel() // math.prod(stacked), like.shape[-1]  # noqa: E741
        self.scale, self.enabled = scale, True
        self.lora_a = nn.Parameter(like.new_zeros(*stacked, rank, I))
        self.lora_b = nn.Parameter(like.new_zeros(*stacked, O, rank))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Initialize A as PEFT does, uniformly in +-1 / sqrt(I); B stays 0."""
        bound = self.lora_a.shape[-1] ** -0.5
        values = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        self.lora_a.copy_(values)

    def forward(self, weight: Tensor) -> Tensor:
        """The merged matrix, in the shape and dtype of `weight`; `weight` itself while disabled."""
        if not self.enabled:
            return weight
        return weight + (self.scale * (self.lora_b @ self.lora_a)).view_as(weight).to(weight.dtype)


class LoRALinear(nn.Module):
    """A linear layer with an adapter; `weight` is the merged matrix."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base = base
        self.adapter = Adapter(base.weight, (), rank, scale)

    @property
    def weight(self) -> Tensor:
        return self.adapter(self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I); returns (..., O)."""
        out = self.base(x)
        if not self.adapter.enabled:
            return out
        return out + self.adapter.scale * F.linear(F.linear(x, self.adapter.lora_a), self.adapter.lora_b)


def adapter_targets(model: Transformer, targets: Collection[str]) -> list[str]:
    """Names, as in a model without adapters, of the parameters that `targets` select.

    Multi-token-prediction modules are never adapted.
    """
    found = []
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, nn.Linear):
            part = "attention" if ".attention." in name else "feed_forward"
            found += [f"{name}.weight"] if part in targets else []
        elif isinstance(module, MoE) and "experts" in targets:
            found += [f"{name}.w_in", f"{name}.w_out"]
    return found


def add_adapters(model: Transformer, names: Collection[str], rank: int, scale: float) -> None:
    """Freeze `model` and add zero adapters to the named parameters, in place."""
    model.requires_grad_(False)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, MoE):
            stack = getattr(module, leaf)
            if isinstance(stack, QuantizedWeight):
                raise ConfigError(
                    f"{name} is quantized as {stack.quantization.name}; adapt experts of a model in bf16, or leave "
                    "experts out of lora.targets"
                )
            parts = 2 if leaf == "w_in" else 1
            adapter = Adapter(stack, (stack.shape[0], parts), rank, scale)
            module.adapters[leaf] = adapter
        else:
            parent, _, place = owner.rpartition(".")
            assert isinstance(module, nn.Linear), name
            setattr(model.get_submodule(parent), place, LoRALinear(module, rank, scale))


def adapt(model: Transformer, cfg: LoRAConfig) -> None:
    """Freeze `model`, quantize it to cfg.base, and add initialized adapters, in place.

    Raises ConfigError if no parameter matches.
    """
    names = adapter_targets(model, cfg.targets)
    if not names:
        raise ConfigError(
            f"lora.targets={list(cfg.targets)} matches no parameter of this model; add 'attention' to lora.targets"
        )
    if cfg.base != "float":
        quantize_model(model, BASE_SCHEMES[cfg.base], quantizable_matrices(model))
    add_adapters(model, names, cfg.rank, cfg.scale)
    generator = torch.Generator().manual_seed(cfg.seed)
    for adapter in adapters(model).values():
        adapter.initialize(generator)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model, by the name of the adapted parameter in a model without adapters."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[f"{name}.weight"] = module.adapter
        elif isinstance(module, MoE):
            for leaf, adapter in module.adapters.items():
                assert isinstance(adapter, Adapter)
                found[f"{name}.{leaf}"] = adapter
    return found


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers as in a plain model: adapters are merged, quantized matrices dequantized."""
    adapted, quantized = adapters(model), quantized_weights(model)
    part_ids = {id(part) for module in quantized.values() for part in module.buffers()}
    dequantized = ((name, module.dequantize_parameter()) for name, module in quantized.items())
    for name, value in chain(dequantized, model.named_parameters(), model.named_buffers()):
        if id(value) in part_ids:
            continue
        plain = name.replace(".base.", ".")
        if plain in adapted:
            yield plain, adapted[plain](value)
        elif not name.endswith((".lora_a", ".lora_b")):
            yield plain, value


@torch.no_grad()
def merge_adapters(model: M) -> M:
    """A copy with the adapters merged into the weights; the model itself if it has none. `model` is not changed."""
    if not adapters(model):
        return model
    copied = dequantize_model(copy.deepcopy(model))
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                child.base.weight.copy_(child.weight)
                setattr(module, name, child.base)
        if isinstance(module, MoE):
            for name, adapter in module.adapters.items():
                getattr(module, name).copy_(adapter(getattr(module, name)))
            module.adapters.clear()
    return copied.requires_grad_(True)


@contextmanager
def adapters_off(model: M) -> Iterator[M]:
    """Disable all adapters within the block, so that the model computes like the base model."""
    disabled = [adapter for adapter in adapters(model).values() if adapter.enabled]
    for adapter in disabled:
        adapter.enabled = False
    try:
        yield model
    finally:
        for adapter in disabled:
            adapter.enabled = True
