"""Checkpoints written by other tools (bench/fixtures.py): all load and give the numbers of those tools."""

import json
import tarfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.peft.adapter import load_adapter
from thinkstack.models.transformer import Transformer
from thinkstack.planner.inspect import describe_model
from thinkstack.types import ConfigError, Message

ARCHIVES = sorted((Path(__file__).parent / "fixtures").glob("*.tar.xz"))
TEXT, QUESTION = "Once upon a time, 12 + 30 = 42.", "What is 12 + 30?"
EXPECTED = "expected.json"
QUANTIZED = r"unsloth/Qwen3-0\.6B-unsloth-bnb-4bit.*base_model_name_or_path"
REFUSED = {
    "peft/4/unsloth_adapter": QUANTIZED,
    "peft/5/unsloth_adapter": QUANTIZED,
    "peft/5/deepseek_v3_adapter": r"target_parameters=\['down_proj'\]",
}
"""Refused adapters and their messages: a base in 4 bits; stacks of experts, which PEFT adapts as one parameter."""


def listed() -> list[str]:
    """Return TOOL/VERSION/NAME of every checkpoint in the archives."""
    found = []
    for path in ARCHIVES:
        with tarfile.open(path) as packed:
            names = packed.getnames()
            found += [f"{path.name.split('.')[0]}/{Path(name).parent}" for name in names if Path(name).name == EXPECTED]
    return sorted(found)


NAMES = listed()


@cache
def _unpacked() -> TemporaryDirectory:
    folder = TemporaryDirectory()
    for path in ARCHIVES:
        with tarfile.open(path) as packed:
            packed.extractall(Path(folder.name) / path.name.split(".")[0], filter="data")
    return folder


def folder_of(name: str) -> Path:
    return Path(_unpacked().name) / name


def source_of(name: str) -> Path:
    """Return the source for load_model."""
    gguf = folder_of(name) / "model.gguf"
    return gguf if gguf.exists() else folder_of(name)


def expected_numbers(name: str) -> dict:
    return json.loads((folder_of(name) / EXPECTED).read_text())


def is_adapter(name: str) -> bool:
    return name.endswith("_adapter")


@torch.no_grad()
def check_numbers(model: Transformer, expected: dict) -> None:
    """Check logits at every 16th token after the prompt within 1e-5 (their deviation is 0.7), and six greedy tokens."""
    ids = list(expected["prompt_ids"])
    logits = model(torch.tensor([ids]))[0, -1]
    assert (logits[::16] - torch.tensor(expected["logits"])).abs().max() < 1e-5
    for token in expected["greedy"]:
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


def test_every_family_and_tool_is_present_in_200_kb():
    assert len(NAMES) >= 75 and sum(path.stat().st_size for path in ARCHIVES) < 200_000
    families_found = ("deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3", "qwen3_moe")
    assert {f"transformers/{version}/{family}" for version in "45" for family in families_found} <= set(NAMES)
    assert {f"llama_cpp/5/{family}_f32" for family in families_found} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if not is_adapter(name)])
def test_a_checkpoint_of_another_tool_gives_its_numbers(name: str):
    """Regression: these were refused: missing BOS, EOS or template, empty tensors for no shared experts, an explicit
    YaRN amplitude, Llama 3's factors for another context than the published one, and V3 from llama.cpp's converter
    without expert_gating_func.
    """
    expected = expected_numbers(name)
    check_numbers(load_model(source_of(name)), expected)
    assert "parameters" in describe_model(str(source_of(name)))
    if "text_ids" not in expected:
        return
    chat = load_chat(source_of(name))
    assert chat.tokenizer.encode(TEXT) == expected["text_ids"]
    assert chat.has_template == ("chat_ids" in expected)
    if chat.has_template:
        assert chat.prompt([Message(role="user", content=QUESTION)]) == expected["chat_ids"]


@pytest.mark.parametrize("name", [name for name in NAMES if is_adapter(name) and name not in REFUSED])
def test_an_adapter_of_peft_gives_its_numbers(name: str):
    model = load_model(source_of(name.replace("_adapter", "_base")))
    load_adapter(model, folder_of(name))
    check_numbers(model, expected_numbers(name))


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_beyond_plain_lora_is_refused_by_name(name: str):
    base = name.replace("unsloth", "qwen3").replace("_adapter", "_base")
    with pytest.raises(ConfigError, match=REFUSED[name]):
        load_adapter(load_model(source_of(base)), folder_of(name))


@pytest.mark.parametrize("name", ["no_bos", "no_bos_no_eos", "eos_list", "base", "deepseek_v3_none_shared"])
def test_missing_tokens_stay_missing_in_a_saved_model(name: str, tmp_path: Path):
    source = source_of(f"transformers/5/{name}")
    model, chat = load_model(source), load_chat(source)
    for folder, like in ((tmp_path / "alone", None), (tmp_path / "like", source)):
        save_model(folder, model, chat.tokenizer, chat, like=like)
        again, spoken = load_model(folder), load_chat(folder)
        assert again.cfg == model.cfg
        assert set(spoken.stop_token_ids) == set(chat.stop_token_ids) and spoken.has_template == chat.has_template
