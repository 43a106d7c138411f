"""Files as users have them: LFS pointers, upper-case suffixes, stages of runs, missing or impossible tokens."""

import json
import logging
from pathlib import Path

import pytest

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.hf.config import from_hf, to_hf
from thinkstack.checkpoint.model import load_chat, load_model, load_tokenizer, save_model
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234\n"


def saved(folder: Path, **changes: object) -> Path:
    save_model(folder, tiny_model(MLA_TINY, vocab_size=384, **changes), tiny_tokenizer(), "v3")
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", POINTER, "git lfs pull"),
        ("model.safetensors", "", "is empty"),
        ("model.safetensors", "<!DOCTYPE html><p>", "web page"),
        ("tokenizer.json", POINTER, "git lfs pull"),
        ("tokenizer.json", "", "is empty"),
        ("tokenizer.json", "<html>", "web page"),
        ("config.json", POINTER, "git lfs pull"),
        ("config.json", "", "is not JSON"),
        ("tokenizer_config.json", POINTER, "git lfs pull"),
        ("chat_template.jinja", POINTER, "git lfs pull"),
        ("model.safetensors.index.json", POINTER, "git lfs pull"),
    ],
)
def test_content_in_place_of_a_file_is_identified(file: str, content: str, words: str, tmp_path: Path):
    """Regression: a Git LFS pointer was reported as a truncated file to fetch again, which fetches the same pointer."""
    folder = saved(tmp_path / "model")
    (folder / file).write_text(content)
    if file.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    if file.endswith("jinja"):
        edit(folder / "tokenizer_config.json", thinkstack_chat_format=None)
    load = load_chat if file.startswith(("tokenizer", "chat")) else load_model
    is_json = file.endswith("config.json") and content != POINTER
    with pytest.raises(ConfigError, match=rf"{file} is not JSON" if is_json else rf"{file}.*{words}"):
        load(folder)


def test_a_gguf_suffix_may_be_upper_case_and_an_lfs_pointer_is_refused(tmp_path: Path):
    folder = saved(tmp_path / "model", mtp_layers=0)
    convert(str(folder), tmp_path / "A.GGUF")
    assert load_model(tmp_path / "A.GGUF").cfg.family == "deepseek_v3"
    (tmp_path / "b.gguf").write_text(POINTER)
    with pytest.raises(ConfigError, match=r"b\.gguf.*git lfs pull"):
        load_model(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("name", "to"),
    [("out.gguf", "hf"), ("out.gguf", "deepseek"), ("OUT.GGUF", "hf"), ("a.safetensors", None), ("a.bin", "hf")],
)
def test_a_name_that_contradicts_the_format_is_refused(name: str, to: str | None, tmp_path: Path):
    """Regression: `convert M out.gguf` wrote a folder of that name."""
    with pytest.raises(ConfigError, match=name):
        convert(str(saved(tmp_path / "model")), tmp_path / name, to)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("name", "to", "is_file"),
    [("out.gguf", None, True), ("OUT.GGUF", "gguf", True), ("out", None, False), ("v1.0", None, False)],
)
def test_the_suffix_determines_the_default_format(name: str, to: str | None, is_file: bool, tmp_path: Path):
    convert(str(saved(tmp_path / "model", mtp_layers=0)), tmp_path / name, to)
    assert (tmp_path / name).is_file() == is_file
    assert load_model(tmp_path / name).cfg.family == "deepseek_v3"


@pytest.mark.parametrize(("name", "is_folder"), [("a.gguf", True), ("a", False)])
def test_an_existing_file_is_not_replaced_by_a_folder_or_vice_versa(name: str, is_folder: bool, tmp_path: Path):
    (tmp_path / name).mkdir() if is_folder else (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=name):
        convert(str(saved(tmp_path / "model")), tmp_path / name)
    assert (tmp_path / name).is_dir() == is_folder


