"""DeepSeek's own layout against an independent implementation of its conversion, for several numbers of ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.deepseek.config import config_of
from thinkstack.checkpoint.hf.files import CONFIG, WEIGHTS
from thinkstack.checkpoint.model import load_chat, load_model, open_source, save_model
from thinkstack.models.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig, named
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.types import ConfigError

SMALL = replace(MLA_TINY, vocab_size=384, mtp_layers=0)
BLOCKS = replace(
    SMALL,
    hidden_size=160,
    num_layers=2,
    attention=MLAConfig(
        num_heads=4, q_lora_rank=40, kv_lora_rank=24, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64
    ),
    intermediate_size=256,
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=2,
        moe_intermediate_size=128,
        num_groups=2,
        top_groups=1,
    ),
)
"""Every split dimension gives two ranks complete blocks."""
V2 = replace(
    SMALL,
    family="deepseek_v2",
    attention=replace(SMALL.attention, q_lora_rank=0),
    moe=replace(SMALL.moe, scoring="softmax", group_score="max", norm_topk_prob=False),
    rope=replace(
        SMALL.rope, yarn=YarnConfig(factor=4.0, original_max_positions=24, mscale=0.707, mscale_all_dim=0.707)
    ),
)

WORDS = {
    "embed_tokens": ("embed", 0), "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0),
    "norm": ("norm", None), "lm_head": ("head", 0),
}  # fmt: skip


def their_conversion(tensors: dict[str, Tensor], num_experts: int, ranks: int, mtp: str) -> list[dict[str, Tensor]]:
    """The steps of inference/convert.py, reimplemented from its description."""
    found: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        if mtp in name:
            continue
        name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        name = name.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        key = name.split(".")[-2]
        word, dim = WORDS[key]
        name = name.replace(key, word)
        for rank in range(ranks):
            part = tensor
            if "experts" in name and "shared_experts" not in name:
                if int(name.split(".")[-3]) // (num_experts // ranks) != rank:
                    continue
            elif dim is not None:
                size = tensor.shape[dim] // ranks
                part = tensor.narrow(dim, rank * size, size)
            found[rank][name] = part
    return found


def write_checkpoint(folder: Path, cfg: ModelConfig = SMALL) -> Path:
    """Write a bf16 checkpoint in Hugging Face layout."""
    model = tiny_model(cfg)
    if cfg.family == "deepseek_v2":
        for block in model.layers[1:]:
            block.ffn.bias.zero_()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    save_model(folder, model, tiny_tokenizer(), "v3")
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("cfg", "dtype"),
    [(SMALL, "bf16"), (replace(SMALL, mtp_layers=1), "bf16"), (V2, "bf16"), (BLOCKS, "fp8"), (BLOCKS, "fp8-ue8m0")],
)
def test_files_equal_those_of_deepseeks_conversion(cfg: ModelConfig, dtype: str, ranks: int, tmp_path: Path):
    convert(str(write_checkpoint(tmp_path / "hf", cfg)), tmp_path / "model", dtype=dtype)
    convert(str(tmp_path / "model"), tmp_path / "theirs", to="deepseek", model_parallel=ranks)
    expected = their_conversion(
        load_file(tmp_path / "model" / WEIGHTS), cfg.moe.num_experts, ranks, f"model.layers.{cfg.num_layers}"
    )
    for rank in range(ranks):
        found = load_file(tmp_path / "theirs" / f"model{rank}-mp{ranks}.safetensors")
        assert found.keys() == expected[rank].keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[rank][name].dtype and torch.equal(
                tensor.float(), expected[rank][name].float()
            ), name


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_in_deepseeks_layout_round_trips_byte_for_byte(ranks: int, dtype: str, tmp_path: Path):
    convert(str(write_checkpoint(tmp_path / "hf", BLOCKS)), tmp_path / "model", dtype=dtype)
    convert(str(tmp_path / "model"), tmp_path / "theirs", to="deepseek", model_parallel=ranks)
    convert(str(tmp_path / "theirs"), tmp_path / "again")
    for file in sorted(path.name for path in (tmp_path / "model").iterdir()):
        if file != CONFIG:  # how weights were drawn has no place in their configuration
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    assert load_chat(tmp_path / "theirs").name == "v3"


@torch.no_grad()
def test_a_model_in_deepseeks_layout_gives_the_same_logits(tmp_path: Path):
    for cfg in (SMALL, V2):
        hf = write_checkpoint(tmp_path / cfg.family, cfg)
        convert(str(hf), tmp_path / f"{cfg.family}-theirs", to="deepseek", model_parallel=2)
        ids = torch.arange(20).view(1, 20)
        assert torch.equal(load_model(tmp_path / f"{cfg.family}-theirs")(ids), load_model(hf)(ids))


def test_the_configuration_of_v3_equals_the_published_one():
    """The fields of inference/configs/config_671B.json that differ from the defaults of ModelArgs."""
    shipped = {
        "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61,
        "n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8,
        "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
    }  # fmt: skip
    defaults = {"original_seq_len": 4096, "rope_theta": 10000.0, "rope_factor": 40.0, "beta_fast": 32, "beta_slow": 1}
    assert config_of(named("v3-671b"), FP8Blocks()) == shipped | defaults | {"mscale": 1.0}
    assert config_of(named("v3-671b"), FP8Blocks(power_of_two=True))["scale_fmt"] == "ue8m0"
    assert config_of(named("v2-lite"), None)["mscale"] == 0.707


@pytest.mark.parametrize("shipped", [True, False])
def test_deepseeks_configuration_is_sufficient_to_load(shipped: bool, tmp_path: Path):
    """DeepSeek's conversion does not copy generation_config.json; BOS and EOS then come from the tokenizer."""
    convert(str(write_checkpoint(tmp_path / "hf", V2)), tmp_path / "theirs", to="deepseek")
    if not shipped:
        (tmp_path / "theirs" / "generation_config.json").unlink()
    assert open_source(tmp_path / "theirs").cfg == replace(V2, init_std=0.006)


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(folder)
    return str(caught.value)


