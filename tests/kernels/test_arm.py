"""The kernels on Arm, whose vectors have 4 numbers: compiled by a cross compiler, run by an emulator.

Python does not run there. Calls are recorded here with all memory that they point to and replayed by arm_driver.cpp;
then the same Python code gets the kernels' outputs from Arm, which are compared with torch's operators.
"""

import ctypes
import functools
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.test_fused import KINDS, LATENT
from tests.kernels.arm_calls import COMPILER, EMULATOR, Call, Memory, described, redirected, run_on_arm
from tests.kernels.arm_cases import (
    BF16,
    BOUND,
    FP32,
    Case,
    alike,
    attention,
    dequantized,
    experts,
    grouped_attention,
    halves,
    log_probabilities,
    model,
    products,
    routing,
    rows,
)
from tests.kernels.test_kernels import random_tensor
from tests.tiny import MLA_TINY, tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.fused import fused_pass
from thinkstack.engine.fused.calls import attend_gqa
from thinkstack.engine.kv_cache import KVCache, KVCacheView
from thinkstack.kernels import ops, reference
from thinkstack.kernels.cpu import build, calls, inference
from thinkstack.kernels.ops import rotate, sample
from thinkstack.kernels.paging import KVLayout, Pages
from thinkstack.kernels.sampling import uniforms
from thinkstack.models.layers import rope_table
from thinkstack.models.precision import inference_copy
from thinkstack.quant.int8 import Int8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not calls.available(), reason="no C++ compiler"),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR}: apt install g++-aarch64-linux-gnu qemu-user",
    ),
]

HEADS = {
    "mla": KVLayout(1, 96, 0, 0, 0, 64),
    "mla, odd": KVLayout(1, 24, 0, 0, 0, 19),
    "gqa": KVLayout(2, 32, 32, 64, 32, 32),
    "gqa, odd": KVLayout(2, 6, 6, 12, 6, 6),
}


def cache_read(kind: str, per_group: int, batched: bool, dtype: torch.dtype) -> Case:
    """Contexts of several segments, chunks of prompts across the edge of a block; entries outside the context are
    NaN."""
    heads = HEADS[kind]
    entries = random_tensor(41, 64, max(heads.key_width, heads.value_at + heads.groups * heads.value_step)).to(dtype)
    block_tables = (1 + torch.randperm(39, generator=torch.Generator().manual_seed(0))).view(1, 39).int()
    block_tables = torch.cat((block_tables, block_tables.flip(1).repeat(5, 1)))
    entries[0] = torch.nan
    block_tables[0, 32] = 40
    entries[40, 6:] = torch.nan  # after token 2053
    seq_index, last = torch.zeros(7, dtype=torch.int32), torch.arange(2047, 2054)
    if batched:
        seq_index = torch.cat((seq_index, torch.arange(1, 6, dtype=torch.int32)))
        last = torch.cat((last, torch.tensor([0, 63, 1024, 1500, 9])))
    query = random_tensor(len(seq_index), heads.groups, per_group, heads.key_width).to(dtype)

    def mine() -> list[Tensor]:
        return [inference.paged_attention(query, Pages(entries, block_tables, seq_index), last, heads, 0.2)]

    def theirs() -> list[Tensor]:
        return [
            reference.paged_attention(
                query.double(), Pages(entries.double().nan_to_num(), block_tables, seq_index), last, heads, 0.2
            )
        ]

    return Case(mine, theirs, BOUND[dtype])


