"""Estimate the peak memory of a training step from shapes: weights, copies, gradients, moments, activations, logits.

Activations are counted as autograd saves them: each tensor that a backward pass reads is counted once. The backward
pass frees activations block by block from the top and allocates gradients; the peak is the maximum over that sequence.
"""

# Shapes in this file: N tokens and B rows of a micro-batch, T tokens per row, D hidden size, H heads, V vocabulary
# size, E experts, K experts per token, I intermediate size; s bytes per number in the working precision.

from dataclasses import dataclass
from typing import Literal, NamedTuple

from thinkstack.kernels.sizes import EXPERT_BLOCK, LANES, ROW_TILE
from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.counts import (
    attention_matrices,
    block_parameters,
    block_vectors,
    count_parameters,
    mtp_merge,
    mtp_parameters,
)
from thinkstack.types import ConfigError

HEAD_TOKENS, HEAD_TILE, HEAD_LOGITS = 1024, 16, 2**25
"""Size of a chunk of logits: maximum number of tokens (small vocabularies stay in cache), the multiple that the number
of tokens is rounded to, and maximum number of logits (134 MB in fp32 for any vocabulary)."""


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """All parameters besides the model that determine the memory of a step."""

    rows: int
    """Number of rows of a micro-batch."""
    row_tokens: int
    """Number of tokens per row."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of matmuls and activations."""
    workers: int = 1
    """Number of threads that run micro-batches, each on a copy of the weights."""
    passes: int = 1
    """Number of micro-batches per worker and step."""
    checkpoint_layers: bool = False
    """Activation checkpointing: save only the input of each block."""
    with_kernels: bool = True
    """Whether the C++ kernels are used; torch's operators save more activations."""
    moments: int = 2
    """Number of fp32 values per weight besides the weight itself: 2 for AdamW, 1 more for a moving average."""
    threads: int = 1
    """Number of threads of one worker."""
    imbalance: float = 0.25
    """Load of the busiest expert divided by the mean load, minus 1; torch's operators pad all experts to this load."""

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
        """Whether workers run copies of the model instead of the model itself."""
        return self.dtype == "bf16" or self.workers > 1


class Segment(NamedTuple):
    """A part of the forward pass, in bytes."""

    saved: int
    """Bytes saved for the backward pass."""
    forward: int
    """Bytes allocated during the forward pass, besides the saved bytes."""
    backward: int
    """Bytes allocated during the backward pass, besides the saved bytes and weight gradients."""
    gradients: int
    """Bytes of the gradients of the weights."""


def training_memory(cfg: ModelConfig, shape: TrainingShape) -> dict[str, int]:
    """Peak bytes of a step by part; "peak" is the sum. Raises ConfigError for rows too long for the model.

    Parts: weights (fp32), copies (one per worker) and the fp32 sums of the gradients of the copies, moments of the
    optimizer. Parts of all workers at the time of the maximum: gradients, activations (saved for the backward pass) and
    transient (memory of the running operation: logits, gradients of activations, scratch). Not counted: the program,
    the integer tensors of the batch, buffers of torch's libraries (some megabytes), and fragmentation of the C
    library's heap (docs/internals/memory.md)."""
    if shape.row_tokens > cfg.max_positions:
        raise ConfigError(
            f"row_tokens={shape.row_tokens} exceeds the model's max_positions={cfg.max_positions}; lower row_tokens"
        )
    weights = 4 * _num_parameters(cfg)
    copies = shape.workers * _copy_bytes(cfg, shape) if shape.has_copies else 0
    moments = 4 * shape.moments * _num_parameters(cfg)
    sums = 4 * shape.workers * _num_parameters(cfg) if shape.has_copies else 0
    update = {"gradients": 0 if shape.has_copies else 4 * _num_parameters(cfg), "activations": 0, "transient": 0}
    largest = max(_peak_parts(cfg, shape), update, key=lambda parts: sum(parts.values()))
    parts = {"weights": weights, "copies": copies, "sums": sums, "moments": moments} | largest
    return parts | {"peak": sum(parts.values())}


def _num_parameters(cfg: ModelConfig) -> int:
    """Number of trained parameters, MTP modules included."""
    return count_parameters(cfg) + mtp_parameters(cfg)


def _weights_in(cfg: ModelConfig, num_parameters: int, num_fp32: int, shape: TrainingShape) -> int:
    """Bytes of `num_parameters` weights of a worker; `num_fp32` of the weights are fp32 in any working precision."""
    return shape.bytes_each * (num_parameters - num_fp32) + 4 * num_fp32


def _num_fp32(cfg: ModelConfig, has_experts: bool) -> int:
    """Number of parameters of a block that are fp32 in any working precision: norms, biases, the router."""
    return block_vectors(cfg) + (cfg.hidden_size * cfg.moe.num_experts if has_experts and cfg.moe else 0)


