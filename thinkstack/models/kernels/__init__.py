"""Hand-written CPU kernels for the model's hot operations; each has a counterpart in torch's operators.

The kernels cover fp32 and bf16 on a CPU; `takes` tells whether they are there for a tensor. What a row becomes does not
depend on the other rows, only in bf16 on whether they are few. Without a compiler, and on other devices, the
counterparts run.
"""

from thinkstack.models.kernels.calls import (
    FEW,
    LANES,
    available,
    takes,
    takes_few,
    takes_linear,
    takes_rows,
    takes_steps,
)
from thinkstack.models.kernels.decoding import (
    BlockWeights,
    LatentLayer,
    RowDraws,
    attend_new,
    block_steps,
    draw,
    few_rows,
    latent_model,
    read_cache,
    route,
    rows_of,
)
from thinkstack.models.kernels.operators import Heads, attend, expert_mlp
from thinkstack.models.kernels.rows import (
    add_norm,
    is_rows,
    linear,
    linear_grad_weight,
    linear_grad_x,
    log_probs,
    log_probs_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
    swiglu,
    swiglu_backward,
    swiglu_halves,
    widen,
)

__all__ = [
    "FEW", "LANES", "BlockWeights", "Heads", "LatentLayer", "RowDraws", "add_norm", "attend", "attend_new",
    "available", "block_steps", "draw", "expert_mlp", "few_rows", "is_rows", "latent_model", "linear",
    "linear_grad_weight", "linear_grad_x", "log_probs", "log_probs_backward", "read_cache", "rms_norm",
    "rms_norm_backward", "rotate", "route", "rows_of", "swiglu", "swiglu_backward", "swiglu_halves", "takes",
    "takes_few", "takes_linear", "takes_rows", "takes_steps", "widen",
]  # fmt: skip
