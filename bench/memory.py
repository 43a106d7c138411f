"""Peak memory of a training step, predicted and measured: `python bench/memory.py [--kernels 0] [--json FILE]`.

Predicted: train/memory.py, from shapes alone. Measured: each configuration in a process of its own, the peak of its
resident memory over three steps less what was resident right before its model was built; a step of a very small model
has loaded the libraries before. Twice: with every tensor in pages of its own (what the program needs), and with the
heap that the program asks for (machine.py), which keeps pages between steps, some of them in holes.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Row, arguments, machine, print_table, write_json

from thinkstack.machine import prepare_machine
from thinkstack.models.config import GQAConfig, ModelConfig, named
from thinkstack.models.transformer import Transformer
from thinkstack.train.loss import next_token_loss
from thinkstack.train.memory import TrainingShape, training_memory
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch

STEPS = 3
"""The second step is the first with moments; the third repeats it."""
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc: memory blocks above 64 kB are pages of their own, given back when freed."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    cfg: ModelConfig
    shape: TrainingShape


WIDE = GQAConfig(num_heads=8, num_kv_heads=4, head_dim=64)
LONG = Case(named("v3-tiny", max_positions=4096), TrainingShape(rows=1, row_tokens=4096, passes=2))
CASES = {
    "v3-tiny": Case(named("v3-tiny"), TrainingShape(rows=16, row_tokens=256)),
    "v3-tiny, 2 workers": Case(named("v3-tiny"), TrainingShape(rows=16, row_tokens=256, workers=2)),
    "v3-tiny, fp32": Case(named("v3-tiny"), TrainingShape(rows=16, row_tokens=256, dtype="fp32", passes=2)),
    "dense, fp32": Case(named("llama-tiny"), TrainingShape(rows=16, row_tokens=512, dtype="fp32")),
    "dense, hidden 512": Case(
        named("llama-tiny", hidden_size=512, num_layers=6, intermediate_size=1536, attention=WIDE),
        TrainingShape(rows=4, row_tokens=512),
    ),
    "dense, 49,152 tokens": Case(
        named("llama-tiny", vocab_size=49152, hidden_size=256, attention=replace(WIDE, num_heads=4, num_kv_heads=2)),
        TrainingShape(rows=4, row_tokens=256),
    ),
    "v3-tiny, rows of 4,096": LONG,
    "the same, checkpointed": Case(LONG.cfg, replace(LONG.shape, rows=4, passes=1, checkpoint_layers=True)),
}


def resident(kind: str) -> int:
    """Bytes of this process that are resident (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def train(case: Case, steps: int = STEPS) -> Trainer:
    """A few steps on tokens drawn at random, each row one document, all of them learnt."""
    shape = case.shape
    model = Transformer(case.cfg).initialize(torch.Generator().manual_seed(0))
    cfg = TrainerConfig(
        dtype=shape.dtype,
        micro_batch_tokens=shape.tokens,
        workers=shape.workers,
        checkpoint_layers=shape.checkpoint_layers,
    )
    trainer = Trainer(model, cfg, steps)
    rows = shape.rows * shape.workers * shape.passes
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(case.cfg.vocab_size, (rows, shape.row_tokens + 1), generator=generator)
    batch = Batch(
        ids=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        positions=torch.arange(shape.row_tokens).repeat(rows, 1),
        document_ids=torch.arange(1, rows + 1).unsqueeze(1).repeat(1, shape.row_tokens),
        loss_mask=torch.ones(rows, shape.row_tokens),
    )
    for _ in range(steps):
        trainer.step(batch, next_token_loss)
    return trainer


def measure(name: str) -> int:
    """Peak of this process while it trains, less what it held before."""
    case = CASES[name]
    small = replace(case.cfg, hidden_size=32, vocab_size=64)
    train(Case(small, replace(case.shape, rows=2, row_tokens=32, passes=1)), steps=2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    train(case)
    return resident("VmHWM") - before


def in_process(name: str, settings: dict[str, str]) -> int:
    """`measure` in a process of its own; settings: its environment. Without OWN_PAGES, the program's heap."""
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kernels", default="1", choices=("0", "1"), help="0: torch's operators alone")
    parser.add_argument("--one", help="measure this case in this process and print the bytes")
    args: Any = parser.parse_args()
    if args.one:
        if OWN_PAGES.items() <= os.environ.items():
            torch.set_num_threads(1)
        else:
            prepare_machine(1)
        print(measure(args.one))
        return
    table, rows = [], []
    for name, case in CASES.items():
        shape = replace(case.shape, with_kernels=args.kernels == "1")
        predicted = training_memory(case.cfg, shape)["peak"]
        settings = {"THINKSTACK_KERNELS": args.kernels}
        needed, heap = in_process(name, settings | OWN_PAGES), in_process(name, settings)
        cells = (predicted / 1e6, needed / 1e6, predicted / needed, heap / 1e6, heap / needed)
        table.append((name, *(f"{cell:.2f}" if cell < 10 else f"{cell:.0f}" for cell in cells)))
        for what, value, unit in zip(("predicted", "measured", "ratio", "heap", "heap ratio"), cells,
                                     ("MB", "MB", "", "MB", ""), strict=True):  # fmt: skip
            rows.append(Row(name=f"{name}: {what}", value=value, unit=unit, n=1, machine=machine()))
    heads = ("", "predicted [MB]", "measured [MB]", "predicted/measured", "program's heap [MB]", "heap/measured")
    path = "C++ kernels" if args.kernels == "1" else "torch's operators"
    print_table(f"peak of a training step, {path}, one core a worker", heads, table)
    print(machine())
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
