"""FP8 checkpoints with DeepSeek's names and blocks: dequantized, kept in FP8, and round trips byte for byte."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.hf.files import CONFIG, INDEX, WEIGHTS, config_json, write_weights
from thinkstack.checkpoint.model import load_model, open_source, save_model
from thinkstack.checkpoint.source import OutputFormat
from thinkstack.models.config import MLAConfig, ModelConfig, MoEConfig
from thinkstack.models.lora import LoRAConfig, adapt, adapters, merge_adapters
from thinkstack.models.precision import update_copy
from thinkstack.models.quantized import dequantize_model, quantizable_matrices, quantize_model, quantized_weights
from thinkstack.quant.fp8 import E4M3, FP8Blocks
from thinkstack.types import ConfigError

WIDE = replace(
    MLA_TINY,
    hidden_size=160,
    num_layers=2,
    intermediate_size=200,
    moe=MoEConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=136, num_groups=2, top_groups=1, route_scale=1.5
    ),
)
"""Blocks are ragged in every dimension, and gate and up of an expert do not end at a block boundary."""
SCALES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


def plain(folder: Path, dtype: torch.dtype = torch.bfloat16, cfg=WIDE) -> Path:
    """Write a checkpoint without FP8."""
    model = tiny_model(cfg)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    save_model(folder, model)
    return folder


def by_hand(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Dequantize block by block, as the format is described."""
    rows, columns = weight.shape
    qweight = torch.empty(rows, columns).to(E4M3)
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = weight[place].float().abs().max() / 448
            if power_of_two:
                scale[i, j] = 2.0 ** torch.ceil(torch.log2(scale[i, j]))
            qweight[place] = (weight[place].float() / scale[i, j]).to(E4M3)
    return qweight, scale


