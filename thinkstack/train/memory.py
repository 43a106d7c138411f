"""What one training step holds in memory at its peak, from shapes alone: weights, copies, gradients, moments,
activations, logits.

Activations are counted as autograd keeps them: each tensor that a backward pass reads, once. The backward pass frees
them block by block from the top while gradients appear, so the peak is the highest point of that walk.
"""

# Letters in this file: N tokens and B rows of a micro-batch, T tokens of a row, D hidden size, H heads, V vocabulary
# size, E experts, K experts per token, I intermediate size; s bytes of a number in the working precision.

from dataclasses import dataclass
from typing import Literal, NamedTuple

from thinkstack.kernels.cpu.calls import LANES
from thinkstack.kernels.cpu.operators import EXPERT_BLOCK
from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.counts import (
    attention_matrices,
    block_parameters,
    block_vectors,
    count_parameters,
    mtp_merge,
    mtp_parameters,
)
from thinkstack.models.layers import ROW_TILE
from thinkstack.types import ConfigError

HEAD_TOKENS, HEAD_TILE, HEAD_LOGITS = 1024, 16, 2**25
"""Most tokens whose logits exist at once, what they are a multiple of, and the most logits: 134 MB in fp32 whatever the
vocabulary; the first keeps small vocabularies in cache."""


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """What the memory of a step depends on, beside the model."""

    rows: int
    """Rows of a micro-batch."""
    row_tokens: int
    """Tokens of a row."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of products and activations."""
    workers: int = 1
    """Threads that each take micro-batches on a copy of the weights."""
    passes: int = 1
    """Micro-batches of each worker in a step."""
    checkpoint_layers: bool = False
    """Whether of each block only the input is kept."""
    with_kernels: bool = True
    """Whether the C++ kernels run; torch's operators keep more."""
    moments: int = 2
    """fp32 numbers kept of each weight beside it: 2 by AdamW, 1 more by a moving average."""
    threads: int = 1
    """Cores of one worker."""
    imbalance: float = 0.25
    """Load of the busiest expert over the mean, minus 1: torch's operators give every expert as many rows."""

    def __post_init__(self) -> None:
        for name in ("rows", "row_tokens", "workers", "passes", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.row_tokens

    @property
    def bytes_each(self) -> int:
        """s."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def has_copies(self) -> bool:
        """Whether workers train copies of the model and not the model itself."""
        return self.dtype == "bf16" or self.workers > 1


class Stage(NamedTuple):
    """A part of the forward pass, in bytes."""

    kept: int
    """What it leaves for the backward pass."""
    forward: int
    """What it needs beside that while it runs."""
    backward: int
    """What its backward pass needs beside what is kept; weight gradients apart."""
    gradients: int
    """Gradients of its weights."""


def training_memory(cfg: ModelConfig, shape: TrainingShape) -> dict[str, int]:
    """Bytes of a step at its peak, by part; "peak" is their sum. Raises ConfigError for rows too long for the model.

    Parts: weights (fp32), copies (one a worker) with sums of their gradients (fp32), moments (of the optimizer); and of
    all workers, at the moment when they are largest together: gradients, activations (kept for the backward pass) and
    passing (held by the operation that runs then: logits, gradients of activations, scratch). Left out: the program
    itself, the batch as integers, buffers of torch's libraries (some megabytes), and what the C library's heap holds in
    holes (docs/memory.md).
    """
    if shape.row_tokens > cfg.max_positions:
        raise ConfigError(f"row_tokens={shape.row_tokens} exceeds the model's {cfg.max_positions} positions; use fewer")
    weights = 4 * _numbers(cfg)
    copies = shape.workers * _copy_bytes(cfg, shape) if shape.has_copies else 0
    moments = 4 * shape.moments * _numbers(cfg)
    sums = 4 * shape.workers * _numbers(cfg) if shape.has_copies else 0
    updating = {"gradients": 0 if shape.has_copies else 4 * _numbers(cfg), "activations": 0, "passing": 0}
    during = max(_walk(cfg, shape), updating, key=lambda parts: sum(parts.values()))
    found = {"weights": weights, "copies": copies, "sums": sums, "moments": moments} | during
    return found | {"peak": sum(found.values())}


def _numbers(cfg: ModelConfig) -> int:
    """Trained numbers, MTP modules included."""
    return count_parameters(cfg) + mtp_parameters(cfg)


def _weights_in(cfg: ModelConfig, numbers: int, wide: int, shape: TrainingShape) -> int:
    """Bytes of a worker's `numbers` weights, of which `wide` stay fp32 whatever the precision."""
    return shape.bytes_each * (numbers - wide) + 4 * wide


def _wide(cfg: ModelConfig, has_experts: bool) -> int:
    """Numbers of a block that stay fp32: norms, biases, the router."""
    return block_vectors(cfg) + (cfg.hidden_size * cfg.moe.num_experts if has_experts and cfg.moe else 0)


def _copy_bytes(cfg: ModelConfig, shape: TrainingShape) -> int:
    """One worker's copy of all weights."""
    blocks = [cfg.is_moe_layer(layer) for layer in range(cfg.num_layers + cfg.mtp_layers)]
    wide = sum(_wide(cfg, kind) for kind in blocks) + cfg.hidden_size + cfg.mtp_layers * mtp_merge(cfg)[1]
    return _weights_in(cfg, _numbers(cfg), wide, shape)


def _walk(cfg: ModelConfig, shape: TrainingShape) -> dict[str, int]:
    """Gradients, activations and logits of all workers when they are largest together.

    The last micro-batch of the step, stage by stage, forward and then backward from the top.
    """
    stages = training_stages(cfg, shape)
    in_place = shape.passes > 1 and not shape.has_copies  # the gradients of the micro-batches before are there
    gradients, kept, found = 4 * _numbers(cfg) if in_place else 0, 0, []
    for stage in stages:
        kept += stage.kept
        found.append((gradients, kept, stage.forward))
    for stage in reversed(stages):
        gradients += 0 if in_place else stage.gradients
        found.append((gradients, kept, stage.backward + (stage.gradients if in_place else 0)))
        kept -= stage.kept
    peak = max(found, key=sum)
    return {
        name: shape.workers * size for name, size in zip(("gradients", "activations", "passing"), peak, strict=True)
    }


def training_stages(cfg: ModelConfig, shape: TrainingShape) -> list[Stage]:
    """The forward pass of one micro-batch from the embedding to the last head, in bytes."""
    N, D, s = shape.tokens, cfg.hidden_size, shape.bytes_each
    table = cfg.vocab_size * D * s
    rope = N * (8 * (cfg.attention.rope_dim // 2) + 4)  # turns, and where each document begins
    # ids, and the table's dense gradient, which joins that of another use
    stages = [Stage(8 * N + rope, 0, N * D * s + (table if cfg.mtp_layers or cfg.tie_embeddings else 0),
                    0 if cfg.mtp_layers or cfg.tie_embeddings else table)]  # fmt: skip
    for layer in range(cfg.num_layers):
        stages += block_stages(cfg, cfg.is_moe_layer(layer), shape)
    stages += [_final_norm(cfg, shape), _head(cfg, shape, is_first=not cfg.mtp_layers)]
    for depth in range(cfg.mtp_layers):
        merge, norms = mtp_merge(cfg)
        own = _norm(N, D, shape) + 2 * N * D * s  # of the embedding, and the merged pair
        own += _norm(N, D, shape) - (N * D * s if shape.with_kernels else 0)  # the hidden state is kept by the head
        is_last = depth == cfg.mtp_layers - 1
        stages.append(Stage(8 * N + own, 0, 3 * N * D * s, s * merge + 4 * norms + (table if is_last else 0)))
        stages += block_stages(cfg, cfg.is_moe_layer(cfg.num_layers + depth), shape)
        stages += [_final_norm(cfg, shape), _head(cfg, shape, is_first=is_last)]
    return stages


def block_stages(cfg: ModelConfig, has_experts: bool, shape: TrainingShape) -> list[Stage]:
    """Attention and feed-forward of one block, each with its norm."""
    N, D, s = shape.tokens, cfg.hidden_size, shape.bytes_each
    attention, passing = _attention(cfg, shape)
    attention += _norm(N, D, shape) + (N * D * s)
    feed_forward, ffn_passing = (_experts if has_experts else _dense)(cfg, shape)
    feed_forward += _norm(N, D, shape) + N * D * s
    numbers, wide = block_parameters(cfg, has_experts), _wide(cfg, has_experts)
    own = attention_matrices(cfg)
    upper = _weights_in(cfg, numbers - own, wide, shape)
    forward = _scores(cfg, shape)
    if not shape.checkpoint_layers:
        return [Stage(attention, forward, passing, s * own), Stage(feed_forward, 0, ffn_passing, upper)]
    chosen = N * (4 * cfg.moe.num_experts + 8 * cfg.moe.num_experts_per_tok + 8) if has_experts and cfg.moe else 0
    again = attention + feed_forward - chosen - (N * D * s if shape.with_kernels else 0)
    below = attention - (N * D * s if shape.with_kernels else 0)
    return [
        Stage(N * D * s, attention + forward, passing + below, s * own),
        Stage(chosen, attention + feed_forward, ffn_passing + again, upper),
    ]


def _norm(count: int, width: int, shape: TrainingShape) -> int:
    """Kept by a norm of `count` rows, its output apart: its input (torch: fp32 normed rows), the scale of each row."""
    return count * width * (shape.bytes_each if shape.with_kernels else 4) + 4 * count


def _attention(cfg: ModelConfig, shape: TrainingShape) -> tuple[int, int]:
    """(kept, passing in the backward pass) of attention and its projections, the norm before it apart."""
    a, N, s = cfg.attention, shape.tokens, shape.bytes_each
    if isinstance(a, MLAConfig):
        G, keys, values, width = (
            a.num_heads,
            a.qk_head_dim,
            a.v_head_dim,
            a.num_heads * (a.qk_nope_head_dim + a.v_head_dim),
        )
        latents = _norm(N, a.cache_width if shape.with_kernels else a.kv_lora_rank, shape) + N * a.kv_lora_rank * s
        made = latents + (_norm(N, a.q_lora_rank, shape) + N * a.q_lora_rank * s if a.q_lora_rank else 0)
        shared = N * a.num_heads * a.qk_rope_head_dim * 4  # the gradient of the shared part of the keys, by head
    else:
        G, keys, values, width = a.num_kv_heads, a.head_dim, a.head_dim, 2 * a.num_kv_heads * a.head_dim
        made, shared = 0, 0
        if a.qk_norm:
            made = _norm(N * (a.num_heads + G), a.head_dim, shape)
    H = a.num_heads
    out = N * H * values * s
    passing = N * cfg.hidden_size * s + out + N * s * (H * keys + width) + shared
    if shape.with_kernels:
        return made + N * H * keys * s + N * width * s + out + 4 * N * H, passing + _attention_scratch(cfg, shape)
    probabilities = H * N * shape.row_tokens * s
    return made + N * s * (H * keys + G * (keys + values)) + probabilities + out, passing + 2 * probabilities


def _scores(cfg: ModelConfig, shape: TrainingShape) -> int:
    """Scores that torch's operators hold before and after the mask; the kernels hold none."""
    return 0 if shape.with_kernels else 2 * cfg.attention.num_heads * shape.tokens * shape.row_tokens * shape.bytes_each


def _dense(cfg: ModelConfig, shape: TrainingShape) -> tuple[int, int]:
    """(kept, passing in the backward pass) of a dense feed-forward: gate, up, and their product."""
    N, s, width = shape.tokens, shape.bytes_each, cfg.intermediate_size
    return 3 * N * width * s, N * cfg.hidden_size * s + 2 * N * width * s


def _experts(cfg: ModelConfig, shape: TrainingShape) -> tuple[int, int]:
    """(kept, passing in the backward pass) of router, routed and shared experts, with what the balance loss keeps."""
    moe, N, D, s = cfg.moe, shape.tokens, cfg.hidden_size, shape.bytes_each
    assert moe is not None
    E, K, width = moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size
    pairs = N * K
    routing = N * 4 * E + 8 * pairs + 4 * pairs + (4 * pairs + 4 * N if moe.norm_topk_prob else 0)
    routing += 4 * N * D if shape.dtype == "bf16" else 0  # the router reads fp32
    balance = 8 * N + 4 * shape.rows * (E + 2)
    shared = 3 * N * moe.shared_size * s
    picked = pairs * D * s
    if shape.with_kernels and D % LANES == 0 and width % LANES == 0:
        routed = (pairs // EXPERT_BLOCK + E) * EXPERT_BLOCK * 2 * width * s + picked
        passing = picked + 2 * N * D * s
    else:
        capacity = -(-int(pairs / E * (1 + shape.imbalance)) // ROW_TILE) * ROW_TILE
        routed = E * capacity * ((D + 3 * width) * s + 8) + 8 * pairs + picked
        passing = E * capacity * (D + 2 * width) * s + 2 * N * D * s
    return routing + balance + routed + shared, max(passing - shared, 2 * N * moe.shared_size * s) + N * D * s


def head_chunk(vocab_size: int) -> int:
    """Tokens whose logits exist at once."""
    return max(min(HEAD_TOKENS, HEAD_LOGITS // vocab_size // HEAD_TILE * HEAD_TILE), HEAD_TILE)


def _final_norm(cfg: ModelConfig, shape: TrainingShape) -> Stage:
    """The norm before a head."""
    N, D, s = shape.tokens, cfg.hidden_size, shape.bytes_each
    return Stage(_norm(N, D, shape) + N * D * s, 0, N * D * s, 4 * D)


def _head(cfg: ModelConfig, shape: TrainingShape, is_first: bool) -> Stage:
    """A head with its log-probabilities. is_first: of the backward pass, whose gradient of the table stays."""
    N, D, s, V = shape.tokens, cfg.hidden_size, shape.bytes_each, cfg.vocab_size
    chunk = min(head_chunk(V), N)
    logits, again = chunk * V * s, min(max(N - chunk, 0), chunk) * V * s  # of a chunk, and of the one before
    forward = logits + again
    if not shape.with_kernels:  # fp32 logits and their exponentials; backward the fp32 gradients, rounded at the end
        forward += 8 * chunk * V
        logits += logits + 4 * chunk * V if s < 4 else 0
    table = V * D * s
    product = table + (4 * V * D if s < 4 else 0)  # of one chunk, and widened to join the fp32 sum of all
    summing = 4 * V * D + logits + max(product, again, chunk * D * s)
    # less what is counted as a gradient that stays: it comes of the sum, when the products are gone
    backward = N * D * s + chunk * D * s + summing - (table if is_first else 0)
    return Stage(24 * N, forward + chunk * D * s, backward, table if is_first else 0)


def _attention_scratch(cfg: ModelConfig, shape: TrainingShape) -> int:
    """What a thread of the attention kernel works in; see Task::bytes in attention.cpp."""
    a = cfg.attention
    keys, values = (a.qk_head_dim, a.v_head_dim) if isinstance(a, MLAConfig) else (a.head_dim, a.head_dim)
    queries = 48
    T = shape.row_tokens
    return shape.threads * 4 * (4 * T * (keys + values) + queries * (5 * T + 4 * (keys + values)))
