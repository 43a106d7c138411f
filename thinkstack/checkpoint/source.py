"""A checkpoint as tensors that are read one at a time: what every format is read as, and written from.

Names and shapes are those of the Hugging Face layout (hf.stored_tensors), whatever the files call and cut them; so a
format needs one reader and one writer, and every conversion is a pair of the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from thinkstack.models.config import ModelConfig
from thinkstack.quant.scheme import Parts, QuantScheme


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """An opened checkpoint. Nothing that was read is kept: peak memory is what the caller holds on to."""

    path: Path
    """The folder or file, for messages."""
    cfg: ModelConfig
    """The model that its configuration describes."""
    tensors: Mapping[str, Callable[[], Tensor]]
    """How to read each tensor, by Hugging Face name; a float tensor, dequantized where the file keeps fewer bits."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """What the files keep each tensor as; what is not named counts as fp32."""
    quantization: QuantScheme | None = None
    """How the matrices in `packed` are kept."""
    packed: Mapping[str, Callable[[], Parts]] = field(default_factory=dict)
    """How to read matrices of few bits as they are kept; each is in `tensors` too."""
    direct: Mapping[tuple[str, str], Callable[[Tensor], None]] = field(default_factory=dict)
    """How to read what is stored into a contiguous tensor of that dtype, without memory on the way, where a format can:
    by name and part, "" for the whole of one that is not packed."""

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor is kept as, or comes out as if it is kept in fewer bits than a float's."""
        return self.dtypes.get(name, torch.float32)


@dataclass(frozen=True)
class OutputFormat:
    """What a writer makes of the tensors of a Source."""

    dtype: torch.dtype | None = None
    """Of everything but the balance bias (fp32) and packed matrices; None keeps what the source has."""
    quantization: QuantScheme | None = None
    """How the matrices of attention and feed-forwards are kept; None keeps them as floats."""
