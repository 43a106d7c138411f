"""The engine under mixed load: `python bench/soak.py [--minutes 60] [--model PATH] [--json FILE]`.

Requests of every kind come at random: long and short, groups, shared beginnings, priorities, penalties, kept sets,
greedy ones; some are aborted. Every 100 steps the invariants of cache and rows are checked; memory is noted once a
minute; at the end 200 finished requests, drawn at random, are asked again one by one in a fresh engine and must give
the same tokens.
"""

import random
import time
from pathlib import Path
from typing import Any

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import torch
from common import Row, arguments, machine, print_table, write_json

from thinkstack.checkpoint.model import load_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.sequence_table import Request
from thinkstack.log import Progress
from thinkstack.machine import prepare_machine
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.types import SamplingParams

REPLAYED = 200
LONGEST = 1024


def resident_megabytes() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Load:
    """Requests by a seed."""

    def __init__(self, vocab_size: int):
        self.random, self.vocab_size = random.Random(0), vocab_size
        self.beginnings = [self.tokens(BLOCK_SIZE * n + 7) for n in range(1, 6)]

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(self.vocab_size) for _ in range(count)]

    def next(self) -> tuple[list[int], SamplingParams, int]:
        """Prompt, sampling and priority."""
        rng = self.random
        beginning = rng.choice(self.beginnings) if rng.random() < 0.5 else []
        prompt = beginning + self.tokens(rng.choice((1, 5, 30, 200)))
        how: dict[str, Any] = {"max_tokens": rng.choice((1, 10, 60, 250)), "seed": rng.randrange(2**40)}
        how |= {"temperature": rng.choice((0.0, 0.7, 1.0)), "n": rng.choice((1, 1, 1, 4))}
        how |= rng.choice(({}, {}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}, {"frequency_penalty": 0.5}))
        if rng.random() < 0.3:
            how["stop_token_ids"] = tuple(self.tokens(3))
        return prompt, SamplingParams(**how), rng.choice((0, 0, 0, 1, -1))


class Soak:
    """An engine under load, and what became of it."""

    def __init__(self, model: Transformer):
        self.model, self.load = model, Load(model.cfg.vocab_size)
        cfg = EngineConfig(
            max_num_seqs=48,
            max_model_len=LONGEST,
            cache_tokens=48 * BLOCK_SIZE,  # too little for 48 long ones: some are sent back
            max_prefill_tokens=512,
            num_speculative_tokens=min(model.cfg.mtp_layers, 1),
        )
        self.engine = Engine(model, cfg)
        self.alive: list[Request] = []
        self.finished: list[Request] = []
        """A sample of fixed size of all that ended by themselves."""
        self.memory: list[float] = []
        self.steps = self.answers = self.aborts = 0

    def step(self) -> None:
        """Let requests come, perhaps abort one, and make a step."""
        rng, engine = self.load.random, self.engine
        while engine.scheduler.num_waiting < 20 and rng.random() < 0.5:
            self.alive.append(engine.submit(*self.load.next()))
        if self.alive and rng.random() < 0.02:
            engine.abort(self.alive.pop(rng.randrange(len(self.alive))))
            self.aborts += 1
        engine.step()
        self.steps += 1
        done = [request for request in self.alive if request.is_finished]
        self.alive = [request for request in self.alive if not request.is_finished]
        for request in done:
            self.answers += request.sampling.n
            if len(self.finished) < REPLAYED:
                self.finished.append(request)
            elif rng.random() < REPLAYED / self.answers:
                self.finished[rng.randrange(REPLAYED)] = request

    def run(self, minutes: float) -> None:
        """Steps for so long."""
        began, shown = time.monotonic(), 0
        with Progress("soak [s]", round(minutes * 60)) as progress:
            while (gone := time.monotonic() - began) < minutes * 60:
                self.step()
                if self.steps % 100 == 0:
                    self.engine.scheduler.check_invariants()
                    progress.advance(int(gone) - shown)
                    shown = int(gone)
                if gone >= 60 * len(self.memory):
                    self.memory.append(resident_megabytes())

    def check(self) -> None:
        """Raise AssertionError where a block was lost, or a request of the sample answers otherwise alone."""
        for request in self.alive:
            self.engine.abort(request)
        self.engine.scheduler.check_invariants()
        pool = self.engine.scheduler.pool
        assert pool.num_free_blocks == pool.num_blocks, "blocks were lost"
        for request in self.finished:
            fresh = Engine(self.model, EngineConfig(max_num_seqs=4, max_model_len=LONGEST, enable_prefix_caching=False))
            (again,) = fresh.generate([list(request.prompt_token_ids)], [request.sampling])
            same = [c.token_ids for c in again] == [c.token_ids for c in request.completions if c is not None]
            assert same, f"request {request.id} answers otherwise alone"

    def rows(self) -> list[Row]:
        """What is printed."""
        settled = self.memory[len(self.memory) // 4 :]
        values = {
            ("steps", ""): self.steps,
            ("answers", ""): self.answers,
            ("requests aborted", ""): self.aborts,
            ("answers sent back", ""): self.engine.scheduler.num_preemptions,
            ("replayed alone, equal", ""): len(self.finished),
            ("memory after a quarter", "MB"): settled[0],
            ("memory at the end", "MB"): settled[-1],
            ("most in between", "MB"): max(settled),
        }
        return [
            Row(name=name, value=value, unit=unit, n=1, machine=machine()) for (name, unit), value in values.items()
        ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", help="a checkpoint; else v3-tiny with drawn weights")
    args = parser.parse_args()
    prepare_machine(args.threads)
    random_model = Transformer(named("v3-tiny", max_positions=LONGEST)).initialize(torch.Generator().manual_seed(0))
    soak = Soak(load_model(args.model) if args.model else random_model)
    soak.run(args.minutes)
    soak.check()
    rows = soak.rows()
    print_table(
        f"soak, {args.minutes:g} minutes",
        ("", "value", "unit"),
        [(row.name, f"{row.value:,.0f}", row.unit) for row in rows],
    )
    print(machine())
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
