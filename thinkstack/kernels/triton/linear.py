"""Matmuls of a few rows with 8-bit matrices as one Triton kernel: weights are dequantized in registers.

The reference is "quantized_linear" in kernels/ops.py, with dequantized weights. Importing this module requires Triton.
"""

# Shapes in this file: B rows, K inputs, N outputs, S parts of the inputs (split K).

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP, OUTPUTS = 128, 32
"""Number of inputs and outputs that a program multiplies at a time; both divide the fp8 block size of 128."""
MAX_PARTS = 16


@triton.jit(do_not_specialize=["B"])  # B differs from step to step
def quantized_linear_kernel(
    x, qweight, scale, out,
    B, N, K, SCALES,
    SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr,
):  # fmt: skip  # type: ignore[no-untyped-def]
    """A program computes OUTPUTS outputs of all rows from one part of the inputs."""
    outputs, part = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1)
    rows = tl.arange(0, ROWS)
    length = tl.cdiv(tl.cdiv(K, STEP), S) * STEP
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(part * length, tl.minimum(part * length + length, K), STEP):
        inputs = begin + tl.arange(0, STEP)
        is_valid = (outputs < N)[:, None] & (inputs < K)[None, :]
        weight = tl.load(qweight + outputs.to(tl.int64)[:, None] * K + inputs[None, :], mask=is_valid, other=0.0)
        is_given = (rows < B)[:, None] & (inputs < K)[None, :]
        given = tl.load(x + rows[:, None] * K + inputs[None, :], mask=is_given, other=0.0)
        factor = tl.load(scale + outputs // SCALE_ROWS * SCALES + begin // SCALE_COLUMNS, mask=outputs < N, other=0.0)
        sums += tl.dot(given, tl.trans(weight.to(tl.float32).to(given.dtype))) * factor[None, :]
    places = (part * B + rows)[:, None] * N + outputs[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=(rows < B)[:, None] & (outputs < N)[None, :])


def quantized_linear(x: Tensor, qweight: Tensor, scale: Tensor, block: tuple[int, int], parts: int = 0) -> Tensor:
    """Multiply x (B, K) bf16 by the transpose of the dequantized qweight (N, K), int8 or e4m3: (B, N).

    scale: (ceil(N / rows), ceil(K / columns)) fp32; block: (rows, columns). parts: number of parts of the inputs
    that are summed in parallel; 0: enough to fill the device.
    """
    (B, K), N = x.shape, len(qweight)
    programs = triton.cdiv(N, OUTPUTS)
    S = parts or _parts(programs, K, x.device)
    out = x.new_empty(S, B, N, dtype=x.dtype if S == 1 else torch.float32)
    quantized_linear_kernel[(programs, S)](
        x.contiguous(), qweight, scale, out, B, N, K, scale.shape[1], *block,
        ROWS=max(16, triton.next_power_of_2(B)), OUTPUTS=OUTPUTS, STEP=STEP, S=S,
    )  # fmt: skip
    return out[0] if S == 1 else out.sum(0).to(x.dtype)


def _parts(programs: int, K: int, device: torch.device) -> int:
    """The number of parts that gives every multiprocessor two programs."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, triton.cdiv(K, STEP), MAX_PARTS))
