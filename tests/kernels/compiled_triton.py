"""Compile the Triton kernels for a generation of devices: `python -m tests.kernels.compiled_triton FOLDER GENERATION`.

Prints {name: [bytes of fast memory, bytes of registers that did not fit]}. A process of its own, for in that of the
tests kernels are interpreted.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
import triton

from thinkstack.kernels.paging import KVLayout, Pages
from thinkstack.kernels.triton import attention as paged
from thinkstack.kernels.triton import linear as quantized

FAST_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may have, by generation (CUDA programming guide, table of technical specifications)."""
SHAPES = {
    "mla, small": (KVLayout(1, 80, 0, 0, 0, 64), 4, 80),
    "mla of V3": (KVLayout(1, 576, 0, 0, 0, 512), 40, 576),
    "gqa": (KVLayout(3, 64, 64, 192, 64, 64), 3, 384),
    "gqa, wide": (KVLayout(2, 128, 128, 256, 128, 128), 5, 512),
    "gqa, small": (KVLayout(2, 24, 24, 48, 24, 24), 1, 96),
}
"""Heads, queries per head, width of an entry; small ones always fit."""
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def compiled(kernel, types: dict[str, str], constants: dict, options: dict, generation: int, folder: Path) -> list[int]:
    """Shared memory and spilled registers of a kernel. types: of pointers and reals; other arguments are integers."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    divisible = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if types.get(name, "").startswith("*")}
    source = triton.compiler.ASTSource(
        kernel, signature, {(names.index(k),): v for k, v in constants.items()}, divisible
    )
    target = triton.backends.compiler.GPUTarget("cuda", generation, 32)
    made = triton.compile(source, target=target, options=options)
    (folder / "code").write_bytes(made.asm["cubin"])
    tool = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")
    said = subprocess.run([tool, "-res-usage", folder / "code"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", said)
    assert found is not None, said
    return [made.metadata.shared, int(found.group(1))]


def reading(generation: int, folder: Path) -> Iterator[tuple[str, list[int]]]:
    for (name, (heads, per_group, width)), dtype, longest in product(SHAPES.items(), TYPES, (1, 40)):
        if name.endswith("small"):
            continue
        pages = Pages(torch.empty(1, 64, width), torch.empty(1, 1), torch.empty(1), longest)
        query = torch.empty(1, heads.groups, per_group, heads.key_width, dtype=dtype)
        shape = paged.shape_of(query, pages, heads)
        types = {name: TYPES[dtype] for name in ("query", "entries")} | {name: "*fp32" for name in ("out", "log_sums")}
        types |= {"block_tables": "*i32", "seq_index": "*i32", "last": "*i64", "scale": "fp32"}
        found = compiled(
            paged.paged_attention_kernel, types, shape | {"S": 4}, paged.options_of(shape), generation, folder
        )
        yield f"attend, {name}, {dtype}, longest run {longest}", found


def multiplying(generation: int, folder: Path) -> Iterator[tuple[str, list[int]]]:
    for (qweight, block), rows in product({"*i8": (1, 2048), "*fp8e4nv": (128, 128)}.items(), (16, 64)):
        if qweight == "*fp8e4nv" and generation < 89:
            continue
        constants = dict(ROWS=rows, OUTPUTS=quantized.OUTPUTS, STEP=quantized.STEP, S=4)
        constants |= dict(zip(("SCALE_ROWS", "SCALE_COLUMNS"), block, strict=True))
        types = {"x": "*bf16", "qweight": qweight, "scale": "*fp32", "out": "*fp32"}
        yield (
            f"multiply, {qweight}, {rows}",
            compiled(quantized.quantized_linear_kernel, types, constants, {}, generation, folder),
        )


if __name__ == "__main__":
    folder, generation = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(dict([*reading(generation, folder), *multiplying(generation, folder)])))
