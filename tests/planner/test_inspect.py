"""What `inspect` shows of a checkpoint, without reading its weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.hf.files import WEIGHTS
from thinkstack.checkpoint.model import load_model, save_model
from thinkstack.checkpoint.tensor_file import TensorFiles
from thinkstack.models.config import named
from thinkstack.models.counts import cache_bytes_per_token, count_parameters, fp8_bytes, weight_bytes
from thinkstack.planner import inspect
from thinkstack.planner.inspect import describe_model
from thinkstack.quant.fp8 import E4M3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An FP8 checkpoint with 250 kB free on the machine; reading a tensor fails."""
    save_model(tmp_path / "model", tiny_model(MLA_TINY, vocab_size=384), tiny_tokenizer(), "r1")
    convert(str(tmp_path / "model"), tmp_path / "fp8", dtype="fp8-ue8m0")
    monkeypatch.setattr(TensorFiles, "read_into", lambda *args: pytest.fail("a weight was read"))
    monkeypatch.setattr(inspect, "free_memory", lambda: {"CPU": 250_000})
    return tmp_path / "fp8"


def rows(text: str) -> dict[str, str]:
    return {line[:18].strip(): line[18:] for line in text.splitlines()}


def test_a_checkpoint_is_described_from_its_headers(folder: Path):
    found = rows(describe_model(str(folder)))
    size = (folder / WEIGHTS).stat().st_size
    assert found["family"] == "deepseek_v3" and found["MTP modules"].endswith("in 1")
    assert found["stored"] == f"{size / 1000:.1f} kB in 1 files: bfloat16, float32"
    assert found["quantized"].startswith("fp8-ue8m0: ")
    assert found["tokenizer"] == "360 tokens, 7 of them control tokens"
    assert found["chat format"] == "r1; a turn ends with <｜end▁of▁sentence｜>"
    assert "<think>" in found["control tokens"]


def test_what_fits_follows_from_bytes_of_weights_and_cache(folder: Path):
    cfg, found = replace(MLA_TINY, vocab_size=384), rows(describe_model(str(folder)))
    tokens = (250_000 - weight_bytes(cfg)) // cache_bytes_per_token(cfg)
    assert found["bf16"].endswith(f"leaving cache for {tokens:,} tokens across all requests")
    assert weight_bytes(cfg, 4) > 250_000 and found["fp32"].startswith("does not fit: needs")
    assert found["training, full"].startswith("does not fit")


def test_a_base_model_says_that_it_has_no_tokenizer(tmp_path: Path):
    save_model(tmp_path / "model", tiny_model(GQA_TINY))
    found = rows(describe_model(str(tmp_path / "model")))
    assert found["tokenizer"].startswith("none: ") and found["stored"].endswith("float32")


@pytest.mark.parametrize("cfg", [MLA_TINY, replace(GQA_TINY, tie_embeddings=True)])
def test_bytes_in_fp8_are_those_of_a_model_in_fp8(cfg, tmp_path: Path):
    """But for blocks that are not full, whose scales weigh more: these matrices are far smaller than 128 x 128."""
    wide = replace(cfg, hidden_size=256, intermediate_size=512, attention=replace(cfg.attention, num_heads=4))
    convert(str(saved(tmp_path / "model", wide)), tmp_path / "half", dtype="bf16")
    state = load_model(tmp_path / "half", E4M3).state_dict()
    whole = sum(t.nbytes for name, t in state.items() if not name.endswith((".scale", ".bias", "head.weight")))
    head = 0 if cfg.tie_embeddings else state["head.weight"].nbytes
    assert fp8_bytes(wide) == pytest.approx(whole + head, rel=1e-3)


def saved(folder: Path, cfg) -> Path:
    save_model(folder, tiny_model(cfg))
    return folder


def test_the_released_model_in_fp8_is_half_of_its_bf16():
    """The published files are 688 GB; they repeat embedding and head, 3.7 GB, in the MTP layer."""
    assert fp8_bytes(named("v3-671b")) == pytest.approx(685e9, rel=1e-3)


@pytest.mark.parametrize("name", ["v3-671b", "v2-lite", "qwen3-30b-a3b", "qwen3-8b", "r1-distill-qwen-1.5b"])
def test_the_line_names_what_counts_as_active(name: str):
    """36.63B of V3 count the head and not the embedding; the line did not say so."""
    cfg, row = named(name), next(line for line in describe_model(name).splitlines() if line.startswith("active"))
    total, both = count_parameters(cfg), cfg.vocab_size * cfg.hidden_size
    active = int(row.split()[3].strip(",").replace(",", ""))
    assert "including the head, without the embedding" in row
    assert active == total - (0 if cfg.tie_embeddings else both) or (cfg.moe is not None and active < total - both)
