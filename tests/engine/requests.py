"""Requests and their completions in an engine of their own, the reference for exactness."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.config import ModelConfig
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, SamplingParams

FUSED = replace(MLA_TINY, moe=replace(MLA_TINY.moe, moe_intermediate_size=16))
"""Computed by a fused pass, if there are kernels."""
MODELS = [("kernels", "mla"), ("kernels", "gqa"), ("kernels", "whole"), ("torch", "mla"), ("torch", "gqa")]
"""How a model may be computed: on torch's operators `FUSED` is one like "mla"."""
LONG = {"max_positions": 400, "num_layers": 2}
"""Changes to a model: room for prompts over several blocks; a dense block and one with experts."""
SMALL = EngineConfig(max_num_seqs=8)


def all_models(gqa: ModelConfig = GQA_TINY) -> pytest.MarkDecorator:
    """Models by the implementation that computes them."""
    models = {"mla": MLA_TINY, "gqa": gqa, "whole": FUSED}
    cases = [pytest.param(path, models[name], id=f"{path}-{name}") for path, name in MODELS]
    return pytest.mark.parametrize(("path", "cfg"), cases, indirect=["path"])


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(48, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def how(count: int, **given) -> list[SamplingParams]:
    return [SamplingParams(**({"max_tokens": 20 + 9 * index, "seed": index} | given)) for index in range(count)]


class Sampled(NamedTuple):
    """The values that must be equal, log-probabilities bit for bit: equal tokens may hide small differences."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def sampled(found: list[list[Completion]]) -> list[list[Sampled]]:
    return [[Sampled(c.token_ids, c.logprobs) for c in group] for group in found]


def alone(
    model: Transformer, prompt_token_ids: list[list[int]], samplings: list[SamplingParams]
) -> list[list[Sampled]]:
    """Each request in an engine of its own, without cached prefixes, the prompt in one piece."""
    plain = replace(SMALL, enable_prefix_caching=False, max_prefill_tokens=4096)
    pairs = zip(prompt_token_ids, samplings, strict=True)
    return [sampled(Engine(model, plain).generate([one], [sampling]))[0] for one, sampling in pairs]
