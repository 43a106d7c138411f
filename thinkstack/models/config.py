"""The model configuration. Model families differ in ModelConfig only, not in code.

Named sizes are at the end. Field names follow the DeepSeek papers; checkpoint/hf/config.py maps them to and from the
Hugging Face config.json of each family.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from thinkstack.models.attention_config import (
    GQAConfig,
    Llama3RopeConfig,
    MLAConfig,
    RopeConfig,
    YarnConfig,
    yarn_mscale,
)
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE: shared and fine-grained routed experts (V3 report, arXiv:2412.19437, section 2.1.2)."""

    num_experts: int
    """Number of routed experts per layer."""
    num_experts_per_tok: int
    """Number of routed experts per token."""
    num_shared_experts: int = 1
    """Number of shared experts, used by every token, in one SwiGLU of width num_shared_experts *
    moe_intermediate_size."""
    moe_intermediate_size: int
    """Intermediate width of one expert."""
    num_groups: int = 1
    """Number of groups of consecutive experts (nodes in DeepSeek's training)."""
    top_groups: int = 1
    """Maximum number of groups from which a token may use experts."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity function; "sigmoid" in V3, "softmax" in V2."""
    group_score: Literal["top2", "max"] = "top2"
    """Score of a group: "top2" is the sum of the two highest affinities (V3), "max" the highest affinity (V2)."""
    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts are divided by their sum (V3) or not (V2)."""
    route_scale: float = 1.0
    """Factor of the routed output."""
    first_dense_layers: int = 1
    """Number of layers, at the beginning, with a dense feed-forward."""

    def __post_init__(self) -> None:
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"moe.num_experts={self.num_experts} does not split into moe.num_groups={self.num_groups} equal "
                f"groups; use a multiple of {self.num_groups}"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(f"moe.top_groups={self.top_groups} must lie in 1..moe.num_groups={self.num_groups}")
        group_size = self.num_experts // self.num_groups
        if self.num_experts_per_tok > self.top_groups * group_size:
            raise ConfigError(
                f"moe.num_experts_per_tok={self.num_experts_per_tok} experts cannot come from {self.top_groups} groups "
                f"of {group_size}; raise moe.top_groups or lower moe.num_experts_per_tok"
            )
        if self.num_groups > 1 and self.group_score == "top2" and group_size < 2:
            raise ConfigError(
                f"moe.group_score='top2' needs two experts per group, but moe.num_groups={self.num_groups} gives "
                f"{group_size}; use fewer groups"
            )

    @property
    def shared_size(self) -> int:
        """Total intermediate width of the shared experts."""
        return self.num_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of a decoder-only model."""

    family: Literal["deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3", "qwen3_moe"]
    """Hugging Face architecture of the checkpoint; the model code does not depend on it."""
    vocab_size: int
    """Number of rows of the embedding; may exceed the size of the tokenizer (V3 pads to 129,280)."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of transformer blocks, without multi-token-prediction modules."""
    attention: MLAConfig | GQAConfig
    """Multi-head latent attention or grouped-query attention."""
    intermediate_size: int
    """Intermediate width of a dense feed-forward."""
    moe: MoEConfig | None = None
    """Experts of the layers from index moe.first_dense_layers; None: all layers are dense."""
    mtp_layers: int = 0
    """Number of multi-token-prediction modules in addition to the main model (D in the V3 report)."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""
    norm_eps: float = 1e-6
    """Epsilon added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding matrix."""
    max_positions: int = 4096
    """Maximum context length in tokens."""
    bos_id: int | None = 0
    """BOS token id in config.json; None if config.json has none, as in Qwen models. Tokenizer.begin_ids has the tokens
    that the tokenizer actually prepends."""
    eos_ids: tuple[int, ...] = (1,)
    """Tokens that end a completion; empty if config.json has none."""
    init_std: float = 0.006
    """Standard deviation of the initial weights (V3 report, section 4.2)."""
    embed_init_std: float = 0.0
    """Standard deviation of the initial embedding; 0: use init_std."""

    def __post_init__(self) -> None:
        if self.attention.rope_dim % 2:
            raise ConfigError(
                f"the rotated head width {self.attention.rope_dim} is odd; rotary embeddings need an even width"
            )
        if self.moe is not None and self.moe.first_dense_layers > self.num_layers:
            raise ConfigError(
                f"moe.first_dense_layers={self.moe.first_dense_layers} exceeds num_layers={self.num_layers}"
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` has experts. Layers count from 0; MTP blocks start at num_layers."""
        return self.moe is not None and layer >= self.moe.first_dense_layers

    @property
    def softmax_scale(self) -> float:
        """Factor of attention scores; with YaRN it includes the squared mscale (V3 report, section 4.3)."""
        width = self.attention.qk_head_dim if isinstance(self.attention, MLAConfig) else self.attention.head_dim
        yarn = self.rope.yarn
        if yarn is None or yarn.mscale_all_dim == 0:
            return width**-0.5
        return width**-0.5 * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


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
        intermediate_size=18432,
        moe=MoEConfig(
            num_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
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
        intermediate_size=10944,
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_tok=6,
            num_shared_experts=2,
            moe_intermediate_size=1408,
            scoring="softmax",
            group_score="max",
            norm_topk_prob=False,
        ),
        rope=RopeConfig(yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707)),
        max_positions=163840,
        bos_id=100000,
        eos_ids=(100001,),
    )


