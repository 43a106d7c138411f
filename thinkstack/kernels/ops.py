"""The operations of the package, and the only place that decides which code computes them.

TABLE has one row per operation: its implementations in order of preference, each with the condition under which it is
used. torch's operators (reference.py) come last and compute everything. A kernel is used where it supports the tensors
and was measured to be faster (choice.py); in fp32 no condition depends on the number of rows, so that a row has the
same result alone and in a batch. A matrix is a Tensor or a QuantizedTensor.
"""

# Shapes in this file: B rows, T tokens, N tokens, R rotated width, D hidden size, H heads, G key/value heads,
# E experts, K inputs, key width or experts per token, M outputs, I intermediate size, V vocabulary size or value width,
# W entry width.

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thinkstack.kernels import reference, sampling, scaled_mm, triton
from thinkstack.kernels.conditions import (
    always,
    fits_dequantize,
    fits_experts,
    fits_grouped,
    fits_linear,
    fits_norm,
    fits_prepacked,
    fits_quantized,
    fits_rotate,
    fits_scaled_mm,
    fits_small_m,
    fits_small_m_quantized,
    fits_swiglu,
    fp32_inference_on_cpu,
    if_eager,
    if_on_cpu,
    is_emulated,
    on_cpu,
    on_device,
    on_triton,
)
from thinkstack.kernels.conditions import never_synchronizes as never_synchronizes
from thinkstack.kernels.cpu import autograd, inference, operators, rows
from thinkstack.kernels.cpu.prepacked import PrepackedMatrix, can_prepack_all
from thinkstack.kernels.masks import PackedMask, document_block_mask
from thinkstack.kernels.paging import KVLayout, Pages
from thinkstack.kernels.sizes import ROW_TILE
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.quant.int8 import Int8
from thinkstack.quant.nf4 import NF4Blocks
from thinkstack.quant.scheme import Parts, QuantizedTensor, QuantScheme

Matrix = Tensor | QuantizedTensor


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None, copy: PrepackedMatrix | None = None) -> Tensor:
    """x (..., K) times weight (M, K) transposed, plus bias (M,) of any dtype: (..., M) in the dtype of x.

    copy: a prepacked copy of the weight for inference in bf16 (`prepack`). Quantized weights have no gradient.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, QuantizedTensor):
        return _run("quantized_linear", x, weight, bias)
    return _run("linear", x, weight, bias, copy)


def linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (M, K) transposed in the dtype of x, without the special cases of inference."""
    return _run("linear_forward", x, weight, None)


