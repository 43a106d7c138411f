"""`thinkstack serve` as a process with a tiny model."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.server.live import TOKENIZER
from tests.tiny import GQA_TINY, tiny_model
from thinkstack.checkpoint.model import save_model

ROOT = Path(__file__).parents[2]
MAIN = "import sys; sys.argv[0] = 'thinkstack'; from thinkstack.cli import main; sys.exit(main())"


def save_tiny(folder: Path, max_positions: int = 4096) -> Path:
    """Save a chat model with random weights."""
    cfg = replace(GQA_TINY, vocab_size=TOKENIZER.vocab_size)
    save_model(folder, tiny_model(cfg, max_positions=max_positions), TOKENIZER, "v3_1_think")
    return folder


class Process:
    """A running server: its address, the first key if it made one, and what it wrote."""

    def __init__(self, arguments: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url, self.key, self.log = "", "", ""
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("the first API key"):
                self.key = line.split()[-1]
            if line.startswith("listening on "):
                self.url = line.split()[-1]
                break

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait()
        self._reader.join()
        return status


@contextlib.contextmanager
def serve(*arguments: str) -> Iterator[Process]:
    """Run `thinkstack serve` with these arguments and a free port."""
    found = Process([*arguments, "--port", "0"])
    try:
        yield found
    finally:
        found.process.kill()
        found.wait()