def _copy_bytes(cfg: ModelConfig, shape: TrainingShape) -> int:
    """Bytes of one worker's copy of all weights."""
    blocks = [cfg.is_moe_layer(layer) for layer in range(cfg.num_layers + cfg.mtp_layers)]
    num_fp32 = sum(_num_fp32(cfg, kind) for kind in blocks) + cfg.hidden_size + cfg.mtp_layers * mtp_merge(cfg)[1]
    return _weights_in(cfg, _num_parameters(cfg), num_fp32, shape)


def _peak_parts(cfg: ModelConfig, shape: TrainingShape) -> dict[str, int]:
    """Gradients, activations and transient bytes of all workers at their common maximum.

    Goes through the last micro-batch of the step segment by segment, forward and then backward from the top.
    """
    segments = training_segments(cfg, shape)
    in_place = shape.passes > 1 and not shape.has_copies  # gradients of earlier micro-batches are allocated
    gradients, saved, points = 4 * _num_parameters(cfg) if in_place else 0, 0, []
    for segment in segments:
        saved += segment.saved
        points.append((gradients, saved, segment.forward))
    for segment in reversed(segments):
        gradients += 0 if in_place else segment.gradients
        points.append((gradients, saved, segment.backward + (segment.gradients if in_place else 0)))
        saved -= segment.saved
    peak = max(points, key=sum)
    return {
        name: shape.workers * size for name, size in zip(("gradients", "activations", "transient"), peak, strict=True)
    }


