"""Conversion: kept side files, refused settings, and bounded memory."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack import cli
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.hf.files import CONFIG, INDEX, WEIGHTS
from thinkstack.checkpoint.model import load_chat, load_model, load_tokenizer, save_model
from thinkstack.checkpoint.peft.adapter import save_adapter
from thinkstack.models.lora import LoRAConfig, adapt
from thinkstack.text.chat import TemplateFormat
from thinkstack.text.tokenizer import BOS, EOS
from thinkstack.types import ConfigError, Message

CFG = replace(MLA_TINY, vocab_size=384)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_checkpoint(folder: Path, cfg=CFG) -> Path:
    save_model(folder, tiny_model(cfg), tiny_tokenizer(), "v3")
    return folder


def shipped(folder: Path) -> Path:
    """Write a folder like published ones: additional settings, a template in a separate file, several end tokens."""
    tokenizer = tiny_tokenizer()
    save_model(folder, tiny_model(CFG, eos_ids=(1, 4)), tokenizer, TemplateFormat(tokenizer, TEMPLATE, BOS, EOS))
    edit(folder / "tokenizer_config.json", chat_template=None, pad_token="<｜▁pad▁｜>", padding_side="left")
    edit(folder / "generation_config.json", temperature=0.3, repetition_penalty=1.05, eos_token_id=[1, 4, 3])
    edit(folder / CONFIG, auto_map={"AutoConfig": "configuration.Config"}, aux_loss_alpha=0.001)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": []}')
    (folder / "LICENSE").write_text("as shipped")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not copied")
    return folder


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Limit the file size to `num_bytes`, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_tensors_are_rounded_once_and_the_balance_bias_never(dtype: str, kind: torch.dtype, tmp_path: Path):
    convert(str(write_checkpoint(tmp_path / "model")), tmp_path / "out", dtype=dtype)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("model", "out"))
    for name, tensor in after.items():
        expected = before[name] if name.endswith("correction_bias") else before[name].to(kind)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["torch_dtype"] == str(kind).removeprefix("torch.")


def test_all_side_files_except_pickles_are_kept(tmp_path: Path):
    folder = shipped(tmp_path / "model")
    convert(str(folder), tmp_path / "out", dtype="bf16")
    names = {path.name for path in folder.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names - {WEIGHTS, CONFIG}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    config, before = (json.loads((place / CONFIG).read_text()) for place in (tmp_path / "out", folder))
    assert config == before | {"torch_dtype": "bfloat16"}


def test_a_trained_model_keeps_the_settings_of_its_base(tmp_path: Path):
    folder = shipped(tmp_path / "base")
    chat = load_chat(folder)
    save_model(tmp_path / "tuned", load_model(folder), chat.tokenizer, chat, like=folder)
    for name in ("special_tokens_map.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "tuned" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "tuned" / "tokenizer_config.json").read_text())
    assert config == json.loads((folder / "tokenizer_config.json").read_text())
    generation = json.loads((tmp_path / "tuned" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.3 and generation["repetition_penalty"] == 1.05
    assert generation["eos_token_id"] == [1, 4, 3]
    save_model(tmp_path / "other", load_model(folder), chat.tokenizer, "v3", like=folder)
    assert load_chat(tmp_path / "other").name == "v3" and not (tmp_path / "other" / "chat_template.jinja").exists()


def test_transformers_opens_a_tuned_model_with_its_pad_token_and_end_tokens(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    folder = shipped(tmp_path / "base")
    edit(folder / CONFIG, auto_map=None)
    chat = load_chat(folder)
    save_model(tmp_path / "tuned", load_model(folder), chat.tokenizer, chat, like=folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<｜▁pad▁｜>", "left")
    turn = [{"role": "user", "content": "3 + 4"}]
    assert tokenizer.apply_chat_template(turn, return_dict=False) == [0, *chat.tokenizer.encode("3 + 4"), 1]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model.generation_config.eos_token_id == [1, 4, 3] and model.generation_config.temperature == 0.3


def test_our_formats_define_sampling_settings(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path / "model")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.95)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)


def test_shards_respect_the_size_limit_and_are_indexed(tmp_path: Path):
    convert(str(write_checkpoint(tmp_path / "model")), tmp_path / "out", max_shard_gb=1e-4)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and all(sum(t.nbytes for t in load_file(path).values()) <= 10**5 for path in shards)
    assert (tmp_path / "out" / INDEX).is_file()
    found, expected = load_model(tmp_path / "out").state_dict(), load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_is_converted_in_place(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "model")
    expected = load_model(folder, torch.bfloat16).state_dict()
    convert(str(folder), folder, dtype="bf16")
    found = load_model(folder, torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert load_file(folder / WEIGHTS)["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("to", ["hf", "deepseek"])
def test_a_full_disk_leaves_the_older_folder_and_nothing_else(to: str, tmp_path: Path):
    folder, out = write_checkpoint(tmp_path / "model"), write_checkpoint(tmp_path / "out", GQA_TINY_LARGE)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with largest_file(60_000), pytest.raises(ConfigError, match=r"cannot write .*out: .*free space"):
        convert(str(folder), out, to=to, dtype="bf16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


GQA_TINY_LARGE = replace(GQA_TINY, vocab_size=384)


def test_a_model_larger_than_the_free_disk_is_refused_before_writing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB and the disk has 0\.0 GB free"):
        convert(str(write_checkpoint(tmp_path / "model")), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_an_adapter_is_refused_with_the_merge_command(tmp_path: Path):
    model = load_model(write_checkpoint(tmp_path / "base"))
    adapt(model, LoRAConfig(rank=2))
    save_adapter(tmp_path / "adapter", model, LoRAConfig(rank=2), str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"thinkstack merge BASE .*adapter --out OUT"):
        convert(str(tmp_path / "adapter"), tmp_path / "out")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "model")
    save_model(tmp_path / "small", tiny_model(GQA_TINY))
    (tmp_path / "small" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for work in (load_tokenizer, lambda place: convert(str(place), tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"tokenizer.json has 360 tokens, but the model has only 48"):
            work(tmp_path / "small")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int4"}, "dtype='int4' is not known in hf; known: fp32, fp16, bf16, fp8, fp8-ue8m0"),
        ({"dtype": "bf16", "to": "gguf"}, "known: F32, F16, BF16, Q8_0, Q4_0"),
        ({"max_shard_gb": 0.0}, "max-shard-gb=0.0 must be above 0"),
        ({"model_parallel": 2}, "model-parallel=2 applies only to the deepseek layout"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, object], words: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=words):
        convert(str(write_checkpoint(tmp_path / "model")), tmp_path / "out", **settings)


def test_the_command_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_checkpoint(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["thinkstack", "convert", str(folder), str(tmp_path / "out"), "--dtype", "fp8"])
    cli.main()
    assert "quantization_config" in json.loads((tmp_path / "out" / CONFIG).read_text())


CODE = """
import gc, sys, torch
from pathlib import Path
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.model import load_model