def fp8_by_hand(folder: Path, scale_dtype: torch.dtype = torch.float32, **keys: object) -> Path:
    """Write a checkpoint in DeepSeek's published format from `plain`, without this package's writer."""
    is_short = scale_dtype == torch.float8_e8m0fnu
    tensors = load_file(plain(folder) / WEIGHTS)
    for name in list(tensors):
        if (name.endswith("proj.weight") and "eh_proj" not in name) or "kv_a_proj_with_mqa" in name:
            qweight, scale = by_hand(tensors[name], is_short)
            tensors |= {name: qweight, f"{name}_scale_inv": scale.to(scale_dtype)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    form = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config["quantization_config"] = form | ({"scale_fmt": "ue8m0"} if is_short else {}) | keys
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def rewrite(folder: Path, **changes: Tensor | None) -> Path:
    tensors = {name: value for name, value in (load_file(folder / WEIGHTS) | changes).items() if value is not None}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(folder)
    return str(caught.value)


@pytest.mark.parametrize("scale_dtype", [*SCALES, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_block_is_multiplied_by_its_scale(dtype: torch.dtype, scale_dtype: torch.dtype, tmp_path: Path):
    folder = fp8_by_hand(tmp_path / "model", scale_dtype)
    state, tensors = load_model(folder, dtype).state_dict(), load_file(folder / WEIGHTS)
    whole = (
        tensors[GATE].float()
        * tensors[f"{GATE}_scale_inv"].float().repeat_interleave(128, 0)[:136].repeat_interleave(128, 1)[:, :160]
    )
    assert torch.equal(state["layers.1.ffn.w_in"][3, :136], whole.to(dtype))
    assert state["embed.weight"].dtype == dtype


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_an_fp8_checkpoint_in_fp8_round_trips_byte_for_byte(scale_dtype: torch.dtype, tmp_path: Path):
    folder = fp8_by_hand(tmp_path / "model", scale_dtype)
    model = load_model(folder, E4M3)
    save_model(tmp_path / "again", model)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    assert model.cfg.mtp_layers == 1 and "mtp.0.block.ffn.w_in" in quantized_weights(model)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float64, "mixed"])
def test_scales_of_any_float_type_are_kept_as_fp32(scale_dtype: torch.dtype | str, tmp_path: Path):
    """Regression: Qwen's files have scales in bf16 and were refused as damaged."""
    folder = fp8_by_hand(tmp_path / "model", torch.bfloat16 if scale_dtype == "mixed" else scale_dtype)
    if scale_dtype == "mixed":
        rewrite(folder, **{f"{GATE}_scale_inv": load_file(folder / WEIGHTS)[f"{GATE}_scale_inv"].float()})
    before, wide = load_file(folder / WEIGHTS), load_model(folder).state_dict()
    save_model(tmp_path / "again", load_model(folder, E4M3))
    convert(str(folder), tmp_path / "copied", dtype="fp8")
    for found in (load_file(tmp_path / name / WEIGHTS) for name in ("again", "copied")):
        for name, value in found.items():
            expected = before[name].float() if name.endswith("_scale_inv") else before[name]
            assert value.dtype == expected.dtype and torch.equal(value.float(), expected.float())
    assert all(torch.equal(value, wide[name]) for name, value in load_model(tmp_path / "again").state_dict().items())


@torch.no_grad()
def test_a_model_in_fp8_computes_what_the_dequantized_one_does(tmp_path: Path):
    folder, ids = fp8_by_hand(tmp_path / "model"), torch.arange(20).view(1, 20)
    kept, wide = load_model(folder, E4M3), load_model(folder, torch.bfloat16)
    assert torch.equal(kept(ids), wide(ids))
    states = [model.mtp_hidden_states(model.trunk(ids), ids)[0][0] for model in (kept, wide)]
    assert torch.equal(*states)


def test_a_model_in_fp8_takes_half_the_memory(tmp_path: Path):
    folder = plain(tmp_path / "model", cfg=replace(WIDE, hidden_size=256, intermediate_size=2048, vocab_size=8))
    sizes = [sum(t.nbytes for t in load_model(folder, kind).state_dict().values()) for kind in (E4M3, torch.bfloat16)]
    assert 0.5 < sizes[0] / sizes[1] < 0.56


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_writer_quantizes_as_by_hand(power_of_two: bool, tmp_path: Path):
    source = open_source(plain(tmp_path / "model"))
    (tmp_path / "fp8").mkdir()
    write_weights(source, tmp_path / "fp8", OutputFormat(torch.bfloat16, FP8Blocks(power_of_two)))
    found, before = load_file(tmp_path / "fp8" / WEIGHTS), load_file(tmp_path / "model" / WEIGHTS)
    qweight, scale = by_hand(before[GATE], power_of_two)
    assert torch.equal(found[GATE].float(), qweight.float()) and torch.equal(found[f"{GATE}_scale_inv"], scale)
    kept = {name for name in found if found[name].dtype != E4M3 and not name.endswith("_scale_inv")}
    parts = ("embed_tokens", "norm", "mlp.gate.", "eh_proj", "head")
    assert all(any(part in name for part in parts) for name in kept) and {n for n in kept if "mlp.gate.weight" in n}


def test_fp8_to_bf16_and_back_keeps_every_number(tmp_path: Path):
    """Power-of-two scales are exact in bf16. Where 448 s was rounded to 224 s, the scale becomes s / 2."""
    folder = fp8_by_hand(tmp_path / "model", torch.float8_e8m0fnu)
    for name, form in (
        ("wide", OutputFormat(torch.bfloat16)),
        ("again", OutputFormat(torch.bfloat16, FP8Blocks(True))),
    ):
        (tmp_path / name).mkdir()
        write_weights(open_source(folder), tmp_path / name, form)
        config = config_json(open_source(folder), form)
        (tmp_path / name / CONFIG).write_text(json.dumps(config))
        folder = tmp_path / name
    first, second = (load_model(tmp_path / name).state_dict() for name in ("model", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_may_part_a_matrix_from_its_scales(tmp_path: Path):
    folder = fp8_by_hand(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    whole = load_model(folder).state_dict()
    (folder / WEIGHTS).unlink()
    scales = {name: value for name, value in tensors.items() if name.endswith("_scale_inv")}
    rest = {name: value for name, value in tensors.items() if name not in scales}
    files = {"a.safetensors": rest, "b.safetensors": scales}
    for file, held in files.items():
        save_file(held, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_missing_scale_is_named(tmp_path: Path):
    message = refused(rewrite(fp8_by_hand(tmp_path / "model"), **{f"{GATE}_scale_inv": None}))
    assert f"{GATE}_scale_inv is missing" in message and WEIGHTS in message


def test_a_scale_of_another_shape_or_type_is_named(tmp_path: Path):
    folder = fp8_by_hand(tmp_path / "model")
    for wrong, word in ((torch.ones(1, 1), "(1, 1)"), (torch.ones(2, 2).to(E4M3), "float8_e4m3fn")):
        message = refused(rewrite(folder, **{f"{GATE}_scale_inv": wrong}))
        assert f"{GATE}_scale_inv" in message and word in message


def test_a_scale_without_its_fp8_matrix_is_named(tmp_path: Path):
    folder = rewrite(fp8_by_hand(tmp_path / "model"), **{GATE: torch.ones(136, 160)})
    assert f"{GATE}_scale_inv, scales of a matrix that is not" in refused(folder)


def test_fp8_that_the_configuration_does_not_announce_is_refused(tmp_path: Path):
    folder = fp8_by_hand(tmp_path / "model")
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]
    (folder / CONFIG).write_text(json.dumps(config))
    message = refused(folder)
    assert "float8_e4m3fn" in message and "quantization_config" in message


def test_quantizing_and_dequantizing_in_place_keep_the_function_of_the_model():
    model, ids = tiny_model(GQA_TINY), torch.arange(20).view(1, 20)
    quantize_model(model, FP8Blocks(), quantizable_matrices(model))
    assert {name.split(".")[2] for name in quantized_weights(model)} == {"attention", "ffn"}
    packed = model(ids)
    assert torch.equal(packed, dequantize_model(model)(ids)) and not quantized_weights(model)


BIASED = replace(GQA_TINY, attention=replace(GQA_TINY.attention, qkv_bias=True), family="qwen2")


@pytest.mark.parametrize("cfg", [WIDE, BIASED], ids=["experts", "biases"])
def test_gradients_pass_through_quantized_matrices(cfg: ModelConfig):
    """Embedding, norms and biases get the same gradients."""
    model, ids = tiny_model(cfg), torch.arange(20).view(1, 20)
    quantize_model(model, FP8Blocks(), quantizable_matrices(model))
    wide = dequantize_model(copy.deepcopy(model))
    for twin in (model, wide):
        twin(ids).square().mean().backward()
    expected = dict(wide.named_parameters())
    loss_mask = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {"embed.weight", "layers.0.ffn_norm.weight"} < loss_mask.keys()
    assert cfg is not BIASED or "layers.0.attention.wq.bias" in loss_mask
    for name, grad in loss_mask.items():
        torch.testing.assert_close(grad, expected[name].grad)


def test_only_the_experts_in_use_are_dequantized(monkeypatch):
    model = tiny_model(WIDE)
    quantize_model(model, FP8Blocks(), quantizable_matrices(model))
    dequantized = []
    monkeypatch.setattr(
        "thinkstack.kernels.ops.dequantize_", lambda scheme, parts, out: dequantized.append(out.shape) or out.zero_()
    )
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    stacks = [shape for shape in dequantized if len(shape) == 4]
    assert stacks and all(shape[0] == 2 for shape in stacks)


def test_casting_a_model_keeps_quantized_weights():
    model = tiny_model(WIDE)
    quantize_model(model, FP8Blocks(), quantizable_matrices(model))
    before = {name: p.parts() for name, p in quantized_weights(model).items()}
    model.to(torch.bfloat16)
    for name, weight in quantized_weights(model).items():
        parts = weight.parts()
        assert all(torch.equal(part.float(), before[name][kind].float()) for kind, part in parts.items())
        assert {part.dtype for part in parts.values()} == {E4M3, torch.float32}


def test_adapters_on_a_quantized_base_merge_into_floats(tmp_path: Path):
    """The engine's copy is created and refreshed from the dequantized matrices."""
    model = load_model(fp8_by_hand(tmp_path / "model"), E4M3)
    wide = load_model(tmp_path / "model", torch.bfloat16)
    cfg = LoRAConfig(rank=2)
    for adapted in (model, wide):
        adapt(adapted, cfg)
        for adapter in adapters(adapted).values():
            adapter.lora_b.data.fill_(0.25)
    twin, expected = merge_adapters(model), merge_adapters(wide).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())
    for parameter in twin.parameters():
        parameter.data.zero_()
    update_copy(twin, model)
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())
    with pytest.raises(ConfigError, match="leave experts out"):
        adapt(load_model(tmp_path / "model", E4M3), LoRAConfig(rank=2, targets=("experts",)))


WHOLE = replace(
    WIDE,
    mtp_layers=0,
    hidden_size=256,
    intermediate_size=256,
    moe=replace(WIDE.moe, moe_intermediate_size=128),
    attention=MLAConfig(
        num_heads=2, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64
    ),
)


@torch.no_grad()
def test_transformers_dequantizes_our_fp8_files_to_the_same_model(tmp_path: Path):
    """Complete blocks only: transformers computes the block size from the number of scales, which is wrong if the last
    block is smaller."""
    transformers = pytest.importorskip("transformers")
    convert(str(plain(tmp_path / "model", cfg=WHOLE)), tmp_path / "fp8", dtype="fp8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    ids = torch.arange(20).view(1, 20)
    torch.testing.assert_close(load_model(tmp_path / "fp8")(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
