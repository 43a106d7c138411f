"""Calls of the C++ kernels: the conversion of arguments."""

import ctypes

import numpy
import torch
from torch import Tensor

from thinkstack.kernels.choice import PRECISIONS
from thinkstack.kernels.cpu import structures
from thinkstack.kernels.cpu.build import binary

POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def available() -> bool:
    """Whether the kernels are built on this machine."""
    return binary() is not None


# The attribute that torch.compiler.assume_constant_result sets; calling it would import the compiler, which takes 1 s.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def structure(name: str, pointers: str, integers: str, reals: str = "") -> type[ctypes.Structure]:
    """`structures.define`; if the library is loaded, also `check_layout`."""
    made = structures.define(name, pointers, integers, reals)
    library = binary() if binary.cache_info().currsize else None
    if library is not None:
        structures.check_layout(library, made)
    return made


def run(name: str, arguments: ctypes.Structure, *flags: int) -> None:
    """Call kernel `name` with a structure and integer flags."""
    getattr(binary(), name)(ctypes.byref(arguments), *map(INTEGER, flags))


def call(name: str, *arguments: object) -> None:
    """Call kernel `name` with tensors, numbers or None, and the number of threads as the last argument."""
    getattr(binary(), name)(*map(_plain, arguments), INTEGER(torch.get_num_threads()))


def call_for(dtype: torch.dtype, name: str, *arguments: object) -> None:
    """`call` the variant of kernel `name` for fp32 or bf16."""
    call(f"{name}_{PRECISIONS[dtype]}", *arguments)


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
