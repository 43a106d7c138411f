"""What a model is, in numbers. Families are values of ModelConfig, never copies of code.

Named sizes stand at the end. Field names follow the DeepSeek papers; checkpoint/hf_config.py maps them to and from the
Hugging Face config.json of each family.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension of the rotary part (YaRN, arXiv:2309.00071; DeepSeek-V3 report, section 4.3)."""

    factor: float = 40.0
    """New context length over the original one."""
    original_max_positions: int = 4096
    """Tokens of context before the extension."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are divided by `factor`."""
    mscale: float = 1.0
    """Numerator of the cos/sin amplitude; equal to mscale_all_dim in the V3 family, so the amplitude is 1."""
    mscale_all_dim: float = 1.0
    """Enters the softmax scale as (0.1 * mscale_all_dim * ln(factor) + 1) ** 2; 0 leaves the scale alone."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"yarn.factor={self.factor} shrinks the context; use a factor >= 1 or leave yarn out")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding."""

    theta: float = 10000.0
    """Base of the frequencies theta ** (-2i / d)."""
    interleaved: bool = True
    """True: pairs are (x0, x1), (x2, x3), ... (DeepSeek). False: pairs are (x_i, x_{i + d/2}) (Llama, Qwen)."""
    yarn: YarnConfig | None = None
    """Context extension, or None."""


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2 report, arXiv:2405.04434, section 2.1)."""

    num_heads: int
    """Attention heads."""
    q_lora_rank: int
    """Width of the query latent; 0 projects queries directly (V2-Lite)."""
    kv_lora_rank: int
    """Width of the key/value latent, which is what the cache holds."""
    qk_nope_head_dim: int
    """Width of a query/key head without position."""
    qk_rope_head_dim: int
    """Width of the rotated part of a query head, and of the one rotated key that all heads share."""
    v_head_dim: int
    """Width of a value head."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Cached elements per token and layer, whatever the number of heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention (Llama, Qwen)."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of every head."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Cached elements per token and layer: one key and one value per key/value head."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE: shared and fine-grained routed experts (V3 report, arXiv:2412.19437, section 2.1.2)."""

    num_experts: int
    """Routed experts per layer."""
    top_k: int
    """Routed experts per token."""
    num_shared_experts: int = 1
    """Experts every token uses; they form one SwiGLU of width num_shared_experts * expert_size."""
    expert_size: int
    """Intermediate width of one expert."""
    num_groups: int = 1
    """Groups of neighbouring experts (nodes in the published training)."""
    top_groups: int = 1
    """A token may use experts from at most this many groups."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity function; V3 uses sigmoid, V2 softmax."""
    group_score: Literal["top2", "max"] = "top2"
    """What ranks a group: the sum of its two best affinities (V3) or its best one (V2)."""
    normalise_weights: bool = True
    """Whether the chosen weights are divided by their sum (V3) or used as they are (V2)."""
    route_scale: float = 1.0
    """Factor on the routed output."""
    first_dense_layers: int = 1
    """Layers at the bottom that keep a dense feed-forward."""

    def __post_init__(self) -> None:
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"moe.num_experts={self.num_experts} does not split into moe.num_groups={self.num_groups} equal "
                f"groups; use a multiple of {self.num_groups}"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(f"moe.top_groups={self.top_groups} must lie in 1..moe.num_groups={self.num_groups}")
        group_size = self.num_experts // self.num_groups
        if self.top_k > self.top_groups * group_size:
            raise ConfigError(
                f"moe.top_k={self.top_k} experts cannot come from {self.top_groups} groups of {group_size}; "
                "raise moe.top_groups or lower moe.top_k"
            )
        if self.num_groups > 1 and self.group_score == "top2" and group_size < 2:
            raise ConfigError(
                f"moe.group_score='top2' needs two experts a group, but moe.num_groups={self.num_groups} leaves "
                f"{group_size}; use fewer groups"
            )

    @property
    def shared_size(self) -> int:
        """Intermediate width of the shared experts together."""
        return self.num_shared_experts * self.expert_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only model of the family."""

    family: Literal["deepseek_v3", "deepseek_v2", "llama"]
    """Which Hugging Face architecture the checkpoint belongs to; the model itself never looks at it."""
    vocab_size: int
    """Rows of the embedding; may exceed the tokenizer's size (V3 pads to 129,280)."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer blocks, without multi-token-prediction modules."""
    attention: MLAConfig | GQAConfig
    """Latent or grouped-query attention."""
    dense_size: int
    """Intermediate width of a dense feed-forward."""
    moe: MoEConfig | None = None
    """Experts of the layers from moe.first_dense_layers on; None keeps all layers dense."""
    mtp_layers: int = 0
    """Multi-token-prediction modules kept beside the main model (D in the V3 report)."""
    rope: RopeConfig = RopeConfig()
    """Rotary embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head reuses the embedding matrix."""
    max_positions: int = 4096
    """Longest context in tokens."""
    bos_id: int = 0
    """Token that begins every sequence."""
    eos_ids: tuple[int, ...] = (1,)
    """Tokens that end an answer."""
    init_std: float = 0.006
    """Standard deviation of the initial weights (V3 report, section 4.2)."""
    embed_init_std: float = 0.0
    """Standard deviation of the initial embedding; 0 takes init_std."""

    def __post_init__(self) -> None:
        if self.attention.rope_dim % 2:
            raise ConfigError(f"the rotated head width {self.attention.rope_dim} is odd; rotation needs pairs")
        if self.moe is not None and self.moe.first_dense_layers > self.num_layers:
            raise ConfigError(
                f"moe.first_dense_layers={self.moe.first_dense_layers} exceeds num_layers={self.num_layers}"
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0; MTP blocks count on from num_layers) has experts."""
        return self.moe is not None and layer >= self.moe.first_dense_layers

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores; with YaRN it carries the squared mscale (V3 report, section 4.3)."""
        width = self.attention.qk_head_dim if isinstance(self.attention, MLAConfig) else self.attention.head_dim
        yarn = self.rope.yarn
        if yarn is None or yarn.mscale_all_dim == 0:
            return width**-0.5
        return width**-0.5 * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: 0.1 * mscale * ln(factor) + 1, and 1 without extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def v3_671b() -> ModelConfig:
    """DeepSeek-V3 and R1 (V3 report, section 4.2; inference/configs/config_671B.json)."""
    return ModelConfig(
        family="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        num_layers=61,
        attention=MLAConfig(
            num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        dense_size=18432,
        moe=MoEConfig(
            num_experts=256,
            top_k=8,
            expert_size=2048,
            num_groups=8,
            top_groups=4,
            route_scale=2.5,
            first_dense_layers=3,
        ),
        mtp_layers=1,
        rope=RopeConfig(yarn=YarnConfig()),
        max_positions=163840,
    )


def v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite (inference/configs/config_16B.json; V2 report, appendix B)."""
    return ModelConfig(
        family="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        attention=MLAConfig(
            num_heads=16, q_lora_rank=0, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        dense_size=10944,
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            expert_size=1408,
            scoring="softmax",
            group_score="max",
            normalise_weights=False,
        ),
        rope=RopeConfig(yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707)),
        max_positions=163840,
        bos_id=100000,
        eos_ids=(100001,),
    )


def v3_tiny() -> ModelConfig:
    """The V3 architecture at the size that learns the demo suite on two CPU cores in minutes.

    Half of each head is rotated: with a quarter, as in V3, looking up "the next operation" is learnt several times more
    slowly. Heads are 32 + 32 = 64 wide, the narrowest that vLLM's CPU attention takes. Initial weights are as large
    relative to the width as small models need: 0.1, the embedding 0.3 (docs/log.md has the comparisons).
    """
    return ModelConfig(
        family="deepseek_v3",
        vocab_size=640,
        hidden_size=128,
        num_layers=4,
        attention=MLAConfig(
            num_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=48
        ),
        dense_size=256,
        moe=MoEConfig(num_experts=8, top_k=2, expert_size=64, num_groups=4, top_groups=2, route_scale=1.0),
        mtp_layers=1,
        max_positions=512,
        init_std=0.1,
        embed_init_std=0.3,
    )


def llama_tiny() -> ModelConfig:
    """A dense model with grouped-query attention and the width of v3-tiny."""
    return ModelConfig(
        family="llama",
        vocab_size=1024,
        hidden_size=128,
        num_layers=4,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        dense_size=384,
        rope=RopeConfig(interleaved=False),
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=512,
        init_std=0.02,
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M-Instruct, a Llama with tied embeddings."""
    return ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        attention=GQAConfig(num_heads=9, num_kv_heads=3, head_dim=64),
        dense_size=1536,
        rope=RopeConfig(theta=100000.0, interleaved=False),
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=8192,
        bos_id=1,
        eos_ids=(2,),
    )


NAMED: dict[str, Callable[[], ModelConfig]] = {
    "v3-671b": v3_671b,
    "v2-lite": v2_lite,
    "v3-tiny": v3_tiny,
    "llama-tiny": llama_tiny,
    "smollm2-135m": smollm2_135m,
}


def named(name: str, **changes: object) -> ModelConfig:
    """The configuration called `name`, with top-level fields replaced by `changes`."""
    if name not in NAMED:
        raise ConfigError(f"unknown model size {name!r}; known: {', '.join(NAMED)}")
    return replace(NAMED[name](), **changes)  # type: ignore[arg-type]
