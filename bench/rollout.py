"""Sampling against transformers: `python bench/rollout.py [--pairs 9] [--json FILE]`.

128 sequences of 64 new tokens from 128 prompts of 32 tokens, v3-tiny's shape, fp32, temperature 1, no end token, the
same weights, the same threads. Ours: one call of the engine, which returns ids and the log-probability of each.
transformers: one `generate` call with its key/value cache and the fastest of its attention and expert implementations,
once for the ids alone and once with the log-probabilities that ours returns in both rows.
"""

from collections.abc import Callable
from typing import Any

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import torch
from common import DEFAULT, Comparison, arguments, compare, fastest, print_comparisons, twins, write_json
from floor import peak_gflops

from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.machine import prepare_machine
from thinkstack.models.config import named
from thinkstack.models.counts import flops_per_token
from thinkstack.models.transformer import Transformer
from thinkstack.types import SamplingParams

PROMPT_TOKENS = 32


def our_rollout(model: Transformer, prompts: torch.Tensor, new_tokens: int) -> Callable[[], Any]:
    """One call of ours."""
    engine = Engine(model, EngineConfig(max_num_seqs=len(prompts), max_model_len=PROMPT_TOKENS + new_tokens))
    prompt_lists = prompts.tolist()
    samplings = [SamplingParams(max_tokens=new_tokens, seed=seed) for seed in range(len(prompt_lists))]

    def run() -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        return [(group[0].token_ids, group[0].logprobs) for group in engine.generate(prompt_lists, samplings)]

    return run


def their_rollout(model: Any, prompts: torch.Tensor, new_tokens: int, with_logprobs: bool) -> Callable[[], Any]:
    """One call of transformers."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}
    width = prompts.shape[1]

    @torch.no_grad()
    def run() -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        out = model.generate(prompts, **settings, return_dict_in_generate=True, output_scores=with_logprobs)
        ids = out.sequences[:, width:].tolist()
        if not with_logprobs:
            return [(tuple(row), ()) for row in ids]
        scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True).tolist()
        return [(tuple(row), tuple(score)) for row, score in zip(ids, scores, strict=True)]

    return run


def measure(sequences: int, new_tokens: int, pairs: int) -> list[Comparison]:
    """Ours against generate, without and with log-probabilities."""
    cfg = named("v3-tiny", mtp_layers=0)
    model = Transformer(cfg).initialize(torch.Generator().manual_seed(0))
    prompts = torch.randint(8, cfg.vocab_size, (sequences, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    ours = our_rollout(model, prompts, new_tokens)
    candidates = twins(model, torch.float32)
    kinds = {
        "default": DEFAULT,
        "fastest": fastest({k: their_rollout(t, prompts, 6, False) for k, t in candidates.items()}),
    }
    context = PROMPT_TOKENS + new_tokens // 2
    operations = sequences * (PROMPT_TOKENS + new_tokens) * flops_per_token(cfg, context)
    floor = operations / peak_gflops(torch.float32) / 1e9
    found = []
    for label, kind in kinds.items():
        print(f"peer {label}: transformers with {kind}")
        for with_logprobs in (False, True):
            peer = their_rollout(candidates[kind], prompts, new_tokens, with_logprobs)
            lengths = {len(ids) for ids, _ in (*ours(), *peer())}
            if lengths != {new_tokens}:
                raise RuntimeError(f"answers of {sorted(lengths)} tokens; both sides must draw {new_tokens}")
            name = f"{sequences} x {new_tokens}, peer {label}, ids" + (" and log-probs" if with_logprobs else "")
            found.append(compare(name, ours, peer, pairs, floor_seconds=floor, warm_up=0))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    prepare_machine(args.threads)
    found = measure(args.sequences, args.new_tokens, args.pairs)
    print_comparisons(
        "rollout, v3-tiny, fp32, temperature 1; floor: its operations at the fp32 peak of floor.py", found
    )
    for comparison in found:
        num_sampled = args.sequences * args.new_tokens
        ours, peer = num_sampled / comparison.ours, num_sampled / comparison.peer
        print(f"{comparison.name}: {ours:,.0f} tokens/s ours, {peer:,.0f} peer")
    write_json(args.json, found)


if __name__ == "__main__":
    main()
