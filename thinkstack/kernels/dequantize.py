"""Matrices in few bits back to floats: by the kernel where that is faster, else by the scheme's own arithmetic."""

from torch import Tensor

from thinkstack import kernels
from thinkstack.quant.fp8 import BLOCK, FP8Blocks
from thinkstack.quant.int8 import Int8
from thinkstack.quant.scheme import Parts, Storage


def dequantize_(storage: Storage, parts: Parts, out: Tensor) -> None:
    """`storage.unpack(parts, out)`: write the matrices that `parts` stand for into out (..., N, K), rounded once."""
    if kernels.takes(out, "dequantize") and out.is_contiguous():
        codes, scale = parts["codes"].contiguous(), parts["scale"]
        if isinstance(storage, Int8):
            return kernels.widen(codes, scale.contiguous(), out, 1, out.shape[-1])
        if isinstance(storage, FP8Blocks):
            return kernels.widen(codes, scale.float().contiguous(), out, BLOCK, BLOCK)
    storage.unpack(parts, out)
