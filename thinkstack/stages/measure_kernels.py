"""Measure the speed of this machine: each operation with its kernel and with torch's operators, matmuls, memory.

`measure_machine` runs once per machine, takes less than three seconds, and stores the results next to the compiled
kernels; bench/kernels.py creates the committed table from the same cases with more repetitions.
"""

# Shapes in this file: B rows, T tokens, D hidden size, N tokens.

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from thinkstack.kernels import choice, ops
from thinkstack.kernels.cpu import calls
from thinkstack.kernels.masks import kv_range_of
from thinkstack.kernels.paging import Pages
from thinkstack.machine import (
    describe_machine,
    instruction_set,
    instruction_sets,
    measure_threads,
    prepare_machine,
    usable_cores,
)
from thinkstack.models.attention import MLA, AttentionContext
from thinkstack.models.config import MLAConfig, named
from thinkstack.models.layers import Linear, QuantizedLinear, QuantizedWeight, RMSNorm, rope_table
from thinkstack.models.moe import route
from thinkstack.quant.int8 import Int8
from thinkstack.train.loss import token_logprobs

log = logging.getLogger(__name__)

Work = Callable[[], object]
SHAPE = named("v3-tiny")
"""Model that defines the sizes of the operations."""
SECONDS = 2.0
"""Time limit of `measure_machine` for the operations."""
WARM_UP_SECONDS, RETRY_SECONDS = 0.2, 0.3
READ_BYTES = 64 << 20
"""Bytes read to measure memory bandwidth; more than the size of the caches."""


def prepare(threads: int = 0) -> None:
    """Call `prepare_machine`, then `measure_machine`; every command calls this before it computes. threads: number of
    threads; 0: the fastest number, which is one per core, or half of that if two "cores" are hardware threads of one
    core."""
    prepare_machine(threads)
    measure_machine()
    if not threads and (fewer := fast_threads()) < torch.get_num_threads():
        log.info("using %d threads on %d cores: more threads are not faster (measured)", fewer, torch.get_num_threads())
        torch.set_num_threads(fewer)


def fast_threads() -> int:
    """The fastest number of threads for the usable cores, measured once per number of cores."""
    cores, measured = usable_cores(), choice.measurements()
    if str(cores) not in measured.fast_threads and (found := measure_threads(cores)):
        measured = replace(measured, fast_threads=measured.fast_threads | {str(cores): found})
        choice.store_measurements(measured)
    return measured.fast_threads.get(str(cores), cores)


def measure_machine() -> None:
    """Measure this machine and store the results, unless there are results already."""
    measured = choice.measurements()
    if measured.factors or not calls.available():
        return
    started = time.monotonic()
    factors = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # least affected by other processes
    try:
        warm_up()
        for number, (name, case) in enumerate(CASES.items()):
            left = SECONDS - (time.monotonic() - started)
            factors[name] = speedup(name, case(), left / (len(CASES) - number))
        for name in [name for name, found in factors.items() if choice.contradicts_table(name, found)]:
            again = speedup(name, CASES[name](), RETRY_SECONDS)
            if not choice.contradicts_table(name, again):  # another process disturbed the first measurement
                factors[name] = again
    finally:
        torch.set_num_threads(threads)
    choice.store_measurements(replace(measured, factors=factors, read_gb_per_second=read_speed()))
    log.info("measured this machine in %.1f s; `thinkstack inspect --machine` shows it", time.monotonic() - started)


def warm_up() -> None:
    """Compute for 0.2 s, because the first 0.1 s of a process is slower, by different factors for kernel and torch."""
    name, case = next(iter(CASES.items()))
    speedup(name, case(), WARM_UP_SECONDS)


def speedup(name: str, work: Work, budget_seconds: float) -> float:
    """Time of torch's operators divided by the time of the kernel; each time is the minimum over alternating calls
    within the budget."""
    best = {True: float("inf"), False: float("inf")}
    started = time.perf_counter()
    while best[False] == float("inf") or time.perf_counter() - started < budget_seconds:
        for uses_kernel in best:
            best[uses_kernel] = min(best[uses_kernel], seconds(name, work, uses_kernel))
    return best[False] / best[True]


