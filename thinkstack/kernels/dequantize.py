"""Dequantization with the kernel if that is faster, otherwise with the scheme's implementation in torch."""

from torch import Tensor

from thinkstack import kernels
from thinkstack.quant.fp8 import BLOCK, FP8Blocks
from thinkstack.quant.int8 import Int8
from thinkstack.quant.scheme import Parts, QuantScheme


def dequantize_(quantization: QuantScheme, parts: Parts, out: Tensor) -> None:
    """`quantization.dequantize_(parts, out)`: write the dequantized matrices into out (..., N, K), rounded once."""
    if kernels.takes(out, "dequantize") and out.is_contiguous():
        qweight, scale = parts["qweight"].contiguous(), parts["scale"]
        if isinstance(quantization, Int8):
            return kernels.dequantize_block(qweight, scale.contiguous(), out, 1, out.shape[-1])
        if isinstance(quantization, FP8Blocks):
            return kernels.dequantize_block(qweight, scale.float().contiguous(), out, BLOCK, BLOCK)
    quantization.dequantize_(parts, out)
