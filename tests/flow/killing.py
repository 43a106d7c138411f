"""A recipe run by the real command line in a process that is killed again and again, and what it leaves."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

RECIPE = """
[shared]
seed = 3
tasks = ["chain", "cups"]

[stages.base]
stage = "pretrain"
steps = {steps}
rows = 2
row_tokens = 160
save_steps = 3
ema_decay = 0.9
model = {{ num_layers = 2, vocab_size = 512 }}
trainer = {{ micro_batch_tokens = 160, workers = 2 }}

[stages.zero]
stage = "rl"
start = "base"
steps = {steps}
prompts_per_step = 2
group_size = 4
max_tokens = 12
dynamic_sampling = false
reward = {{ parts = {{ random = 1.0 }} }}
trainer = {{ micro_batch_tokens = 512, workers = 2, bias_speed = 0.0, balance_weight = 0.0, mtp_detached = true }}
eval_steps = 5
eval_problems = 2
eval_samples = 2
save_steps = 3

[stages.zero-eval]
stage = "evaluate"
start = "zero"
num_problems = 4
samples = 2
max_tokens = 12
"""
"""The coin as reward lets every group differ, so that every step of this short run moves the weights."""
POLL_SECONDS = 5e-4
CLOCK = ("timings.jsonl", "provenance.json", "stage.json")
"""Files that say when and how long."""


class Process(Protocol):
    """A running recipe."""

    @property
    def pid(self) -> int | None: ...

    def is_alive(self) -> bool: ...

    def join(self) -> None: ...


Launch = Callable[[Path, Path], Process]
"""Begins `thinkstack run RECIPE --out FOLDER`."""


class Command:
    """The command line as a program of its own."""

    def __init__(self, recipe: Path, out: Path):
        command = [sys.executable, "-m", "thinkstack", "run", str(recipe), "--out", str(out)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=take_one_core, **quiet)
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def join(self) -> None:
        self.process.wait()


def take_one_core() -> None:
    """Threads that wait for each other in turns take a minute beside other work; with one core there are none."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


class Moment(NamedTuple):
    """The instant right before a file operation."""

    operation: str
    """As Python names it to audit hooks."""
    path: str
    """Below the folder of the run."""
    count: int = 1
    """Which of the operations of this kind on this path."""
    signal: int = signal.SIGKILL
    """What the process gets then."""


def _main(recipe: Path, out: Path, moment: Moment | None) -> None:
    from thinkstack.cli import main
    from thinkstack.stages import pretrain

    take_one_core()
    pretrain.TOKENIZER_DOCUMENTS = 200  # more take longer than all the steps
    if moment:
        sys.addaudithook(_signal_before(moment, out))
    sys.argv = ["thinkstack", "run", str(recipe), "--out", str(out)]
    main()


def _signal_before(moment: Moment, out: Path) -> Callable[[str, tuple], None]:
    """A hook that kills or stops its process."""
    operation, path, left = moment.operation, str(out / moment.path), moment.count

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == operation and str(arguments[0]) == path:
            left -= 1
            if not left:
                os.kill(os.getpid(), moment.signal)

    return hook


