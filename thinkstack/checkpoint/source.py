"""TensorSource: a checkpoint as tensors that are read one at a time; the common representation of all formats.

Names and shapes follow the Hugging Face layout (hf.tensors.tensor_entries), independent of the file format. Each
format needs one reader and one writer, and every conversion combines a reader with a writer.
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
    """An opened checkpoint. Tensors are not cached; the caller decides how many are in memory."""

    path: Path
    """The folder or file, for messages."""
    cfg: ModelConfig
    """The model configuration."""
    tensors: Mapping[str, Callable[[], Tensor]]
    """Readers of the tensors by Hugging Face name; each returns a float tensor, dequantized if necessary."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Stored dtypes by name; a missing name means fp32."""
    quantization: QuantScheme | None = None
    """Quantization scheme of the matrices in `quantized`."""
    quantized: Mapping[str, Callable[[], Parts]] = field(default_factory=dict)
    """Readers of the stored parts of quantized matrices; each matrix is also in `tensors`."""
    direct_readers: Mapping[tuple[str, str], Callable[[Tensor], None]] = field(default_factory=dict)
    """Functions that read stored data directly into a contiguous tensor of its dtype, without a buffer, if the format
    allows it. Keys: (name, part); the part is "" for a tensor that is not quantized."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the stored dtype, or for a quantized matrix the dtype after dequantization."""
        return self.dtypes.get(name, torch.float32)


@dataclass(frozen=True)
class OutputFormat:
    """Types of the tensors that a writer writes."""

    dtype: torch.dtype | None = None
    """Dtype of everything except the balance bias (fp32) and quantized matrices; None keeps the dtypes of the
    source."""
    quantization: QuantScheme | None = None
    """Quantization of the matrices of attention and feed-forward layers; None writes them as floats."""
