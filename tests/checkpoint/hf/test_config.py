"""Reading and writing of config.json, for transformers 4 and 5, and settings that are refused by name."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.tiny import GQA_TINY, MLA_TINY
from thinkstack.checkpoint.hf.config import from_hf, quantization_keys, read_quantization, to_hf
from thinkstack.models.config import NAMED, Llama3RopeConfig, ModelConfig, RopeConfig, YarnConfig, named
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.types import ConfigError

QWEN2_TINY = replace(GQA_TINY, family="qwen2", attention=replace(GQA_TINY.attention, qkv_bias=True))
QWEN3_TINY = replace(GQA_TINY, family="qwen3", attention=replace(GQA_TINY.attention, qk_norm=True))
QWEN3_MOE_TINY = replace(
    QWEN3_TINY,
    family="qwen3_moe",
    moe=replace(named("qwen3-30b-a3b").moe, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=12),
)
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
        replace(GQA_TINY, attention=replace(GQA_TINY.attention, head_dim=10, qkv_bias=True, out_bias=True)),
        replace(GQA_TINY, rope=RopeConfig(interleaved=False, llama3=Llama3RopeConfig(low_freq_factor=1.5))),
        replace(GQA_TINY, rope=RopeConfig(interleaved=False, linear_factor=4.0)),
        replace(QWEN2_TINY, tie_embeddings=True, rope=RopeConfig(interleaved=False, yarn=YarnConfig(mscale_all_dim=0))),
        replace(QWEN3_TINY, attention=replace(QWEN3_TINY.attention, head_dim=12, qkv_bias=True, out_bias=True)),
        replace(QWEN3_MOE_TINY, moe=replace(QWEN3_MOE_TINY.moe, first_dense_layers=2, norm_topk_prob=False)),
        replace(QWEN3_MOE_TINY, moe=None),
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


def test_qwen2_reads_as_released():
    """The file of the 7B distilled model: an unused window, no key for biases, heads that divide the width."""
    released = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    assert from_hf(released, "config.json") == named("r1-distill-qwen-7b")


def test_llama3_scaling_has_the_values_of_the_released_file():
    assert to_hf(named("r1-distill-llama-8b"))["rope_scaling"] == {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


def test_experts_are_read_under_the_names_of_both_versions_of_transformers():
    config = to_hf(QWEN3_MOE_TINY)
    assert from_hf(config | {"num_local_experts": config.pop("num_experts")}, "config.json") == QWEN3_MOE_TINY


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
        ("use_sliding_window", True),
        ("decoder_sparse_step", 2),
        ("dual_chunk_attention_config", {"chunk_size": 64}),
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
        ("rope_scaling", [1]),
    ],
)
def test_unsupported_settings_are_refused_by_name(key: str, value: Any):
    message = refused(MLA_TINY, **{key: value})
    assert key in message
    assert value is None or repr(value) in message


@pytest.mark.parametrize(
    ("cfg", "key", "value"),
    [
        (GQA_TINY, "mlp_bias", True),
        (GQA_TINY, "sliding_window", 128),
        (GQA_TINY, "attention_bias", 1),
        (QWEN2_TINY, "attention_bias", False),
        (QWEN2_TINY, "use_sliding_window", True),
        (QWEN3_TINY, "use_sliding_window", True),
        (QWEN3_TINY, "dual_chunk_attention_config", {"chunk_size": 64}),
        (QWEN3_MOE_TINY, "decoder_sparse_step", 2),
        (QWEN3_MOE_TINY, "mlp_only_layers", [1]),
    ],
)
def test_unsupported_settings_of_dense_families_are_refused_by_name(cfg: ModelConfig, key: str, value: Any):
    message = refused(cfg, **{key: value})
    assert key in message and repr(value) in message


@pytest.mark.parametrize("cfg", [QWEN2_TINY, QWEN3_TINY, QWEN3_MOE_TINY])
def test_sliding_layers_are_refused_wherever_they_are_listed(cfg: ModelConfig):
    message = refused(cfg, layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert "layer_types" in message and "sliding_attention" in message


@pytest.mark.parametrize(("cfg", "key"), [(QWEN2_TINY, "num_key_value_heads"), (QWEN3_TINY, "head_dim")])
def test_qwen_files_require_keys_with_unrelated_defaults(cfg: ModelConfig, key: str):
    """The defaults of transformers are 32 key/value heads and a head width of 128, independent of the other sizes."""
    assert key in refused(cfg, **{key: None})


@pytest.mark.parametrize("cfg", [MLA_TINY, named("v2-lite")])
def test_another_norm_eps_is_refused_with_latents(cfg: ModelConfig):
    """transformers always uses 1e-6 for the norms of the latents: with 1e-5, logits differed by 4e-5."""
    assert "rms_norm_eps=1e-05" in refused(cfg, rms_norm_eps=1e-5)


def test_half_rotation_is_refused_in_v2():
    """transformers' DeepseekV2 always pairs neighbors, so a file with this key has two interpretations."""
    assert "rope_interleave" in refused(named("v2-lite"), rope_interleave=False)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"fmt": "e5m2"}, "'e5m2'"),
        ({"weight_block_size": [1, 128]}, "[1, 128]"),
        ({"weight_block_size": None}, "no weight_block_size"),
        ({"activation_scheme": "static"}, "'static'"),
        ({"scale_fmt": "e5m6"}, "'e5m6'"),
    ],
)
def test_other_quantizations_than_deepseeks_are_refused(changes: dict[str, object], word: str):
    known = quantization_keys(FP8Blocks(power_of_two=True))
    assert read_quantization(known, "config.json") == FP8Blocks(power_of_two=True)
    message = refused(MLA_TINY, quantization_config=known["quantization_config"] | changes)
    assert "quantization_config" in message and word in message


