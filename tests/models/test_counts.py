"""Counts against published figures and against the tensors of built models."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.models.config import NAMED, ModelConfig, named
from thinkstack.models.counts import (
    cache_bytes_per_token,
    count_active_parameters,
    count_parameters,
    flops_per_token,
    mtp_parameters,
    training_bytes,
    weight_bytes,
)
from thinkstack.models.transformer import Transformer
from thinkstack.train.optim import OptimConfig, make_optimizer


def on_meta(cfg: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg)


def test_published_totals():
    assert round(count_parameters(named("v3-671b")) / 1e9, 2) == 671.03
    assert round(count_parameters(named("v2-236b")) / 1e9, 2) == 235.74
    assert round(count_parameters(named("v2-lite")) / 1e9, 2) == 15.71
    assert round(count_parameters(named("smollm2-135m")) / 1e6, 1) == 134.5


def test_published_totals_of_the_students():
    """Totals of the released safetensors files; the models' names have the rounded ones of their base models."""
    published = {
        "r1-distill-qwen-1.5b": 1_777_088_000,
        "r1-distill-qwen-7b": 7_615_616_512,
        "r1-distill-qwen-14b": 14_770_033_664,
        "r1-distill-qwen-32b": 32_763_876_352,
        "r1-distill-llama-8b": 8_030_261_248,
        "r1-distill-llama-70b": 70_553_706_496,
        "qwen3-8b": 8_190_735_360,
        "qwen3-30b-a3b": 30_532_122_624,
    }
    assert {name: count_parameters(named(name)) for name in published} == published


def test_the_page_of_families_has_these_counts():
    page = (Path(__file__).parents[2] / "docs" / "formats" / "model_families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \| [^|]+ \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 11
    for name, parameters, cache in rows:
        cfg = named(name)
        assert (f"{count_parameters(cfg):,}", f"{cache_bytes_per_token(cfg):,}") == (parameters, cache), name


def test_published_active_parameters():
    assert round(count_active_parameters(named("v3-671b")) / 1e9) == 37
    assert round(count_active_parameters(named("v2-236b")) / 1e9) == 21
    assert round(count_active_parameters(named("v2-lite")) / 1e9, 1) in (2.4, 2.5)


def test_published_training_cost_per_token():
    """The hardware paper (arXiv:2505.09343) prints 250 GFLOP a token for V3 at 4,096 tokens: mean context 2,048."""
    assert round(3 * flops_per_token(named("v3-671b"), 2048) / 1e9) == 250


def test_published_cache_of_v3():
    assert cache_bytes_per_token(named("v3-671b")) == 70272


def test_published_cache_beside_grouped_queries():
    """The hardware paper prints 516.096 KB for 405B Llama 3.1: 126 layers, 8 key/value heads of 128."""
    assert cache_bytes_per_token(named("r1-distill-llama-70b", num_layers=126)) == 516096


def test_cache_of_grouped_queries_holds_a_key_and_a_value_per_head():
    assert cache_bytes_per_token(GQA_TINY, bytes_per_element=4) == 3 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("name", NAMED)
def test_totals_equal_the_built_models_tensors(name: str):
    model = on_meta(named(name))
    total = sum(parameter.numel() for parameter in model.parameters())
    in_mtp = sum(parameter.numel() for parameter in model.mtp.parameters())
    assert mtp_parameters(model.cfg) == in_mtp
    assert count_parameters(model.cfg) == total - in_mtp


def test_active_parameters_leave_out_the_embedding_and_idle_experts():
    model = on_meta(MLA_TINY)
    one_expert, moe_layers, idle = 3 * 32 * 12, 2, 8 - 2
    total = sum(parameter.numel() for parameter in model.parameters())
    in_mtp = sum(parameter.numel() for parameter in model.mtp.parameters())
    assert count_active_parameters(MLA_TINY) == total - in_mtp - 48 * 32 - one_expert * moe_layers * idle


def test_released_sizes_on_disk():
    """70B of Llama is 141.1 GB in bf16; V3 with its MTP module 1.37 TB, 685 GB in the released FP8."""
    assert round(weight_bytes(named("r1-distill-llama-70b")) / 1e9, 1) == 141.1
    assert round(weight_bytes(named("v3-671b"), bytes_per_element=1) / 1e9) == 683  # without the MTP file's copies


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY])
def test_training_memory_is_what_a_step_allocates(cfg: ModelConfig):
    model = tiny_model(cfg)
    optimizer = make_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [slot for state in optimizer.state.values() for slot in state.values() if slot.dim() > 0]
    held = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    assert sum(tensor.nbytes for tensor in (*held, *moments) if tensor is not None) == training_bytes(cfg)


def test_biases_and_head_norms_are_counted_and_cost_no_operations():
    H, KV, R, D, L = 4, 2, 8, 32, 3
    rich = replace(GQA_TINY, attention=replace(GQA_TINY.attention, qkv_bias=True, out_bias=True, qk_norm=True))
    assert count_parameters(rich) - count_parameters(GQA_TINY) == L * ((H + 2 * KV) * R + D + 2 * R)
    assert count_parameters(rich) == sum(parameter.numel() for parameter in on_meta(rich).parameters())
    assert flops_per_token(rich, 10) == flops_per_token(GQA_TINY, 10)


def test_operations_of_a_dense_model_by_hand():
    D, H, KV, R, I, V, L, context = 32, 4, 2, 8, 40, 48, 3, 10  # noqa: E741
    matrices = L * (2 * D * H * R + 2 * D * KV * R + 3 * D * I) + V * D
    scores_and_values = L * H * context * (R + R)
    assert flops_per_token(GQA_TINY, context) == 2 * matrices + 2 * scores_and_values
