"""The settings of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import torch
from dataclasses import replace
from thinkstack.machine import prepare_machine
prepare_machine(1)
from tests.tiny import GQA_TINY, drawn_batch, tiny_model
from thinkstack.train.loss import next_token_loss
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig

cfg = replace(GQA_TINY, vocab_size=49152, hidden_size=192, num_layers=1, tie_embeddings=True)
trainer = Trainer(tiny_model(cfg), TrainerConfig(dtype="bf16", micro_tokens=256, workers=2), 100)
for step in range(12):
    trainer.step(drawn_batch([40 + 3 * step] * 16, 256, 49152, seed=step), next_token_loss)
    if step in (2, 11):
        print(int(open("/proc/self/statm").read().split()[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_large_vocabulary_does_not_let_memory_grow_from_step_to_step():
    """Blocks of 113 MB left holes in the heap that nothing filled again: 190 MB a step, until the machine was full."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    early, late = map(int, done.stdout.split())
    assert late < 1.1 * early
