"""Adapters in PEFT's folder layout: saved, loaded, and merged into a checkpoint that transformers opens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model, tiny_tokenizer
from thinkstack import cli
from thinkstack.checkpoint.hf.files import WEIGHTS as MODEL_WEIGHTS
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.peft.adapter import CONFIG, WEIGHTS, load_adapter, merge_adapter, save_adapter
from thinkstack.models.lora import LoRAConfig, adapt, adapters, merge_adapters
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError

ALL = LoRAConfig(rank=3, alpha=6.0, targets=("attention", "feed_forward", "experts"))


def adapted(cfg=MLA_TINY, lora: LoRAConfig = ALL) -> Transformer:
    """Return a model with nonzero adapters."""
    model, generator = tiny_model(cfg), torch.Generator().manual_seed(5)
    adapt(model, lora)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_b.copy_(torch.randn(adapter.lora_b.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def logits(model: Transformer) -> torch.Tensor:
    return model(random_batch([20], 19).ids)


def write_checkpoint(tmp_path: Path, cfg=MLA_TINY, lora: LoRAConfig = ALL, **changes) -> tuple[Path, Path, Transformer]:
    """Write a base folder and an adapter folder; return them with the model."""
    save_model(tmp_path / "base", tiny_model(cfg))
    model = adapted(cfg, lora)
    save_adapter(tmp_path / "adapter", model, lora, str(tmp_path / "base"))
    if changes:
        config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | changes))
    return tmp_path / "base", tmp_path / "adapter", model


def test_names_equal_those_of_peft(tmp_path):
    """Names as in PEFT's documentation of its checkpoint format, for a base of one layer."""
    model = tiny_model(GQA_TINY, num_layers=1)
    lora = LoRAConfig(rank=3, alpha=6.0, rslora=True)
    adapt(model, lora)
    save_adapter(tmp_path / "adapter", model, lora, "some/base")
    shapes = {name: tuple(value.shape) for name, value in load_file(tmp_path / "adapter" / WEIGHTS).items()}
    expected = {}
    for module, inputs, outputs in (
        ("self_attn.q_proj", 32, 32),
        ("self_attn.k_proj", 32, 16),
        ("self_attn.v_proj", 32, 16),
        ("self_attn.o_proj", 32, 32),
        ("mlp.gate_proj", 32, 40),
        ("mlp.up_proj", 32, 40),
        ("mlp.down_proj", 40, 32),
    ):
        expected[f"base_model.model.model.layers.0.{module}.lora_A.weight"] = (3, inputs)
        expected[f"base_model.model.model.layers.0.{module}.lora_B.weight"] = (outputs, 3)
    assert shapes == expected
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6.0, True)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["base_model_name_or_path"] == "some/base"


def test_full_names_are_written_if_short_ones_would_also_match_experts(tmp_path):
    lora = LoRAConfig(rank=3, targets=("feed_forward",))
    model = tiny_model()
    adapt(model, lora)
    save_adapter(tmp_path / "adapter", model, lora, "")
    names = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    assert "model.layers.0.mlp.gate_proj" in names and "model.layers.1.mlp.shared_experts.up_proj" in names
    assert len(names) == 9


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
def test_an_adapter_round_trips_bit_for_bit(tmp_path, cfg, rslora):
    targets = ALL.targets if cfg is MLA_TINY else ALL.targets[:2]
    lora = LoRAConfig(rank=3, alpha=6.0, rslora=rslora, targets=targets)
    base, folder, model = write_checkpoint(tmp_path, cfg, lora)
    again = load_model(base)
    found = load_adapter(again, folder)
    assert (found.rank, found.alpha, found.rslora) == (3, 6.0, rslora)
    assert torch.equal(logits(again), logits(model))
    save_adapter(tmp_path / "again", again, found, str(base))
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
def test_an_adapter_merged_by_hand_equals_the_adapted_model_in_transformers(tmp_path, cfg):
    """Without this package: W + alpha / r * B A, computed from the files."""
    transformers = pytest.importorskip("transformers")
    lora = ALL if cfg is MLA_TINY else LoRAConfig(rank=3, alpha=6.0)
    base, folder, model = write_checkpoint(tmp_path, cfg, lora)
    tensors, adapter = load_file(base / MODEL_WEIGHTS), load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    used = 0
    for name in tensors:
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in adapter:
            product = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            tensors[name] = tensors[name] + config["lora_alpha"] / config["r"] * product
            used += 2
    assert used == len(adapter)
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    save_file(tensors, by_hand / MODEL_WEIGHTS, metadata={"format": "pt"})
    (by_hand / "config.json").write_bytes((base / "config.json").read_bytes())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(by_hand, dtype=torch.float32)
    with torch.no_grad():
        found = theirs(random_batch([20], 19).ids).logits
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)
    merge_adapter(base, folder, tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / MODEL_WEIGHTS)
    assert ours.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-6, msg=name)


