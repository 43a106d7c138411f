"""A checkpoint as tensors that are read one at a time: what every format is read as, and written from.

Names and shapes are those of the Hugging Face layout (hf.stored_tensors), whatever the files call and cut them; so a
format needs one reader and one writer, and every conversion is a pair of the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from thinkstack.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint. Nothing that was read is kept: peak memory is what the caller holds on to."""

    path: Path
    """The folder or file, for messages."""
    cfg: ModelConfig
    """The model that its configuration describes."""
    tensors: Mapping[str, Callable[[], Tensor]]
    """How to read each tensor, by Hugging Face name; a float tensor, dequantised where the file keeps fewer bits."""