def seconds(name: str, work: Work, uses_kernel: bool) -> float:
    """Time of an operation with its kernel or with torch's operators, after one warm-up call."""
    with choice.using_kernel(name, uses_kernel):
        work()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


def describe_speed() -> str:
    """A text table of the measurements and decisions for this machine."""
    found, chosen, table = choice.measurements(), choice.choices(), choice.table().get(instruction_set().name, {})
    others = ", ".join(one.name for one in instruction_sets() if one != instruction_set())
    rows = [
        ("machine", describe_machine()),
        ("instruction set", f"{instruction_set().name}{f' (also: {others})' if others else ''}"),
        ("threads", f"{torch.get_num_threads()}"),
        *(
            (f"matmuls, {name}", f"{speed:.4g} GFLOP/s on {found.threads} threads")
            for name, speed in found.gflops.items()
        ),
        ("reading memory", f"{found.read_gb_per_second:.3g} GB/s"),
        ("dtype auto", f"{chosen.auto_dtype}: {chosen.reason}"),
        ("kernels", "none" if not calls.available() else "compiled; times as fast as torch's operators:"),
        ("", f"{'operation':<22}{'table':>8}{'here':>8}  computed by"),
    ]
    for name in CASES:
        here, listed = found.factors.get(name), table.get(name)
        operation, _, dtype = name.partition(".")
        is_kernel = choice.uses(operation, {kind: dtype for dtype, kind in choice.PRECISIONS.items()}[dtype])
        figures = "".join(f"{'-' if value is None else f'{value:.2f}':>8}" for value in (listed, here))
        rows.append(("", f"{name:<22}{figures}  {'kernel' if is_kernel else 'torch'}"))
    return "\n".join(f"{name:<18}{text}" for name, text in rows)


