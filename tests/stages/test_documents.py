"""What pre-training reads: holes and split tokens at the rates asked for, sampled by index, never wider than a row."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from thinkstack.data import DocumentSource, Example
from thinkstack.stages.documents import make_source
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.tasks.puzzles.corpus import CorpusConfig, document
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.text.boundary import BoundarySplitter
from thinkstack.text.chat import ChatFormat, chat_format
from thinkstack.text.tokenizer import BOS, CONTROL, EOS, FIM, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer, train_tokenizer
from thinkstack.types import ConfigError

PLAIN = PretrainConfig(row_tokens=300, corpus=CorpusConfig(prose_share=0.5))
COUNT = 300


@cache
def tokenizer(control: tuple[str, ...] = (*CONTROL, *FIM), join_breaks: bool = True) -> Tokenizer:
    suite = puzzle_tasks(PLAIN.tasks)
    docs = [document(suite, PLAIN.corpus, 1, index) for index in range(300)]
    texts = [f"{doc.question}\n{doc.text}" for doc in docs]
    return train_tokenizer(texts, 640, ("<answer>", "</answer>"), control, join_breaks)


def chat() -> ChatFormat:
    return chat_format("r1_zero_short", tokenizer())


def source(**changes: object) -> DocumentSource:
    return make_source(replace(PLAIN, **changes), puzzle_tasks(PLAIN.tasks), chat())


def is_reworked(sample: Example) -> bool:
    return tokenizer().control_id(FIM_BEGIN) in sample.ids


def text_of(sample: Example) -> str:
    """The document's text without BOS and EOS, put together again if it has a hole."""
    names = (FIM_BEGIN, FIM_HOLE, FIM_END, EOS, BOS)
    begin, hole, end, eos, bos = (tokenizer().control_id(name) for name in names)
    ids = [token for token in sample.ids if token not in (bos, eos)]
    if begin in ids:
        first, second = ids.index(hole), ids.index(end)
        ids = ids[1:first] + ids[second + 1 :] + ids[first + 1 : second]
    return tokenizer().decode(ids)


def test_no_document_changes_without_transforms():
    suite, read = puzzle_tasks(PLAIN.tasks), source()
    for index in range(50):
        doc = document(suite, PLAIN.corpus, PLAIN.seed, index)
        assert chat().text_of(read(index).ids[1:]).endswith(doc.text)
        assert not is_reworked(read(index))


def test_plain_text_gets_holes_at_its_rate_and_questions_never():
    suite, read = puzzle_tasks(PLAIN.tasks), source(fim_rate=0.25)
    texts = [index for index in range(COUNT) if not document(suite, PLAIN.corpus, 0, index).question]
    reworked = {index for index in range(COUNT) if is_reworked(read(index))}
    assert reworked <= set(texts)
    expected, error = 0.25 * len(texts), (0.25 * 0.75 * len(texts)) ** 0.5
    assert len(texts) > 100 and abs(len(reworked) - expected) < 4 * error


@pytest.mark.parametrize("changes", [{"fim_rate": 1.0}, {"boundary_split_share": 0.5}, {"fim_rate": 1.0, "seed": 3}])
def test_the_text_of_every_document_survives(changes):
    plain, read = source(seed=changes.get("seed", 0)), source(**changes)
    changed = 0
    for index in range(100):
        assert text_of(read(index)) == text_of(plain(index))
        assert read(index) == read(index), "a document is named by its index"
        assert read(index).loss_mask == (0,) + (1,) * read(index).width
        changed += read(index) != plain(index)
    assert changed > 20


def test_a_document_that_would_not_fit_its_row_stays_as_it_was():
    wide = [source()(index) for index in range(60)]
    width = max(sample.width for sample in wide)
    for changes in ({"fim_rate": 1.0}, {"boundary_split_share": 1.0}):
        narrow = [source(row_tokens=width, **changes)(index) for index in range(60)]
        assert all(sample.width <= width for sample in narrow)
        assert any(mine != plain for mine, plain in zip(narrow, wide, strict=True))


def test_files_leave_room_for_holes_and_stay_whole_where_a_character_is_cut(tmp_path: Path):
    """A piece that ends within a character has no text to put together again."""
    path = tmp_path / "a.txt"
    path.write_text(
        "plain words, many of them, one after another; " * 40 + "\U0001f600\U0001f601" * 60, encoding="utf-8"
    )
    read = source(text_files=(str(path),), text_share=1.0, fim_rate=1.0, row_tokens=48)
    samples = [read(index) for index in range(200)]
    assert all(sample.width <= 48 for sample in samples)
    assert any(map(is_reworked, samples))
    for sample in samples:
        if is_reworked(sample):
            assert "\ufffd" not in text_of(sample) and text_of(sample) in path.read_text(encoding="utf-8")


def test_the_share_of_split_tokens_is_the_configured_one():
    splitter, counts = BoundarySplitter(tokenizer()), []
    for share in (0.0, 0.3):
        read = source(boundary_split_share=share) if share else source()
        counts.append(sum(token in splitter.pieces_by_token for index in range(COUNT) for token in read(index).ids))
    error = (0.3 * 0.7 * counts[0]) ** 0.5
    assert counts[0] > 200 and abs(counts[1] - 0.7 * counts[0]) < 4 * error


@pytest.mark.parametrize("changes", [{"fim_rate": 0.1}, {"boundary_split_share": 0.1}])
def test_a_tokenizer_that_lacks_the_tokens_is_refused(changes):
    format_without = chat_format("r1_zero_short", tokenizer(CONTROL, join_breaks=False))
    with pytest.raises(ConfigError, match=r"set (boundary_split_share|fim_rate)=0"):
        make_source(replace(PLAIN, **changes), puzzle_tasks(PLAIN.tasks), format_without)
