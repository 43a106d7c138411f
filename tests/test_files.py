"""Files that people bring: what a line is, which files are refused and in which words, one way for all readers."""

import datetime
import decimal
import gzip
import json
import random
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thinkstack.checkpoint.json_reader import read_json
from thinkstack.checkpoint.tensor_file import TensorFiles, read_header
from thinkstack.config import read_toml
from thinkstack.data import read_texts
from thinkstack.files import read_rows, read_text
from thinkstack.rl.rollout_log import read_lines
from thinkstack.stages.conversations import read_conversations
from thinkstack.stages.generate import read_prompts
from thinkstack.tasks.benchmarks.datasets import Gsm8k
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError

BOM = b"\xef\xbb\xbf"
ROWS = b"".join(b'{"question": "q%d", "answer": "a #### %d", "text": "t"}\n' % (i, i) for i in range(300))
READERS = {
    "rows": lambda path: list(read_rows(path)),
    "conversations": lambda path: read_conversations([str(path)]),
    "a data set": Gsm8k("gsm8k", TaskConfig()).read,
    "texts": read_texts,
    "prompts": read_prompts,
    "rollouts": read_lines,
    "settings": read_toml,
    "a config.json": read_json,
}
"""Everything that opens a text file which a person may have made."""
NOT_TEXT = {
    "UTF-16 of Notepad": ("\ufeff" + ROWS.decode()).encode("utf-16-le"),
    "UTF-16, the other way round": b"\xfe\xff" + ROWS.decode().encode("utf-16-be"),
    "UTF-16 without a mark": ROWS.decode().encode("utf-16-le"),
    "UTF-32": ROWS.decode().encode("utf-32"),
    "Latin-1": ROWS.replace(b"q7", "é".encode("latin-1")),
    "Windows-1252": b"\x93quoted\x94\n" + ROWS,
    "UTF-8 cut within a character": ROWS + "é".encode()[:1],
    "half of a pair": ROWS + "\ud83d".encode("utf-8", "surrogatepass"),
    "a program": b"\x7fELF\x02\x01\x01\x00" + bytes(20),
    "zip": b"PK\x03\x04\x14\x00",
    "zstd": b"\x28\xb5\x2f\xfd\x04\x00",
    "xz": b"\xfd7zXZ\x00",
    "bzip2": b"BZh91AY&SY",
    "parquet": b"PAR1\x15\x04",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:5a\nsize 9\n",
    "GGUF": b"GGUF\x03\x00\x00\x00",
}