def test_the_folder_of_a_stage_loads_its_model(tmp_path: Path):
    saved(tmp_path / "run" / "zero" / "model", mtp_layers=0)
    assert load_model(tmp_path / "run" / "zero").cfg == load_model(tmp_path / "run" / "zero" / "model").cfg
    assert load_chat(tmp_path / "run" / "zero").name == "v3"
    with pytest.raises(ConfigError, match=r"run/zero/model"):
        load_model(tmp_path / "run")
    (tmp_path / "ggufs").mkdir()
    convert(str(tmp_path / "run" / "zero"), tmp_path / "ggufs" / "a.gguf")
    with pytest.raises(ConfigError, match=r"ggufs/a\.gguf"):
        load_model(tmp_path / "ggufs")


@pytest.mark.parametrize(
    ("value", "ends"),
    [(None, ()), (-1, ()), ([], ()), ([-1], ()), (2, (2,)), ([2, 3], (2, 3)), ([2, 2, -1], (2,)), ([None, 4], (4,))],
)
def test_eos_is_none_one_or_several(value: object, ends: tuple[int, ...]):
    found = from_hf(to_hf(GQA_TINY) | {"eos_token_id": value}, "config.json")
    assert found.eos_ids == ends
    assert from_hf(to_hf(found), "again") == found


@pytest.mark.parametrize(
    ("value", "words"),
    [(48, "48, but the embedding has only 48 rows"), ([1, 99], "99, but"), (-2, "-2, which is no"), ("a", "'a'")],
)
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_an_impossible_token_id_is_refused(key: str, value: object, words: str):
    with pytest.raises(ConfigError, match=f"{key}.*{words}"):
        from_hf(to_hf(GQA_TINY) | {key: value}, "config.json")


def test_texts_begin_with_the_bos_of_the_tokenizer_and_it_is_logged_once(tmp_path: Path, caplog):
    """In R1's distilled Qwen models, the BOS in config.json differs from the first token of the tokenizer."""
    folder = saved(tmp_path / "model", mtp_layers=0)
    edit(folder / "config.json", bos_token_id=5)
    with caplog.at_level(logging.INFO):
        assert load_tokenizer(folder).begin_ids == [0]
        load_chat(folder)
        convert(str(folder), tmp_path / "a.gguf")
    assert caplog.text.count("prepends the token 0") == 1
    assert load_model(tmp_path / "a.gguf").cfg.bos_id == 0


@pytest.mark.parametrize("begin", [[], ["<s>"], ["<s>", "<t>"]])
@pytest.mark.parametrize("end", [[], ["</s>"], ["</s>", "<t>"]])
def test_tokens_that_a_tokenizer_appends_are_not_in_prompts(begin: list[str], end: list[str]):
    spec = json.loads(tiny_tokenizer().spec)
    spec["added_tokens"] = [
        spec["added_tokens"][0] | {"id": place, "content": token}
        for place, token in enumerate(("<s>", "</s>", "<t>"), 400)
    ]
    special = {
        token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
        for token in spec["added_tokens"]
    }
    text, pair = [{"Sequence": {"id": "A", "type_id": 0}}], [{"Sequence": {"id": "B", "type_id": 0}}]
    around = [[{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens] for tokens in (begin, end)]
    single = [*around[0], *text, *around[1]]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + pair,
        "special_tokens": special,
    }
    tokenizer = Tokenizer(json.dumps(spec))
    assert tokenizer.begin_ids == [tokenizer.control[token] for token in begin]


@pytest.mark.parametrize("side", ["Left", "Right"])
@pytest.mark.parametrize("size", [1, 8])
def test_truncation_and_padding_in_the_file_are_ignored(side: str, size: int):
    """Regression: prompts were silently truncated and padded."""
    spec = json.loads(tiny_tokenizer().spec)
    spec["truncation"] = {"direction": side, "max_length": size, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>", "pad_to_multiple_of": None}
    spec["padding"] = {"strategy": {"Fixed": size}, "direction": side} | pad
    tokenizer = Tokenizer(json.dumps(spec))
    for text in ("a", "the ball is under cup 3 " * 4):
        assert tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert json.loads(tokenizer.spec)["truncation"] is None
