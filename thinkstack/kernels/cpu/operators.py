"""Attention of packed rows and routed experts, with gradients.

Both are registered as torch operators with shape functions, so that compiled models use the kernels as well.
"""

# Shapes in this file: B rows, T tokens, S cached tokens, H heads, G key/value heads, D key width, R rotated width,
# V value width, W width of an entry, N tokens, K experts per token, E experts, I intermediate size.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from thinkstack.kernels.cpu.calls import address, run, structure
from thinkstack.kernels.cpu.rows import is_rows
from thinkstack.kernels.masks import PackedMask
from thinkstack.kernels.paging import KVLayout
from thinkstack.kernels.sizes import EXPERT_BLOCK

_Attention = structure(
    "Attention",
    "q k k_shared v rope kv_range out log_sum grad grad_q grad_k grad_v grad_k_shared",
    "B T H G D R V q_t q_h k_t k_h shared_t v_t v_h rope_rows kv_range_rows interleaved threads",
    "scale",
)
_ExpertsArguments = structure(
    "Experts",
    "x weights experts w_in w_out out hidden picked grad grad_x grad_pairs grad_w_in grad_w_out grad_weights",
    "N K E D I threads",
)


def _attention(q: Tensor, kv: Tensor, k_shared: Tensor | None, rope: Tensor, kv_range: Tensor, layout: KVLayout,
               scale: float, interleaved: bool, grad_kv: Tensor | None = None, **more: Tensor) -> None:  # fmt: skip
    B, T, H, D = q.shape
    assert q.is_contiguous() and kv.is_contiguous() and (k_shared is None or is_rows(k_shared))
    arguments = _Attention(
        **{
            name: address(x)
            for name, x in dict(q=q, k=kv, k_shared=k_shared, rope=rope, kv_range=kv_range, **more).items()
        },
        v=kv.data_ptr() + layout.value_at * kv.itemsize,
        **dict(B=B, T=T, H=H, G=layout.groups, D=D, R=2 * rope.shape[-1], V=layout.value_width),
        **dict(q_t=q.stride(1), q_h=q.stride(2), k_t=kv.stride(1), k_h=layout.key_step),
        **dict(v_t=kv.stride(1), v_h=layout.value_step, shared_t=0 if k_shared is None else k_shared.stride(1)),
        **dict(rope_rows=rope.shape[0], kv_range_rows=kv_range.shape[0], interleaved=interleaved),
        threads=torch.get_num_threads(),
        scale=scale,
    )
    if grad_kv is not None:
        arguments.grad_k, arguments.grad_v = grad_kv.data_ptr(), grad_kv.data_ptr() + layout.value_at * kv.itemsize
    run("attention", arguments, q.dtype == torch.bfloat16, grad_kv is not None)


def _attend(q, kv, k_shared, rope, kv_range, layout, scale, interleaved):  # type: ignore[no-untyped-def]
    out, log_sum = _attend_shapes(q, kv, k_shared, rope, kv_range, layout, scale, interleaved)
    _attention(q, kv, k_shared, rope, kv_range, KVLayout(*layout), scale, interleaved, out=out, log_sum=log_sum)
    return out, log_sum


def _attend_shapes(q, kv, k_shared, rope, kv_range, layout, scale, interleaved):  # type: ignore[no-untyped-def]
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, KVLayout(*layout).value_width), q.new_empty(B, H, T, dtype=torch.float32)


def _attend_backward(grad, q, kv, k_shared, rope, kv_range, layout, scale, interleaved, out, log_sum):  # type: ignore[no-untyped-def]
    grads = _attend_backward_shapes(grad, q, kv, k_shared, rope, kv_range, layout, scale, interleaved, out, log_sum)
    tensors = dict(out=out, log_sum=log_sum, grad=grad.contiguous(), grad_q=grads[0], grad_k_shared=grads[2])
    _attention(q, kv, k_shared, rope, kv_range, KVLayout(*layout), scale, interleaved, grad_kv=grads[1], **tensors)
    return grads


def _attend_backward_shapes(grad, q, kv, k_shared, rope, kv_range, layout, scale, interleaved, out, log_sum):  # type: ignore[no-untyped-def]
    B, T, _, _ = q.shape
    parts = 0 if k_shared is None else layout[0]
    return (
        q.new_empty(q.shape),
        kv.new_empty(kv.shape),
        q.new_empty(B, parts, T, 2 * rope.shape[-1], dtype=torch.float32),
    )


def _experts(x, weights, experts, w_in, w_out, save_hidden):  # type: ignore[no-untyped-def]
    out, hidden, picked = _experts_shapes(x, weights, experts, w_in, w_out, save_hidden)
    tensors = dict(x=x, weights=weights, experts=experts, w_in=w_in, w_out=w_out, out=out, picked=picked)
    _run_experts(False, **tensors, hidden=hidden if save_hidden else None)
    return out, hidden, picked


