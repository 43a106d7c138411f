"""`thinkstack eval`, killed again and again, ends with the same result and samples nothing twice."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flow.killing import take_one_core
from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import save_model

NUM_PROBLEMS, KILLS = 84, 20
CLOCK = ("seconds",)
"""Keys of results that say how long."""


def start(model: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "thinkstack", "eval", str(model), "--task", "chain,cups", "--limit", str(NUM_PROBLEMS),
        "--samples", "2", "--max-tokens", "150", "--dtype", "fp32", "--thinking-format", "think_answer_tags",
        "--set", "max_num_seqs=4", "--out", str(out),
    ]  # fmt: skip
    return subprocess.Popen(
        command, preexec_fn=take_one_core, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def saved(out: Path) -> list[str]:
    """The keys of the prompts whose completions are saved."""
    path = out / "evaluate" / "completions.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["key"] for line in lines]


def results(out: Path) -> tuple[dict, list[dict]]:
    folder = out / "evaluate"
    figures = json.loads((folder / "sampled.json").read_text(encoding="utf-8"))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: value for name, value in figures.items() if name not in CLOCK}, samples


@pytest.mark.slow
def test_twenty_kills_change_nothing_and_nothing_is_sampled_twice(tmp_path):
    model = tmp_path / "model"
    save_model(model, tiny_model(GQA_TINY, vocab_size=360, max_positions=512), tiny_tokenizer(), "r1_zero_short")
    finish(start(model, tmp_path / "whole"))
    out, before = tmp_path / "killed", 0
    for kill in range(KILLS):
        process, wanted = start(model, out), (kill + 1) * NUM_PROBLEMS // (KILLS + 1)
        deadline = time.monotonic() + 120
        while len(saved(out)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        keys = saved(out)
        assert before <= len(keys) < NUM_PROBLEMS and len(keys) >= wanted, "killed in the middle"
        assert len(keys) == len(set(keys)), "a finished prompt was sampled again"
        before = len(keys)
    finish(start(model, out))
    assert results(out) == results(tmp_path / "whole")