def made(folder: Path, raw: bytes, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def refusal(reader, path: Path) -> str:
    """The message of the ConfigError that `reader` raises, which names the file in one line."""
    with pytest.raises(ConfigError) as error:
        reader(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("raw", NOT_TEXT.values(), ids=NOT_TEXT)
def test_a_file_that_is_not_utf_8_text_is_named_with_the_way_out(tmp_path, reader, raw):
    error_text = refusal(reader, made(tmp_path, raw))
    assert any(
        way in error_text for way in ("save it as UTF-8", "unpack it", "git lfs pull", ".parquet", "checkpoint")
    ), error_text


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_cut_or_damaged_gz_is_one_line_with_its_name(tmp_path, reader):
    """EOFError, zlib.error and BadGzipFile came up as tracebacks."""
    whole = gzip.compress(ROWS)
    damaged = {
        "half": whole[: len(whole) // 2],
        "without its end": whole[:-8],
        "one byte short": whole[:-1],
        "within its header": whole[:5],
        "zeros in its middle": whole[:40] + bytes(40) + whole[80:],
        "another checksum": whole[:-6] + bytes(2) + whole[-4:],
        "text behind it": whole + b"more",
    }
    for name, raw in damaged.items():
        error_text = refusal(reader, made(tmp_path, raw, "x.jsonl.gz"))
        assert "cut off or damaged" in error_text and "fetch it again" in error_text, (name, error_text)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_folder_and_a_missing_file_are_refused_in_our_words(tmp_path, reader):
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("folder.jsonl", "missing.jsonl"):
        assert "Errno" not in refusal(reader, tmp_path / name)


@pytest.mark.parametrize(
    "reader", [reader for name, reader in READERS.items() if name not in ("rows", "rollouts", "settings")]
)
@pytest.mark.parametrize("raw", [b"", BOM, b"\n\r\n", gzip.compress(b"")], ids=["empty", "a mark", "breaks", "gz"])
def test_a_file_without_content_says_so(tmp_path, reader, raw):
    refusal(reader, made(tmp_path, raw))


def test_random_damage_never_comes_up_as_another_error(tmp_path):
    rng, whole = random.Random(0), gzip.compress(ROWS)
    for _ in range(300):
        raw = bytearray(rng.choice((ROWS, whole)))
        for _ in range(rng.choice((1, 3))):
            raw[rng.randrange(min(len(raw), 600))] = rng.randrange(256)
        try:
            read_conversations([str(made(tmp_path, bytes(raw[: rng.choice((len(raw), rng.randrange(len(raw))))])))])
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", [b"", BOM], ids=["no mark", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\r\n \t\r\n"], ids=["LF", "CR LF", "blanks", "both"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_rows_and_prompts_are_the_same_however_they_were_saved(tmp_path, pack, mark, end, last):
    """A byte-order mark was an unexpected character of the first row, and a letter of the first prompt."""
    rows = [b'{"question": "q1", "answer": "a"}', b'{"question": "q2", "answer": "a"}']
    path = made(tmp_path, pack(mark + end.join(rows) + end * last), "x.jsonl.gz")
    assert [row["question"] for _, row in read_rows(path)] == ["q1", "q2"]
    assert [conversation[0].content for conversation in read_conversations([str(path)])] == ["q1", "q2"]
    assert read_prompts(made(tmp_path, pack(mark + end.join((b"one", b"two ")) + end * last))) == ["one", "two "]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CR LF"])
@pytest.mark.parametrize("marks", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1), (1, 2, 0)])
def test_rows_of_files_that_were_joined_may_begin_with_a_mark_each(tmp_path, marks, end):
    rows = [BOM * marks[i] + b'{"question": "q%d"}' % i for i in range(3)]
    found = [row["question"] for _, row in read_rows(made(tmp_path, end.join(rows)))]
    assert found == ["q0", "q1", "q2"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path, mark):
    """str.splitlines ends a line at each of these: one prompt became two, and one row of JSON two halves."""
    assert read_prompts(made(tmp_path, f"a{mark}b\nc\r\n".encode())) == [f"a{mark}b", "c"]
    row = json.dumps({"question": f"a{mark}b", "answer": "c"}, ensure_ascii=False)
    assert [found["question"] for _, found in read_rows(made(tmp_path, f"{row}\n{row}\n".encode()))] == [
        f"a{mark}b"
    ] * 2
    assert [found["question"] for found in read_lines(made(tmp_path, zlib_gz(f"{row}\n{row}")))] == [f"a{mark}b"] * 2
    assert read_text(made(tmp_path, f"a{mark}b\r\nc".encode())) == f"a{mark}b\nc"


def zlib_gz(text: str) -> bytes:
    """gzip as another library makes it: no name, no time, one member after the other."""
    half = len(text) // 2
    packers = zlib.compressobj(wbits=31), zlib.compressobj(wbits=31)
    parts = zip(packers, (text[:half], text[half:]), strict=True)
    return b"".join(packer.compress(part.encode()) + packer.flush() for packer, part in parts)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            b'{"question": "q", "answer": "a"}\n{"question": "q", "ans',
            r"line 2 is not JSON \(column 19.*may be cut off",
        ),
        (b"{'question': 'q'}\n", r"line 1 is not JSON \(column 2: Expecting property name"),
        (b'{"question": "q"} {"question": "r"}\n', r"line 1 is not JSON \(column 19: Extra data"),
        (b"question,answer\nq,a\n", "line 1 is not JSON.*known: JSON lines"),
        (b"<!DOCTYPE html>\n", "line 1 is not JSON"),
        (b'{\n  "question": "q",\n  "answer": "a"\n}\n', "line 1 is not JSON.*known: JSON lines"),
        (b'[{"question": "q"},\n {"question": ', r"is not JSON \(line 2, column"),
        (b'"question"\n', "line 1 is text, not an object"),
        (b'{"question": "q"}\n[1]\n', "line 2 is a list, not an object"),
        (b"[1, 2]\n", "entry 1 is a number, not an object"),
        (b"null\n", "line 1 is null, not an object"),
        (b'{"question": "q", "answer": "a", "question": "r"}\n', "line 1 has the key 'question' twice"),
        (b'{"a": [{"role": "user", "content": "q", "role": "x"}]}\n', "line 1 has the key 'role' twice"),
        (b'[{"a": 1}, {"a": 1, "a": 1}]', r"x\.jsonl has the key 'a' twice"),
        (b'{"question": "\\ud83d"}\n', r"line 1 has \\ud83d, half of a character"),
        (b'{"question": ["a", {"b": "\\uDE00 x"}]}\n', r"line 1 has \\ude00, half of a character"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", "line 1 cannot be read as JSON"),
    ],
)
def test_a_row_that_is_none_is_named_by_its_line(tmp_path, raw, message):
    with pytest.raises(ConfigError, match=message):
        list(read_rows(made(tmp_path, raw)))


