"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen model learns through small matrices beside its own.

y = W x + scale * B (A x). B begins at zero, so that an adapted model begins as the model it adapts. `weight` of an
adapted layer is always the merged matrix: code that reads it, such as the kernels of inference, needs to know nothing.
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
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import (
    QuantizedWeight,
    dequantize_model,
    quantizable_matrices,
    quantize_model,
    quantized_weights,
)
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.quant.nf4 import NF4Blocks
from thinkstack.quant.scheme import QuantScheme
from thinkstack.types import ConfigError

M = TypeVar("M", bound=Transformer)
BASES: dict[str, QuantScheme] = {"fp8": FP8Blocks(), "nf4": NF4Blocks()}
"""Storages of a frozen base."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What is adapted, and how much. The names of the fields are those of PEFT where it has them."""

    rank: CountOrZero = 0
    """Columns of A and B (r); 0 trains the whole model instead."""
    alpha: Positive = 16.0
    """The product of B and A counts alpha / rank times."""
    rslora: bool = False
    """Divide by the root of the rank, which keeps the step size of large ranks (arXiv:2312.03732)."""
    targets: tuple[Literal["attention", "feed_forward", "experts"], ...] = ("attention", "feed_forward")
    """Which matrices: the projections of attention, dense and shared feed-forwards, routed experts one by one."""
    base: Literal["float", "fp8", "nf4"] = "float"
    """How the frozen matrices are kept: as floats, in 8 bits (quant/fp8.py) or in 4 (QLoRA: quant/nf4.py)."""
    seed: Seed = 0
    """Fixes the drawn A."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0:
            raise ConfigError(f"lora.rank={self.rank} cannot be negative and lora.alpha={self.alpha} must be positive")
        if not self.targets:
            raise ConfigError("lora.targets=[] adapts nothing; name attention, feed_forward or experts, or use rank=0")

    @property
    def scale(self) -> float:
        """Factor of the product of B and A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module):
    """A (..., r, I) and B (..., O, r), with leading dimensions where matrices are stacked; switched off it is 0."""

    def __init__(self, like: Tensor, stacked: tuple[int, ...], rank: int, scale: float):
        """like: the matrix or stack (..., O, I) to adapt; stacked: leading dimensions that it is cut into."""
        super().__init__()
        O, I = like.shape[-2] * like.shape[:-2].numel() // math.prod(stacked), like.shape[-1]  # noqa: E741
        self.scale, self.enabled = scale, True
        self.lora_a = nn.Parameter(like.new_zeros(*stacked, rank, I))
        self.lora_b = nn.Parameter(like.new_zeros(*stacked, O, rank))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw A as PEFT does, uniformly up to 1 / sqrt(I); B stays 0."""
        bound = self.lora_a.shape[-1] ** -0.5
        drawn = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        self.lora_a.copy_(drawn)

    def forward(self, weight: Tensor) -> Tensor:
        """The merged matrix, of weight's shape and dtype; weight itself while switched off."""
        if not self.enabled:
            return weight
        return weight + (self.scale * (self.lora_b @ self.lora_a)).view_as(weight).to(weight.dtype)


class LoRALinear(nn.Module):
    """A linear layer and its adapter; `weight` is the merged matrix, for code that reads it."""

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


def adaptable(model: Transformer, targets: Collection[str]) -> list[str]:
    """Parameters of the main layers that belong to `targets`, by their names in a model without adapters.

    Multi-token-prediction modules are not among them: an adapter is for the model that answers.
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
    """Freeze `model` and give the named parameters adapters of zeros, in place."""
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
    """Freeze `model` and give it the adapters of `cfg`, drawn, in place; its matrices are packed as cfg.base says.

    Raises ConfigError if nothing matches.
    """
    names = adaptable(model, cfg.targets)
    if not names:
        raise ConfigError(f"lora.targets={list(cfg.targets)} names nothing that this model has; add attention")
    if cfg.base != "float":
        quantize_model(model, BASES[cfg.base], quantizable_matrices(model))
    add_adapters(model, names, cfg.rank, cfg.scale)
    generator = torch.Generator().manual_seed(cfg.seed)
    for adapter in adapters(model).values():
        adapter.initialize(generator)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model, by the name that the adapted parameter has without them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[f"{name}.weight"] = module.adapter
        elif isinstance(module, MoE):
            for leaf, adapter in module.adapters.items():
                assert isinstance(adapter, Adapter)
                found[f"{name}.{leaf}"] = adapter
    return found


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the names of a plain model: adapters merged into what they adapt, packed ones wide."""
    known, quantized = adapters(model), quantized_weights(model)
    held = {id(part) for module in quantized.values() for part in module.buffers()}
    wide = ((name, module.whole()) for name, module in quantized.items())
    for name, value in chain(wide, model.named_parameters(), model.named_buffers()):
        if id(value) in held:
            continue
        plain = name.replace(".base.", ".")
        if plain in known:
            yield plain, known[plain](value)
        elif not name.endswith((".lora_a", ".lora_b")):
            yield plain, value


@torch.no_grad()
def merged(model: M) -> M:
    """A model without adapters that computes the same; the model itself if it has none. The adapted one is kept."""
    if not adapters(model):
        return model
    twin = dequantize_model(copy.deepcopy(model))
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                child.base.weight.copy_(child.weight)
                setattr(module, name, child.base)
        if isinstance(module, MoE):
            for name, adapter in module.adapters.items():
                getattr(module, name).copy_(adapter(getattr(module, name)))
            module.adapters.clear()
    return twin.requires_grad_(True)


@contextmanager
def adapters_off(model: M) -> Iterator[M]:
    """The model as it was before it was adapted, for as long as the block runs."""
    switched = [adapter for adapter in adapters(model).values() if adapter.enabled]
    for adapter in switched:
        adapter.enabled = False
    try:
        yield model
    finally:
        for adapter in switched:
            adapter.enabled = True
