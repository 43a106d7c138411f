"""Memory for the engine: zeros that are allocated as they are written, and buffers that a device copies from."""

import math

import numpy
import torch
from torch import Tensor

LINE = 64
"""Size of a cache line of the processor, in bytes."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Zeros of this shape. On a CPU they are aligned to a cache line and use no memory until they are written. They
    are zero because a masked NaN would still be NaN. device: None: the CPU."""
    if device is not None and device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    held = numpy.zeros(size + LINE, dtype=numpy.uint8)
    start = -held.ctypes.data % LINE
    return torch.from_numpy(held[start : start + size]).view(dtype).view(shape)


def staging_bytes(size: int, device: torch.device) -> Tensor:
    """`size` zero bytes on the CPU that are copied to `device` without waiting."""
    return torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