def test_a_list_of_rows_is_read_like_lines(tmp_path):
    rows = [{"question": f"{i}", "answer": "😀"} for i in range(3)]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), f"\n {json.dumps(rows)}"):
        path = made(tmp_path, text.encode(), "x.json")
        assert [row for _, row in read_rows(path)] == rows
    assert [where for where, _ in read_rows(path)] == [f"{path} entry {i}" for i in (1, 2, 3)]


def test_recipes_read_with_a_mark_and_either_line_end_and_name_what_is_wrong(tmp_path):
    raw = b'[shared]\nseed = 0\nname = "a\xc2\x85b"\n'
    wanted = {"shared": {"seed": 0, "name": "a\x85b"}}
    for file in (raw, BOM + raw, raw.replace(b"\n", b"\r\n"), BOM + raw.replace(b"\n", b"\r\n"), raw[:-1]):
        assert read_toml(made(tmp_path, file, "r.toml")) == wanted
    for broken in (raw[:-2], b"[shared\n", b"seed = \n", b"day = 2026-13-01\n", b"[" * 3000, b"a = " + b"[" * 9000):
        assert "is not TOML" in refusal(read_toml, made(tmp_path, broken, "r.toml"))


def test_texts_are_whole_files_or_the_text_of_each_row(tmp_path, caplog):
    """A file of JSON lines was trained on as text, with its braces and keys."""
    caplog.set_level("INFO")
    assert read_texts(made(tmp_path, gzip.compress(BOM + b"one\r\ntwo\rthree"), "a.txt.gz")) == ["one\ntwo\rthree"]
    rows = b'{"text": "one", "url": "u"}\n{"text": "two", "url": "v", "id": 1}\n'
    assert read_texts(made(tmp_path, rows, "c4.jsonl")) == ["one", "two"]
    assert f"{tmp_path / 'c4.jsonl'}: keys not used: url (2 rows), id (1 rows)" in caplog.text
    for name in ("C4.JSONL", "c4.ndjson", "c4.Json.GZ", "c4.json"):
        assert read_texts(made(tmp_path, b'[{"text": "one"}]', name)) == ["one"]
    for row, error_text in (
        (b'{"content": "one"}', 'line 1 has no key "text" (it has content)'),
        (b'{"Text": "one"}', 'line 1 has no key "text" (it has Text)'),
        (b'{"text": null}', 'line 1: "text" is null, not text'),
        (b'{"text": ["one"]}', 'line 1: "text" is a list, not text'),
        (b'{"text": 1}', 'line 1: "text" is a number, not text'),
        (b'{"text": false}', 'line 1: "text" is true or false, not text'),
    ):
        assert error_text in refusal(read_texts, made(tmp_path, row, "c4.jsonl"))
    for name, raw in (
        ("a.txt", b""),
        ("b.txt", BOM),
        ("c.jsonl", b""),
        ("d.jsonl", b'{"text": ""}'),
        ("e.json", b"[]"),
    ):
        assert "has no text" in refusal(read_texts, made(tmp_path, raw, name))