def v3_tiny() -> ModelConfig:
    """The V3 architecture at a size that learns the tasks of the demo on two CPU cores in minutes.

    Rotary embeddings apply to half of each head: with a quarter, as in V3, the model needs several times longer to
    learn to look up "the next operation". Heads are 32 + 32 = 64 wide, the smallest width that vLLM's CPU attention
    supports. Small models need larger initial weights: standard deviation 0.1, and 0.3 for the embedding (compared in
    docs/log.md)."""
    return ModelConfig(
        family="deepseek_v3",
        vocab_size=640,
        hidden_size=128,
        num_layers=4,
        attention=MLAConfig(
            num_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=48
        ),
        intermediate_size=256,
        moe=MoEConfig(
            num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, num_groups=4, top_groups=2, route_scale=1.0
        ),
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
        intermediate_size=384,
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
        intermediate_size=1536,
        rope=RopeConfig(theta=100000.0, interleaved=False),
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=8192,
        bos_id=1,
        eos_ids=(2,),
    )


def v2_236b() -> ModelConfig:
    """DeepSeek-V2 (inference/configs/config_236B.json; V2 report, section 3.1.2, for mscale)."""
    return replace(
        v2_lite(),
        hidden_size=5120,
        num_layers=60,
        attention=v3_671b().attention,
        intermediate_size=12288,
        moe=replace(
            v2_lite().moe,  # type: ignore[type-var]
            num_experts=160,
            moe_intermediate_size=1536,
            num_groups=8,
            top_groups=3,
            route_scale=16.0,
        ),
    )


def llama3(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int) -> ModelConfig:
    """Llama 3.1 and 3.3, the base models of the R1-Distill-Llama models (config.json of the released models)."""
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=hidden_size,
        num_layers=num_layers,
        attention=GQAConfig(num_heads=num_heads, num_kv_heads=8, head_dim=128),
        intermediate_size=intermediate_size,
        rope=RopeConfig(theta=500000.0, interleaved=False, llama3=Llama3RopeConfig()),
        norm_eps=1e-5,
        max_positions=131072,
        bos_id=128000,
        eos_ids=(128001,),
        init_std=0.02,
    )


def qwen2(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    vocab_size: int = 152064,
    theta: float = 1e6,
) -> ModelConfig:
    """Qwen2.5, the base models of the R1-Distill-Qwen models: head width 128, untied embeddings (config.json of the
    released models)."""
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        attention=GQAConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128, qkv_bias=True),
        intermediate_size=intermediate_size,
        rope=RopeConfig(theta=theta, interleaved=False),
        max_positions=131072,
        bos_id=151643,
        eos_ids=(151643,),
        init_std=0.02,
    )


def qwen3_8b() -> ModelConfig:
    """Qwen3-8B, the base model of DeepSeek-R1-0528-Qwen3-8B."""
    return replace(
        qwen2(4096, 36, 32, 8, 12288, vocab_size=151936),
        family="qwen3",
        attention=GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128, qk_norm=True),
        max_positions=40960,
        eos_ids=(151645,),
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B: num_heads * head_dim exceeds the hidden size; every layer has experts, without shared experts."""
    return replace(
        qwen3_8b(),
        family="qwen3_moe",
        hidden_size=2048,
        num_layers=48,
        attention=GQAConfig(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm=True),
        intermediate_size=6144,
        moe=MoEConfig(
            num_experts=128,
            num_experts_per_tok=8,
            num_shared_experts=0,
            moe_intermediate_size=768,
            scoring="softmax",
            group_score="max",
            first_dense_layers=0,
        ),
    )


NAMED: dict[str, Callable[[], ModelConfig]] = {
    "v3-671b": v3_671b,
    "v2-236b": v2_236b,
    "v2-lite": v2_lite,
    "v3-tiny": v3_tiny,
    "llama-tiny": llama_tiny,
    "smollm2-135m": smollm2_135m,
    "r1-distill-qwen-1.5b": partial(qwen2, 1536, 28, 12, 2, 8960, vocab_size=151936, theta=10000.0),
    "r1-distill-qwen-7b": partial(qwen2, 3584, 28, 28, 4, 18944, theta=10000.0),
    "r1-distill-qwen-14b": partial(qwen2, 5120, 48, 40, 8, 13824),
    "r1-distill-qwen-32b": partial(qwen2, 5120, 64, 40, 8, 27648),
    "r1-distill-llama-8b": partial(llama3, 4096, 32, 32, 14336),
    "r1-distill-llama-70b": partial(llama3, 8192, 80, 64, 28672),
    "qwen3-8b": qwen3_8b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
}


def named(name: str, **changes: object) -> ModelConfig:
    """The configuration of a named size, with top-level fields replaced by `changes`."""
    if name not in NAMED:
        raise ConfigError(f"unknown model size {name!r}; use one of {', '.join(NAMED)}")
    return replace(NAMED[name](), **changes)  # type: ignore[arg-type]
