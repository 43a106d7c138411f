"""How Python calls a kernel: when it may, and how tensors become its arguments."""

import ctypes

import numpy
import torch
from torch import Tensor

from thinkstack.kernels.choice import DTYPES, uses
from thinkstack.kernels.cpu.build import binary

POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
LANES = 16
"""Expert sizes must be multiples of this; everything else may have any width."""
SMALL_M = 8
"""Rows that are few: their products take as long as reading the weights."""
WIDE = 32
"""Widths that `takes_small_m` needs are multiples of this."""
MAX_FUSED_HIDDEN = 1024
"""Models up to this hidden size run as one fused pass in fp32."""


def takes(x: Tensor, operation: str) -> bool:
    """Whether a kernel computes this operation (choice.py) on tensors like x: it can, and is faster."""
    return x.device.type == "cpu" and x.dtype in DTYPES and available() and uses(operation, x.dtype)


def available() -> bool:
    """Whether the kernels could be built here."""
    return binary() is not None


# What torch.compiler.assume_constant_result sets; calling that imports the whole compiler, a second of every start.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes_rows(x: Tensor, operation: str) -> bool:
    """Whether the kernels for norms, activations and rotations should: as `takes`, but not while compiling."""
    return not torch.compiler.is_compiling() and takes(x, operation)


def takes_steps(x: Tensor, hidden_size: int, operation: str) -> bool:
    """Whether the kernels for small models should compute this: inference in fp32 on a model of few features.

    Beyond MAX_FUSED_HIDDEN features the products outweigh the calls, and torch's are as good.
    """
    small = hidden_size <= MAX_FUSED_HIDDEN and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return small and takes_rows(x, operation)


def takes_linear(x: Tensor, *widths: int) -> bool:
    """Whether the kernel multiplies x by a matrix of these widths: in fp32, of whole vectors."""
    if x.dtype != torch.float32 or x.numel() == 0:
        return False
    return all(width % LANES == 0 for width in widths) and takes_rows(x, "linear")


def takes_small_m(x: Tensor, *weights: Tensor) -> bool:
    """Whether weights (M, K) should be read by the kernels for a few rows: inference on SMALL_M rows at most, x in
    bf16, weights in bf16 or int8.

    What comes of a row then depends on whether there are few, as it does among torch's own kernels.
    """
    if x.dtype != torch.bfloat16 or x.numel() > SMALL_M * x.shape[-1] or torch.is_grad_enabled():
        return False
    if not takes_rows(x, "small_m_int8" if weights[0].dtype == torch.int8 else "small_m"):
        return False
    return x.is_contiguous() and all(
        weight.dtype in (x.dtype, torch.int8) and weight.is_contiguous() and weight.shape[1] % WIDE == 0
        for weight in weights
    )


def structure(name: str, pointers: str, integers: str, reals: str = "") -> type[ctypes.Structure]:
    """The C structure with these fields, in this order."""
    kinds = ((pointers, POINTER), (integers, INTEGER), (reals, REAL))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})  # slots: an unknown field is an error


def run(name: str, arguments: ctypes.Structure, *flags: int) -> None:
    """Call kernel `name` with a structure and flags."""
    getattr(binary(), name)(ctypes.byref(arguments), *map(INTEGER, flags))


def call(name: str, *arguments: object) -> None:
    """Call kernel `name` with tensors, numbers and None; the number of threads comes last."""
    getattr(binary(), name)(*map(_plain, arguments), INTEGER(torch.get_num_threads()))


def call_for(dtype: torch.dtype, name: str, *arguments: object) -> None:
    """`call` the variant of kernel `name` for fp32 or bf16."""
    call(f"{name}_{DTYPES[dtype]}", *arguments)


def address(x: Tensor | None) -> int | None:
    """Where the elements of x lie."""
    return None if x is None else x.data_ptr()


def place(x: numpy.ndarray) -> int:
    """`address` of an array, whose elements lie together."""
    assert x.flags.c_contiguous
    return x.__array_interface__["data"][0]


def _plain(value: object) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if value is None or isinstance(value, Tensor):
        return POINTER(address(value))
    return REAL(value) if isinstance(value, float) else INTEGER(value)  # type: ignore[arg-type]
