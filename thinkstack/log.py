"""Run folders with provenance and metrics as JSON lines, and progress lines with the remaining time."""

import datetime
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from thinkstack.stopping import StopRequest
from thinkstack.types import ConfigError

METRICS, TIMINGS, CURVE = "metrics.jsonl", "timings.jsonl", "curve.jsonl"
"""JSON-lines files: metrics determined by settings and seed, timings, and evaluations during training."""
PROVENANCE = "provenance.json"
RECORD = "stage.json"
"""Fingerprint of the settings and inputs of a stage, seconds so far, and whether the stage is done."""
PLAIN_SECONDS = 15.0
"""Minimum seconds between two progress lines without a terminal."""

log = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically. Raises ConfigError if it cannot be written."""
    temporary = path.with_name(path.name + ".writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a last line truncated by a crash; [] for a missing file."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Run:
    """The folder of one stage: JSON-lines files, provenance.json, and the outputs of the stage."""

    def __init__(self, folder: Path, stop: StopRequest | None = None):
        """Creates the folder. stop: request to save the state and end; None: no such requests.

        Raises ConfigError if the folder cannot be created or written to.
        """
        self.folder, self.stop = folder, stop or StopRequest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"cannot write to {folder}: {error.strerror or error}; choose another folder with --out"
            ) from error

    def start(self, config: dict[str, Any], seed: int, machine: str) -> None:
        """Write provenance.json, and log the provenance in one line."""
        commit = commit_of(Path(__file__).parent)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = {"commit": commit, "date": now, "machine": machine, "seed": seed, "command": sys.argv, "config": config}
        write_json(self.folder / PROVENANCE, facts)
        log.info("%s: commit %s, seed %d, %s", self.folder, commit, seed, machine)

    def provenance(self) -> dict[str, Any]:
        """The provenance that `start` wrote; {} in a new folder."""
        path = self.folder / PROVENANCE
        try:
            provenance = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            provenance = {}
        return provenance if isinstance(provenance, dict) else {}

    @staticmethod
    def record_of(folder: Path) -> dict[str, Any]:
        """The record of the stage in a folder; {} if the folder has none."""
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write_record(self, fingerprint: str, seconds: float, done: bool) -> None:
        """Write the record of the stage."""
        write_json(self.folder / RECORD, {"fingerprint": fingerprint, "seconds": seconds, "done": done})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to the metrics; timings go to a separate file."""
        timings = {name: value for name, value in metrics.items() if is_timing(name)}
        self.append(METRICS, {"step": step} | {name: value for name, value in metrics.items() if name not in timings})
        if timings:
            self.append(TIMINGS, {"step": step} | timings)

    def append(self, file: str, row: dict[str, Any]) -> None:
        """Append one row to a JSON-lines file. Raises ConfigError if it cannot be written."""
        try:
            with (self.folder / file).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.folder / file}: {error.strerror or error}; free space, then resume"
            ) from error

    def rows(self, file: str = METRICS) -> list[dict[str, Any]]:
        """All rows logged so far."""
        return read_lines(self.folder / file)

    def mark(self) -> dict[str, int]:
        """Flush the JSON-lines files and return their sizes in bytes: part of a training state, for `rewind`."""
        sizes = {}
        for path in (self.folder / file for file in (METRICS, TIMINGS, CURVE)):
            if path.exists():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
                    sizes[path.name] = os.fstat(handle.fileno()).st_size
        return sizes

    def rewind(self, marks: dict[str, int]) -> None:
        """Truncate the JSON-lines files to the sizes that `mark` returned ({}: to 0); a resumed run writes the rest
        again.

        Raises ConfigError for a file that is shorter.
        """
        for path in (self.folder / file for file in (METRICS, TIMINGS, CURVE)):
            size, target = path.stat().st_size if path.exists() else 0, marks.get(path.name, 0)
            if size < target:
                raise ConfigError(
                    f"{path} has {size} bytes; it had {target} when the training state was saved: restore the file, or "
                    f"delete {self.folder} to start the stage again"
                )
            if size > target:
                os.truncate(path, target)


def is_timing(name: str) -> bool:
    """Whether a metric is a timing, which differs between two runs with the same seed."""
    return name.startswith("time/") or name.endswith("_per_second")


def commit_of(folder: Path) -> str:
    """The short hash of the git commit in `folder`, with "+" if files have changed; "unknown" without git."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class Progress:
    """Progress with the remaining time: a live line on a terminal, otherwise a line every PLAIN_SECONDS."""

    def __init__(self, title: str, total: int, done: int = 0, in_flight: int = 0):
        """in_flight: items that are worked on at the same time, each of which counts as half done."""
        self.title, self.total, self.done, self.first, self.in_flight = title, total, done, done, in_flight
        self.started = self.printed = time.monotonic()
        self.note = ""
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description:<22}"),
                progress.BarColumn(bar_width=28),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[left]} left"),
                progress.TextColumn("{task.fields[note]}"),
            )
            self.bar = progress.Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, left="-:--", note="")
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` to the number of completed items and show `note`."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, left=clock(self.seconds_left()), note=self.note)
        elif time.monotonic() - self.printed >= PLAIN_SECONDS or (self.done == self.total and self._is_long()):
            self.printed = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def _is_long(self) -> bool:
        return time.monotonic() - self.started >= 1

    def line(self) -> str:
        """Progress as plain text."""
        elapsed = clock(time.monotonic() - self.started)
        left = clock(self.seconds_left())
        return f"{self.title}: {self.done}/{self.total}, {elapsed} elapsed, {left} left  {self.note}"

    def seconds_left(self) -> float:
        """The time that the rest takes at the mean speed so far."""
        begun = min(self.in_flight, self.total - self.done) / 2
        done = max(self.done - self.first + begun, 1)
        return (time.monotonic() - self.started) / done * (self.total - self.done - begun)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to times["time/{name}_seconds"]."""
    start = time.perf_counter()
    yield
    key = f"time/{name}_seconds"
    times[key] = times.get(key, 0.0) + time.perf_counter() - start
