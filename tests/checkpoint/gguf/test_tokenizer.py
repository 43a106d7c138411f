"""Tokenizers inside a GGUF: round trips, the choice of a llama.cpp pre-tokenizer, and refused tokenizers."""

import json
from pathlib import Path

import pytest
import tokenizers

from tests.checkpoint.gguf.test_families import CASES, random_model
from tests.tiny import tiny_tokenizer
from thinkstack.checkpoint.gguf.file import GGUFFile, Metadata
from thinkstack.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS
from thinkstack.checkpoint.gguf.tokenizer import (
    PROBE_TEXTS,
    RARE_TEXTS,
    added_token,
    bpe_spec,
    tokenizer_of,
    tokenizer_values,
)
from thinkstack.checkpoint.gguf.write import write_gguf
from thinkstack.checkpoint.hf.tensors import source_of
from thinkstack.checkpoint.model import load_chat, load_tokenizer
from thinkstack.text.chat import chat_format
from thinkstack.text.tokenizer import Tokenizer, train_tokenizer
from thinkstack.types import ConfigError, Message

TOKENS, TYPES, PRE = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.pre"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
LINES = [
    "User: What is 12 + 30? It's 42, isn't it.\n\nAssistant: (the) first line.\nThe second one, don't you'll",
    "从左到右计算,每步只保留个位。答案是什么？",
] * 4


def values_of(tokenizer: Tokenizer, rows: int = 400) -> dict:
    return tokenizer_values(tokenizer, rows)


def read_back(values: dict) -> Tokenizer:
    return tokenizer_of(Metadata(Path("a.gguf"), values))


def foreign(name: str) -> Tokenizer:
    """Train a tokenizer with one of llama.cpp's pre-tokenizers."""
    pre = PRE_TOKENIZERS[name]
    spec = bpe_spec({"<bos>": 0}, [], [added_token(0, "<bos>", True)], pre)
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(LINES, trainer)
    return Tokenizer(model.to_str())


def test_token_types_determine_visibility():
    """Control tokens are hidden, think tags and single-token strings are found in any text, spare rows are unused."""
    tokenizer = tiny_tokenizer()
    values = values_of(tokenizer)
    types = dict(zip(values[TOKENS], values[TYPES], strict=True))
    assert types["<｜User｜>"] == types["<｜end▁of▁sentence｜>"] == CONTROL
    assert types["<think>"] == types["</think>"] == types["<answer>"] == types["</answer>"] == USER_DEFINED
    assert types["Ġthe"] == NORMAL
    assert types["[PAD399]"] == UNUSED
    assert len(values[TOKENS]) == len(set(values[TOKENS])) == 400


def test_merges_across_pre_token_boundaries_are_left_out():
    """A merge that only <answer> uses would join "<" to a name elsewhere."""
    tokenizer = tiny_tokenizer()
    left = {tuple(merge) for merge in json.loads(tokenizer.spec)["model"]["merges"]}
    left -= {tuple(merge.split(" ")) for merge in values_of(tokenizer)["tokenizer.ggml.merges"]}
    assert left
    assert all(set("<>/") & set("".join(merge)) for merge in left)


def test_our_tokenizer_round_trips():
    tokenizer = tiny_tokenizer()
    again = read_back(values_of(tokenizer))
    assert again.spec == tokenizer.spec
    assert again.encode("<answer>6</answer>") == tokenizer.encode("<answer>6</answer>")


def test_joined_line_breaks_select_a_pre_tokenizer_that_joins_them():
    tokenizer = train_tokenizer(LINES, 380, join_breaks=True)
    assert values_of(tokenizer)[PRE] == "qwen2"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_known_pre_tokenizers_are_recognized(name: str):
    tokenizer = foreign(name)
    values = values_of(tokenizer)
    assert values[PRE] == name
    assert "tokenizer.huggingface.json" not in values
    again = read_back(values)
    for text in (*PROBE_TEXTS, *RARE_TEXTS):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.control == tokenizer.control


def test_different_ids_of_rare_texts_are_reported(caplog: pytest.LogCaptureFixture):
    tokenizer = train_tokenizer(["two  spaces   spaces spaces spaces"] * 10, 300)
    values_of(tokenizer)
    assert "'two  spaces'" in caplog.text


def test_pre_tokenizers_without_an_equivalent_are_refused():
    spec = json.loads(tiny_tokenizer().spec)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}"}
    with pytest.raises(ConfigError, match="splits text like this tokenizer, for example '从左到右"):
        values_of(Tokenizer(json.dumps(spec)))


