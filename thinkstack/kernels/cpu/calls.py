"""Calls of the C++ kernels: predicates that decide whether a kernel is used, and the conversion of arguments."""

import ctypes

import numpy
import torch
from torch import Tensor

from thinkstack.kernels.choice import DTYPES, uses
from thinkstack.kernels.cpu.build import binary

POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
LANES = 16
"""Number of elements that the sizes of experts must be multiples of; other widths are arbitrary."""
SMALL_M = 8
"""Maximum number of rows for the small-M kernels, which are bound by the time to read the weights."""
SMALL_M_ALIGNMENT = 32
"""Number of elements that widths must be multiples of for `takes_small_m`."""
MAX_FUSED_HIDDEN = 1024
"""Maximum hidden size of models that run as one fused pass in fp32."""


def takes(x: Tensor, operation: str) -> bool:
    """Whether to use the kernel of this operation for tensors like x: it supports x and is faster (choice.py)."""
    return x.device.type == "cpu" and x.dtype in DTYPES and available() and uses(operation, x.dtype)


def available() -> bool:
    """Whether the kernels are built on this machine."""
    return binary() is not None


# The attribute that torch.compiler.assume_constant_result sets; calling it would import the compiler, which takes 1 s.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes_rows(x: Tensor, operation: str) -> bool:
    """`takes` for norms, activations and rotations; False within torch.compile, which fuses these operations itself."""
    return not torch.compiler.is_compiling() and takes(x, operation)


def takes_steps(x: Tensor, hidden_size: int, operation: str) -> bool:
    """`takes` for the kernels of small models: inference in fp32 up to hidden size MAX_FUSED_HIDDEN.

    For larger sizes the matmuls take longer than the overhead of calls, and torch's matmuls are as fast.
    """
    small = hidden_size <= MAX_FUSED_HIDDEN and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return small and takes_rows(x, operation)


def takes_linear(x: Tensor, *widths: int) -> bool:
    """`takes` for the matmul of x with a matrix of these widths: fp32, widths that are multiples of LANES."""
    if x.dtype != torch.float32 or x.numel() == 0:
        return False
    return all(width % LANES == 0 for width in widths) and takes_rows(x, "linear")


def takes_small_m(x: Tensor, *weights: Tensor) -> bool:
    """Whether to use the small-M kernels for weights (M, K): inference, x in bf16 with at most SMALL_M rows, weights in
    bf16 or int8.

    The result of a row therefore depends on whether there are at most SMALL_M rows; torch's kernels have the same
    property.
    """
    if x.dtype != torch.bfloat16 or x.numel() > SMALL_M * x.shape[-1] or torch.is_grad_enabled():
        return False
    if not takes_rows(x, "small_m_int8" if weights[0].dtype == torch.int8 else "small_m"):
        return False
    return x.is_contiguous() and all(
        weight.dtype in (x.dtype, torch.int8) and weight.is_contiguous() and weight.shape[1] % SMALL_M_ALIGNMENT == 0
        for weight in weights
    )


def structure(name: str, pointers: str, integers: str, reals: str = "") -> type[ctypes.Structure]:
    """A ctypes structure with these fields in this order: pointers, 64-bit integers, doubles."""
    kinds = ((pointers, POINTER), (integers, INTEGER), (reals, REAL))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})  # slots: an unknown field is an error


def run(name: str, arguments: ctypes.Structure, *flags: int) -> None:
    """Call kernel `name` with a structure and integer flags."""
    getattr(binary(), name)(ctypes.byref(arguments), *map(INTEGER, flags))


def call(name: str, *arguments: object) -> None:
    """Call kernel `name` with tensors, numbers or None, and the number of threads as the last argument."""
    getattr(binary(), name)(*map(_plain, arguments), INTEGER(torch.get_num_threads()))


def call_for(dtype: torch.dtype, name: str, *arguments: object) -> None:
    """`call` the variant of kernel `name` for fp32 or bf16."""
    call(f"{name}_{DTYPES[dtype]}", *arguments)


def address(x: Tensor | None) -> int | None:
    """The address of the elements of x; None for None."""
    return None if x is None else x.data_ptr()


def array_address(x: numpy.ndarray) -> int:
    """The address of the elements of a contiguous array."""
    assert x.flags.c_contiguous
    return x.__array_interface__["data"][0]


def _plain(value: object) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if value is None or isinstance(value, Tensor):
        return POINTER(address(value))
    return REAL(value) if isinstance(value, float) else INTEGER(value)  # type: ignore[arg-type]