def test_an_unknown_family_is_refused_with_the_known_ones():
    message = refused(GQA_TINY, model_type="mixtral")
    assert "mixtral" in message and "deepseek_v3, deepseek_v2, llama, qwen2, qwen3, qwen3_moe" in message


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


YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
PLAIN_AMPLITUDE = 0.1 * math.log(4.0) + 1


@pytest.mark.parametrize(
    ("cfg", "keys", "amplitude"),
    [
        (GQA_TINY, {}, PLAIN_AMPLITUDE),
        (GQA_TINY, {}, round(PLAIN_AMPLITUDE, 7)),
        (GQA_TINY, {"mscale": 1.0}, PLAIN_AMPLITUDE),
        (GQA_TINY, {"factor": 1.0}, 1),
        (MLA_TINY, {}, PLAIN_AMPLITUDE),
        (MLA_TINY, {"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        (MLA_TINY, {"mscale": 1.0, "mscale_all_dim": 0.5}, PLAIN_AMPLITUDE / (0.05 * math.log(4.0) + 1)),
    ],
)
def test_an_amplitude_of_yarn_is_accepted_if_it_follows_from_the_other_keys(
    cfg: ModelConfig, keys: dict, amplitude: float
):
    """Regression: every `attention_factor` was refused."""
    config, scaling = to_hf(cfg), YARN_KEYS | keys
    spelt = from_hf(config | {"rope_scaling": scaling | {"attention_factor": amplitude}}, "config.json")
    assert spelt == from_hf(config | {"rope_scaling": scaling}, "config.json")
    assert "attention_factor" in refused(cfg, rope_scaling=scaling | {"attention_factor": amplitude + 1e-3})


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"type": "mrope", "mrope_section": [1, 1, 2]}, "mrope"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "linear_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "low_freq_factor=4.0",
        ),
    ],
)
def test_other_rotations_of_a_plain_family_are_refused_by_name(scaling: dict[str, Any], word: str):
    for cfg in (GQA_TINY, QWEN2_TINY, QWEN3_TINY, QWEN3_MOE_TINY):
        assert word in refused(cfg, rope_scaling=scaling)


def test_two_extensions_of_one_context_are_refused():
    with pytest.raises(ConfigError, match=r"rope.yarn and rope.linear_factor"):
        RopeConfig(yarn=YARN, linear_factor=2.0)


def test_softmax_scale_of_yarn_is_refused_in_a_llama():
    """transformers does not scale the softmax of a Llama by mscale_all_dim; our model would."""
    rope = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert "mscale_all_dim" in refused(GQA_TINY, rope_scaling=rope)


def test_impossible_routing_names_the_file():
    assert "top_groups" in refused(MLA_TINY, topk_group=9)


def test_settings_that_a_family_cannot_express_are_refused():
    cfg = replace(MLA_TINY, moe=replace(MLA_TINY.moe, scoring="softmax"))
    with pytest.raises(ConfigError, match="scoring_func"):
        to_hf(cfg)
    with pytest.raises(ConfigError, match="group_score"):
        to_hf(replace(MLA_TINY, moe=replace(MLA_TINY.moe, group_score="max")))
    with pytest.raises(ConfigError, match="attention="):
        to_hf(replace(GQA_TINY, attention=replace(GQA_TINY.attention, qkv_bias=True)))
    with pytest.raises(ConfigError, match="qk_norm"):
        to_hf(replace(QWEN3_TINY, family="llama"))
    with pytest.raises(ConfigError, match="moe="):
        to_hf(replace(QWEN3_MOE_TINY, family="qwen3"))
    with pytest.raises(ConfigError, match="num_shared_experts"):
        to_hf(replace(QWEN3_MOE_TINY, moe=replace(QWEN3_MOE_TINY.moe, num_shared_experts=1)))
    with pytest.raises(ConfigError, match="llama3"):
        to_hf(replace(MLA_TINY, rope=RopeConfig(llama3=Llama3RopeConfig())))