def test_other_kinds_of_tokenizers_are_refused():
    spec = json.loads(tiny_tokenizer().spec)
    with pytest.raises(ConfigError, match="a BPE tokenizer with a Metaspace decoder is not supported in a GGUF"):
        values_of(Tokenizer(json.dumps(spec | {"decoder": {"type": "Metaspace", "replacement": "_"}})))
    with pytest.raises(ConfigError, match="does not normalize text by Lowercase"):
        values_of(Tokenizer(json.dumps(spec | {"normalizer": {"type": "Lowercase"}})))


def test_texts_begin_with_the_bos_of_the_model_or_nothing():
    values = values_of(foreign("smollm"))
    assert values["tokenizer.ggml.add_bos_token"] is False
    begun = values | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0}
    assert read_back(begun).begin_ids == [0]
    assert read_back(begun | {PRE: "llama-bpe", "tokenizer.ggml.add_bos_token": False}).begin_ids == []


@pytest.mark.parametrize("bos", [None, -1, 2**32 - 1])
@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_a_file_without_a_bos_begins_texts_with_nothing(pre: str, add: bool | None, bos: int | None):
    """Regression: Qwen's files have no tokenizer.ggml.bos_token_id and were refused as incomplete."""
    values = values_of(foreign(pre)) | {"tokenizer.ggml.add_bos_token": add, "tokenizer.ggml.bos_token_id": bos}
    kept = {key: value for key, value in values.items() if value is not None}
    assert read_back(kept).begin_ids == []


def test_missing_merges_are_an_error_only_if_tokens_are_merged():
    """Regression: writers omit an empty list, so a vocabulary of single bytes was refused as incomplete."""
    values = values_of(foreign("qwen2"))
    del values["tokenizer.ggml.merges"]
    with pytest.raises(ConfigError, match="merges"):
        read_back(values)
    single = [index for index, token in enumerate(values["tokenizer.ggml.tokens"]) if len(token) == 1]
    values |= {TYPES: [kind if index in single or kind == CONTROL else 5 for index, kind in enumerate(values[TYPES])]}
    assert read_back(values).decode(read_back(values).encode("ab")) == "ab"


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        (PRE, "viking", "tokenizer.ggml.pre='viking' is not supported; known: .*smollm"),
        (TYPES, [1] * 399, "400 tokens and 399 token types"),
        ("tokenizer.ggml.merges", ["q"], "a damaged tokenizer"),
        ("tokenizer.ggml.add_bos_token", "yes", "unexpected type"),
        ("tokenizer.ggml.model", "llama", "only byte-level BPE"),
    ],
)
def test_lists_that_do_not_fit_are_refused(key: str, value: object, word: str):
    with pytest.raises(ConfigError, match=f"a.gguf.*{word}"):
        read_back(values_of(foreign("smollm")) | {key: value})


def test_a_tokenizer_json_that_contradicts_the_list_is_refused():
    values = values_of(tiny_tokenizer())
    tokens = list(values[TOKENS])
    tokens[300], tokens[301] = tokens[301], tokens[300]
    with pytest.raises(ConfigError, match=r"a\.gguf: token 300 is"):
        read_back(values | {TOKENS: tokens})


def test_our_chat_format_is_stored_by_name_and_template(tmp_path: Path):
    chat, path = chat_format("v3", tiny_tokenizer()), tmp_path / "model.gguf"
    write_gguf(source_of(random_model(CASES["llama"])), path, "F32", chat.tokenizer, chat)
    question = [Message(role="user", content="the <think> 12")]
    assert load_chat(path).prompt(question) == chat.prompt(question)
    assert load_tokenizer(path).begin_ids == [0]
    meta = GGUFFile(path).meta
    assert "<｜Assistant｜>" in meta.get("tokenizer.chat_template", str)
    assert meta.get("tokenizer.ggml.eos_token_id", int) == chat.stop_token_ids[0]
    assert meta.get("tokenizer.ggml.padding_token_id", int) == 2


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path):
    big = train_tokenizer(["".join(f"{word:b} ".translate({48: "a", 49: "b"}) for word in range(2000))], 385)
    with pytest.raises(ConfigError, match="385 tokens, but the model has only 384"):
        write_gguf(source_of(random_model(CASES["llama"])), tmp_path / "model.gguf", "F32", big)
