"""What sampling options cost: a decoding step of 64 rows with an option against one of 64 plain rows, v3-tiny.

    python bench/sampling_options.py [--pairs 9] [--steps 60]

Prints the median over pairs of the time of a step with the option and of a plain step, run in turn, and their ratio.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy
import torch

from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.grammar import GrammarFactory
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.types import SamplingParams

ROWS, PROMPT = 64, 32


class OddAfterEven:
    """A grammar whose tokens alternate; it costs next to nothing itself."""

    def __init__(self, vocab_size: int):
        size = -(-vocab_size // 32)
        self.masks = (numpy.full(size, 0x55555555, numpy.int32), numpy.full(size, -0x55555556, numpy.int32))
        self.num_tokens = 0

    def advance(self, token_ids: Sequence[int]) -> None:
        self.num_tokens += len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        self.num_tokens -= num_tokens

    def fill_bitmask(self, bitmask: numpy.ndarray, index: int) -> None:
        bitmask[index] = self.masks[self.num_tokens % 2]


class Load:
    """An engine that decodes 64 rows."""

    def __init__(self, model: Transformer, sampling: SamplingParams, grammar: GrammarFactory | None = None):
        self.engine = Engine(model, EngineConfig(max_num_seqs=ROWS))
        for seed in range(ROWS):
            prompt = torch.randint(5, 500, (PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()
            self.engine.submit(prompt, sampling, grammar=grammar)
        while (self.engine.table.num_tokens[:ROWS] <= PROMPT).any():
            self.engine.step()

    def seconds_a_step(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model = Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0))
    V, max_tokens = model.cfg.vocab_size, model.cfg.max_positions - PROMPT
    options = {
        "plain": {},
        "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        "repetition_penalty": {"repetition_penalty": 1.1},
        "top_logprobs=5": {"top_logprobs": 5},
        "raw_logprobs": {"raw_logprobs": True},
        "logit_bias of 100 tokens": {"logit_bias": {token: 1.0 for token in range(100)}},
        "min_tokens": {"min_tokens": max_tokens, "stop_token_ids": (1,)},
        "thinking_budget": {"thinking_budget": max_tokens, "think_end_token_ids": (5, 6)},
        "grammar": {},
    }
    print(
        f"{ROWS} rows, vocabulary of {V}, {args.pairs} pairs of {args.steps} steps, {torch.get_num_threads()} threads"
    )
    for name, given in options.items():
        plain, with_option = [], []
        for _ in range(args.pairs):
            grammar = (lambda: OddAfterEven(V)) if name == "grammar" else None
            without = Load(model, SamplingParams(max_tokens=max_tokens))
            load = Load(model, SamplingParams(max_tokens=max_tokens, **given), grammar)
            for _ in range(4):  # in turn, a quarter of the steps each
                plain.append(without.seconds_a_step(args.steps // 4))
                with_option.append(load.seconds_a_step(args.steps // 4))
        ratio = statistics.median(b / a for a, b in zip(plain, with_option, strict=True))
        times = (f"{statistics.median(times) * 1e3:6.2f} ms" for times in (with_option, plain))
        print(f"{name:26} {next(times)}, plain {next(times)}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
