"""Weights files: byte-identical round trips, shards, and one clear error for each kind of damage."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.checkpoint.hf.config import to_hf
from thinkstack.checkpoint.hf.files import CONFIG, INDEX, WEIGHTS, save_weights
from thinkstack.checkpoint.model import load_model
from thinkstack.checkpoint.tensor_file import TensorInfo, write_file
from thinkstack.models.config import ModelConfig, MoEConfig
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError

V2_TINY = replace(
    MLA_TINY,
    family="deepseek_v2",
    attention=replace(MLA_TINY.attention, q_lora_rank=0),
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=2,
        moe_intermediate_size=12,
        scoring="softmax",
        group_score="max",
        norm_topk_prob=False,
    ),
    mtp_layers=0,
)
MTP_EMBEDDING, ROUTER = "model.layers.3.embed_tokens.weight", "model.layers.1.mlp.gate.weight"


def write_checkpoint(folder: Path, model: Transformer, **changes: torch.Tensor | None) -> Path:
    """Write the folder with the model's weights; tensors are replaced, added or (None) left out."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(to_hf(model.cfg)))
    save_weights(model, folder)
    if changes:
        tensors = load_file(folder / WEIGHTS) | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def read(folder: Path, cfg: ModelConfig = MLA_TINY, dtype: torch.dtype = torch.float32) -> Transformer:
    (folder / CONFIG).write_text(json.dumps(to_hf(cfg)))
    return load_model(folder, dtype)


def refused(folder: Path, cfg: ModelConfig = MLA_TINY) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, cfg)
    return str(caught.value)


def same_weights(one: Transformer, other: Transformer) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY, replace(GQA_TINY, tie_embeddings=True)])
def test_a_file_round_trips_byte_for_byte(cfg: ModelConfig, tmp_path: Path):
    (tmp_path / "again").mkdir()
    model = tiny_model(cfg)
    loaded = read(write_checkpoint(tmp_path, model), cfg)
    save_weights(loaded, tmp_path / "again")
    assert same_weights(model, loaded)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_bf16_round_trips_and_the_bias_stays_fp32(tmp_path: Path):
    (tmp_path / "again").mkdir()
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    save_weights(read(write_checkpoint(tmp_path, model), dtype=torch.bfloat16), tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors[ROUTER].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_names_and_shapes_on_disk_are_the_released_ones(tmp_path: Path):
    tensors = load_file(write_checkpoint(tmp_path, tiny_model()) / WEIGHTS)
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (32, 12)
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (12, 32)
    in_mtp = {name.removeprefix("model.layers.3.") for name in tensors if name.startswith("model.layers.3.")}
    extras = {"enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head"}
    assert {f"{name}.weight" for name in extras} <= in_mtp
    assert not any("experts.gate_up_proj" in name for name in tensors)


def test_gate_rows_come_before_up_rows_in_a_fused_expert(tmp_path: Path):
    model = tiny_model()
    tensors = load_file(write_checkpoint(tmp_path, model) / WEIGHTS)
    fused = model.layers[1].ffn.w_in[5]
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.gate_proj.weight"], fused[:12])
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.up_proj.weight"], fused[12:])


def test_shards_hold_the_same_weights(tmp_path: Path):
    model = tiny_model()
    save_weights(model, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(tmp_path / file).values()
    )
    assert same_weights(model, read(tmp_path))


def test_tied_embeddings_stay_one_tensor(tmp_path: Path):
    cfg = replace(GQA_TINY, tie_embeddings=True)
    model = read(write_checkpoint(tmp_path, tiny_model(cfg)), cfg)
    assert model.head.weight is model.embed.weight
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)


def test_a_written_copy_of_a_tied_head_must_equal_the_embedding(tmp_path: Path):
    cfg = replace(GQA_TINY, tie_embeddings=True)
    model = tiny_model(cfg)
    folder = write_checkpoint(tmp_path, model, **{"lm_head.weight": model.embed.weight.detach().clone()})
    assert same_weights(model, read(folder, cfg))
    assert "lm_head.weight differs" in refused(
        write_checkpoint(tmp_path, model, **{"lm_head.weight": torch.zeros(48, 32)}), cfg
    )


def test_copies_in_the_mtp_layer_may_be_missing_but_not_differ(tmp_path: Path):
    model = tiny_model()
    assert same_weights(model, read(write_checkpoint(tmp_path, model, **{MTP_EMBEDDING: None})))
    assert MTP_EMBEDDING in refused(write_checkpoint(tmp_path, model, **{MTP_EMBEDDING: torch.zeros(48, 32)}))


