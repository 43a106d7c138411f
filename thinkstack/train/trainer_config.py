"""Settings of the trainer."""

from dataclasses import dataclass
from typing import Literal

from thinkstack.config import Count, Weight
from thinkstack.models.lora import LoRAConfig
from thinkstack.models.precision import AskedPrecision
from thinkstack.train.optim import OptimConfig
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How steps are taken."""

    optim: OptimConfig = OptimConfig()
    dtype: AskedPrecision = "auto"
    """Precision of matrix products and activations; weights, gradients and the optimizer are fp32 in both. "auto": bf16
    where the device multiplies it faster than fp32, and with `fp8`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained and the engine of the same stage draws; "auto": on CUDA where there is some."""
    compile: bool = False
    """Compile the blocks with torch.compile (docs/gpu.md says what it costs); on CUDA they attend by FlexAttention."""
    fp8: Literal["off", "fp32", "ue8m0"] = "off"
    """Products of the blocks in 8 bits, with scales of this kind (docs/gpu.md); needs dtype="bf16" or "auto"."""
    micro_batch_tokens: Count = 2048
    """Tokens of one forward and backward pass; more passes add up to a step."""
    workers: Count = 1
    """Threads that take micro-batches in turn, each on one core with a copy of the weights."""
    checkpoint_layers: bool = False
    """Activation checkpointing: keep each block's input alone and compute the rest again in the backward pass."""
    mtp_weight: Weight = 0.3
    """Weight of the multi-token-prediction loss (lambda in the V3 report, section 2.2)."""
    mtp_detached: bool = False
    """Let that loss train the MTP modules only, not the trunk, embedding and head they look at."""
    balance_weight: Weight = 1e-4
    """Weight of the sequence-wise balance loss (alpha)."""
    bias_speed: Weight = 1e-3
    """Step of the balance bias (gamma); 0 freezes it."""
    lora: LoRAConfig = LoRAConfig()
    """Adapters to train in place of the model; lora.rank=0 trains the model."""

    def __post_init__(self) -> None:
        if self.lora.rank and self.bias_speed:
            raise ConfigError(
                f"bias_speed={self.bias_speed} would change the model that lora.rank={self.lora.rank} keeps frozen; "
                "use bias_speed=0"
            )
        if self.fp8 != "off" and self.dtype == "fp32":
            raise ConfigError(f"fp8={self.fp8!r} rounds what dtype={self.dtype!r} keeps exact; use dtype='bf16'")
        if self.device == "cuda" and self.workers > 1:
            raise ConfigError(f"workers={self.workers} are threads on CPU cores; use workers=1 with device='cuda'")
        if self.micro_batch_tokens < 1 or self.workers < 1:
            raise ConfigError(
                f"micro_batch_tokens={self.micro_batch_tokens} and workers={self.workers} must be at least 1"
            )