def test_an_adapter_of_two_projections_as_peft_users_train_it_loads(tmp_path):
    """As written by PEFT: q_proj and v_proj only, keys of an older version, more settings in the config."""
    save_model(tmp_path / "base", tiny_model(GQA_TINY))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(3):
        for module, outputs in (("q_proj", 32), ("v_proj", 16)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{key}.lora_A.default.weight"] = torch.randn(4, 32, generator=generator)
            tensors[f"{key}.lora_B.default.weight"] = torch.randn(outputs, 4, generator=generator)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.05,
    }
    (folder / CONFIG).write_text(json.dumps(config | {"use_dora": False, "rank_pattern": {}, "revision": None}))
    model = load_model(tmp_path / "base")
    load_adapter(model, folder)
    assert len(adapters(model)) == 6
    key = "base_model.model.model.layers.1.self_attn.v_proj"
    delta = 2.0 * tensors[f"{key}.lora_B.default.weight"] @ tensors[f"{key}.lora_A.default.weight"]
    expected = tiny_model(GQA_TINY).layers[1].attention.wv.weight + delta
    torch.testing.assert_close(merge_adapters(model).layers[1].attention.wv.weight, expected)


def test_the_command_merges_a_folder_with_its_tokenizer(tmp_path, monkeypatch):
    model = tiny_model(MLA_TINY, vocab_size=400)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    save_model(tmp_path / "base", model, tiny_tokenizer(), "r1_zero")
    start = load_model(tmp_path / "base")
    adapt(start, ALL)
    save_adapter(tmp_path / "adapter", start, ALL, "")
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["thinkstack", *command])
    cli.main()
    assert load_chat(tmp_path / "out").name == "r1_zero"
    for file in (tmp_path / "base").iterdir():  # adapters of zero: every file is the same, bf16 weights too
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported, only plain LoRA is"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"r": None}, "no usable r"),
        ({"r": 0}, "r=0 adapts nothing"),
        ({"r": 5}, "lora_A of .* has shape \\(3, 40\\), but this model with r=5 requires \\(5, 40\\)"),
    ],
)
def test_settings_beyond_plain_lora_are_refused(tmp_path, changes, message):
    base, folder, _ = write_checkpoint(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_adapter(load_model(base), folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "mica"])
def test_an_initialization_that_changes_the_base_is_refused_by_name(tmp_path, init):
    """Regression: PiSSA and similar methods subtract a part from the base; with the original base, the sum was silently
    another model."""
    base, folder, _ = write_checkpoint(tmp_path, init_lora_weights=init)
    with pytest.raises(ConfigError, match=f"init_lora_weights='{init}'"):
        load_adapter(load_model(base), folder)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_initialization_that_keeps_the_base_is_accepted(tmp_path, init):
    base, folder, _ = write_checkpoint(tmp_path, init_lora_weights=init)
    load_adapter(load_model(base), folder)


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/Llama-3.2-1B-bnb-4bit",
        "unsloth/Qwen3-0.6B-unsloth-bnb-4bit",
        "TheBloke/Llama-2-7B-GPTQ",
        "models/qwen2.5-awq",
        "mlx-community/Qwen3-4B-8bit",
        "some/model.w4a16",
    ],
)
def test_an_adapter_of_a_quantized_base_is_refused_by_the_base_s_name(tmp_path, name):
    base, folder, _ = write_checkpoint(tmp_path, base_model_name_or_path=name)
    with pytest.raises(ConfigError, match=f"trained on {name}, whose weights are quantized"):
        load_adapter(load_model(base), folder)


@pytest.mark.parametrize(
    "name", ["", None, "deepseek-ai/DeepSeek-V3", "runs/orbit4/model", "me/gptq2llama", "Qwen3-8B-FP8"]
)
def test_other_base_names_are_accepted(tmp_path, name):
    base, folder, _ = write_checkpoint(tmp_path, base_model_name_or_path=name)
    load_adapter(load_model(base), folder)


def test_mismatched_files_are_named(tmp_path):
    base, folder, _ = write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=f"is not a matrix of this model.*trained on: {tmp_path / 'base'}"):
        load_adapter(tiny_model(GQA_TINY), folder)
    tensors = load_file(folder / WEIGHTS)
    first = next(iter(tensors))
    save_file({first.replace("lora_A", "lora_embedding_A"): tensors[first]}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="not a matrix of a plain LoRA adapter"):
        load_adapter(load_model(base), folder)
    save_file({first: tensors[first]}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"lora_B of .* is missing"):
        load_adapter(load_model(base), folder)
    (folder / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(ConfigError, match="truncated"):
        load_adapter(load_model(base), folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"convert adapter_model\.bin"):
        load_adapter(load_model(base), folder)
