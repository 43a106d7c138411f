"""Configurations of attention (heads, latents, biases) and of rotary embeddings with context extensions."""

import math
from dataclasses import dataclass

from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2 report, arXiv:2405.04434, section 2.1)."""

    num_heads: int
    """Number of attention heads."""
    q_lora_rank: int
    """Width of the query latent; 0: queries are projected directly (V2-Lite)."""
    kv_lora_rank: int
    """Width of the key/value latent, which is stored in the cache."""
    qk_nope_head_dim: int
    """Width of the part of a query/key head without rotary embedding."""
    qk_rope_head_dim: int
    """Width of the part of a query head with rotary embedding, and of the rotated key that is shared by all heads."""
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
        """Number of cached elements per token and layer; independent of the number of heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention (Llama, Qwen)."""

    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of key/value heads; each is shared by num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of every head; num_heads * head_dim may differ from the hidden size (Qwen3)."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen2)."""
    out_bias: bool = False
    """Whether the output projection has a bias."""
    qk_norm: bool = False
    """Whether each query and key head is normed before it is rotated (Qwen3)."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "the query heads must divide evenly among the key/value heads"
            )

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Number of cached elements per token and layer: one key and one value per key/value head."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension of rotary embeddings by YaRN (arXiv:2309.00071; DeepSeek-V3 report, section 4.3)."""

    factor: float = 40.0
    """New context length divided by the original context length."""
    original_max_positions: int = 4096
    """Context length in tokens before the extension."""
    beta_fast: float = 32.0
    """Frequencies with more rotations than this within the original context are unchanged."""
    beta_slow: float = 1.0
    """Frequencies with fewer rotations than this within the original context are divided by `factor`."""
    mscale: float = 1.0
    """Numerator of the cos/sin amplitude; equal to mscale_all_dim in the V3 family, so that the amplitude is 1."""
    mscale_all_dim: float = 1.0
    """The softmax scale is multiplied by (0.1 * mscale_all_dim * ln(factor) + 1) ** 2; 0: no change."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"yarn.factor={self.factor} shrinks the context; use a factor >= 1 or leave yarn out")


@dataclass(frozen=True, kw_only=True)
class Llama3RopeConfig:
    """Context extension of Llama 3.1 and later (arXiv:2407.21783, section 3.4.2; defaults as in the released
    config.json).
    """

    factor: float = 8.0
    """Divisor of low frequencies."""
    low_freq_factor: float = 1.0
    """Frequencies with fewer rotations than this within the original context are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Frequencies with more rotations than this within the original context are unchanged; frequencies between the two
    bounds are interpolated."""
    original_max_positions: int = 8192
    """Context length in tokens before the extension."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"llama3.factor={self.factor} shrinks the context; use a factor >= 1 or leave llama3 out")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"llama3.low_freq_factor={self.low_freq_factor} must be positive and below "
                f"llama3.high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) with at most one context extension."""

    theta: float = 10000.0
    """Base of the frequencies theta ** (-2i / d)."""
    interleaved: bool = True
    """True: pairs are (x0, x1), (x2, x3), ... (DeepSeek). False: pairs are (x_i, x_{i + d/2}) (Llama, Qwen)."""
    yarn: YarnConfig | None = None
    """Context extension of DeepSeek, and of Qwen beyond 32,768 tokens; None: not used."""
    llama3: Llama3RopeConfig | None = None
    """Context extension of Llama 3.1 and later; None: not used."""
    linear_factor: float = 1.0
    """Divisor of all frequencies (arXiv:2306.15595; 4 in DeepSeek-Coder); 1: no change."""

    def __post_init__(self) -> None:
        if not self.theta > 1:
            raise ConfigError(f"rope.theta={self.theta} must exceed 1; 10000 is usual")
        if self.linear_factor < 1:
            raise ConfigError(f"rope.linear_factor={self.linear_factor} shrinks the context; use a factor >= 1")
        used = [name for name in ("yarn", "llama3") if getattr(self, name) is not None]
        used += ["linear_factor"] if self.linear_factor != 1 else []
        if len(used) > 1:
            raise ConfigError(f"rope.{used[0]} and rope.{used[1]} are both set; use one context extension")


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: 0.1 * mscale * ln(factor) + 1; 1 without extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