def test_missing_and_unexpected_parts_are_named(tmp_path: Path):
    folder = tmp_path / "theirs"
    convert(str(write_checkpoint(tmp_path / "hf")), folder, to="deepseek", model_parallel=2)
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(json.dumps(json.loads(config) | {"n_layers": 2}))
    assert "unexpected tensor layers.2" in refused(folder)
    (folder / CONFIG).write_text(json.dumps(json.loads(config) | {"n_layers": 4}))
    assert "lacks the tensor model.layers.3.input_layernorm.weight" in refused(folder)
    (folder / CONFIG).unlink()
    assert "inference/configs" in refused(folder)
    (folder / CONFIG).write_text(config)
    (folder / "model1-mp2.safetensors").unlink()
    assert "model1-mp2.safetensors is missing" in refused(folder)


@pytest.mark.parametrize(
    ("cfg", "dtype", "ranks", "words"),
    [
        (SMALL, "", 3, "8 routed experts do not divide among 3 ranks"),
        (SMALL, "", 4, "2 heads do not divide among 4 ranks"),
        (SMALL, "", 0, "model-parallel=0"),
        (SMALL, "fp8", 2, "or dtype=bf16"),
        (GQA_TINY, "", 1, "not llama; write the hf or gguf format"),
        (replace(SMALL, moe=replace(SMALL.moe, norm_topk_prob=False)), "", 1, "norm_topk_prob=False"),
        (SMALL, "fp32", 1, "known: bf16, fp8, fp8-ue8m0"),
    ],
)
def test_models_that_deepseeks_layout_cannot_store_are_refused(
    cfg: ModelConfig, dtype: str, ranks: int, words: str, tmp_path: Path
):
    save_model(tmp_path / "hf", tiny_model(cfg))
    with pytest.raises(ConfigError, match=words):
        convert(str(tmp_path / "hf"), tmp_path / "out", to="deepseek", dtype=dtype, model_parallel=ranks)
    assert not (tmp_path / "out").exists()