def new_tokens(width: int, normed: bool, interleaved: bool, dtype: torch.dtype) -> Case:
    """New tokens of two sequences, across the edge of a block; their entries are written too."""
    H, G, N = 6, 2, 5
    qkv, entries = (
        random_tensor(N, (H + 2 * G) * width, dtype=dtype),
        random_tensor(7, 64, 2 * G * width, seed=1, dtype=dtype),
    )
    norms = (random_tensor(width, seed=2), random_tensor(width, seed=3)) if normed else (None, None)
    block_tables, seq_index = (
        torch.tensor([[3, 1], [2, 5]], dtype=torch.int32),
        torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32),
    )
    last = torch.tensor([62, 63, 64, 65, 9])
    rope = rope_table(last, width, MLA_TINY.rope)
    numbers = dict(H=H, G=G, W=width, interleaved=interleaved, scale=0.3, eps=1e-6)

    def mine() -> list[Tensor]:
        own = entries.clone()
        return [attend_gqa(qkv, norms, numbers, rope, last, Pages(own, block_tables, seq_index)), own]

    def theirs() -> list[Tensor]:
        q, k, v = qkv.float().unflatten(1, (-1, width)).split([H, G, G], 1)
        if normed:
            q, k = (F.rms_norm(x, (width,), weight, 1e-6) for x, weight in zip((q, k), norms, strict=True))
        q, k = (rotate(x[None].contiguous(), rope[None], interleaved)[0] for x in (q, k))
        own = entries.float()
        own[block_tables[seq_index, last // 64].long(), last % 64] = torch.cat((k.flatten(1), v.flatten(1)), 1)
        heads = KVLayout(G, width, width, G * width, width, width)
        return [
            reference.paged_attention(
                q.unflatten(1, (G, -1)), Pages(own, block_tables, seq_index), last, heads, 0.3
            ).view(N, -1),
            own,
        ]

    return Case(mine, theirs, BOUND[dtype])


def sampling(vocabulary: int, is_filtered: bool, dtype: torch.dtype) -> Case:
    """With top-k, top-p and min-p or without, some greedy, some without the lower half of the tokens."""
    logits = (random_tensor(60, vocabulary) * 3).to(dtype)
    logits[::5, : vocabulary // 2] = -torch.inf
    temperature, uniform = torch.full((60,), 0.8), torch.linspace(0, 0.999, 60, dtype=torch.float64)
    temperature[::7] = 0
    limits = None
    if is_filtered:
        limits = (torch.tensor([0, 1, 2, 40, 10_000]), torch.tensor([1.0, 0.9, 0.3, 0.999]), torch.tensor([0, 0.02, 1]))
        limits = tuple(limit.repeat(60)[:60] for limit in limits)
    return alike(lambda: list(sample(logits, temperature, uniform, limits)), 2e-5)


def sampling_of_rows(is_unfiltered: bool) -> Case:
    """Rows with their own settings and random numbers of the kernel, over 4,000 equally likely tokens."""
    random = numpy.random.default_rng(0)
    columns = dict(seed=random.integers(0, 2**64, 50, dtype=numpy.uint64), num_tokens=random.integers(20, 30, 50))
    columns |= dict(num_prompt_tokens=random.integers(0, 20, 50), top_k=random.integers(0, 3000, 50))
    columns |= {name: random.uniform(0.3, 1, 50).astype(numpy.float32) for name in ("temperature", "top_p", "min_p")}
    chosen, offsets, logits = random.permutation(50)[:40], random.integers(0, 4, 40), torch.zeros(40, 4000)

    def mine() -> list[Tensor]:
        found = ops.RowSampler(**columns).sample(logits, chosen, offsets, is_unfiltered)
        return [torch.from_numpy(one) for one in found]

    def theirs() -> list[Tensor]:
        counters = (columns["num_tokens"] - columns["num_prompt_tokens"])[chosen] + offsets
        numbers = torch.from_numpy(uniforms(columns["seed"][chosen], counters.astype("u8")))
        names = ("temperature", "top_k", "top_p", "min_p")
        temperature, *filters = (torch.from_numpy(columns[name][chosen]) for name in names)
        return list(sample(logits, temperature, numbers, None if is_unfiltered else tuple(filters)))

    return Case(mine, theirs, 2e-5)


def small_m_linear(count: int, width: int) -> Case:
    x, weight = random_tensor(count, width, dtype=BF16), random_tensor(50, width, seed=1)
    parts = Int8().quantize(weight)

    @torch.no_grad()
    def mine() -> list[Tensor]:
        return [
            inference.small_m_linear(x, weight.bfloat16()),
            inference.small_m_linear(x, parts["qweight"], parts["scale"]),
        ]

    def theirs() -> list[Tensor]:
        matrices = weight.bfloat16().double(), parts["qweight"].double() * parts["scale"].double()
        return [x.double() @ matrix.T for matrix in matrices]

    return Case(mine, theirs, 3e-3)


def at_once(kind: str, count: int, weights: str, bound: float, cache_dtype: torch.dtype) -> Case:
    """New tokens through a whole model: states, experts, and what is written into the cache. The other side: the model
    in parts, in fp32 over a cache in fp32. weights: "fp32", or those of inference_copy in bf16."""
    exact = tiny_model((LATENT | KINDS)[kind])
    own = exact if weights == "fp32" else inference_copy(exact, BF16, weights)
    if weights == "int8":
        exact = tiny_model(KINDS[kind])
        for block in exact.layers:
            for layer in block.modules():
                if isinstance(layer, torch.nn.Linear):
                    Int8().dequantize_(Int8().quantize(layer.weight.data), layer.weight.data)
    chunk = max(count - 4, 1)
    seq_index = torch.tensor([0] * chunk + [1, 2, 3, 4])[:count]
    places = torch.cat((torch.arange(62, 62 + chunk), torch.tensor([9, 200, 64, 0])))[:count]
    block_tables = (1 + torch.randperm(20, generator=torch.Generator().manual_seed(1))).view(5, 4).int()
    slots = block_tables[seq_index, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
    ids = torch.randint(48, (count,), generator=torch.Generator().manual_seed(2))

    def cache_of(dtype: torch.dtype) -> KVCache:
        cache = KVCache(exact.cfg, 21, dtype)
        cache.data.copy_(random_tensor(*cache.data.shape, seed=3))
        return cache

    def pages(cache: KVCache) -> Pages:
        return Pages(cache.data[0], block_tables, seq_index.int())

    @torch.no_grad()
    def mine() -> list[Tensor]:
        cache, fused = cache_of(cache_dtype), fused_pass(own)
        hidden, chosen = fused.hidden(ids, places, pages(cache), cache.data)
        return [hidden, cache.data, *([] if chosen is None else chosen.sort(-1).values)]

    @torch.no_grad()
    def theirs() -> list[Tensor]:
        cache = cache_of(FP32)
        trunk = exact.trunk(ids.unsqueeze(1), places.unsqueeze(1), cache=KVCacheView(cache, pages(cache), slots))
        chosen = [each.experts[:, 0].sort(-1).values for each in trunk.routing]
        return [trunk.hidden[:, 0], cache.data, *chosen]

    return Case(mine, theirs, bound)


CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[..., Case], *settings: object) -> None:
    words = ", ".join(str(setting).removeprefix("torch.") for setting in settings)
    CASES[f"{function.__name__}: {words}"] = functools.partial(function, *settings)


for _dtype in (FP32, BF16):
    for _tokens, _branched in ((50, False), (50, True), (131, False), (131, True)):
        case(attention, _tokens, _branched, _dtype)
        case(grouped_attention, _tokens, _branched, _dtype)
    for _width in (2, 16, 37):
        case(rows, _width, _dtype)
    for _function in (experts, halves, log_probabilities, dequantized):
        case(_function, _dtype)
    for _kind in HEADS:
        case(cache_read, _kind, 3, False, _dtype)
        case(cache_read, _kind, 3, True, _dtype)
    case(cache_read, "gqa", 40, True, _dtype)
    for _width, _normed, _interleaved in ((32, True, False), (12, False, True), (10, True, True), (32, False, False)):
        case(new_tokens, _width, _normed, _interleaved, _dtype)
    for _vocabulary, _kept in itertools.product((53, 1003), (False, True)):
        case(sampling, _vocabulary, _kept, _dtype)
for _name, _interleaved in itertools.product(("whole vectors", "odd widths", "gqa"), (True, False)):
    case(model, _name, _interleaved)
for _score, _normalize in itertools.product(("top2", "max"), (True, False)):
    case(routing, _score, _normalize)
for _count, _wide, _narrow in ((1, 48, 16), (5, 304, 80), (263, 64, 336)):
    case(products, _count, _wide, _narrow)
for _is_unfiltered in (False, True):
    case(sampling_of_rows, _is_unfiltered)
for _count, _width in ((1, 32), (2, 96), (3, 576), (5, 96), (8, 576)):
    case(small_m_linear, _count, _width)
for _kind in LATENT:
    case(at_once, _kind, 19, "fp32", 1e-5, FP32)
    case(at_once, _kind, 5, "fp32", 1e-2, BF16)
for _kind, _count in itertools.product(KINDS, (1, 3, 8)):
    case(at_once, _kind, _count, "none", 5e-2, BF16)
    case(at_once, _kind, _count, "int8", 5e-2, BF16)


class Arm:
    """The calls of the kernels for all cases, and their results here and on Arm."""

    def __init__(self, folder: Path):
        self.recorded: dict[str, list[Call]] = {}
        self.here: dict[str, list[Tensor]] = {}
        for name, make in CASES.items():
            self.here[name], self.recorded[name] = record(make)
        every = [call for recorded in self.recorded.values() for call in recorded]
        run_on_arm(every, folder)

    def play(self, name: str) -> list[Tensor]:
        """The results of a case with the kernels' outputs from Arm."""
        left = iter(self.recorded[name])

        def handle(kernel: str, arguments: tuple, memory: Memory) -> None:
            known, own = next(left), described(kernel, arguments, memory)
            assert (own.name, own.integers, own.reals) == (known.name, known.integers, known.reals)
            assert own.addresses == known.addresses
            holds_addresses = {block for block, *_ in own.addresses}
            for n, (at, before, after) in enumerate(zip(own.blocks, known.before, known.after, strict=True)):
                if n not in holds_addresses and before != after:
                    ctypes.memmove(at, after, len(after))

        with redirected(handle):
            found = CASES[name]().mine()
        assert next(left, None) is None
        return found


def record(make: Callable[[], Case]) -> tuple[list[Tensor], list[Call]]:
    """Results of a case here, and the calls that it made."""
    recorded, library = [], build.binary()

    def handle(name: str, arguments: tuple, memory: Memory) -> None:
        recorded.append(described(name, arguments, memory))
        getattr(library, name)(*arguments)

    with redirected(handle):
        return make().mine(), recorded


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    return Arm(tmp_path_factory.mktemp("arm"))


def difference(mine: Tensor, theirs: Tensor) -> float:
    """The relative difference; for integers, whether they differ."""
    if not mine.is_floating_point():
        return float(not torch.equal(mine, theirs))
    mine, theirs = mine.double(), theirs.double()
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CASES)
def test_on_arm_the_kernels_compute_what_torch_does(name, arm, on_torch):
    """And what the kernels compute here."""
    mine, expected = arm.play(name), CASES[name]()
    theirs = on_torch(expected.theirs)
    assert len(mine) == len(theirs) == len(arm.here[name]) > 0
    for own, other, here in zip(mine, theirs, arm.here[name], strict=True):
        assert own.dtype == here.dtype and own.shape == other.shape == here.shape
        assert difference(own, other) <= expected.bound
        assert difference(own, here) <= min(expected.bound, BOUND[BF16])


def test_every_kernel_was_called_in_each_of_its_variants(arm):
    """Kernels that take a structure have flags: bf16 or not, gradients or not."""
    text = "".join((build.PACKAGE / name).read_text() for name in build.SOURCES)
    exported = set(re.findall(r'^extern "C" void (\w+)\(', text, re.MULTILINE))
    for name in re.findall(r"^BOTH\((\w+),", text, re.MULTILINE):
        exported |= {f"{name}_fp32", f"{name}_bf16"}
    every = [call for recorded in arm.recorded.values() for call in recorded]
    assert {call.name for call in every} == exported
    for name, flags in re.findall(r'^extern "C" void (\w+)\(const [A-Z]\w+\* a\b(.*?)\)', text, re.MULTILINE):
        called = {tuple(call.integers[1:]) for call in every if call.name == name}
        assert called == set(itertools.product((0, 1), repeat=flags.count("int64_t"))), name
