"""Read the user's files: text, JSON lines and parquet.

Text is UTF-8, with or without a byte-order mark. Lines end only at a line feed or CR LF: U+2028, U+0085 and form feeds
are part of a line, as in JSON. gzip is detected by its magic bytes, not by the file name. Errors are ConfigErrors with
one-line messages that contain the file name.
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
ROW_FORMATS = "JSON lines (.jsonl), a JSON list (.json), both also as .gz, or .parquet"
ROW_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
LFS_POINTER = b"version https://git-lfs"
"""First bytes of the placeholder of a file that Git LFS did not fetch."""
IS_LFS_POINTER = "is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
FOREIGN = {
    codecs.BOM_UTF16_LE: "is UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16 text; save it as UTF-8",
    LFS_POINTER: IS_LFS_POINTER,
    PARQUET: "is a parquet file; give it the extension .parquet",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"BZh91AY": "is compressed by bzip2; unpack it, or use gzip",
    b"\xfd7zXZ": "is compressed by xz; unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it, or use gzip",
    b"GGUF": "is a GGUF checkpoint, not text",
}
"""Magic bytes of file types that are not UTF-8 text, each mapped to the text that follows the path in the error
message."""


def lines(path: Path, what: str = "file") -> Iterator[str]:
    """Yield the lines of a text file, each with its "\\n" (CR LF becomes "\\n"); the last line may have none.

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
                position = f"line {number} has the byte 0x{raw[error.start]:02x}"
                raise ConfigError(f"{path} is not UTF-8 text ({position}); save it as UTF-8") from error
            yield f"{line[:-2]}\n" if line.endswith("\r\n") else line


def matching_files(path: Path) -> list[Path]:
    """Return the files that `path` matches, sorted; the last part of `path` may contain *.

    Raises ConfigError if there are none.
    """
    if "*" not in path.name:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; correct the path")
        return [path]
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise ConfigError(f"no file matches {path}; correct the path")
    return files


def read_text(path: Path, what: str = "file") -> str:
    """Return the text of a file, with CR LF converted to line feeds. Raises ConfigError like `lines`."""
    return "".join(lines(path, what))


def has_rows(path: Path) -> bool:
    """Whether a file has the extension of a row format, in upper or lower case."""
    return path.name.lower().removesuffix(".gz").endswith(ROW_ENDINGS)


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a JSON-lines, JSON-list or parquet file, each with its location for messages.

    Blank lines are skipped. In parquet, a null inside a column counts as a missing key. Raises ConfigError.
    """
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is {kind_of(row)}, not an object with keys; known: {ROW_FORMATS}")
        yield where, row


def read_object(path: Path) -> Row:
    """Return the JSON object in a file. Raises ConfigError."""
    value = parse_json(read_text(path), str(path), "fetch or write it again", has_unique_keys=False)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {kind_of(value)}, not a JSON object; fetch or write it again")
    return value


def parse_json(text: str, where: str, fix: str, has_unique_keys: bool = True) -> Any:
    """Return the value of JSON text.

    has_unique_keys: refuse duplicate keys in an object; otherwise the last value counts.
    Raises ConfigError, also for unpaired surrogates; its message starts with `where` and ends with `fix`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object if has_unique_keys else None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ConfigError(f"{where} is not JSON ({line}column {error.colno}: {error.msg}); {fix}") from error
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        raise ConfigError(f"{where} cannot be read as JSON ({error}); {fix}") from error
    if "\\ud" in text or "\\uD" in text:  # json accepts unpaired surrogates, which cannot be encoded
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(error.object[error.start]):04x}"
            raise ConfigError(
                f"{where} has {surrogate}, half of a character (an unpaired surrogate); remove it"
            ) from error
    return value


def log_unused_keys(path: Path, counts: Counter[str]) -> None:
    """Log the unused keys of the rows of a file. counts: number of rows with each key."""
    if counts:
        log.info("%s: keys not used: %s", path, ", ".join(f"{key} ({count:,} rows)" for key, count in counts.items()))


def kind_of(value: object) -> str:
    """Return the JSON type of a value for messages; the Python type for other values, which parquet files can have."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    kinds |= dict.fromkeys((int, float), "a number")
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"of type {type(value).__name__}")


def as_json(value: object) -> str:
    """Return a row value as JSON for messages; bytes and dates, which parquet files can have, as Python's repr."""
    return json.dumps(value, default=repr)


@contextmanager
def _opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed if it is gzip. Works for pipes too."""
    try:
        with path.open("rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == GZIP else nullcontext(raw) as file:
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is cut off or damaged ({str(error).lower()}); fetch it again") from error
    except IsADirectoryError as error:
        raise ConfigError(f"cannot read the {what} {path}: it is a folder; give a file") from error
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror or error}") from error


def _refuse_foreign(path: Path, start: bytes) -> None:
    problem = next((message for magic, message in FOREIGN.items() if start.startswith(magic)), None)
    if problem is None and b"\0" in start:
        problem = "contains zero bytes, as UTF-16 text and binary files do; save it as UTF-8 text"
    if problem is not None:
        raise ConfigError(f"{path} {problem}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text, is_first = lines(path), True
    for number, line in enumerate(text, start=1):
        line = line.lstrip("\ufeff")  # files joined by `cat` have byte-order marks inside
        if is_first and line.lstrip().startswith("["):
            values = parse_json("".join((line, *text)), str(path), f"known: {ROW_FORMATS}")
            yield from ((f"{path} entry {index}", value) for index, value in enumerate(values, start=1))
        elif line.strip():
            is_first = False
            fix = f"known: {ROW_FORMATS}" if line.endswith("\n") else "the file may be cut off: fetch it again"
            yield f"{path} line {number}", parse_json(line, f"{path} line {number}", fix)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Build an object and refuse duplicate keys: Python would drop all values of a duplicate key except the last."""
    value = dict(pairs)
    if len(value) != len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ConfigError(f"has the key {duplicate!r} twice in one object; keep one of them")
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with _opened(path, "file") as file:
        start = file.read(64)
        file.seek(max(file.seek(0, 2) - len(PARQUET), len(PARQUET)))
        end = file.read()
    if not start.startswith(PARQUET):
        _refuse_foreign(path, start)
        raise ConfigError(f"{path} is not a parquet file; known: {ROW_FORMATS}")
    if end != PARQUET:
        raise ConfigError(f"{path} is cut off: it does not end with parquet's magic bytes; fetch it again")
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install 'thinkstack[parquet]', or give JSON lines") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is a damaged parquet file ({reason}); fetch it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Drop null keys: parquet gives every object of a column the keys of all objects, with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
