"""Every family through the formats: round trips in FP8, and chains of conversions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.hf.files import CONFIG, WEIGHTS
from thinkstack.checkpoint.model import load_model, save_model
from thinkstack.models.config import NAMED, GQAConfig, MLAConfig, ModelConfig, MoEConfig, named
from thinkstack.models.moe import MoE
from thinkstack.quant.fp8 import E4M3

FAMILIES = ("v3-671b", "v2-lite", "smollm2-135m", "r1-distill-qwen-7b", "qwen3-8b", "qwen3-30b-a3b")
"""A named size of each family."""


def shrunk(name: str) -> ModelConfig:
    """Return the architecture of the family at a tiny size; blocks of 128 are ragged."""
    cfg = named(name)
    if isinstance(cfg.attention, MLAConfig):
        attention = replace(
            cfg.attention,
            num_heads=2,
            q_lora_rank=24 if cfg.attention.q_lora_rank else 0,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
        )
    else:
        attention: MLAConfig | GQAConfig = replace(cfg.attention, num_heads=4, num_kv_heads=2, head_dim=36)
    moe: MoEConfig | None = cfg.moe
    if moe is not None:
        groups = dict(num_groups=min(2, moe.num_groups), top_groups=1)
        moe = replace(
            moe,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            **groups,
            first_dense_layers=moe.first_dense_layers % 2,
        )
    small = dict(
        vocab_size=64, hidden_size=144, num_layers=2, intermediate_size=136, bos_id=0, eos_ids=(1,), max_positions=64
    )
    return replace(cfg, **small, attention=attention, moe=moe, rope=replace(cfg.rope, yarn=None, llama3=None))


def write_checkpoint(folder: Path, cfg: ModelConfig) -> Path:
    """Write a bf16 checkpoint with random weights."""
    model = tiny_model(cfg)
    for module in model.modules():
        if isinstance(module, MoE) and cfg.family != "deepseek_v3":
            module.bias.zero_()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    save_model(folder, model)
    return folder


def test_all_families_are_covered():
    assert {named(name).family for name in FAMILIES} == {named(name).family for name in NAMED}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_round_trips_in_fp8(name: str, tmp_path: Path):
    cfg, ids = shrunk(name), torch.arange(20).view(1, 20)
    convert(str(write_checkpoint(tmp_path / "bf16", cfg)), tmp_path / "fp8", dtype="fp8")
    kept, wide = load_model(tmp_path / "fp8", E4M3), load_model(tmp_path / "fp8", torch.bfloat16)
    assert kept.cfg == wide.cfg == cfg
    assert torch.equal(kept(ids), wide(ids))
    save_model(tmp_path / "again", kept)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "fp8" / file).read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_round_trips_through_gguf(name: str, tmp_path: Path):
    """Includes the MTP module of V3."""
    cfg, ids = shrunk(name), torch.arange(20).view(1, 20)
    folder = write_checkpoint(tmp_path / "bf16", cfg)
    convert(str(folder), tmp_path / "model.gguf", to="gguf")
    convert(str(tmp_path / "model.gguf"), tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(ids), load_model(folder)(ids))