def linear_grad_x(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x (N, K), given the gradient (N, M) of `linear_forward` and the weight (M, K)."""
    return _run("linear_grad_x", grad, weight)


def linear_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight (M, K), given the gradient (N, M) of `linear_forward` and x (N, K)."""
    return _run("linear_grad_weight", grad, x)


def scaled_matmul(a: scaled_mm.Scaled, b: scaled_mm.Scaled, b_rows: int, dtype: torch.dtype) -> Tensor:
    """a (..., M, K) in 1 x 128 blocks times the transpose of b (..., N, K) in b_rows x 128 blocks: (..., M, N)."""
    return _run("scaled_matmul", a, b, b_rows, dtype)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The matrices (..., N, K) as floats of `dtype`; None: the dtype of the quantized tensor."""
    device = next(iter(weight.parts.values())).device
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device)
    dequantize_(weight.scheme, weight.parts, out)
    return out


def dequantize_(scheme: QuantScheme, parts: Parts, out: Tensor) -> None:
    """Write the dequantized matrices into out (..., N, K), rounded once to its dtype."""
    _run("dequantize_", scheme, parts, out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight for x (..., D) of any float dtype, computed in fp32 (arXiv:1910.07467)."""
    return _run("rms_norm", x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (arXiv:2002.05202)."""
    return _run("swiglu", gate, up)


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Rotate heads x (B, T, H, R) by the complex table of their positions (B or 1, T, R / 2), in fp32. Returns x's
    shape and dtype. interleaved: whether pairs are neighbors, or R / 2 apart (arXiv:2104.09864)."""
    return _run("rotate", x, table, interleaved)


def packed_mask(kv_range: Tensor, is_compiled: bool = False) -> PackedMask:
    """The mask of packed rows with kv_range (B or 1, T, 3). is_compiled: whether the model's blocks are compiled."""
    return _run("packed_mask", kv_range, is_compiled)


def attend(
    q: Tensor,
    kv: Tensor,
    k_shared: Tensor | None,
    rope: Tensor,
    mask: PackedMask,
    layout: KVLayout,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """Causal attention of the tokens of packed rows to each other, (B, T, H, V).

    q: (B, T, H, K), not rotated. kv: (B, T, W) entries in `layout`, not rotated. k_shared: (B, T, R), the part at the
    end of every key that heads share, or None. rope: (B or 1, T, R / 2) complex64, by which the last R elements of
    queries and keys are rotated. scale: factor of the scores.
    """
    return _run("attend", q, kv, k_shared, rope, mask, layout, scale, interleaved)


def paged_attend(query: Tensor, pages: Pages, last: Tensor, layout: KVLayout, scale: float) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences.

    query: (N, G, H / G, K), rotated. pages: pages of the N tokens. last: (N,) int64, the last entry that each token
    attends to. scale: factor of the scores. Returns (N, G, H / G, V).
    """
    return _run("paged_attend", query, pages, last, layout, scale)


def route(
    scores: Tensor, bias: Tensor, top_k: int, groups: tuple[int, int, int], normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """Choose experts for each token by group-limited top-k.

    scores: (N, E) affinities, fp32. bias: (E,) affects the choice of experts but not the weights. groups: number of
    groups, number of groups to use, affinities summed per group (1 or 2). normalize: whether the weights of a token sum
    to `factor`. Returns (weights (N, K) fp32, experts (N, K) int64).
    """
    return _run("route", scores, bias, top_k, groups, normalize, factor)


def experts(x: Tensor, weights: Tensor, chosen: Tensor, w_in: Matrix, w_out: Matrix) -> Tensor:
    """Sum over a token's experts of weight * SwiGLU_expert(token), (N, D).

    x (N, D); weights (N, K) fp32; chosen (N, K) int64 experts; w_in (E, 2I, D): gate rows, then up rows; w_out
    (E, D, I). Quantized stacks have the shapes (E, 2, I, D) and (E, 1, D, I); only chosen experts are dequantized.
    """
    return _run("experts", x, weights, chosen, w_in, w_out)


def logprobs(logits: Tensor, targets: Tensor, temperature: float, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets (N,) under logits (N, V), which may be overwritten. Returns fp32 (log-probabilities,
    log normalizers); writes entropy (N,) if given."""
    return _run("logprobs", logits, targets, temperature, entropy)


def logprobs_backward(logits: Tensor, targets: Tensor, normalizer: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """Gradients of logits (N, V), which may be overwritten; grad (N,) fp32 is the gradient of the log-probabilities."""
    return _run("logprobs_backward", logits, targets, normalizer, grad, temperature)


def sample(
    logits: Tensor, temperature: Tensor, uniform: Tensor, filters: sampling.SamplingFilters | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    logits: (B, V) fp32 or bf16. temperature: (B,) fp32. uniform: (B,) float64 in [0, 1). filters: None: no filters.
    Returns (tokens (B,) int64, log-probabilities (B,) fp32 of the tokens under the sampling distribution). Temperature
    0 selects the most likely token and returns its log-probability at temperature 1.
    """
    return _run("sample", logits, temperature, uniform, filters)


def top_logprobs(
    logits: Tensor, temperature: Tensor, filters: sampling.SamplingFilters | None, count: int
) -> tuple[Tensor, Tensor]:
    """The most likely tokens under the sampling distribution: (ids, log-probabilities fp32), (B, count) each, sorted;
    among equals the lower id first. The arguments are those of `sample`."""
    return _run("top_logprobs", logits, temperature, filters, count)


def penalize_(logits: Tensor, penalized: sampling.PenalizedTokens) -> None:
    """Apply penalties to logits (B, V) fp32 in place, computed in fp64 and rounded once: the repetition penalty of
    arXiv:1909.05858, then the presence and frequency penalties of the OpenAI API."""
    _run("penalize_", logits, penalized)


def apply_token_bitmask_(logits: Tensor, entries: numpy.ndarray, bitmask: numpy.ndarray) -> None:
    """Set tokens of logits (B, V) fp32 to -inf in place: in rows `entries` (n,) int64, tokens whose bit is 0 in bitmask
    (n, ceil(V / 32)) int32, where bit i of word w is token 32 * w + i."""
    _run("apply_token_bitmask_", logits, entries, bitmask)


class RowSampler:
    """`sample` for rows of a table of sampling settings. The contents of the columns may change; the arrays must stay
    the same. The random number of a token depends on its seed and position only."""

    def __init__(self, **columns: numpy.ndarray):
        """columns: temperature, top_p, min_p fp32; top_k, num_tokens, num_prompt_tokens int64; seed uint64."""
        self.columns, self.addresses = columns, inference.column_addresses(columns)

    def sample(
        self, logits: Tensor, rows: numpy.ndarray, offsets: numpy.ndarray, is_unfiltered: bool
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Sample from logits (B, V) of table rows (B,). offsets: (B,), 0 for the token after a row's num_tokens tokens.

        is_unfiltered: whether top_k, top_p and min_p are neutral in these rows. Returns the same as `sample`.
        """
        return _run("sample_rows", self, logits, rows, offsets, is_unfiltered)


def prepack(weights: Collection[Tensor]) -> list[PrepackedMatrix | None]:
    """Prepacked copies of the matrices in bf16 for `linear`, None for other dtypes; all None if memory or machine do
    not allow them."""
    is_bf16 = [weight.dtype == torch.bfloat16 for weight in weights]
    fits = can_prepack_all(*(weight for weight, use in zip(weights, is_bf16, strict=True) if use))
    return [PrepackedMatrix() if fits and use else None for use in is_bf16]


def row_padding(count: int, dtype: torch.dtype) -> int:
    """Number of padding rows for a pass over `count` rows, so that in fp32 `linear` is batch-invariant; bf16 is not."""
    return -count % ROW_TILE if dtype == torch.float32 else 0


def _run(operation: str, *arguments: Any) -> Any:
    """Compute an operation with its first implementation whose condition holds."""
    for compute, condition in TABLE[operation]:
        if condition(*arguments):
            return compute(*arguments)
    raise AssertionError(f"no implementation of {operation}")


def _attend_in_steps(
    q: Tensor,
    kv: Tensor,
    k_shared: Tensor | None,
    rope: Tensor,
    mask: PackedMask,
    layout: KVLayout,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """`attend` as rotations, then softmax attention."""
    k, v = layout.split(kv)  # (B, T, G, ...)
    if k_shared is None:
        k = rotate(k, rope, interleaved)
    else:
        shared = rotate(k_shared.unsqueeze(2), rope, interleaved)
        k = torch.cat((k, shared.expand(-1, -1, layout.groups, -1)), -1)
    own = q.shape[-1] - 2 * rope.shape[-1]
    q = torch.cat((q[..., :own], rotate(q[..., own:], rope, interleaved)), -1)
    grouped = q.unflatten(2, (layout.groups, -1))
    return _run("softmax_attention", grouped, k, v, mask, scale).flatten(2, 3)


def _quantized_experts(
    x: Tensor, weights: Tensor, chosen: Tensor, w_in: QuantizedTensor, w_out: QuantizedTensor
) -> Tensor:
    """`experts` of quantized stacks, of which the chosen experts are dequantized."""
    used, place = chosen.unique(return_inverse=True)  # sorted experts in use; (N, K)

    def compute(x: Tensor, weights: Tensor) -> Tensor:
        dequantized = (dequantize(stack.at((used,)), x.dtype).flatten(1, 2) for stack in (w_in, w_out))
        return experts(x, weights, place, *dequantized)

    if torch.is_grad_enabled():  # the backward pass dequantizes the experts again instead of saving them
        return checkpoint(compute, x, weights, use_reentrant=False, preserve_rng_state=False)
    return compute(x, weights)


class _DequantizedLinear(torch.autograd.Function):
    """`linear` with a quantized weight; the backward pass dequantizes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        return _run("matmul", x, dequantize(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:  # type: ignore[override]
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        weight, dtype = dequantize(ctx.weight, grad.dtype), torch.float32 if is_emulated(grad) else grad.dtype
        return (grad.to(dtype) @ weight.to(dtype)).to(grad.dtype), None, grad_bias


def _upcast_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """ "matmul" computed in fp32."""
    return _run("matmul", x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _quantized_on_triton(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    out = triton.quantized_linear(x, weight.parts["qweight"], weight.parts["scale"].float())
    return out if bias is None else out + bias


# Operation: implementations with their conditions, best first.
TABLE: dict[str, tuple[tuple[Callable[..., Any], Callable[..., bool]], ...]] = {
    "linear": (
        (lambda x, w, b, p: inference.small_m_linear(x, w), lambda x, w, b, p: b is None and fits_small_m(x, w)),
        (lambda x, w, b, p: p.linear(x, w, b), lambda x, w, b, p: p is not None and fits_prepacked(x)),
        (lambda x, w, b, p: _run("matmul", x, w, b), always),
    ),
    "quantized_linear": (
        (_quantized_on_triton, fits_quantized),
        (lambda x, w, b: inference.small_m_linear(x, w.parts["qweight"], w.parts["scale"]), fits_small_m_quantized),
        (_DequantizedLinear.apply, always),
    ),
    "matmul": (
        (_upcast_matmul, is_emulated),
        (autograd.linear, lambda x, w, b: w.dtype == x.dtype and fits_linear(x, *w.shape)),
        (F.linear, always),
    ),
    "linear_forward": (
        (autograd.linear, lambda x, w, b: w.dtype == x.dtype and fits_linear(x, *w.shape)),
        (F.linear, always),
    ),
    "linear_grad_x": ((rows.linear_grad_x, lambda grad, w: fits_linear(grad, *w.shape)), (torch.matmul, always)),
    "linear_grad_weight": (
        (rows.linear_grad_weight, lambda grad, x: fits_linear(grad, grad.shape[1], x.shape[1])),
        (lambda grad, x: grad.T @ x, always),
    ),
    "scaled_matmul": ((scaled_mm.device_matmul, fits_scaled_mm), (scaled_mm.dequantized_matmul, always)),
    "dequantize_": (
        (lambda _, parts, out: rows.dequantize_block(**parts, out=out), partial(fits_dequantize, (Int8, FP8Blocks))),
        (lambda _, parts, out: rows.dequantize_nf4(**parts, out=out), partial(fits_dequantize, NF4Blocks)),
        (lambda scheme, parts, out: scheme.dequantize_(parts, out), always),
    ),
    "rms_norm": ((autograd.rms_norm, fits_norm), (reference.rms_norm, always)),
    "swiglu": ((autograd.swiglu, fits_swiglu), (reference.swiglu, always)),
    "rotate": ((autograd.rotate, fits_rotate), (reference.rotate, always)),
    "packed_mask": (
        (
            lambda kv_range, _: PackedMask(kv_range=kv_range, block_mask=document_block_mask(kv_range)),
            lambda kv_range, is_compiled: is_compiled and kv_range.is_cuda,
        ),
        (lambda kv_range, _: PackedMask(kv_range=kv_range), always),
    ),
    "attend": (
        (operators.attend, lambda q, kv, shared, rope, mask, *_: mask.block_mask is None and on_cpu(q, "attend")),
        (_attend_in_steps, always),
    ),
    "softmax_attention": (
        (reference.fused_attention, lambda q, k, v, mask, scale: mask.block_mask is not None or on_device(q)),
        (reference.eager_attention, always),
    ),
    "paged_attend": (
        (inference.paged_attention, if_on_cpu("paged_attend")),
        (triton.paged_attention, on_triton),
        (reference.paged_attention, always),
    ),
    "route": (
        (inference.route, lambda scores, *_: fp32_inference_on_cpu(scores, "route")),
        (reference.route, always),
    ),
    "experts": (
        (_quantized_experts, lambda x, weights, chosen, w_in, w_out: isinstance(w_in, QuantizedTensor)),
        (operators.experts, fits_experts),
        (reference.grouped_experts, lambda x, weights, chosen, w_in, w_out: fits_grouped(w_in, w_out)),
        (reference.padded_experts, always),
    ),
    "logprobs": ((rows.logprobs, if_eager("logprobs")), (reference.logprobs, always)),
    "logprobs_backward": ((rows.logprobs_backward, if_eager("logprobs")), (reference.logprobs_backward, always)),
    "sample": ((inference.sample, if_on_cpu("sample")), (sampling.sample, always)),
    "top_logprobs": (
        (inference.top_logprobs, lambda logits, _, filters, count: filters is None and on_cpu(logits, "sample")),
        (sampling.top_logprobs, always),
    ),
    "penalize_": ((inference.penalize_, if_on_cpu("sample")), (sampling.penalize_, always)),
    "apply_token_bitmask_": (
        (inference.apply_token_bitmask_, if_on_cpu("sample")),
        (sampling.apply_token_bitmask_, always),
    ),
    "sample_rows": (
        (lambda s, *given: inference.sample_rows(s.addresses, *given), lambda s, logits, *_: on_cpu(logits, "sample")),
        (lambda s, *given: sampling.sample_rows(s.columns, *given), always),
    ),
}