def training_segments(cfg: ModelConfig, shape: TrainingShape) -> list[Segment]:
    """The segments of the forward pass of one micro-batch, from the embedding to the last head."""
    N, D, s = shape.tokens, cfg.hidden_size, shape.bytes_each
    table = cfg.vocab_size * D * s
    rope = N * (8 * (cfg.attention.rope_dim // 2) + 4)  # rotations, and the start of each document
    # ids, and the dense gradient of the table, which is added to the gradient of a tied head or MTP module
    segments = [Segment(8 * N + rope, 0, N * D * s + (table if cfg.mtp_layers or cfg.tie_embeddings else 0),
                    0 if cfg.mtp_layers or cfg.tie_embeddings else table)]  # fmt: skip
    for layer in range(cfg.num_layers):
        segments += block_segments(cfg, cfg.is_moe_layer(layer), shape)
    segments += [_final_norm(cfg, shape), _head(cfg, shape, is_first=not cfg.mtp_layers)]
    for depth in range(cfg.mtp_layers):
        merge, norms = mtp_merge(cfg)
        own = _norm(N, D, shape) + 2 * N * D * s  # norm of the embedding, and the merged pair
        own += _norm(N, D, shape) - (N * D * s if shape.with_kernels else 0)  # the hidden state is saved by the head
        is_last = depth == cfg.mtp_layers - 1
        segments.append(Segment(8 * N + own, 0, 3 * N * D * s, s * merge + 4 * norms + (table if is_last else 0)))
        segments += block_segments(cfg, cfg.is_moe_layer(cfg.num_layers + depth), shape)
        segments += [_final_norm(cfg, shape), _head(cfg, shape, is_first=is_last)]
    return segments


def block_segments(cfg: ModelConfig, has_experts: bool, shape: TrainingShape) -> list[Segment]:
    """The segments of one block: attention and feed-forward, each with its norm."""
    N, D, s = shape.tokens, cfg.hidden_size, shape.bytes_each
    attention, transient = _attention(cfg, shape)
    attention += _norm(N, D, shape) + (N * D * s)
    feed_forward, ffn_passing = (_experts if has_experts else _dense)(cfg, shape)
    feed_forward += _norm(N, D, shape) + N * D * s
    num_parameters, num_fp32 = block_parameters(cfg, has_experts), _num_fp32(cfg, has_experts)
    own = attention_matrices(cfg)
    upper = _weights_in(cfg, num_parameters - own, num_fp32, shape)
    forward = _scores(cfg, shape)
    if not shape.checkpoint_layers:
        return [Segment(attention, forward, transient, s * own), Segment(feed_forward, 0, ffn_passing, upper)]
    chosen = N * (4 * cfg.moe.num_experts + 8 * cfg.moe.num_experts_per_tok + 8) if has_experts and cfg.moe else 0
    again = attention + feed_forward - chosen - (N * D * s if shape.with_kernels else 0)
    below = attention - (N * D * s if shape.with_kernels else 0)
    return [
        Segment(N * D * s, attention + forward, transient + below, s * own),
        Segment(chosen, attention + feed_forward, ffn_passing + again, upper),
    ]


def _norm(count: int, width: int, shape: TrainingShape) -> int:
    """Bytes saved by a norm of `count` rows, without the output: the input (with torch's operators, fp32 normed rows)
    and one scale per row."""
    return count * width * (shape.bytes_each if shape.with_kernels else 4) + 4 * count


def _attention(cfg: ModelConfig, shape: TrainingShape) -> tuple[int, int]:
    """(saved, transient in the backward pass) bytes of attention and its projections, without the norm before it."""
    a, N, s = cfg.attention, shape.tokens, shape.bytes_each
    if isinstance(a, MLAConfig):
        G, keys, values, width = (
            a.num_heads,
            a.qk_head_dim,
            a.v_head_dim,
            a.num_heads * (a.qk_nope_head_dim + a.v_head_dim),
        )
        latents = _norm(N, a.cache_width if shape.with_kernels else a.kv_lora_rank, shape) + N * a.kv_lora_rank * s
        projected = latents + (_norm(N, a.q_lora_rank, shape) + N * a.q_lora_rank * s if a.q_lora_rank else 0)
        shared = N * a.num_heads * a.qk_rope_head_dim * 4  # the gradient of the shared part of the keys, per head
    else:
        G, keys, values, width = a.num_kv_heads, a.head_dim, a.head_dim, 2 * a.num_kv_heads * a.head_dim
        projected, shared = 0, 0
        if a.qk_norm:
            projected = _norm(N * (a.num_heads + G), a.head_dim, shape)
    H = a.num_heads
    out = N * H * values * s
    transient = N * cfg.hidden_size * s + out + N * s * (H * keys + width) + shared
    if shape.with_kernels:
        return projected + N * H * keys * s + N * width * s + out + 4 * N * H, transient + _attention_scratch(
            cfg, shape
        )
    probabilities = H * N * shape.row_tokens * s
    return projected + N * s * (H * keys + G * (keys + values)) + probabilities + out, transient + 2 * probabilities


def _scores(cfg: ModelConfig, shape: TrainingShape) -> int:
    """Bytes of the scores that torch's operators allocate before and after the mask; kernels allocate no scores."""
    return 0 if shape.with_kernels else 2 * cfg.attention.num_heads * shape.tokens * shape.row_tokens * shape.bytes_each


def _dense(cfg: ModelConfig, shape: TrainingShape) -> tuple[int, int]:
    """(saved, transient in the backward pass) bytes of a dense feed-forward: gate, up, and gate * up."""
    N, s, width = shape.tokens, shape.bytes_each, cfg.intermediate_size
    return 3 * N * width * s, N * cfg.hidden_size * s + 2 * N * width * s


def _experts(cfg: ModelConfig, shape: TrainingShape) -> tuple[int, int]:
    """(saved, transient in the backward pass) bytes of router, routed and shared experts and the balance loss."""
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
        transient = picked + 2 * N * D * s
    else:
        capacity = -(-int(pairs / E * (1 + shape.imbalance)) // ROW_TILE) * ROW_TILE
        routed = E * capacity * ((D + 3 * width) * s + 8) + 8 * pairs + picked
        transient = E * capacity * (D + 2 * width) * s + 2 * N * D * s
    return routing + balance + routed + shared, max(transient - shared, 2 * N * moe.shared_size * s) + N * D * s


def head_chunk(vocab_size: int) -> int:
    """Number of tokens of a chunk of logits."""
    return max(min(HEAD_TOKENS, HEAD_LOGITS // vocab_size // HEAD_TILE * HEAD_TILE), HEAD_TILE)


def _final_norm(cfg: ModelConfig, shape: TrainingShape) -> Segment:
    """The segment of the norm before a head."""
    N, D, s = shape.tokens, cfg.hidden_size, shape.bytes_each
    return Segment(_norm(N, D, shape) + N * D * s, 0, N * D * s, 4 * D)


def _head(cfg: ModelConfig, shape: TrainingShape, is_first: bool) -> Segment:
    """The segment of a head with its log-probabilities. is_first: first in the backward pass, which allocates the
    gradient of the table."""
    N, D, s, V = shape.tokens, cfg.hidden_size, shape.bytes_each, cfg.vocab_size
    chunk = min(head_chunk(V), N)
    logits, again = (
        chunk * V * s,
        min(max(N - chunk, 0), chunk) * V * s,
    )  # logits of this chunk, and of the previous chunk
    forward = logits + again
    if not shape.with_kernels:  # fp32 logits and their exponentials; backward the fp32 gradients, rounded at the end
        forward += 8 * chunk * V
        logits += logits + 4 * chunk * V if s < 4 else 0
    table = V * D * s
    product = table + (4 * V * D if s < 4 else 0)  # matmul of one chunk, and a copy in fp32 for the sum over chunks
    summing = 4 * V * D + logits + max(product, again, chunk * D * s)
    # minus the final gradient, which is counted separately: it is created from the sum after the matmuls are freed
    backward = N * D * s + chunk * D * s + summing - (table if is_first else 0)
    return Segment(24 * N, forward + chunk * D * s, backward, table if is_first else 0)


def _attention_scratch(cfg: ModelConfig, shape: TrainingShape) -> int:
    """Bytes of the scratch memory of the attention kernel's threads; see Task::bytes in attention.cpp."""
    a = cfg.attention
    keys, values = (a.qk_head_dim, a.v_head_dim) if isinstance(a, MLAConfig) else (a.head_dim, a.head_dim)
    queries = 48
    T = shape.row_tokens
    return shape.threads * 4 * (4 * T * (keys + values) + queries * (5 * T + 4 * (keys + values)))