def read_speed() -> float:
    """Bandwidth of torch's threads reading main memory, in GB/s; the best of five measurements."""
    numbers = torch.ones(READ_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - started)
    return READ_BYTES / best / 1e9


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _with_gradients(work: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """Forward and backward pass with gradients of all floating-point inputs."""
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    grad = torch.ones_like(work(*leaves))

    def run() -> None:
        with torch.enable_grad():
            torch.autograd.backward(work(*leaves), grad)

    return run


def _without_gradients(work: Work) -> Work:
    return torch.no_grad()(work)


def _attend(dtype: torch.dtype) -> Work:
    B, T = 4, 160
    layer, a = MLA(SHAPE, 0), SHAPE.attention
    assert isinstance(a, MLAConfig)
    positions = torch.arange(T).unsqueeze(0)
    mask = ops.packed_mask(kv_range_of(positions // 40))
    ctx = AttentionContext(rope=rope_table(positions, a.qk_rope_head_dim, SHAPE.rope), mask=mask)
    width = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    q, kv = _random(B, T, a.num_heads, a.qk_head_dim, dtype=dtype), _random(B, T, width, dtype=dtype)
    shared = _random(B, T, a.qk_rope_head_dim, dtype=dtype)
    return _with_gradients(lambda q, kv, k: layer.attend_packed(q, kv, k, layer.expanded_layout, ctx), q, kv, shared)


def _experts(dtype: torch.dtype) -> Work:
    N, D, moe = 640, SHAPE.hidden_size, SHAPE.moe
    assert moe is not None
    experts = torch.stack([torch.randperm(moe.num_experts)[: moe.num_experts_per_tok] for _ in range(N)])
    w_in, w_out = (
        _random(moe.num_experts, *shape, dtype=dtype)
        for shape in ((2 * moe.moe_intermediate_size, D), (D, moe.moe_intermediate_size))
    )
    x, weights = _random(N, D, dtype=dtype), _random(N, moe.num_experts_per_tok, dtype=torch.float32)
    return _with_gradients(lambda x, w, i, o: ops.experts(x, w, experts, i, o), x, weights, w_in, w_out)


def _rms_norm(dtype: torch.dtype) -> Work:
    return _with_gradients(RMSNorm(SHAPE.hidden_size, 1e-6), _random(640, SHAPE.hidden_size, dtype=dtype))


def _swiglu(dtype: torch.dtype) -> Work:
    return _with_gradients(
        ops.swiglu, *(_random(640, SHAPE.intermediate_size, dtype=dtype, seed=seed) for seed in range(2))
    )


def _rope(dtype: torch.dtype) -> Work:
    table = rope_table(torch.arange(160).unsqueeze(0), 32, SHAPE.rope)
    return _with_gradients(lambda x: ops.rotate(x, table, True), _random(4, 160, 4, 32, dtype=dtype))


def _linear(dtype: torch.dtype) -> Work:
    x, weight = (
        _random(640, SHAPE.hidden_size, dtype=dtype),
        _random(SHAPE.intermediate_size, SHAPE.hidden_size, dtype=dtype),
    )
    return _with_gradients(ops.linear, x, weight)


def _dequantize(dtype: torch.dtype) -> Work:
    scheme = Int8()
    parts = scheme.quantize(_random(576, 1536, dtype=torch.float32))
    out = torch.empty(576, 1536, dtype=dtype)
    return _without_gradients(lambda: ops.dequantize_(scheme, parts, out))


def _route(dtype: torch.dtype) -> Work:
    moe = SHAPE.moe
    assert moe is not None
    scores, bias = _random(64, moe.num_experts, dtype=dtype).sigmoid(), torch.zeros(moe.num_experts)
    return _without_gradients(lambda: route(scores, bias, moe))


def _paged_attend(dtype: torch.dtype) -> Work:
    sequences, blocks, size = 16, 4, 64
    layer, a = MLA(SHAPE, 0), SHAPE.attention
    assert isinstance(a, MLAConfig)
    entries = _random(1 + sequences * blocks, size, a.cache_width, dtype=dtype)
    block_tables = torch.arange(1, 1 + sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    pages = Pages(entries, block_tables, torch.arange(sequences, dtype=torch.int32))
    ctx = AttentionContext(rope=torch.empty(0), positions=torch.full((sequences, 1), 200))
    q = _random(sequences, 1, a.num_heads, a.cache_width, dtype=dtype)
    return _without_gradients(lambda: layer.attend_paged(q, pages, layer.absorbed_layout, ctx))


def _small_m(dtype: torch.dtype) -> Work:
    layer, x = Linear(576, 1536, bias=False), _random(1, 576, dtype=dtype)
    layer.weight.data = _random(1536, 576, dtype=dtype)
    return _without_gradients(lambda: layer(x))


def _small_m_int8(dtype: torch.dtype) -> Work:
    layer = QuantizedLinear(QuantizedWeight(Int8(), _random(1536, 576, dtype=torch.float32), dtype), None)
    x = _random(1, 576, dtype=dtype)
    return _without_gradients(lambda: layer(x))


def _logprobs(dtype: torch.dtype) -> Work:
    hidden, weight = (
        _random(640, SHAPE.hidden_size, dtype=dtype),
        _random(SHAPE.vocab_size, SHAPE.hidden_size, dtype=dtype),
    )
    index = torch.arange(640)
    return _with_gradients(lambda h, w: token_logprobs(h, index, w, index)[0], hidden, weight)


def _sample(dtype: torch.dtype) -> Work:
    logits, ones = _random(64, 4096, dtype=dtype), torch.ones(64)
    uniform = torch.linspace(0, 0.99, 64, dtype=torch.float64)
    return _without_gradients(lambda: ops.sample(logits, ones, uniform))


FP32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, Callable[[], Work]] = {
    f"{name}.{choice.PRECISIONS[dtype]}": partial(case, dtype)
    for name, case, dtypes in (
        ("linear", _linear, (FP32,)),
        ("attend", _attend, (FP32, BF16)),
        ("experts", _experts, (FP32, BF16)),
        ("rms_norm", _rms_norm, (FP32, BF16)),
        ("swiglu", _swiglu, (FP32, BF16)),
        ("rope", _rope, (FP32, BF16)),
        ("logprobs", _logprobs, (FP32, BF16)),
        ("dequantize", _dequantize, (FP32, BF16)),
        ("paged_attend", _paged_attend, (FP32, BF16)),
        ("sample", _sample, (FP32, BF16)),
        ("route", _route, (FP32,)),
        ("small_m", _small_m, (BF16,)),
        ("small_m_int8", _small_m_int8, (BF16,)),
    )
    for dtype in dtypes
}
"""Operations by name and precision, with the keys of choice.uses."""
