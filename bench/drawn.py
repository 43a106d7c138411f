"""Odd models drawn from seeds, and the batches to compare them on: material for parity with transformers.

A case is a function of its number alone. Sizes are small and mostly odd: heads, latents, experts and vocabularies that
no released model has, because a wrong stride or a swapped size shows there first.
"""

from dataclasses import dataclass, replace
from random import Random

import torch

from thinkstack.models.config import (
    GQAConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
)

FAMILIES = ("deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3", "deepseek_v3", "qwen3_moe")
"""Family of case n: the entry n modulo their number; V3 twice, as it has the most to get wrong."""
PADDINGS = ("none", "right", "left")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a batch of rows."""

    cfg: ModelConfig
    padding: str
    """Where shorter rows are filled up: "none" (all are as long), "right" or "left"."""
    ids: torch.Tensor
    """(B, T) int64 tokens, drawn in the padding too."""
    mask: torch.Tensor
    """(B, T) bool; True = a token, False = padding."""

    @property
    def positions(self) -> torch.Tensor:
        """(B, T) int64: tokens of a row are counted from 0; padding is at 0."""
        return ((self.mask.long().cumsum(1) - 1) * self.mask).clamp(min=0)


def random_case(number: int) -> Case:
    """Case `number` of an endless list."""
    rng = Random(f"odd {number}")
    family = FAMILIES[number % len(FAMILIES)]
    rows, tokens, padding = rng.randint(1, 3), rng.randint(6, 24), rng.choice(PADDINGS)
    lengths = [tokens if padding == "none" else rng.randint(3, tokens) for _ in range(rows)]
    places = torch.arange(tokens)
    begins = [tokens - length if padding == "left" else 0 for length in lengths]
    inside = [(places >= begin) & (places < begin + length) for begin, length in zip(begins, lengths, strict=True)]
    cfg = random_config(family, rng)
    ids = torch.randint(cfg.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(number))
    return Case(cfg=cfg, padding=padding, ids=ids, mask=torch.stack(inside))


def random_config(family: str, rng: Random) -> ModelConfig:
    """A small odd model of a family."""
    is_deepseek = family.startswith("deepseek")
    hidden, num_layers = rng.randint(17, 41), rng.randint(1, 3)
    rope = _random_deepseek_rope(family, rng) if is_deepseek else _random_plain_rope(rng)
    attention: MLAConfig | GQAConfig = _random_mla(rope, rng) if is_deepseek else _random_gqa(family, rng)
    if family in ("llama", "deepseek_v2"):  # transformers refuses these with heads that do not divide the width
        hidden = attention.num_heads * -(-hidden // attention.num_heads)
    experts = _random_experts(family, num_layers, rng) if is_deepseek or family == "qwen3_moe" else None
    cfg = ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=rng.randint(37, 83),
        hidden_size=hidden,
        num_layers=num_layers,
        attention=attention,
        intermediate_size=rng.randint(19, 53),
        moe=experts,
        mtp_layers=rng.choice((0, 0, 1)) if family == "deepseek_v3" else 0,
        rope=rope,
        norm_eps=1e-6 if is_deepseek else rng.choice((1e-6, 1e-5)),
        tie_embeddings=rng.random() < 0.4,
        max_positions=64,
        init_std=round(1.3 * hidden**-0.5, 3),
    )
    return replace(cfg, eos_ids=(1, 2)) if rng.random() < 0.3 else cfg


def _random_mla(rope: RopeConfig, rng: Random) -> MLAConfig:
    # turning neighbors as complex numbers, as transformers does in V2, takes views of an even stride
    is_odd = not rope.interleaved
    return MLAConfig(
        num_heads=rng.choice((1, 2, 3, 5, 7)),
        q_lora_rank=rng.choice((0, rng.randint(5, 19))),
        kv_lora_rank=2 * rng.randint(2, 8) + is_odd,
        qk_nope_head_dim=2 * rng.randint(1, 4) + is_odd,
        qk_rope_head_dim=2 * rng.randint(1, 5),
        v_head_dim=rng.randint(1, 11),
    )


def _random_gqa(family: str, rng: Random) -> GQAConfig:
    num_kv_heads = rng.choice((1, 2, 3))
    has_biases = family != "qwen2" and rng.random() < 0.4
    return GQAConfig(
        num_heads=num_kv_heads * rng.choice((1, 2, 3, 5)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * rng.randint(2, 7),
        qkv_bias=family == "qwen2" or has_biases,
        out_bias=has_biases,
        qk_norm=family.startswith("qwen3"),
    )


def _random_experts(family: str, num_layers: int, rng: Random) -> MoEConfig:
    is_v3, is_qwen = family == "deepseek_v3", family == "qwen3_moe"
    num_groups = 1 if is_qwen else rng.choice((1, 2, 3, 4))
    group_size, top_groups = rng.randint(2, 5), rng.randint(1, num_groups)
    # the one weight of a token normed to 1 would leave the router a gradient of rounding errors
    is_normed = family != "deepseek_v2" and rng.random() < 0.7
    return MoEConfig(
        num_experts=num_groups * group_size,
        num_experts_per_tok=rng.randint(1 + is_normed, min(4, top_groups * group_size)),
        num_shared_experts=0 if is_qwen else rng.randint(1, 3),
        moe_intermediate_size=rng.choice((rng.randint(5, 23), 16, 32)),  # the C++ kernels take multiples of 16 only
        num_groups=num_groups,
        top_groups=top_groups,
        scoring="sigmoid" if is_v3 else "softmax",
        group_score="top2" if is_v3 else "max",
        norm_topk_prob=is_normed,
        route_scale=1.0 if is_qwen else rng.choice((0.7, 1.0, 2.5)),
        first_dense_layers=rng.randint(0, num_layers - 1),
    )


def _random_yarn(rng: Random, mscale: float, mscale_all_dim: float) -> YarnConfig:
    return YarnConfig(
        factor=rng.choice((2.0, 4.0, 40.0)),
        original_max_positions=rng.choice((8, 16, 24)),
        beta_fast=rng.choice((32.0, 8.0, 2.0)),
        beta_slow=rng.choice((1.0, 0.25)),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def _random_deepseek_rope(family: str, rng: Random) -> RopeConfig:
    mscales = rng.choice(((1.0, 1.0), (0.707, 0.707), (0.7, 1.0), (1.0, 0.0)))
    return RopeConfig(
        theta=rng.choice((100.0, 10000.0)),
        interleaved=family == "deepseek_v2" or rng.random() < 0.5,
        yarn=_random_yarn(rng, *mscales) if rng.random() < 0.6 else None,
    )


def _random_plain_rope(rng: Random) -> RopeConfig:
    rope, kind = RopeConfig(theta=rng.choice((100.0, 10000.0, 5e5)), interleaved=False), rng.randrange(4)
    if kind == 0:
        return replace(rope, yarn=_random_yarn(rng, 1.0, 0.0))
    if kind == 1:
        low = rng.choice((0.5, 1.0))
        scaling = Llama3RopeConfig(factor=8.0, low_freq_factor=low, high_freq_factor=4.0, original_max_positions=32)
        return replace(rope, llama3=scaling)
    return replace(rope, linear_factor=4.0) if kind == 2 else rope
