"""Completions in company against the same alone, bit for bit: `python bench/exactness.py [--answers 5000] [--only X]`.

Random small models of every attention; random requests in batches, in chunks, pushed out of a small cache, over cached
prefixes, in groups, drafted ahead, with kept sets and penalties. Each is asked again alone, without a prefix cache.
Tokens, log-probabilities and alternatives must have the same bits. Every path in a process of its own: the kernels,
torch's operators alone, and what is used where nothing is asked for, on every instruction set of this processor.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import torch
from common import capped, machine, print_table

from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.log import Progress
from thinkstack.machine import instruction_sets, prepare_machine
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, SamplingParams

LONGEST = 640
SINGLE = EngineConfig(max_num_seqs=8, enable_prefix_caching=False, max_prefill_tokens=4096)
Bits = tuple[tuple[int, ...], tuple[str, ...], str]


def model_config(rng: random.Random) -> ModelConfig:
    """A small model of any shape that a family has."""
    common = ModelConfig(
        family="llama",
        vocab_size=rng.choice((48, 320, 1000, 33000)),
        hidden_size=rng.choice((32, 48, 64, 64, 256, 576)),
        num_layers=rng.choice((1, 2, 3)),
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        intermediate_size=rng.choice((40, 64, 96, 1536)),
        moe=None,
        mtp_layers=0,
        max_positions=LONGEST,
        init_std=0.2,
        rope=RopeConfig(interleaved=False),
    )
    if rng.random() < 0.5:
        heads, groups = rng.choice(((4, 2), (4, 4), (2, 1), (6, 2)))
        family = rng.choice(("llama", "qwen2", "qwen3"))
        attention = GQAConfig(
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=rng.choice((8, 16, 32)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )
        return replace(common, family=family, attention=attention, tie_embeddings=rng.random() < 0.5)
    latent = MLAConfig(
        num_heads=rng.choice((2, 3, 4)),
        q_lora_rank=rng.choice((0, 12)),
        kv_lora_rank=rng.choice((8, 16, 32)),
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=rng.choice((6, 8)),
    )
    size = rng.choice((12, 16))
    moe = MoEConfig(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=size, num_groups=4, top_groups=2, route_scale=1.5
    )
    drafts = rng.choice((0, 1))
    return replace(common, family="deepseek_v3", attention=latent, moe=moe, mtp_layers=drafts, rope=RopeConfig())


def request(rng: random.Random, vocab: int, shared: list[int]) -> tuple[list[int], SamplingParams]:
    """A prompt, perhaps one that begins as others do, and how it is answered."""
    beginning = shared[: rng.choice((64, 128, 130, 200))] if rng.random() < 0.4 else []
    prompt = beginning + [rng.randrange(vocab) for _ in range(rng.choice((1, 2, 5, 17, 30, 64, 100, 250)))]
    how = {"max_tokens": rng.choice((1, 5, 12, 30, 80)), "seed": rng.randrange(2**40)}
    how |= {"temperature": rng.choice((0.0, 0.7, 1.0)), "n": rng.choice((1, 1, 2, 3))}
    how |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}, {"top_k": 300, "top_p": 0.95}))
    how |= rng.choice(({}, {}, {"frequency_penalty": 0.5, "presence_penalty": 0.3}, {"repetition_penalty": 1.2}))
    how |= rng.choice(({}, {"top_logprobs": 3}, {"raw_logprobs": True}, {"logit_bias": {3: 2.0}}))
    return prompt, SamplingParams(**how)


def bits(completion: Completion) -> Bits:
    """All that must be equal."""
    logprobs = tuple(map(float.hex, completion.logprobs))
    return completion.token_ids, logprobs, repr(completion.top_logprobs)


def count_differences(answers: int, seed: int) -> dict[str, int]:
    """Answers, and those of which tokens, log-probabilities or alternatives differ from those alone."""
    rng, found = random.Random(seed), {"answers": 0, "tokens": 0, "logprobs": 0, "preempted": 0}
    with Progress("answers", answers) as progress:
        while found["answers"] < answers:
            model_seed = rng.randrange(2**20)
            model = Transformer(model_config(rng)).initialize(torch.Generator().manual_seed(model_seed))
            cfg = EngineConfig(
                max_num_seqs=rng.choice((4, 8, 16, 40)),
                max_prefill_tokens=rng.choice((16, 64, 100, 4096)),
                cache_tokens=rng.choice((0, 12, 16)) * BLOCK_SIZE,
                num_speculative_tokens=min(rng.choice((0, 1)), model.cfg.mtp_layers),
            )
            engine, single = Engine(model, cfg), Engine(model, SINGLE)
            shared = [rng.randrange(model.cfg.vocab_size) for _ in range(200)]
            requests = [request(rng, model.cfg.vocab_size, shared) for _ in range(40)]
            together = engine.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
            found["preempted"] += engine.scheduler.num_preemptions
            for (prompt, sampling), group in zip(requests, together, strict=True):
                (expected,) = single.generate([prompt], [sampling])
                for ours, theirs in zip(map(bits, group), map(bits, expected), strict=True):
                    found["answers"] += 1
                    found["tokens"] += ours[0] != theirs[0]
                    found["logprobs"] += ours != theirs
                    if ours != theirs:
                        differing = (n for n, (a, b) in enumerate(zip(ours[1], theirs[1], strict=False)) if a != b)
                        where = f"model seed {model_seed}, prompt of {len(prompt)}, {sampling}"
                        print(f"{where}: token {next(differing, None)} differs", file=sys.stderr)
                progress.advance(len(group))
    return found


def paths() -> dict[str, dict[str, str]]:
    """Environments by name: each instruction set here with all kernels, with the chosen ones, with none."""
    switches = {"kernels": "1", "as chosen": "", "torch alone": "0"}
    return {
        f"{isa.name}, {name}": capped(isa.name) | {"THINKSTACK_KERNELS": switch}
        for isa in instruction_sets()
        for name, switch in switches.items()
    }


def main() -> None:
    """Every path, and a table of what differed; exit code 1 where anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="paths whose name holds this")
    parser.add_argument("--here", action="store_true", help="in this process, as it is")
    args = parser.parse_args()
    if args.here:
        prepare_machine(args.threads)
        print(json.dumps(count_differences(args.answers, args.seed)))
        return
    numbers = ["--answers", str(args.answers), "--seed", str(args.seed), "--threads", str(args.threads)]
    command = [sys.executable, __file__, "--here", *numbers]
    rows, differ = [], 0
    requests = {name: environment for name, environment in paths().items() if args.only in name}
    if not requests:
        parser.error(f"no path holds {args.only!r}; known: {'; '.join(paths())}")
    for name, environment in requests.items():
        ran = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
        counts = json.loads(ran.stdout)
        differ += counts["logprobs"]
        rows.append((name, *(f"{value:,}" for value in counts.values())))
        print(*rows[-1], file=sys.stderr)
    print_table("answers in company that differ from those alone", ("path", *counts), rows)
    print(machine())
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
