"""config.json both ways, in both spellings of transformers, and what is refused by name."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.tiny import GQA_TINY, MLA_TINY
from thinkstack.checkpoint.hf_config import from_hf, to_hf
from thinkstack.models.config import NAMED, ModelConfig, RopeConfig, YarnConfig, named
from thinkstack.types import ConfigError

YARN = YarnConfig(factor=4.0, original_max_positions=24, beta_fast=16.0, mscale=0.7, mscale_all_dim=0.7)


def refused(cfg: ModelConfig, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        from_hf(to_hf(cfg) | changes, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json")
    return message


@pytest.mark.parametrize("name", NAMED)
def test_named_models_survive_the_round_trip(name: str):
    assert from_hf(to_hf(named(name)), "config.json") == named(name)


@pytest.mark.parametrize(
    "cfg",
    [
        replace(MLA_TINY, rope=RopeConfig(yarn=YARN), eos_ids=(1, 5), embed_init_std=0.4),
        replace(MLA_TINY, rope=RopeConfig(interleaved=False)),
        replace(MLA_TINY, moe=None, mtp_layers=0, tie_embeddings=True),
        replace(GQA_TINY, rope=RopeConfig(interleaved=False, yarn=YarnConfig(mscale_all_dim=0.0))),
    ],
)
def test_unusual_models_survive_the_round_trip(cfg: ModelConfig):
    assert from_hf(to_hf(cfg), "config.json") == cfg


def test_v3_has_the_values_of_the_released_file():
    config = to_hf(named("v3-671b"))
    released = {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
        "rope_theta": 10000.0,
    }
    assert {key: config[key] for key in released} == released
    assert config["rope_scaling"] == {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def test_the_spelling_of_transformers_5_means_the_same():
    cfg = replace(MLA_TINY, rope=RopeConfig(theta=500.0, yarn=YARN))
    config = to_hf(cfg)
    rope = config.pop("rope_scaling")
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": rope.pop("type"), **rope}
    assert from_hf(config | {"rope_parameters": rope}, "config.json") == cfg


def test_llama_without_head_dim_divides_the_width():
    config = to_hf(GQA_TINY)
    del config["head_dim"], config["num_key_value_heads"]
    attention = from_hf(config, "config.json").attention
    assert attention == replace(GQA_TINY.attention, num_kv_heads=4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("moe_layer_freq", 2),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("num_key_value_heads", 1),
        ("sliding_window", 128),
        ("vocab_size", "many"),
        ("vocab_size", True),
        ("vocab_size", None),
        ("num_attention_heads", 0),
        ("hidden_size", -32),
        ("rms_norm_eps", math.inf),
        ("norm_topk_prob", 1),
        ("eos_token_id", None),
        ("rope_scaling", [1]),
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_name(key: str, value: Any):
    message = refused(MLA_TINY, **{key: value})
    assert key in message
    assert value is None or repr(value) in message


def test_quantised_weights_are_refused_with_a_way_out():
    message = refused(MLA_TINY, quantization_config={"quant_method": "fp8"})
    assert "fp8" in message and "bf16" in message


def test_an_unknown_family_is_refused_with_the_known_ones():
    message = refused(GQA_TINY, model_type="qwen2")
    assert "qwen2" in message and "deepseek_v3, deepseek_v2, llama" in message


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "llama3"),
        ({"type": "linear", "factor": 8.0}, "linear"),
        ({"type": "yarn", "factor": 8.0}, "original_max_position_embeddings"),
        (
            {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "attention_factor": 2.0},
            "attention_factor",
        ),
        ({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "mscale": 0.7}, "mscale"),
        ({"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 8}, "factor"),
    ],
)
def test_other_rotations_are_refused_by_name(scaling: dict[str, Any], word: str):
    assert word in refused(MLA_TINY, rope_scaling=scaling)


def test_softmax_scale_of_yarn_is_refused_in_a_llama():
    """transformers leaves the softmax of a Llama alone whatever mscale_all_dim says; our model would scale it."""
    rope = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert "mscale_all_dim" in refused(GQA_TINY, rope_scaling=rope)


def test_impossible_routing_names_the_file():
    assert "top_groups" in refused(MLA_TINY, topk_group=9)


def test_what_a_family_cannot_express_is_not_written():
    cfg = replace(MLA_TINY, moe=replace(MLA_TINY.moe, scoring="softmax"))
    with pytest.raises(ConfigError, match="scoring_func"):
        to_hf(cfg)
    with pytest.raises(ConfigError, match="group_score"):
        to_hf(replace(MLA_TINY, moe=replace(MLA_TINY.moe, group_score="max")))
