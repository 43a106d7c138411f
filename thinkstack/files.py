"""Files that people bring: text, JSON lines and parquet, opened in one place.

Text is UTF-8, with or without a byte-order mark. A line ends at a line feed or at CR LF and nowhere else: U+2028,
U+0085 and form feeds stand within a line, as JSON allows. gzip is known by its first bytes, whatever a file is called.
Whatever is wrong with a file is a ConfigError of one line that begins with its name.
"""

import codecs
import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from thinkstack.types import ConfigError

log = logging.getLogger(__name__)
Row = dict[str, Any]
ROW_FORMS = "JSON lines (.jsonl), a JSON list (.json), both also as .gz, or .parquet"
ROW_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
LFS_POINTER = b"version https://git-lfs"
"""How the file begins that lies in a clone in place of one that was not fetched."""
IS_LFS_POINTER = "is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"
FOREIGN = {
    codecs.BOM_UTF16_LE: "is UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16 text; save it as UTF-8",
    LFS_POINTER: IS_LFS_POINTER,
    PARQUET: "is a parquet file; give it the ending .parquet",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"BZh91AY": "is compressed by bzip2; unpack it, or use gzip",
    b"\xfd7zXZ": "is compressed by xz; unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it, or use gzip",
    b"GGUF": "is a GGUF checkpoint, not text",
}
"""What files that are not UTF-8 text begin with, and what they are."""


def lines(path: Path, what: str = "file") -> Iterator[str]:
    """The lines of a text file in order, each with its "\\n" (CR LF becomes that), the last one with or without.

    what: a noun for messages. Raises ConfigError for a file that cannot be read, is damaged or is not UTF-8 text.
    """
    with _opened(path, what) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                _refuse_foreign(path, raw)
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                found = f"line {number} has the byte 0x{raw[error.start]:02x}"
                raise ConfigError(f"{path} is not UTF-8 text ({found}); save it as UTF-8") from error
            yield f"{line[:-2]}\n" if line.endswith("\r\n") else line


def matching_files(path: Path) -> list[Path]:
    """The files that `path` means, sorted; its last part may hold *. Raises ConfigError if there are none."""
    if "*" not in path.name:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; correct the path")
        return [path]
    found = sorted(path.parent.glob(path.name))
    if not found:
        raise ConfigError(f"no file matches {path}; correct the path")
    return found


def read_text(path: Path, what: str = "file") -> str:
    """The text of a file. CR LF becomes a line feed. Raises ConfigError as `lines`."""
    return "".join(lines(path, what))


def has_rows(path: Path) -> bool:
    """Whether the ending of a file says that it holds rows, in any case of letters."""
    return path.name.lower().removesuffix(".gz").endswith(ROW_ENDINGS)


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file of JSON lines, a JSON list or parquet, each with its address for messages; blank lines are
    left out. In parquet, a key within a column that is null is a key that the row does not have. Raises ConfigError.
    """
    found = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)
    for where, row in found:
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is {kind_of(row)}, not an object with keys; known: {ROW_FORMS}")
        yield where, row


def read_object(path: Path) -> Row:
    """The JSON object that a file holds. Raises ConfigError."""
    found = parse_json(read_text(path), str(path), "fetch or write it again", has_unique_keys=False)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is {kind_of(found)}, not a JSON object; fetch or write it again")
    return found


def parse_json(text: str, where: str, way_out: str, has_unique_keys: bool = True) -> Any:
    """The value that JSON text holds. has_unique_keys: refuse a key that stands twice in an object; without, its last
    value counts. Raises ConfigError, which begins with `where` and ends with `way_out`; also for half a character.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object if has_unique_keys else None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ConfigError(f"{where} is not JSON ({line}column {error.colno}: {error.msg}); {way_out}") from error
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        raise ConfigError(f"{where} cannot be read as JSON ({error}); {way_out}") from error
    if "\\ud" in text or "\\uD" in text:  # json takes half of a surrogate pair for a character; nothing can encode it
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ConfigError(f"{where} has {half}, half of a character that was cut in two; remove it") from error
    return value


def log_unused_keys(path: Path, counts: Counter[str]) -> None:
    """Say once for a file which keys of its rows were not used. counts: rows that have each."""
    if counts:
        log.info("%s: keys not used: %s", path, ", ".join(f"{key} ({count:,} rows)" for key, count in counts.items()))


def kind_of(value: object) -> str:
    """What a value of a row is, in JSON's words; parquet has others too."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    kinds |= dict.fromkeys((int, float), "a number")
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"of type {type(value).__name__}")


def as_json(value: object) -> str:
    """A value of a row for messages, as JSON writes it; bytes and dates of parquet as Python does."""
    return json.dumps(value, default=repr)


@contextmanager
def _opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """The bytes of a file, those that gzip packed if it did. Pipes can be read too."""
    try:
        with path.open("rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == GZIP else nullcontext(raw) as file:
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is cut off or damaged ({str(error).lower()}); fetch it again") from error
    except IsADirectoryError as error:
        raise ConfigError(f"cannot read the {what} {path}: it is a folder; name a file") from error
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror or error}") from error


def _refuse_foreign(path: Path, start: bytes) -> None:
    found = next((says for mark, says in FOREIGN.items() if start.startswith(mark)), None)
    if found is None and b"\0" in start:
        found = "has bytes of value 0, as UTF-16 text and binary files do; save it as UTF-8 text"
    if found is not None:
        raise ConfigError(f"{path} {found}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text, is_first = lines(path), True
    for number, line in enumerate(text, start=1):
        line = line.lstrip("\ufeff")  # files joined by `cat` bring their byte-order marks along
        if is_first and line.lstrip().startswith("["):
            values = parse_json("".join((line, *text)), str(path), f"known: {ROW_FORMS}")
            yield from ((f"{path} entry {place}", value) for place, value in enumerate(values, start=1))
        elif line.strip():
            is_first = False
            way_out = f"known: {ROW_FORMS}" if line.endswith("\n") else "the file may be cut off: fetch it again"
            yield f"{path} line {number}", parse_json(line, f"{path} line {number}", way_out)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """An object whose keys differ. Python would drop all values but the last of a key that stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ConfigError(f"has the key {twice!r} twice in one object; keep one of them")
    return found


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with _opened(path, "file") as file:
        start = file.read(64)
        file.seek(max(file.seek(0, 2) - len(PARQUET), len(PARQUET)))
        end = file.read()
    if not start.startswith(PARQUET):
        _refuse_foreign(path, start)
        raise ConfigError(f"{path} is no parquet file; known: {ROW_FORMS}")
    if end != PARQUET:
        raise ConfigError(f"{path} is cut off: it does not end as a parquet file does; fetch it again")
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow; pip install pyarrow, or give JSON lines") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is a damaged parquet file ({reason}); fetch it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A table gives every object of a column the keys of all of them, filled up with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
