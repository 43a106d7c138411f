"""Round trips of every family through GGUF: equal models, the layout of llama.cpp, and refused models."""

import math
import os
import random
import resource
import signal
from dataclasses import replace
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from tests.tiny import MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.gguf.tensors import KV_B
from thinkstack.checkpoint.gguf.write import KINDS, write_gguf
from thinkstack.checkpoint.hf.tensors import source_of
from thinkstack.checkpoint.model import load_chat, load_model, load_tokenizer, open_source
from thinkstack.models.config import (
    GQAConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
)
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.text.chat import chat_format
from thinkstack.types import ConfigError

HALVES = RopeConfig(interleaved=False)
LLAMA = ModelConfig(
    family="llama",
    vocab_size=384,
    hidden_size=64,
    num_layers=3,
    attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    intermediate_size=96,
    rope=HALVES,
    norm_eps=1e-5,
    max_positions=256,
    init_std=0.1,
)
BIASED = replace(LLAMA.attention, qkv_bias=True)
QWEN_EXPERTS = MoEConfig(
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_shared_experts=0,
    scoring="softmax",
    group_score="max",
    first_dense_layers=0,
)
V3 = replace(
    LLAMA,
    family="deepseek_v3",
    attention=MLAConfig(
        num_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=replace(MLA_TINY.moe, moe_intermediate_size=32),
    mtp_layers=1,
    rope=RopeConfig(),
    norm_eps=1e-6,
)
V2 = replace(
    V3,
    family="deepseek_v2",
    mtp_layers=0,
    moe=replace(
        V3.moe,
        scoring="softmax",
        group_score="max",
        norm_topk_prob=False,
        num_groups=1,
        top_groups=1,
        num_shared_experts=2,
    ),
    rope=RopeConfig(yarn=YarnConfig(factor=8.0, original_max_positions=32, mscale=0.707, mscale_all_dim=0.707)),
)
YARN = YarnConfig(factor=4.0, original_max_positions=64, mscale_all_dim=0.0)
CASES = {
    "llama": LLAMA,
    "llama tied": replace(LLAMA, tie_embeddings=True),
    "llama 3": replace(LLAMA, rope=replace(HALVES, theta=5e5, llama3=Llama3RopeConfig(original_max_positions=64))),
    "llama linear": replace(LLAMA, rope=replace(HALVES, linear_factor=4.0)),
    "llama biases": replace(LLAMA, attention=replace(BIASED, out_bias=True)),
    "qwen2": replace(LLAMA, family="qwen2", attention=BIASED),
    "qwen2 yarn": replace(LLAMA, family="qwen2", attention=BIASED, rope=replace(HALVES, yarn=YARN)),
    "qwen3": replace(LLAMA, family="qwen3", attention=replace(LLAMA.attention, head_dim=32, qk_norm=True)),
    "qwen3moe": replace(LLAMA, family="qwen3_moe", attention=replace(LLAMA.attention, qk_norm=True), moe=QWEN_EXPERTS),
    "v3": V3,
    "v3 yarn": replace(V3, rope=RopeConfig(yarn=YarnConfig(factor=8.0, original_max_positions=32))),
    "v3 dense": replace(V3, moe=None, mtp_layers=0),
    "v2": V2,
    "v2 lite": replace(V2, attention=replace(V2.attention, q_lora_rank=0)),
    "v2 groups": replace(V2, moe=replace(V2.moe, num_groups=4, top_groups=2)),
}


def random_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """Return a model with random weights; balance biases only for V3, the only family that stores them."""
    model = tiny_model(cfg, seed)
    for module in model.modules():
        if isinstance(module, MoE) and cfg.family != "deepseek_v3":
            module.bias.zero_()
    return model


def write_checkpoint(cfg: ModelConfig, folder: Path, kind: str = "F32", **options) -> tuple[Transformer, Path]:
    model = random_model(cfg)
    write_gguf(source_of(model), folder / "model.gguf", kind, **options)
    return model, folder / "model.gguf"


def stored(path: Path) -> dict[str, numpy.ndarray]:
    """Return the tensors as read by the package gguf."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def kinds(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", CASES)
def test_a_model_round_trips_bit_for_bit(name: str, tmp_path: Path):
    model, path = write_checkpoint(CASES[name], tmp_path)
    loaded = load_model(path)
    free = {"init_std": loaded.cfg.init_std, "embed_init_std": loaded.cfg.embed_init_std}
    assert loaded.cfg == replace(model.cfg, **free)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_mla_has_the_layout_for_attention_on_latents(tmp_path: Path):
    """Head h of kv_b_proj is N key rows, then V value rows; the key part is transposed; metadata have one KV head."""
    model, path = write_checkpoint(V3, tmp_path)
    there, weight = stored(path), model.layers[1].attention.wkv_b.weight.detach().numpy()
    for head in range(4):
        rows = weight[head * 64 : head * 64 + 64]
        assert numpy.array_equal(there["blk.1.attn_k_b.weight"][head], rows[:32].T)
        assert numpy.array_equal(there["blk.1.attn_v_b.weight"][head], rows[32:])
    fields = gguf.GGUFReader(path).fields
    wanted = {"head_count_kv": 1, "key_length": 48, "value_length": 32, "key_length_mla": 48, "value_length_mla": 32}
    assert {key: fields[f"deepseek2.attention.{key}"].contents() for key in wanted} == wanted


def test_experts_are_stacked_and_mtp_modules_follow_the_layers(tmp_path: Path):
    model, path = write_checkpoint(V3, tmp_path)
    there, moe = stored(path), model.layers[1].ffn
    assert numpy.array_equal(there["blk.1.ffn_up_exps.weight"], moe.w_in.detach().numpy()[:, 32:])
    assert numpy.array_equal(there["blk.1.ffn_gate_exps.weight"], moe.w_in.detach().numpy()[:, :32])
    assert numpy.array_equal(there["blk.1.ffn_down_exps.weight"], moe.w_out.detach().numpy())
    assert numpy.array_equal(there["blk.1.exp_probs_b.bias"], moe.bias.numpy())
    assert numpy.array_equal(there["blk.3.nextn.eh_proj.weight"], model.mtp[0].merge.weight.detach().numpy())
    assert gguf.GGUFReader(path).fields["deepseek2.block_count"].contents() == 4


def test_without_mtp_the_file_suits_older_versions(tmp_path: Path):
    path = write_checkpoint(V3, tmp_path, with_mtp=False)[1]
    assert not [name for name in kinds(path) if "nextn" in name or name.startswith("blk.3.")]
    assert load_model(path).cfg.mtp_layers == 0


def test_llama_3_frequencies_are_divided_by_a_tensor(tmp_path: Path):
    """By hand: pair 0 turns 64 / 2 pi > 4 times in 64 tokens and keeps its frequency; the last pair is divided by 8."""
    factors = stored(write_checkpoint(CASES["llama 3"], tmp_path)[1])["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert (factors[0], factors[-1]) == (1.0, 8.0)


def test_a_llama_3_of_another_converter_gets_the_published_settings(tmp_path: Path):
    cfg = replace(LLAMA, rope=replace(HALVES, theta=5e5, llama3=Llama3RopeConfig(factor=32.0)))
    path = write_checkpoint(cfg, tmp_path)[1]
    path.write_bytes(path.read_bytes().replace(b"thinkstack.rope.llama3", b"somebodys.rope.llama__"))
    assert load_model(path).cfg.rope == cfg.rope


def test_old_files_with_unsplit_kv_b_proj_are_read(tmp_path: Path):
    """Files from before llama.cpp attended to latents: unsplit kv_b_proj, and the widths of keys and values."""
    model, path = write_checkpoint(replace(V3, mtp_layers=0), tmp_path)
    reader, old = gguf.GGUFReader(path), tmp_path / "old.gguf"
    writer = gguf.GGUFWriter(old, "deepseek2")
    changes = {"key_length": 48, "value_length": 32, "head_count_kv": 4}
    for name, field in reader.fields.items():
        key = name.removeprefix("deepseek2.attention.")
        if not name.startswith("GGUF.") and name != "general.architecture" and not key.endswith("_mla"):
            writer.add_key_value(name, changes.get(key, field.contents()), field.types[0])
    for tensor in reader.tensors:
        if tensor.name.endswith("attn_k_b.weight"):
            layer = int(tensor.name.split(".")[1])
            writer.add_tensor(f"blk.{layer}.{KV_B}", model.layers[layer].attention.wkv_b.weight.detach().numpy())
        elif not tensor.name.endswith("attn_v_b.weight"):
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_model(old)
    assert loaded.cfg.attention == model.cfg.attention
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("kind", KINDS)
def test_norms_routers_and_biases_are_not_quantized(kind: str, tmp_path: Path):
    found = kinds(write_checkpoint(V3, tmp_path, kind)[1])
    whole = [name for name in found if name.endswith(("norm.weight", "_norm.weight", ".bias", "ffn_gate_inp.weight"))]
    assert {found.pop(name) for name in whole} == {"F32"}
    ends = {found.pop("token_embd.weight"), found.pop("output.weight")}
    assert ends == {"Q8_0" if kind == "Q4_0" else kind}
    assert set(found.values()) == {kind}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_values_follow_the_format(kind: str, tmp_path: Path):
    """The format: one fp16 factor for 32 numbers, computed from the largest one; Q4_0 has 16 steps."""
    model, path = write_checkpoint(LLAMA, tmp_path, kind)
    weight = model.layers[0].ffn.w1.weight.detach().view(-1, 32)
    if kind == "Q8_0":
        step = (weight.abs().amax(1, keepdim=True) / 127).half().float()
    else:
        largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
        step = (largest / -8).half().float().abs()
    read = load_model(path).layers[0].ffn.w1.weight.detach().view(-1, 32)
    assert float(((read - weight).abs() / step).max()) <= (0.57 if kind == "Q8_0" else 1.01)
    assert torch.equal((read / step).round(), (read / step).mul(1e3).round().div(1e3))


def test_rows_that_are_not_a_multiple_of_a_block_stay_f16(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_checkpoint(replace(LLAMA, intermediate_size=80), tmp_path, "Q8_0")[1]
    assert {kind for name, kind in kinds(path).items() if "ffn_down" in name} == {"F16"}
    assert "3 matrices stay F16" in caplog.text


def test_a_source_in_bf16_is_written_unchanged(tmp_path: Path):
    model = random_model(LLAMA).to(torch.bfloat16)
    write_gguf(source_of(model), tmp_path / "model.gguf", "BF16")
    source = open_source(tmp_path / "model.gguf")
    assert source.dtype_of("model.layers.0.mlp.up_proj.weight") == torch.bfloat16
    assert torch.equal(source.tensors["model.layers.0.mlp.up_proj.weight"](), model.layers[0].ffn.w3.weight)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_what_was_written(name: str, tmp_path: Path):
    """transformers always uses a head width of 128 for Qwen3."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    cfg = CASES[name]
    cfg = replace(cfg, attention=replace(cfg.attention, head_dim=128)) if name == "qwen3" else cfg
    model, path = write_checkpoint(cfg, tmp_path, tokenizer=tiny_tokenizer())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = torch.arange(3, 43).view(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "word"),
    [
        (replace(V3, rope=RopeConfig(interleaved=False)), "cannot express rope=.*interleaved=False"),
        (replace(V3, rope=RopeConfig(yarn=YARN)), "mscale different from mscale_all_dim"),
        (replace(V3, rope=RopeConfig(yarn=YarnConfig(beta_fast=16.0))), "other betas"),
        (replace(V3, num_layers=27, mtp_layers=0), "query latent in a model of 27 layers"),
        (replace(V3, moe=replace(V3.moe, num_shared_experts=0)), "without a shared expert"),
        (replace(CASES["qwen2"], attention=replace(BIASED, head_dim=32)), "total width differs from hidden_size"),
        (replace(CASES["qwen3"], attention=replace(CASES["qwen3"].attention, out_bias=True)), "bias on the output"),
        (replace(CASES["qwen3moe"], moe=replace(QWEN_EXPERTS, first_dense_layers=1)), "dense layers"),
        (
            replace(CASES["qwen3moe"], moe=replace(QWEN_EXPERTS, norm_topk_prob=False)),
            "cannot express moe=.*norm_topk_prob=False",
        ),
    ],
)
def test_models_that_llama_cpp_computes_differently_are_refused(cfg: ModelConfig, word: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=word):
        write_checkpoint(cfg, tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_f16_are_refused(tmp_path: Path):
    model = random_model(LLAMA)
    model.layers[0].ffn.w1.weight.data[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"blk.0.ffn_gate.weight has values beyond 65,504.*BF16"):
        write_gguf(source_of(model), tmp_path / "model.gguf", "F16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_older_file(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"the older one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(ConfigError, match=r"cannot write .*free space"):
            write_gguf(source_of(random_model(LLAMA)), path, "F32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"the older one"


def opened(path: Path) -> None:
    """Read everything from a file: weights, tokenizer and chat format."""
    load_model(path)
    load_chat(path)


def test_damaged_bytes_are_refused_or_read_in_bounded_time(tmp_path: Path):
    """Every position of the header, and truncations: a ConfigError, in bounded time and memory."""
    chat = chat_format("r1_zero", tiny_tokenizer())
    cfg = replace(V3, hidden_size=32, intermediate_size=32, num_layers=2, vocab_size=360)
    whole = write_checkpoint(cfg, tmp_path, tokenizer=chat.tokenizer, chat=chat)[1].read_bytes()
    path, rng = tmp_path / "damaged.gguf", random.Random(0)
    header = len(whole) - sum(
        4 * math.prod(shape) for shape in (t.shape for t in stored(tmp_path / "model.gguf").values())
    )
    refused = 0
    signal.alarm(60)
    try:
        for number in range(300):
            data = bytearray(whole)
            if number % 3 == 0:
                del data[rng.randrange(len(data)) :]
            elif number % 3 == 1:
                data[rng.randrange(header)] ^= 1 << rng.randrange(8)
            else:
                place = rng.randrange(header - 8)
                data[place : place + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\xff" * 4 + bytes(4), os.urandom(8)])
            path.write_bytes(data)
            try:
                opened(path)
            except ConfigError as error:
                assert str(path) in str(error), error
                refused += 1
    finally:
        signal.alarm(0)
    assert refused > 150


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path):
    path = write_checkpoint(LLAMA, tmp_path)[1]
    assert load_model(path).cfg.vocab_size == 384
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.model='no_vocab'"):
        load_tokenizer(path)
