"""Settings of the trainer."""

from dataclasses import dataclass
from typing import Literal

from thinkstack.config import Count, Weight
from thinkstack.kernels.precision import RequestedPrecision
from thinkstack.models.lora import LoRAConfig
from thinkstack.train.optim import OptimConfig
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Precision, optimizer and auxiliary losses of a training run."""

    optim: OptimConfig = OptimConfig()
    dtype: RequestedPrecision = "auto"
    """Precision of matmuls and activations; weights, gradients and the optimizer are always fp32. "auto": bf16 if it is
    faster on the device, and with `fp8`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trained model and of the engine in the same stage; "auto": CUDA if available."""
    compile: bool = False
    """Compile the blocks with torch.compile (costs in docs/internals/gpu.md); on CUDA attention is FlexAttention."""
    fp8: Literal["off", "fp32", "ue8m0"] = "off"
    """fp8 matmuls in the blocks, with this format of the scales (docs/internals/gpu.md); needs dtype="bf16" or
    dtype="auto"."""
    micro_batch_tokens: Count = 2048
    """Maximum number of tokens of a micro-batch (one forward and backward pass)."""
    workers: Count = 1
    """Number of threads that run micro-batches in parallel, each on one core with a copy of the weights."""
    checkpoint_layers: bool = False
    """Activation checkpointing: save only the input of each block and recompute the rest in the backward pass."""
    mtp_weight: Weight = 0.3
    """Weight of the multi-token-prediction loss (lambda in the V3 report, section 2.2)."""
    mtp_detached: bool = False
    """Train only the MTP modules with the MTP loss, not the trunk, embedding and head."""
    balance_weight: Weight = 1e-4
    """Weight of the sequence-wise balance loss (alpha)."""
    bias_speed: Weight = 1e-3
    """Update size of the balance bias (gamma); 0 freezes it."""
    lora: LoRAConfig = LoRAConfig()
    """Adapters to train instead of the model; lora.rank=0: train the model."""

    def __post_init__(self) -> None:
        if self.lora.rank and self.bias_speed:
            raise ConfigError(
                f"bias_speed={self.bias_speed} would change the model, which lora.rank={self.lora.rank} freezes; "
                "use bias_speed=0"
            )
        if self.fp8 != "off" and self.dtype == "fp32":
            raise ConfigError(f"fp8={self.fp8!r} does not work with dtype={self.dtype!r}; use dtype='bf16'")
        if self.device == "cuda" and self.workers > 1:
            raise ConfigError(f"workers={self.workers} needs a CPU; use workers=1 with device='cuda'")
        if self.micro_batch_tokens < 1 or self.workers < 1:
            raise ConfigError(
                f"micro_batch_tokens={self.micro_batch_tokens} and workers={self.workers} must be at least 1"
            )
