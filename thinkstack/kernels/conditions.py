"""What the kernels support: the conditions of the table in ops.py.

A condition has the arguments of its operation. None depends on the number of rows in fp32.
"""

# Shapes in this file: K inputs or experts per token, M outputs, D hidden size, I intermediate size, E experts.

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from thinkstack.kernels import choice, triton
from thinkstack.kernels.cpu import calls, rows
from thinkstack.kernels.scaled_mm import Scaled
from thinkstack.kernels.sizes import LANES, MAX_PREPACKED_ROWS, MAX_TRITON_ROWS, SMALL_M, SMALL_M_ALIGNMENT
from thinkstack.quant.fp8 import BLOCK, FP8Blocks
from thinkstack.quant.int8 import Int8
from thinkstack.quant.scheme import Parts, QuantizedTensor, QuantScheme


def always(*_: Any) -> bool:
    """The condition of a reference implementation."""
    return True


def on_cpu(x: Tensor, operation: str) -> bool:
    """Whether the C++ kernel of this operation supports tensors like x and is faster (choice.py)."""
    return (
        x.device.type == "cpu"
        and x.dtype in choice.PRECISIONS
        and calls.available()
        and choice.uses(operation, x.dtype)
    )


def eager_on_cpu(x: Tensor, operation: str) -> bool:
    """`on_cpu`, except within torch.compile, which fuses these operations itself."""
    return not torch.compiler.is_compiling() and on_cpu(x, operation)


def if_on_cpu(operation: str) -> Callable[..., bool]:
    """`on_cpu` of an operation's first argument."""
    return lambda x, *_: on_cpu(x, operation)


def if_eager(operation: str) -> Callable[..., bool]:
    """`eager_on_cpu` of an operation's first argument."""
    return lambda x, *_: eager_on_cpu(x, operation)


def fp32_inference_on_cpu(x: Tensor, operation: str) -> bool:
    """`eager_on_cpu` for kernels that have no gradient and no bf16."""
    return x.dtype == torch.float32 and not torch.is_grad_enabled() and eager_on_cpu(x, operation)


def fits_norm(x: Tensor, *_: Any) -> bool:
    """With gradients the kernel copies rows that are not contiguous."""
    return eager_on_cpu(x, "rms_norm") and (torch.is_grad_enabled() or rows.is_rows(x))


def fits_swiglu(gate: Tensor, up: Tensor) -> bool:
    """Contiguous tensors."""
    return eager_on_cpu(gate, "swiglu") and gate.is_contiguous() and up.is_contiguous()


def fits_rotate(x: Tensor, *_: Any) -> bool:
    """Heads with contiguous rows."""
    return eager_on_cpu(x, "rope") and rows.is_rotatable(x)


def fits_linear(x: Tensor, *widths: int) -> bool:
    """fp32, with widths that are multiples of LANES."""
    if x.dtype != torch.float32 or x.numel() == 0:
        return False
    return all(width % LANES == 0 for width in widths) and eager_on_cpu(x, "linear")


def fits_small_m(x: Tensor, *weights: Tensor) -> bool:
    """Inference with at most SMALL_M contiguous rows in bf16 and weights (M, K) in bf16 or int8.

    The result of a row therefore depends on whether there are at most SMALL_M rows; torch's kernels have the same
    property.
    """
    if x.dtype != torch.bfloat16 or x.numel() > SMALL_M * x.shape[-1] or torch.is_grad_enabled():
        return False
    if not eager_on_cpu(x, "small_m_int8" if weights[0].dtype == torch.int8 else "small_m"):
        return False
    return x.is_contiguous() and all(
        weight.dtype in (x.dtype, torch.int8) and weight.is_contiguous() and weight.shape[1] % SMALL_M_ALIGNMENT == 0
        for weight in weights
    )


def fits_small_m_quantized(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> bool:
    """`fits_small_m` of a quantized weight without bias."""
    return bias is None and fits_small_m(x, weight.parts["qweight"])


def fits_prepacked(x: Tensor) -> bool:
    """Inference in bf16, and not so many rows that the reorder of the matrix takes little of the time."""
    is_bf16 = x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    return is_bf16 and 0 < x.numel() <= MAX_PREPACKED_ROWS * x.shape[-1]


def is_emulated(x: Tensor, *_: Any) -> bool:
    """Inference in bf16 on a processor that emulates it, where matmuls take up to 40 times as long as in fp32."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return choice.emulates_bf16()


def fits_dequantize(
    kinds: type[QuantScheme] | tuple[type[QuantScheme], ...], scheme: QuantScheme, parts: Parts, out: Tensor
) -> bool:
    """Contiguous output, quantized by a scheme of these kinds."""
    return isinstance(scheme, kinds) and out.is_contiguous() and on_cpu(out, "dequantize")


def fits_experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    """D and I that are multiples of LANES."""
    sizes = x.shape[1], w_out.shape[2]
    return on_cpu(x, "experts") and all(size % LANES == 0 for size in sizes)


def on_device(x: Tensor) -> bool:
    """On a CUDA device, or on the meta device, where tests trace the CUDA implementation."""
    return x.is_cuda or x.is_meta


def on_triton(x: Tensor, *_: Any) -> bool:
    """On a device, with Triton installed."""
    return on_device(x) and triton.available()


def fits_quantized(x: Tensor, weight: QuantizedTensor, *_: Any) -> bool:
    """Inference in bf16 with few rows on Triton; int8 on all devices, e4m3 from Ada (compute capability 8.9) on."""
    if not on_triton(x) or x.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return False
    if x.numel() > MAX_TRITON_ROWS * x.shape[-1] or not isinstance(weight.scheme, Int8 | FP8Blocks):
        return False
    return isinstance(weight.scheme, Int8) or x.is_meta or torch.cuda.get_device_capability(x.device) >= (8, 9)


def fits_grouped(w_in: Tensor | QuantizedTensor, w_out: Tensor | QuantizedTensor) -> bool:
    """Experts w_in (E, 2I, D), w_out (E, D, I) in bf16 on a device, with widths that are multiples of 8."""
    if not isinstance(w_in, Tensor) or not on_device(w_in) or w_in.dtype != torch.bfloat16:
        return False
    return all(width % 8 == 0 for width in (w_in.shape[2], w_out.shape[2]))


def fits_scaled_mm(a: Scaled, b: Scaled, *_: Any) -> bool:
    """Two matrices without partial blocks on Hopper."""
    rows, columns = a[0], b[0]
    if rows.dim() != 2 or not rows.is_cuda or torch.cuda.get_device_capability(rows.device) != (9, 0):
        return False
    return rows.shape[0] % 16 == 0 and columns.shape[0] % BLOCK == 0 and rows.shape[1] % BLOCK == 0


def never_synchronizes(
    like: Tensor, stacks: Iterable[tuple[Tensor | QuantizedTensor, Tensor | QuantizedTensor]]
) -> bool:
    """Whether `paged_attend` for tensors like `like` and `experts` of these stacks run without waiting for the device,
    which a CUDA graph requires: a Triton kernel reads the cache, and experts need no token counts on the host."""
    return on_triton(like) and all(fits_grouped(w_in, w_out) for w_in, w_out in stacks)