def test_a_parquet_file_that_is_cut_or_none_is_named_before_pyarrow_is_imported(tmp_path):
    for raw, message in (
        (b"", "is not a parquet file"),
        (b"PAR1", "cut off"),
        (b"PAR1\x15\x04PAR1", "needs pyarrow|damaged"),
        (b"PAR1\x15\x04\x15\x10", "cut off"),
        (b"PAR", "is not a parquet file"),
        (ROWS, "is not a parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:5a\n", "Git LFS pointer"),
        (gzip.compress(b"PAR1...."), "cut off"),
    ):
        with pytest.raises(ConfigError, match=rf"x\.parquet.*({message})"):
            read_conversations([str(made(tmp_path, raw, "x.parquet"))])


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "hm_fim.parquet").write_bytes(b"PAR1\x15\x04PAR1")
    task = make_task("fim", TaskConfig(data=str(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"hm_fim\.parquet needs pyarrow: pip install 'thinkstack\[parquet\]', or give"
    ):
        task.problems("test", 0)


def test_damaged_parquet_is_one_line_and_nulls_within_a_column_are_no_keys(tmp_path):
    """Arrow gives every object of a column the keys of all: a call of one tool had the arguments of the other, null."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]
    path = tmp_path / "x.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": turns, "id": None}, {"messages": turns, "id": 7}]), path
    )
    assert [row for _, row in read_rows(path)] == [{"messages": turns, "id": None}, {"messages": turns, "id": 7}]
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(100):
        raw = bytearray(whole)
        for _ in range(8):
            raw[rng.randrange(4, len(raw) - 4)] = rng.randrange(256)
        try:
            list(read_rows(made(tmp_path, bytes(raw), "x.parquet")))
        except ConfigError as error:
            assert "x.parquet" in str(error) and "\n" not in str(error)


def test_values_that_only_parquet_has_are_refused_by_their_type(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    day = datetime.date(2025, 1, 20)
    for turns, more, error_text in (
        ([{"role": b"user", "content": "q"}], {}, "role .* is not supported"),
        ([{"role": "user", "content": b"q"}], {}, "content or value is of type bytes, not text"),
        ([{"role": "user", "content": day}], {}, "content or value is of type date, not text"),
        ([{"role": "assistant", "content": "a", "weight": decimal.Decimal("0.5")}], {}, "weight=.* is not supported"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"d": day}}]}], {}, "written as JSON"),
        ([], {"question": day, "answer": "a"}, "the question is of type date, not text"),
        ([], {"question": "q", "answer": "a", "tools": [{"name": "f", "parameters": {"d": day}}]}, "written as JSON"),
    ):
        row = ({"messages": turns} if turns else {}) | more
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.PARQUET")
        with pytest.raises(ConfigError, match=rf"x\.PARQUET row 1.*{error_text}"):
            read_conversations([str(tmp_path / "x.PARQUET")])


def test_json_and_tokenizers_of_a_checkpoint_may_begin_with_a_mark(tmp_path):
    from tests.tiny import tiny_tokenizer

    made(tmp_path, BOM + tiny_tokenizer().spec.encode(), "tokenizer.json")
    assert Tokenizer.load(tmp_path).encode("12") == tiny_tokenizer().encode("12")
    assert read_json(made(tmp_path, BOM + b'{"a": "\xc2\x85"}\r\n', "config.json")) == {"a": "\x85"}


def test_a_cut_or_damaged_safetensors_file_is_one_line_with_its_name(tmp_path):
    """Every cut, and damage of its header, its length and its offsets."""
    path, rng = tmp_path / "model.safetensors", random.Random(0)
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, path)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        assert "truncated or not a safetensors file" in refusal(read_header, made(tmp_path, whole[:cut], path.name))
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            _, header = read_header(made(tmp_path, bytes(raw), path.name))
            TensorFiles(dict.fromkeys(header, path)).read(next(iter(header)))
        except ConfigError as error:
            assert path.name in str(error) and "\n" not in str(error)
    for raw in (whole + b"more", b"", b"<!DOCTYPE html>", gzip.compress(whole), whole[8:]):
        refusal(read_header, made(tmp_path, raw, path.name))
    for name in ("missing.safetensors", tmp_path.name):
        assert "cannot read" in refusal(read_header, tmp_path.parent / name)
