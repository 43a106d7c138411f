"""Block-scaled fp8 matmuls, as in DeepSeek-V3's training (V3 report, arXiv:2412.19437, section 3.3).

All three matmuls of a linear layer have e4m3 operands: activations and gradients in blocks of 1 x 128 along the
reduction dimension, weights in blocks of 128 x 128. Accumulation is in fp32. Embedding, head, routers, norms and
attention scores are not quantized.
"""

# Shapes in this file: M rows, K inputs (reduction dimension), N outputs, leading dimensions (...) are batch dimensions.

import torch
from torch import Tensor, nn

from thinkstack.kernels import ops
from thinkstack.kernels.reference import dispatch_tokens
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import BLOCK, dequantize, quantize


class _Linear(torch.autograd.Function):
    """x (..., M, K) times weight (..., N, K) transposed; tensors saved for the backward pass are fp8."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, power_of_two: bool) -> Tensor:  # type: ignore[override]
        a, b = quantize(x, 1, power_of_two), quantize(weight, BLOCK, power_of_two)
        ctx.save_for_backward(*a, *b)
        ctx.settings = power_of_two, x.dtype, weight.dtype
        return ops.scaled_matmul(a, b, BLOCK, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        power_of_two, x_dtype, weight_dtype = ctx.settings
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # sums over N: the blocks of the weight, transposed
            transposed = weight.mT.contiguous(), weight_scale.mT.contiguous()
            grad_x = ops.scaled_matmul(quantize(grad, 1, power_of_two), transposed, BLOCK, x_dtype)
        if ctx.needs_input_grad[1]:  # sums over rows: blocks of 128 rows of one column
            columns = quantize(dequantize(x, x_scale, 1).mT.contiguous(), 1, power_of_two)
            grad_weight = ops.scaled_matmul(quantize(grad.mT.contiguous(), 1, power_of_two), columns, 1, weight_dtype)
        return grad_x, grad_weight, None


def linear(x: Tensor, weight: Tensor, power_of_two: bool) -> Tensor:
    """x (..., K) times weight (N, K) transposed, or stacks (E, M, K) and (E, N, K); all three matmuls are in fp8."""
    if weight.dim() > 2:
        return _Linear.apply(x, weight, power_of_two)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, power_of_two).unflatten(0, x.shape[:-1])


class FP8Linear(nn.Linear):
    """A linear layer with fp8 matmuls; weight and bias are shared with the layer that it replaces."""

    def __init__(self, base: nn.Linear, power_of_two: bool):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.power_of_two = base.weight, base.bias, power_of_two

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.power_of_two)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FP8Experts(nn.Module):
    """The routed experts of a layer with fp8 matmuls; the rows of each expert are padded with zeros to the number of
    rows of the busiest expert."""

    def __init__(self, power_of_two: bool):
        super().__init__()
        self.power_of_two = power_of_two

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """Arguments and result as in `ops.experts`."""
        E, K = w_in.shape[0], experts.shape[1]
        plan = dispatch_tokens(experts, E)
        used = x.new_zeros(E * plan.capacity, 1).index_fill_(0, plan.slot, 1.0)
        rows = (x.index_select(0, plan.source) * used).unflatten(0, (E, -1))  # (E, C, D)
        gate, up = linear(rows, w_in, self.power_of_two).chunk(2, -1)
        out = linear(ops.swiglu(gate.contiguous(), up.contiguous()), w_out, self.power_of_two).flatten(0, 1)
        picked = out.index_select(0, plan.slot).unflatten(0, (-1, K))  # (N, K, D)
        return (picked * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def use_fp8(model: Transformer, power_of_two: bool) -> None:
    """Replace the linear layers and experts in the blocks of `model` by fp8 layers, in place."""
    for block in model.blocks():
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is not FP8Linear and isinstance(child, nn.Linear):
                    setattr(parent, name, FP8Linear(child, power_of_two))
            if isinstance(parent, MoE):
                parent.expert_module = FP8Experts(power_of_two)