def _experts_shapes(x, weights, experts, w_in, w_out, save_hidden):  # type: ignore[no-untyped-def]
    (N, D), K, (E, _, I) = x.shape, experts.shape[1], w_out.shape  # noqa: E741
    blocks = N * K // EXPERT_BLOCK + E if save_hidden else 0
    return x.new_empty(N, D), x.new_empty(blocks, 2 * I, EXPERT_BLOCK), x.new_empty(N * K, D)


def _experts_backward(grad, x, weights, experts, w_in, w_out, hidden, picked):  # type: ignore[no-untyped-def]
    grads = _experts_backward_shapes(grad, x, weights, experts, w_in, w_out, hidden, picked)
    forward = dict(x=x, weights=weights, experts=experts, w_in=w_in, w_out=w_out, hidden=hidden, picked=picked)
    backward = dict(zip(("grad_x", "grad_weights", "grad_w_in", "grad_w_out"), grads, strict=True))
    _run_experts(True, **forward, **backward, grad=grad, grad_pairs=torch.empty_like(picked))
    return grads


def _experts_backward_shapes(grad, x, weights, experts, w_in, w_out, hidden, picked):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(w_in), torch.empty_like(w_out)


def _run_experts(backward: bool, **tensors: Tensor | None) -> None:
    x, experts, w_out = tensors["x"], tensors["experts"], tensors["w_out"]
    assert x is not None and experts is not None and w_out is not None
    (N, D), K, (E, _, I) = x.shape, experts.shape[1], w_out.shape  # noqa: E741
    addresses = {name: address(tensor) for name, tensor in tensors.items()}
    arguments = _ExpertsArguments(**addresses, N=N, K=K, E=E, D=D, I=I, threads=torch.get_num_threads())
    run("experts", arguments, x.dtype == torch.bfloat16, backward)


_SHARED = (
    "Tensor q, Tensor kv, Tensor? k_shared, Tensor rope, Tensor kv_range, int[] layout, float scale, bool interleaved"
)
_ROUTED = "Tensor x, Tensor weights, Tensor experts, Tensor w_in, Tensor w_out"
_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "attend": (f"({_SHARED}) -> (Tensor, Tensor)", _attend, _attend_shapes),
    "attend_backward": (
        f"(Tensor grad, {_SHARED}, Tensor out, Tensor log_sum) -> (Tensor, Tensor, Tensor)",
        _attend_backward,
        _attend_backward_shapes,
    ),
    "experts": (f"({_ROUTED}, bool save_hidden) -> (Tensor, Tensor, Tensor)", _experts, _experts_shapes),
    "experts_backward": (
        f"(Tensor grad, {_ROUTED}, Tensor hidden, Tensor picked) -> (Tensor, Tensor, Tensor, Tensor)",
        _experts_backward,
        _experts_backward_shapes,
    ),
}
_operators = library.Library("thinkstack", "DEF")
for _name, (_signature, _compute, _shapes) in _OPERATORS.items():
    _operators.define(_name + _signature)
    _operators.impl(_name, _compute, "CPU")
    _operators.impl(_name, _shapes, "Meta")


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k_shared, rope, kv_range, layout, scale, interleaved):  # type: ignore[no-untyped-def,override]
        q, kv = q.contiguous(), kv.contiguous()
        out, log_sum = torch.ops.thinkstack.attend(q, kv, k_shared, rope, kv_range, layout, scale, interleaved)
        ctx.save_for_backward(q, kv, k_shared, rope, kv_range, out, log_sum)
        ctx.settings = layout, scale, interleaved
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        *inputs, out, log_sum = ctx.saved_tensors
        grad_q, grad_kv, parts = torch.ops.thinkstack.attend_backward(grad, *inputs, *ctx.settings, out, log_sum)
        shared = None if inputs[2] is None else parts.sum(1).to(grad.dtype)
        return grad_q, grad_kv, shared, None, None, None, None, None


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
    """Causal attention of the tokens of each row to each other, (B, T, H, V).

    Arguments as in `ops.attend`, which are rotated here."""
    return _Attend.apply(q, kv, k_shared, rope, mask.kv_range, list(layout), scale, interleaved)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, experts, w_in, w_out):  # type: ignore[no-untyped-def,override]
        out, hidden, picked = torch.ops.thinkstack.experts(x, weights, experts, w_in, w_out, True)
        ctx.save_for_backward(x, weights, experts, w_in, w_out, hidden, picked)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        grads = torch.ops.thinkstack.experts_backward(grad.contiguous(), *ctx.saved_tensors)
        return grads[0], grads[1], None, grads[2], grads[3]


def experts(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """As `ops.experts`; D and I must be multiples of LANES."""
    if torch.is_grad_enabled():
        return _Experts.apply(x, weights, experts, w_in, w_out)
    return torch.ops.thinkstack.experts(x, weights, experts, w_in, w_out, False)[0]
