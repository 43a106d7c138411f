"""Counts against published figures and against the tensors of built models."""

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY
from thinkstack.models.config import NAMED, ModelConfig, named
from thinkstack.models.counts import (
    cache_bytes_per_token,
    count_active_parameters,
    count_parameters,
    flops_per_token,
    mtp_parameters,
)
from thinkstack.models.transformer import Transformer


def on_meta(cfg: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg)


def test_published_totals():
    assert round(count_parameters(named("v3-671b")) / 1e9, 2) == 671.03
    assert round(count_parameters(named("v2-lite")) / 1e9, 2) == 15.71
    assert round(count_parameters(named("smollm2-135m")) / 1e6, 1) == 134.5


def test_published_active_parameters():
    assert round(count_active_parameters(named("v3-671b")) / 1e9) == 37
    assert round(count_active_parameters(named("v2-lite")) / 1e9, 1) in (2.4, 2.5)


def test_published_training_cost_per_token():
    """The hardware paper (arXiv:2505.09343) prints 250 GFLOP a token for V3 at 4,096 tokens: mean context 2,048."""
    assert round(3 * flops_per_token(named("v3-671b"), 2048) / 1e9) == 250


def test_published_cache_of_v3():
    assert cache_bytes_per_token(named("v3-671b")) == 70272


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


def test_operations_of_a_dense_model_by_hand():
    D, H, KV, R, I, V, L, context = 32, 4, 2, 8, 40, 48, 3, 10  # noqa: E741
    matrices = L * (2 * D * H * R + 2 * D * KV * R + 3 * D * I) + V * D
    scores_and_values = L * H * context * (R + R)
    assert flops_per_token(GQA_TINY, context) == 2 * matrices + 2 * scores_and_values
