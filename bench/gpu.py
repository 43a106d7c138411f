"""The engine on a GPU: `python bench/gpu.py [--models NAME ...] [--json FILE]`, meant for ten minutes of one device.

Models with drawn weights in bf16: v3-tiny, R1's Qwen student of 1.5B, DeepSeek-V2-Lite. Operations of reading prompts
against the device's best product (MFU); a decoding step of 1, 8, 64 and 256 requests behind 128 tokens against reading
what it needs once, with recorded steps and without. `--device cpu --batches 1 4` tries the command without a GPU.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Row, arguments, machine, print_table, repeat, write_json

from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.machine import prepare_machine
from thinkstack.models.config import ModelConfig, named
from thinkstack.models.counts import cache_bytes_per_token, flops_per_token
from thinkstack.models.transformer import Transformer
from thinkstack.types import SamplingParams

MODELS = ("v3-tiny", "r1-distill-qwen-1.5b", "v2-lite")
BATCHES = (1, 8, 64, 256)
PROMPT, STEPS, WARM = 128, 64, 8
"""Tokens of a prompt, decoding steps, and how many of these compile and record and do not count."""
READ = 512, 8
"""Tokens of a prompt, and prompts, whose reading is timed."""


def wait(device: torch.device) -> None:
    """Until everything that was begun is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def best_of(work: Callable[[], Any], device: torch.device, budget: float = 1.0) -> tuple[float, int]:
    """Least seconds of a call, and how many there were."""

    def call() -> None:
        work()
        wait(device)

    times = repeat(call, budget)
    return min(times), len(times)


def floors(device: torch.device) -> tuple[float, float]:
    """Operations a second of the best bf16 product, and bytes a second of reading."""
    rates = []
    for size in (1024, 4096, 8192) if device.type == "cuda" else (1024,):
        left, right = torch.randn(2, size, size, device=device).bfloat16()
        rates.append(2 * size**3 / best_of(lambda a=left, b=right: a @ b, device)[0])
    memory = torch.ones((1 << 32 if device.type == "cuda" else 1 << 28) // 4, device=device)
    return max(rates), memory.nbytes / best_of(memory.sum, device)[0]


def random_model(cfg: ModelConfig, device: torch.device) -> Transformer:
    """A model in bf16 whose weights are drawn where it lies."""
    with torch.device("meta"):
        model = Transformer(cfg)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    return model.to_empty(device=device).initialize(torch.Generator(device).manual_seed(0))


def bytes_a_step(model: Transformer, batch: int, context: int) -> float:
    """What a decoding step reads: every matrix but a separate embedding, of the routed experts those that somebody is
    expected to choose, and every request's context."""
    cfg, total = model.cfg, 0.0
    for name, parameter in model.named_parameters():
        if parameter is model.embed.weight and parameter is not model.head.weight:
            continue
        if cfg.moe is not None and name.endswith(("w_in", "w_out")):
            total += parameter.nbytes * (1 - (1 - cfg.moe.num_experts_per_tok / cfg.moe.num_experts) ** batch)
        else:
            total += parameter.nbytes
    return total + batch * context * cache_bytes_per_token(cfg)


def seconds_a_step(model: Transformer, batch: int, recorded: bool) -> float:
    """Median of a decoding step of so many requests, drawing included."""
    size = EngineConfig(
        max_num_seqs=batch, max_model_len=PROMPT + 2 * STEPS, dtype="bf16", enable_prefix_caching=False, graphs=recorded
    )
    engine, times = Engine(model, size), []
    prompts = torch.randint(8, model.cfg.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    for seed, prompt in enumerate(prompts.tolist()):
        engine.submit(prompt, SamplingParams(max_tokens=2 * STEPS, seed=seed))
    while len(engine.scheduler.running) < batch or (engine.table.num_computed_tokens < PROMPT)[:batch].any():
        engine.step()
    for step in range(STEPS):
        began = time.perf_counter()
        engine.step()
        if step >= WARM:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def seconds_of_prompts(model: Transformer, device: torch.device) -> tuple[float, int]:
    """Least time of reading prompts, with a token drawn behind each, and how often they were read."""
    length, count = READ
    size = EngineConfig(
        max_num_seqs=count,
        max_model_len=length + 1,
        max_prefill_tokens=length * count,
        dtype="bf16",
        enable_prefix_caching=False,
    )
    engine = Engine(model, size)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(8, model.cfg.vocab_size, (count, length), generator=generator).tolist()
    return best_of(lambda: engine.generate(prompts, [SamplingParams(max_tokens=1)] * count), device)


def measure(name: str, device: torch.device, batches: list[int], peak: float, bandwidth: float) -> list[Row]:
    """All figures of one model."""
    model = random_model(named(name, mtp_layers=0, max_positions=1024), device)
    (prompts, tries), (length, count) = seconds_of_prompts(model, device), READ
    operations = length * count * flops_per_token(model.cfg, length // 2)
    figures = [
        ("prompts, tokens/s", length * count / prompts, "", tries),
        ("prompts, MFU", operations / prompts / peak, "", tries),
    ]
    for batch in batches:
        plain, recorded = (seconds_a_step(model, batch, on) for on in (False, True))
        floor = bytes_a_step(model, batch, PROMPT + STEPS // 2) / bandwidth
        figures += [
            (f"batch {batch}: step", recorded * 1e3, "ms", STEPS - WARM),
            (f"batch {batch}: new tokens/s", batch / recorded, "", STEPS - WARM),
            (f"batch {batch}: share of the bandwidth floor", floor / recorded, "", STEPS - WARM),
            (f"batch {batch}: gain of recorded steps", plain / recorded, "", STEPS - WARM),
        ]
    where = torch.cuda.get_device_name() if device.type == "cuda" else machine()
    return [Row(name=f"{name}: {what}", value=value, unit=unit, n=n, machine=where) for what, value, unit, n in figures]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    args = parser.parse_args()
    prepare_machine(args.threads)
    device, rows = torch.device(args.device), []
    peak, bandwidth = floors(device)
    print(f"floors: {peak / 1e12:.1f} TFLOP/s in bf16, reading {bandwidth / 1e9:.0f} GB/s")
    for name in args.models:
        rows += measure(name, device, args.batches, peak, bandwidth)
        write_json(args.json, rows)  # after every model: time may run out
        mine = [(r.name, f"{r.value:.4g}", r.unit, str(r.n)) for r in rows if r.name.startswith(f"{name}: ")]
        print_table(name, ("", "value", "unit", "n"), mine)
    print(rows[0].machine)


if __name__ == "__main__":
    main()
