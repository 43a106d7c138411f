"""C++ kernels for the model's most expensive operations on a CPU, in fp32 and bf16.

Each operation also has an implementation with torch's operators, which needs no compiler and runs on other devices;
`takes` decides which implementation is used for a tensor. Kernels are batch-invariant, except that in bf16 different
kernels are used for up to SMALL_M rows and for more rows.
"""

from thinkstack.kernels.cpu.calls import (
    LANES,
    SMALL_M,
    available,
    takes,
    takes_linear,
    takes_rows,
    takes_small_m,
    takes_steps,
)
from thinkstack.kernels.cpu.inference import (
    RowSampler,
    paged_attention,
    route,
    sample,
    small_m_linear,
)
from thinkstack.kernels.cpu.operators import KVLayout, attend, expert_mlp
from thinkstack.kernels.cpu.rows import (
    add_norm,
    dequantize_block,
    is_rows,
    linear,
    linear_grad_weight,
    linear_grad_x,
    logprobs,
    logprobs_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
    swiglu,
    swiglu_backward,
    swiglu_halves,
)

__all__ = [
    "LANES",
    "SMALL_M",
    "KVLayout",
    "RowSampler",
    "add_norm",
    "attend",
    "available",
    "dequantize_block",
    "expert_mlp",
    "is_rows",
    "linear",
    "linear_grad_weight",
    "linear_grad_x",
    "logprobs",
    "logprobs_backward",
    "paged_attention",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "route",
    "sample",
    "small_m_linear",
    "swiglu",
    "swiglu_backward",
    "swiglu_halves",
    "takes",
    "takes_linear",
    "takes_rows",
    "takes_small_m",
    "takes_steps",
]  # fmt: skip
