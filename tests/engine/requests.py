"""Requests, and what each is answered alone: the measure of exactness."""

from dataclasses import replace

import torch

from tests.tiny import MLA_TINY
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, Sampling

WHOLE = replace(MLA_TINY, moe=replace(MLA_TINY.moe, expert_size=16))
"""Computed by one kernel, where there are kernels."""
LONG = {"max_positions": 400}
SMALL = EngineConfig(max_batch=8)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(48, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def how(count: int, **given) -> list[Sampling]:
    return [Sampling(**({"max_tokens": 20 + 9 * index, "seed": index} | given)) for index in range(count)]


def drawn(found: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in found]


def alone(model: Transformer, asked: list[list[int]], samplings: list[Sampling]) -> list[list[tuple[int, ...]]]:
    """Each request in an engine of its own, without cached prefixes, the prompt in one piece."""
    plain = replace(SMALL, prefix_cache=False, max_prefill_tokens=4096)
    pairs = zip(asked, samplings, strict=True)
    return [drawn(Engine(model, plain).generate([one], [sampling]))[0] for one, sampling in pairs]
