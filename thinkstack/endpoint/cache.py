"""Completions by content, in a folder of JSON-lines files that processes may share.

Each process appends to a file of its own, a line per completion, before the completion is reported: a killed process
loses none, a power cut at most those of the last second. A line without its end is ignored. Folders may be merged by
copying their files.
"""

import json
import logging
import os
import re
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from thinkstack.types import ConfigError

log = logging.getLogger(__name__)
PATTERN = "completions-*.jsonl"
LINE = re.compile(rb'\{"key": "([0-9a-f]{64})", "row": ')
"""The start of a line, so that the index needs no parsing of JSON."""
REFRESH_SECONDS = SYNC_SECONDS = 1.0
"""Minimum times between two looks at the files of other processes, and between two flushes to the disk."""


class CompletionCache:
    """An index of the lines of all files of a folder: no line is in memory."""

    def __init__(self, folder: Path):
        """Creates the folder and reads its files. Raises ConfigError."""
        self.folder = folder
        self._index: dict[bytes, tuple[Path, int]] = {}
        """By key: file and position of the line."""
        self._sizes: dict[Path, int] = {}
        """Bytes of each file that are in the index."""
        self._own: Path | None = None
        self._file: int | None = None
        self._lock, self._refreshed, self._synced = threading.Lock(), 0.0, 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._read_files()
        except OSError as error:
            raise _cannot("read", folder, error) from error

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: str) -> Any:
        """The row of a key, of whichever process wrote it; None if there is none."""
        with self._lock:
            found = self._index.get(bytes.fromhex(key))
            if found is None and time.monotonic() - self._refreshed >= REFRESH_SECONDS:
                self._read_files()
                found = self._index.get(bytes.fromhex(key))
        if found is None:
            return None
        path, position = found
        try:
            with path.open("rb") as file:
                file.seek(position)
                return json.loads(file.readline())["row"]
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s has a damaged line at byte %d; its completion is asked for again", path, position)
            with self._lock:
                self._index.pop(bytes.fromhex(key), None)
            return None

    def open(self) -> None:
        """Create the file of this process, if there is none yet. Raises ConfigError if it cannot be written."""
        with self._lock:
            self._open()

    def put(self, key: str, row: Any) -> None:
        """Append a row. Raises ConfigError if it cannot be written."""
        line = f'{{"key": "{key}", "row": {json.dumps(row)}}}\n'.encode()
        with self._lock:
            file = self._open()
            assert self._own is not None
            start = self._sizes[self._own]
            try:
                written = 0
                while written < len(line):
                    written += os.write(file, line[written:])
                if time.monotonic() - self._synced >= SYNC_SECONDS:
                    os.fsync(file)
                    self._synced = time.monotonic()
            except OSError as error:
                os.ftruncate(file, start)  # which needs no space: no later line may follow half of this one
                raise _cannot("write", self._own, error) from error
            self._index.setdefault(bytes.fromhex(key), (self._own, start))
            self._sizes[self._own] = start + len(line)

    def close(self) -> None:
        """Close the file of this process; without a line it is deleted."""
        with self._lock:
            if self._file is not None and self._own is not None:
                os.fsync(self._file)
                os.close(self._file)
                if not self._sizes.pop(self._own):
                    self._own.unlink(missing_ok=True)
            self._file = None

    def _open(self) -> int:
        if self._file is None:
            self._own = self.folder / PATTERN.replace("*", uuid.uuid4().hex[:12])
            try:
                self._file = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            except OSError as error:
                raise _cannot("write", self._own, error) from error
            self._sizes[self._own] = 0
        return self._file

    def _read_files(self) -> None:
        """Add what is new in the files of other processes to the index; of two rows of a key the first one counts."""
        for path in sorted(set(self.folder.glob(PATTERN)) - {self._own}):
            with suppress(FileNotFoundError):  # a process that wrote nothing deletes its file
                if path.stat().st_size > self._sizes.get(path, 0):
                    self._read_file(path)
        self._refreshed = time.monotonic()

    def _read_file(self, path: Path) -> None:
        position = self._sizes.get(path, 0)
        with path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # a process was killed here, or writes now
                found = LINE.match(line)
                if found:
                    self._index.setdefault(bytes.fromhex(found[1].decode()), (path, position))
                else:
                    log.warning("%s has a damaged line at byte %d, which is ignored", path, position)
                position += len(line)
        self._sizes[path] = position


def _cannot(verb: str, path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(f"cannot {verb} {path}: {reason}; free space or choose another folder as cache")