def forked(recipe: Path, out: Path, moment: Moment | None = None) -> multiprocessing.process.BaseProcess:
    """The same command line in a process forked from one that has imported everything and done nothing; it is killed
    at a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["thinkstack.pipeline.run", "thinkstack.rl.trainer", "thinkstack.cli", "torch._dynamo"]
    )
    process = context.Process(target=_main, args=(recipe, out, moment))
    process.start()
    return process


@dataclass
class Kills:
    """How a driven run went."""

    inside_writes: int = 0
    """Kills that left a half-written or half-replaced folder behind."""
    leftovers: list[str] = field(default_factory=list)
    """Names of those folders."""
    at_rows: list[int] = field(default_factory=list)
    """Rows of metrics when each kill came."""


def run_through(launch: Launch, recipe: Path, out: Path) -> None:
    """Run a recipe to its end."""
    process = launch(recipe, out)
    process.join()
    assert json.loads((out / "zero-eval" / "stage.json").read_text())["done"]


def drive(launch: Launch, recipe: Path, out: Path, stage: str, kills: int, steps: int, seed: int) -> Kills:
    """Kill the process `kills` times while it works at `stage`.

    Kills move through the stage and take turns: inside a write, inside the same write again, between two of them, while
    the process starts; the last one inside the write of the model.
    """
    rng, found, startup = random.Random(seed), Kills(), 2.0
    rows = 0
    while len(found.at_rows) < kills:
        number = len(found.at_rows)
        is_last = number == kills - 1
        kind = "write" if is_last else ("write", "again", "row", "start")[number % 4]
        rows = steps if is_last else rows + (0 if kind == "again" else rng.randint(0, max(2 * steps // kills - 1, 1)))
        process, began = launch(recipe, out), time.monotonic()
        if kind == "start":
            time.sleep(rng.uniform(0, startup))
        else:
            _wait(process, lambda wanted=rows: _rows(out / stage) >= wanted, _changed(out / stage))
            startup = min(startup, time.monotonic() - began)
            if kind == "row":
                time.sleep(rng.uniform(0, 0.2))
            else:
                wanted, longest = ("model", 1e-3) if is_last else ("", 0.02)  # the model is written once
                _stop_in_a_write(process, out / stage, wanted, rng.uniform(0, longest))
        assert process.is_alive() and process.pid is not None, f"the run ended before kill {number} ({kind} at {rows})"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        half = _half(out / stage)
        found.inside_writes += bool(half)
        found.leftovers += half
        rows = max(rows, _rows(out / stage)) if kind != "start" else rows
        found.at_rows.append(_rows(out / stage))
    return found


def kill_when(launch: Launch, recipe: Path, out: Path, condition: Callable[[], bool]) -> None:
    """Begin the recipe and kill the process as soon as `condition` holds."""
    process = launch(recipe, out)
    _wait(process, condition)
    assert process.is_alive() and process.pid is not None, "the run ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def kill_at(moment: Moment, recipe: Path, out: Path) -> list[str]:
    """Run the recipe until it is killed at a moment. Returns names of folders that are half there then."""
    process = forked(recipe, out, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run ended before {moment}"
    return _half(out / Path(moment.path).parts[0])


def _wait(process: Process, *conditions: Callable[[], bool]) -> None:
    """Until all conditions hold, or the process ends."""
    while not all(condition() for condition in conditions):
        if not process.is_alive():
            return
        time.sleep(POLL_SECONDS)


def _stop_in_a_write(process: Process, stage: Path, wanted: str, delay: float) -> None:
    """Stop the process some seconds after a write has begun; one that has ended by then is let go, and the next one is
    stopped sooner."""
    while process.is_alive() and process.pid is not None:
        _wait(process, lambda: _is_writing(stage, wanted))
        _spin(delay)
        os.kill(process.pid, signal.SIGSTOP)
        if _half(stage) or (stage / "model").exists():
            return
        os.kill(process.pid, signal.SIGCONT)
        delay /= 4


def _spin(seconds: float) -> None:
    """Pass a time too short to sleep."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _rows(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _changed(stage: Path) -> Callable[[], bool]:
    """Whether the process has touched the rows: before, they are those of the process that was killed."""

    def stamp() -> int:
        path = stage / "metrics.jsonl"
        return path.stat().st_mtime_ns if path.exists() else 0

    before = stamp()
    return lambda: stamp() != before


def _half(stage: Path) -> list[str]:
    """Folders that are being written or replaced."""
    names = ("state.writing", "state.old", "model.writing", "model.old")
    return [name for name in names if (stage / name).exists()]


def _is_writing(stage: Path, wanted: str) -> bool:
    """Whether a folder whose name begins with `wanted` is half there, or the last chance for that has passed."""
    return any(name.startswith(wanted) for name in _half(stage)) or (stage / "model").exists()


def digests(out: Path) -> dict[str, str]:
    """Hash of every file of a run by its path; times are taken out of the files that have them beside figures."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir() or path.name in CLOCK:
            continue
        content = path.read_bytes()
        if path.suffix == ".json" and path.parent.name in ("state", "zero-eval"):
            values = json.loads(content)
            values.pop("seconds", None)
            values.get("rows", {}).pop("timings.jsonl", None)
            content = json.dumps(values).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found
