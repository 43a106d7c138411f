"""The precisions of computation, and the one to use on this machine."""

import functools
import logging
from typing import Literal

import torch

from thinkstack.kernels import choice

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
RequestedPrecision = Literal["auto", "fp32", "bf16"]
""""auto": bf16 if matmuls on the device are faster in bf16 than in fp32 (`resolve_precision`)."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_precision(requested: RequestedPrecision, device: torch.device | str = "cpu") -> Precision:
    """The precision to compute in. "auto" is bf16 on CUDA; on a CPU it depends on the instruction set and a
    measurement. Requesting bf16 on a CPU that emulates it logs a warning once."""
    is_bf16_fast = torch.device(device).type != "cpu" or choice.choices().auto_dtype == "bf16"
    if requested == "auto":
        return "bf16" if is_bf16_fast else "fp32"
    if requested == "bf16" and not is_bf16_fast:
        _warn_of_emulation(choice.choices().reason)
    return requested


@functools.cache
def _warn_of_emulation(reason: str) -> None:
    log.warning("dtype=bf16 is slow on this processor (%s); use dtype=auto or dtype=fp32", reason)
