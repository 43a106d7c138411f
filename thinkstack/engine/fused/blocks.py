"""What the fused passes have in common: the modules that they support, and a prepacked head."""

# Shapes in this file: B tokens, D hidden size, V vocabulary size.

from collections.abc import Iterable

from torch import Tensor, nn

from thinkstack.kernels.cpu.prepacked import prepack_batch_invariant, prepacked_linear
from thinkstack.models.attention import GQA, MLA
from thinkstack.models.block import Block
from thinkstack.models.layers import Linear, QuantizedLinear, QuantizedWeight, RMSNorm, SwiGLU
from thinkstack.models.lora import Adapter, LoRALinear
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer

BLOCK_MODULES: set[type[nn.Module]] = {Block, GQA, MLA, SwiGLU, MoE, RMSNorm, Linear, nn.ModuleDict}
"""The module types of an unmodified block."""
REFUSALS: dict[type[nn.Module], str] = {
    LoRALinear: "adapters",
    Adapter: "adapters",
    QuantizedLinear: "quantized weights",
    QuantizedWeight: "quantized weights",
}


class FusedHead:
    """The head of a fused pass."""

    ignores_threads = False
    """Whether results of every step are bit for bit independent of torch's number of threads."""

    def __init__(self, weight: Tensor):
        """weight: (V, D)."""
        self.prepacked_head = prepack_batch_invariant(weight)
        """The prepacked matrix of the head if its matmuls are batch-invariant, otherwise None."""

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Logits (B, V) of hidden states (B, D), batch-invariant; None if the model's head computes them."""
        return None if self.prepacked_head is None else prepacked_linear(hidden, self.prepacked_head)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, which means that it is sharded across ranks."""
    return any(part._forward_hooks for part in module.modules())


def refused_dtype(model: Transformer, blocks: Iterable[nn.Module]) -> str | None:
    """The dtypes of the matrices in words if they, routers aside, differ from the embedding's dtype; None if not."""
    named = [named for block in blocks for named in block.named_parameters()]
    matrices = {parameter.dtype for name, parameter in named if parameter.dim() > 1 and not name.endswith("router")}
    dtypes = sorted(map(str, matrices | {model.embed.weight.dtype}))
    return f"matrices of several dtypes: {', '.join(dtypes)}" if len(dtypes) > 1 else None


def refused_module(blocks: Iterable[nn.Module], supported: set[type[nn.Module]]) -> str | None:
    """The first module of blocks that a fused pass does not support, in words; None if it supports all."""
    for block in blocks:
        if has_hooks(block):
            return "forward hooks, which shard a model across ranks"
        for part in block.modules():
            if type(part) not in supported:
                return REFUSALS.get(type(part), type(part).__name__)
    return None
