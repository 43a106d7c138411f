"""Memory-bound operations on rows (norms, activations, rotations, log-probabilities), and matmuls in fp32."""

# Shapes in this file: B rows, T tokens, H heads, D width, R rotated width, N tokens, V vocabulary size.

import torch
from torch import Tensor

from thinkstack.kernels.cpu.calls import call, call_for
from thinkstack.quant.fp8 import BLOCK
from thinkstack.quant.nf4 import LEVELS


def rms_norm(x: Tensor, weight: Tensor, eps: float, return_inverse: bool) -> tuple[Tensor, Tensor | None]:
    """RMSNorm of x (..., D), rows contiguous; weight (D,) fp32. Returns (normed x, 1 / rms per row (...,) fp32 or
    None)."""
    rows, stride = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32) if return_inverse else None
    call_for(x.dtype, "rms_norm", x, weight, out, inverse, rows, x.shape[-1], stride, float(eps))
    return out, inverse


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to `residual` in place, both (N, D) and contiguous; returns the RMSNorm of the sum."""
    out = torch.empty_like(residual)
    call_for(residual.dtype, "add_norm", residual, x, None, weight, out, *residual.shape, float(eps))
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in the dtype of x, and of weight, in fp32."""
    rows, stride = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    parts = torch.empty(torch.get_num_threads(), x.shape[-1])
    call_for(x.dtype, "rms_norm_backward", grad.contiguous(), x, weight, inverse, out, parts, rows, x.shape[-1], stride)
    return out, parts.sum(0)


def _rows(x: Tensor) -> tuple[int, int]:
    """The number of rows and the stride between them."""
    return x.numel() // x.shape[-1], next((x.stride(i) for i in range(x.dim() - 2, -1, -1) if x.shape[i] > 1), 0)


def is_rows(x: Tensor) -> bool:
    """Whether the rows of x (..., D) are contiguous and have one stride between them."""
    strides, shape = x.stride(), x.shape
    if strides[-1] != 1:
        return False
    return all(strides[i] == strides[i + 1] * shape[i + 1] or shape[i] == 1 for i in range(x.dim() - 2))


def is_rotatable(x: Tensor) -> bool:
    """Whether each head of x (B, T, H, R) has contiguous rows with one stride between them."""
    return x.stride(-1) == 1 and is_rows(x[:, :, 0])


def dequantize_block(qweight: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write qweight (..., N, D) times the scale of each block into out, contiguous: int8 with scales (..., N, 1) of
    rows, or e4m3 with scales (..., ceil(N / 128), ceil(D / 128)) of 128 x 128 blocks."""
    N, D = qweight.shape[-2:]
    kind, block = ("int8", (1, D)) if qweight.dtype == torch.int8 else ("e4m3", (BLOCK, BLOCK))
    tensors = qweight.contiguous(), scale.float().contiguous(), out
    call_for(out.dtype, f"dequantize_{kind}", *tensors, qweight.shape[:-2].numel(), N, D, *block)


def dequantize_nf4(qweight: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write levels qweight (..., N, B * 32) uint8, two per byte, times the bf16 scales (..., N, B) of blocks of 64
    numbers into out (..., N, D), contiguous; B = ceil(D / 64)."""
    D = out.shape[-1]
    parts = qweight.contiguous(), scale.contiguous(), torch.tensor(LEVELS)
    call_for(out.dtype, "dequantize_nf4", *parts, out, out.numel() // D, D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous tensors."""
    out = torch.empty_like(gate)
    call_for(gate.dtype, "swiglu", gate, up, out, 1, gate.numel(), 0)
    return out


def swiglu_halves(both: Tensor) -> Tensor:
    """silu(gate) * up of rows (N, 2 I), each row gate followed by up: (N, I)."""
    N, width = both.shape
    out = both.new_empty(N, width // 2)
    call_for(both.dtype, "swiglu", both, both[:, width // 2 :], out, N, width // 2, width)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    call_for(gate.dtype, "swiglu_backward", grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel())
    return grad_gate, grad_up


def rotate(x: Tensor, table: Tensor, interleaved: bool, inverse: bool = False) -> Tensor:
    """Rotate x (B, T, H, R), with any strides of tokens and heads, by table (B or 1, T, R / 2) complex64. inverse:
    rotate by the negative angles."""
    B, T, H, R = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    steps = _rows(x[:, :, 0])[1], x.stride(2), table.shape[0] * T
    call_for(x.dtype, "rotate", x, table, out, B * T, H, R, *steps, int(interleaved), -1.0 if inverse else 1.0)
    return out


def logprobs(logits: Tensor, targets: Tensor, temperature: float, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets (N,) under logits (N, V), contiguous. Returns fp32 (log-probabilities, log
    normalizers); writes entropy (N,)."""
    normalizer = torch.empty(logits.shape[0], dtype=torch.float32)
    logprob = torch.empty_like(normalizer)
    call_for(logits.dtype, "logprobs", logits, targets, normalizer, logprob, entropy, *logits.shape, float(temperature))
    return logprob, normalizer


def logprobs_backward(logits: Tensor, targets: Tensor, normalizer: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """Replace logits by the gradients of logits, in place, and return them; grad (N,) fp32 is the gradient of the
    log-probabilities."""
    rows = logits, targets, normalizer, grad.contiguous()
    call_for(logits.dtype, "logprobs_backward", *rows, *logits.shape, float(temperature))
    return logits


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (..., K) by weight (M, K) transposed and add bias (M,): (..., M). All are fp32; M and K are multiples
    of LANES."""
    x, (M, K) = x.contiguous(), weight.shape
    out = torch.empty(*x.shape[:-1], M)
    call("linear", x, weight.contiguous(), bias, out, x.numel() // K, M, K)
    return out


def linear_grad_x(grad: Tensor, weight: Tensor) -> Tensor:
    """Multiply grad (..., M) by weight (M, K): (..., K); requirements as in `linear`."""
    grad, (M, K) = grad.contiguous(), weight.shape
    out = torch.empty(*grad.shape[:-1], K)
    call("linear_grad_x", grad, weight.contiguous(), out, grad.numel() // M, M, K)
    return out


def linear_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Multiply grad (..., M) transposed by x (..., K): (M, K); requirements as in `linear`."""
    M, K = grad.shape[-1], x.shape[-1]
    out = torch.empty(M, K)
    call("linear_grad_weight", grad.contiguous(), x.contiguous(), out, x.numel() // K, M, K)
    return out
