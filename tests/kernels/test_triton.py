"""What the Triton kernels compute: on a device, or step by step in Triton's interpreter where there is none (which
conftest.py asks for); and that compilers for three generations of devices keep them in registers and fast memory."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy
import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.kernels import ops, reference
from thinkstack.kernels.cpu import calls
from thinkstack.kernels.paging import Pages
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.quant.int8 import Int8
from thinkstack.types import SamplingParams

triton = pytest.importorskip("triton")
from tests.kernels.compiled_triton import FAST_MEMORY, SHAPES, TYPES  # noqa: E402
from thinkstack.kernels.triton import attention as paged  # noqa: E402
from thinkstack.kernels.triton import linear as quantized  # noqa: E402

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
BLOCK_SIZE = 64
ONE_BY_ONE, RUNS = [1, 1, 1, 1], [5, 23, 1, 9]
"""New tokens of four sequences."""


def readings():
    """Every shape in both precisions, with one and several parts; larger ones by default only as on a device."""
    for (name, shape), dtype, parts, new in product(SHAPES.items(), TYPES, (1, 3), (ONE_BY_ONE, RUNS)):
        is_default = name.endswith("small") or (dtype == torch.bfloat16 and parts == 3)
        if shape[1] > 32:  # a program then computes one token, in the same way for one as for many
            new = [min(count, 2) for count in new]
        what = f"{name}, {TYPES[dtype][1:]}, {parts} parts, {'decoding' if max(new) == 1 else 'prompts'}"
        yield pytest.param(shape, dtype, parts, new, id=what, marks=() if is_default else pytest.mark.slow)


@pytest.fixture(autouse=True)
def dots_of_bf16(monkeypatch: pytest.MonkeyPatch):
    """The interpreter multiplies the bits of bf16 as integers; this converts them to fp32 first."""
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def as_fp32(x):
        if x.dtype.scalar != triton.language.bfloat16:
            return x
        return interpreter.TensorHandle(
            (x.data.astype(numpy.uint32) << 16).view(numpy.float32), triton.language.float32
        )

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: multiply(self, as_fp32(a), as_fp32(b), *rest),
    )


def case(shape, lengths: list[int], new: list[int], dtype: torch.dtype):
    """Queries of new tokens at the ends of contexts with scattered blocks; no other block may be read."""
    heads, per_group, width = shape
    generator, blocks = torch.Generator().manual_seed(0), -(-max(lengths) // BLOCK_SIZE)
    entries = torch.randn(1 + len(lengths) * blocks, BLOCK_SIZE, width, generator=generator).to(dtype)
    entries[0] = torch.nan
    block_tables = 1 + torch.randperm(len(lengths) * blocks, generator=generator).view(len(lengths), blocks).int()
    for row, length in enumerate(lengths):
        block_tables[row, -(-length // BLOCK_SIZE) :] = 0
    seq_index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(new)).int()
    last = torch.cat([torch.arange(length - count, length) for length, count in zip(lengths, new, strict=True)])
    query = torch.randn(len(seq_index), heads.groups, per_group, heads.key_width, generator=generator).to(dtype)
    query, entries, block_tables, seq_index, last = (
        x.to(DEVICE) for x in (query, entries, block_tables, seq_index, last)
    )
    return query, Pages(entries, block_tables, seq_index, max(new)), last, heads


def exact(query, pages, last, heads, scale):
    wide = pages._replace(entries=pages.entries.double().nan_to_num())
    return reference.paged_attention(query.double(), wide, last, heads, scale)


@pytest.mark.parametrize(("shape", "dtype", "parts", "new"), list(readings()))
def test_paged_attention_equals_torchs(shape, dtype, parts, new):
    """Contexts within a block, at its edge, over several; parts without keys."""
    query, pages, last, heads = case(shape, [5, 150, 64, 130], new, dtype)
    found = paged.paged_attention(query, pages, last, heads, 0.2, parts)
    expected = exact(query, pages, last, heads, 0.2)
    assert found.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert (found.double() - expected).norm() < bound * expected.norm()


def test_unknown_run_lengths_and_padding_are_supported():
    """Runs with any start, interrupted runs, and padding rows, which all have position 0."""
    query, pages, _, heads = case(SHAPES["gqa"], [200, 130, 64], [12, 4, 4], torch.float32)
    last = torch.tensor([*range(20, 27), *range(90, 95), *range(62, 66), 0, 0, 0, 0], device=DEVICE)
    found = paged.paged_attention(query, pages._replace(longest_run=0), last, heads, 0.2, 1)
    expected = exact(query, pages, last, heads, 0.2)
    assert (found.double() - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
def test_an_engine_with_the_kernel_samples_the_same_tokens(cfg, monkeypatch):
    """Chunked prompts together with decoding, padding, groups of completions."""
    if DEVICE == "cuda":
        pytest.skip("tests/gpu has engines")
    prompt_token_ids, samplings = (
        [[7] * 19, [3, 1, 4], [5] * 8],
        [SamplingParams(max_tokens=3, seed=n, n=1 + n % 2) for n in range(3)],
    )
    monkeypatch.setattr(calls, "available", lambda: False)

    def completions():
        model = tiny_model(cfg, num_layers=1)
        engine = Engine(model, EngineConfig(max_num_seqs=8, max_prefill_tokens=9, graphs=False))
        return [[c.token_ids for c in group] for group in engine.generate(prompt_token_ids, samplings)]

    expected, seen = completions(), []

    def read(query, pages, last, heads, scale):
        seen.append(pages.longest_run)
        return paged.paged_attention(query, pages, last, heads, scale, parts=2)

    monkeypatch.setitem(ops.TABLE, "paged_attend", ((read, lambda *_: True),))
    assert completions() == expected
    assert {1, 9} <= set(seen)


@pytest.mark.parametrize(
    "quantization", [Int8(), FP8Blocks(), FP8Blocks(power_of_two=True)], ids=lambda each: each.name
)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 100, 256), (5, 300, 200), (40, 128, 640)])
@pytest.mark.parametrize("parts", [1, 3])
def test_quantized_products_equal_dequantized_ones(quantization, rows, outputs, inputs, parts):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).bfloat16().to(DEVICE)
    held = quantization.quantize(torch.randn(outputs, inputs, generator=generator).exp().to(DEVICE))
    wide = torch.empty(outputs, inputs, device=DEVICE)
    quantization.dequantize_(held, wide)
    block = (1, inputs) if isinstance(quantization, Int8) else (128, 128)
    found = quantized.quantized_linear(x, held["qweight"], held["scale"], block, parts)
    expected = x.double() @ wide.double().T
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 5e-3 * expected.norm()


def machine_code(generation: int, folder: Path) -> dict[str, tuple[int, int]]:
    """The compilers' report per kernel: bytes of shared memory and of spilled registers."""
    where = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "tests.kernels.compiled_triton", str(folder), str(generation)]
    return json.loads(subprocess.run(command, env=where, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("generation", [80, *(pytest.param(n, marks=pytest.mark.slow) for n in FAST_MEMORY if n > 80)])
def test_kernels_fit_a_multiprocessor(generation: int, tmp_path: Path):
    """Shared memory suffices, and accumulators stay in registers: only a few numbers are spilled, not a tile. The
    oldest generation has the least of both."""
    found = machine_code(generation, tmp_path)
    assert len(found) >= 14
    assert {name: memory for name, (memory, _) in found.items() if memory > FAST_MEMORY[generation]} == {}
    assert {name: spilt for name, (_, spilt) in found.items() if spilt > 64} == {}
