"""Clients of bench/server.py: a server process, one curl process with many requests, and streams over bare sockets."""

import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.model import load_chat, save_model
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.text.tokenizer import CONTROL, TOOLS, train_tokenizer

WORDS = "the sum of 1 and 2 is 3, says the tool. What is the capital of France? Paris explain why cups and balls"
MAIN = "import sys; sys.argv[0] = 'thinkstack'; from thinkstack.cli import main; sys.exit(main())"
PRICES = """currency = "USD"
[[models.deepseek-chat]]
input_hit = 0.07
input_miss = 0.27
output = 1.10
"""


def make_tiny(folder: Path) -> str:
    """A checkpoint of v3-tiny with random weights; returns its path."""
    tokenizer = train_tokenizer([WORDS] * 4, 420, control=(*CONTROL, *TOOLS))
    cfg = named("v3-tiny", vocab_size=tokenizer.vocab_size, mtp_layers=0, max_positions=4096)
    model = Transformer(cfg).initialize(torch.Generator().manual_seed(0))
    save_model(folder / "v3-tiny", model, tokenizer, "v3_1_think")
    return str(folder / "v3-tiny")


def no_end(model: str) -> dict[str, float]:
    """logit_bias without control tokens, so that every completion has max_tokens tokens."""
    return {str(token): -100.0 for token in load_chat(model).tokenizer.control_of_id}


class ServerProcess:
    """`thinkstack serve` with one model under the name deepseek-chat, prices, and a key."""

    def __init__(
        self,
        folder: Path,
        model: str,
        database: str = "",
        max_num_seqs: int = 64,
        max_waiting: int = 1024,
        cores: Sequence[int] = (),
        stream_interval: float = 0.02,
    ):
        self.folder, self.database = folder, database
        (folder / "prices.toml").write_text(PRICES, encoding="utf-8")
        (folder / "server.toml").write_text(
            f'[members.default]\nmodel = "{model}"\ndtype = "fp32"\nmax_num_seqs = {max_num_seqs}\n'
            f"max_waiting = {max_waiting}\n[models.deepseek-chat]\nthinking = false\n"
            f"[server]\nstream_interval = {stream_interval}\n", encoding="utf-8",
        )  # fmt: skip
        arguments = ["--config", str(folder / "server.toml"), "--prices", str(folder / "prices.toml"), "--port", "0"]
        arguments += ["--database", database] if database else ["--data", str(folder)]
        pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        with (folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*pinned, sys.executable, "-c", MAIN, "serve", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.url, self.key = "", ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("the first API key"):
                self.key = line.split()[-1]
            if line.startswith("listening on "):
                self.url = line.split()[-1]
                return
        raise SystemExit(f"the server did not start; see {folder / 'server.log'}")

    def cpu_seconds(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """SIGTERM, or nothing if the process has ended."""
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def serving(folder: Path, model: str, **settings: Any) -> Iterator[ServerProcess]:
    """Run a server while the block runs."""
    server = ServerProcess(folder, model, **settings)
    try:
        yield server
    finally:
        server.stop()


def curl(server: ServerProcess, key: str, body: dict[str, Any], requests: int, parallel: int, out: Path) -> float:
    """Send one body many times by one curl process; the replies are files in `out`. Returns the CPU seconds of curl."""
    (out / "body.json").write_text(json.dumps(body), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["-s", "-S", "--no-progress-meter", "-N", "-Z", "--parallel-immediate", "--parallel-max", str(parallel)]
    words += [
        "-H",
        f"Authorization: Bearer {key}",
        "-H",
        "Content-Type: application/json",
        "--data-binary",
        f"@{out / 'body.json'}",
    ]
    url = f"{server.url}/chat/completions?[1-{requests}]"
    subprocess.run(["curl", *words, "-o", f"{out}/#1.txt", url], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass
class Stream:
    """What one streamed request saw; times in seconds."""

    began: float
    status: int = 0
    first: float = 0.0
    """Duration to the first content; of a refusal: of the whole reply."""
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between two chunks."""
    id: str = ""
    num_tokens: int = 0
    """Tokens with log-probabilities, if these were asked for."""
    usage: dict[str, Any] | None = None
    is_done: bool = False


async def stream(server: ServerProcess, key: str, body: dict[str, Any]) -> Stream:
    """One streamed request on a connection of its own; what arrived before a broken connection is kept."""
    found, data = Stream(time.perf_counter()), json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    last = 0.0
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return found
    try:
        writer.write(head.encode() + data)
        while line := await reader.readline():
            now = time.perf_counter()
            if line.startswith(b"HTTP/1.1 "):
                found.status = int(line.split()[1])
            elif line.startswith(b"data: [DONE]"):
                found.is_done = True
            elif line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                found.id = chunk.get("id", found.id)
                found.usage = chunk.get("usage") or found.usage
                for choice in chunk.get("choices", ()):
                    found.num_tokens += len((choice.get("logprobs") or {}).get("content") or ())
                if last:
                    found.gaps.append(now - last)
                elif chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                    found.first = now - found.began
                    last = now
                last = now if last else 0.0
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    found.ended = time.perf_counter() - found.began
    found.first = found.first or found.ended
    return found


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds; 0 without values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0, 0.0
    return ordered[len(ordered) // 2] * 1e3, ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3
