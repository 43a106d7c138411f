"""llama.cpp on our weights, in the Python that THINKSTACK_LLAMA_CPP names, for benches that time it in turn with us."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from thinkstack.checkpoint.convert import convert

PEER = """
import json, sys, time
from llama_cpp import Llama
job = json.loads(sys.stdin.readline())
model = Llama(job["path"], n_ctx=1024, n_threads=job["threads"], n_threads_batch=job["threads"], verbose=False)
for _ in sys.stdin:
    model.reset()
    model.eval(job["prompt"])
    token = model.sample(temp=0.0)
    began = time.perf_counter()
    for _ in range(job["tokens"]):
        model.eval([token])
        token = model.sample(temp=0.0)
    print((time.perf_counter() - began) / job["tokens"], flush=True)
"""


class GGUFPeer:
    """A process that answers one user greedily."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def seconds(self) -> float:
        """Of a token, measured over an answer without its prompt."""
        assert self.process.stdout is not None
        self.say("")
        return float(self.process.stdout.readline())


@contextmanager
def gguf_peer(model: str, kind: str, prompt: Sequence[int], tokens: int) -> Iterator[GGUFPeer | None]:
    """llama.cpp on `model`, written as GGUF of `kind`, with as many threads as torch; None where no Python is named."""
    python = os.environ.get("THINKSTACK_LLAMA_CPP", "")
    if not python:
        yield None
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind}.gguf"
        convert(model, path, to="gguf", dtype=kind)
        command = [python, "-c", PEER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            peer = GGUFPeer(process)
            job = {"path": str(path), "prompt": list(prompt), "tokens": tokens, "threads": torch.get_num_threads()}
            peer.say(json.dumps(job))
            try:
                yield peer
            finally:
                process.terminate()