def resident(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) * 1024

load_model(sys.argv[2], torch.float8_e4m3fn)  # libraries, once: packing on the meta device imports most of them
for how in ("bfloat16", "float8_e4m3fn", "convert"):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident("VmRSS")
    if how == "convert":
        convert(sys.argv[1], Path(sys.argv[3]), dtype="bf16")
        size = 0
    else:
        model = load_model(sys.argv[1], getattr(torch, how))
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        del model
    print(how, resident("VmHWM") - before, size)
"""
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc: allocations above 64 kB use separate pages, which are returned when freed."""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_loading_peaks_below_1_2_models_and_converting_below_one(tmp_path: Path):
    """153 MB of fp32 in one file; allowed on top of the model are eight of its largest matrices, of 4 MB each."""
    dense = replace(CFG.moe, first_dense_layers=12)
    cfg = replace(CFG, hidden_size=512, intermediate_size=2048, mtp_layers=0, num_layers=12, moe=dense)
    save_model(tmp_path / "big", tiny_model(cfg))
    save_model(tmp_path / "small", tiny_model())
    command = [sys.executable, "-c", CODE, *(str(tmp_path / name) for name in ("big", "small", "out"))]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | PAGES)
    for line in found.stdout.splitlines():
        how, peak, size = line.split()
        assert int(peak) < 1.2 * int(size) + 32e6, (how, peak, size)
    assert len(found.stdout.splitlines()) == 3


@torch.no_grad()
def test_a_gguf_and_back_gives_the_same_model_and_prompts(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "model", replace(GQA_TINY, vocab_size=384))
    convert(str(folder), tmp_path / "gguf", to="gguf")
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["Modelfile", "gguf-F32.gguf"]
    convert(str(tmp_path / "gguf" / "gguf-F32.gguf"), tmp_path / "again")
    ids = torch.arange(20).view(1, 20)
    assert torch.equal(load_model(tmp_path / "again")(ids), load_model(folder)(ids))
    question = [Message(role="user", content="3 + 4")]
    assert load_chat(tmp_path / "again").prompt(question) == load_chat(folder).prompt(question)
    convert(str(folder), tmp_path / "one.gguf", to="gguf", dtype="Q8_0")
    assert (tmp_path / "one.gguf").is_file()