def test_v2_has_no_bias_on_disk_and_loses_none(tmp_path: Path):
    model = Transformer(V2_TINY).initialize(torch.Generator().manual_seed(0))
    save_weights(model, tmp_path)
    assert not any("bias" in name for name in load_file(tmp_path / WEIGHTS))
    assert same_weights(model, read(tmp_path, V2_TINY))
    model.layers[1].ffn.bias[0] = 0.5
    with pytest.raises(ConfigError, match=r"layers.1.ffn.bias is not zero"):
        save_weights(model, tmp_path)


def test_derived_rotations_of_old_files_are_passed_over(tmp_path: Path):
    model = tiny_model(GQA_TINY)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert same_weights(model, read(write_checkpoint(tmp_path, model, **old), GQA_TINY))


def test_a_missing_tensor_is_named(tmp_path: Path):
    assert f"lacks the tensor {ROUTER}:" in refused(write_checkpoint(tmp_path, tiny_model(), **{ROUTER: None}))


def test_an_unexpected_tensor_is_named(tmp_path: Path):
    message = refused(write_checkpoint(tmp_path, tiny_model(), **{"model.layers.9.mlp.gate.weight": torch.zeros(2)}))
    assert WEIGHTS in message and "model.layers.9.mlp.gate.weight" in message


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path):
    message = refused(write_checkpoint(tmp_path, tiny_model(), **{ROUTER: torch.zeros(4, 32)}))
    assert ROUTER in message and "(4, 32)" in message and "(8, 32)" in message


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int8, "I8")])
def test_a_quantized_tensor_is_refused(dtype: torch.dtype, name: str, tmp_path: Path):
    message = refused(write_checkpoint(tmp_path, tiny_model(), **{ROUTER: torch.zeros(8, 32).to(dtype)}))
    assert WEIGHTS in message and ROUTER in message and name in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path):
    path = write_checkpoint(tmp_path, tiny_model()) / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(tmp_path)
    assert str(path) in message and ("truncated or not a safetensors file" if keep else "is empty") in message


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    (tmp_path / WEIGHTS).write_bytes(b"\x80\x04 certainly not tensors" * 20)
    assert "truncated or not a safetensors file" in refused(tmp_path)


class Explosive:
    """A pickle with a visible effect if anything loads it."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_unread(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(pickle.dumps(Explosive()))
    message = refused(tmp_path)
    assert name in message and "pickle" in message and "safetensors" in message


def test_an_empty_folder_is_refused(tmp_path: Path):
    assert f"neither {WEIGHTS} nor {INDEX}" in refused(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path):
    save_weights(tiny_model(), tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing" in refused(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path):
    save_weights(tiny_model(), tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost} | {"x": torch.ones(1)}, shard)
    message = refused(tmp_path)
    assert str(shard) in message and lost in message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_damaged_index_is_named(text: str, tmp_path: Path):
    (tmp_path / INDEX).write_text(text)
    assert INDEX in refused(tmp_path)


def edited(folder: Path, **changes: object) -> str:
    """Return the error for a folder with another config.json."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError) as caught:
        load_model(folder)
    return str(caught.value)


def test_a_configuration_with_another_number_of_layers_is_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path, tiny_model(GQA_TINY))
    message = edited(folder, num_hidden_layers=2)
    assert "unexpected tensor model.layers.2" in message and "2 layers, width 32" in message
    assert "lacks the tensor model.layers.3.input_layernorm.weight" in edited(folder, num_hidden_layers=4)


def test_a_configuration_with_other_heads_is_named_with_both_shapes(tmp_path: Path):
    message = edited(write_checkpoint(tmp_path, tiny_model(GQA_TINY)), num_attention_heads=2, num_key_value_heads=2)
    assert "self_attn.o_proj.weight has shape (32, 32), but the configuration requires (32, 16)" in message
    assert WEIGHTS in message and "2 heads" in message


def test_a_wrong_tied_flag_is_named_with_the_key_to_change(tmp_path: Path):
    untied = write_checkpoint(tmp_path / "untied", tiny_model(GQA_TINY))
    message = edited(untied, tie_word_embeddings=True)
    assert "lm_head.weight differs" in message and "set tie_word_embeddings to false" in message
    tied = write_checkpoint(tmp_path / "tied", tiny_model(replace(GQA_TINY, tie_embeddings=True)))
    message = edited(tied, tie_word_embeddings=False)
    assert "lacks the tensor lm_head.weight" in message and "set tie_word_embeddings to true" in message


def test_a_writer_that_streams_writes_the_library_s_bytes(tmp_path: Path):
    """All types, names out of order, odd sizes."""
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float64)
    tensors = {f"{'ba'[i % 2]}.{i}": torch.ones(3, i + 1).to(kind) for i, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    entries = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with write_file(tmp_path / "ours", entries) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
