"""Inference on one new token per sequence: reading a cache, whole sublayers, routing and drawing. No gradients."""

# Shapes in this file: B sequences, S cached tokens, G key/value heads, Q query heads per group, W width of an entry,
# V value width, D hidden size, R rotated width, E experts, K experts per token. LatentStep's sizes are in steps.cpp.

import torch
from torch import Tensor

from thinkstack.models.kernels.calls import address, call, run, structure
from thinkstack.models.kernels.operators import Heads

_Decode = structure(
    "Decode", "query entries last out", "B G Q W V entries_b entries_s key_g value_g value_at longest threads", "scale"
)
_LatentStep = structure(
    "LatentStep",
    "x wq_a q_norm wq_b wkv_a kv_norm wkv_b wo rope last cache out",
    "B D H N R V C Q cache_b interleaved longest threads",
    "scale eps",
)


def read_cache(query: Tensor, entries: Tensor, last: Tensor, heads: Heads, scale: float) -> Tensor:
    """Attention of one new token per sequence over cached entries.

    query: (B, G, Q, key_width). entries: (B, S, W), any distance between rows and tokens. last: (B,) int64, the
    last entry that each sequence sees. scale: factor of the scores. Returns (B, G, Q, V).
    """
    B, G, Q, W = query.shape
    query = query.contiguous()
    out = query.new_empty(B, G, Q, heads.value_width)
    arguments = _Decode(
        *map(address, (query, entries, last, out)),
        *(B, G, Q, W, heads.value_width, entries.stride(0), entries.stride(1)),
        *(heads.key_step, heads.value_step, heads.value_at, entries.shape[1], torch.get_num_threads(), scale),
    )
    run("decode", arguments, query.dtype == torch.bfloat16)
    return out


def latent_step(
    x: Tensor,
    weights: dict[str, Tensor | None],
    sizes: dict[str, int],
    rope: Tensor,
    last: Tensor,
    cache: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    """One new token per sequence through multi-head latent attention, projections included, in fp32.

    x: (B, D), normed. weights: by the names of MLA's parameters; wq_a and q_norm may be None. sizes: H, N, R, V, C, Q
    and interleaved. rope: (B, R / 2) complex64. last: (B,) int64, where the new entries go. cache: (B, S, C + R), its
    entries contiguous; written to. Returns (B, D).
    """
    out = torch.empty_like(x)
    tensors = dict(weights, x=x, rope=rope, last=last, cache=cache, out=out)
    arguments = _LatentStep(
        **{name: address(tensor) for name, tensor in tensors.items()},
        **dict(sizes, B=x.shape[0], D=x.shape[1], cache_b=cache.stride(0), longest=cache.shape[1]),
        **dict(threads=torch.get_num_threads(), scale=scale, eps=eps),
    )
    run("latent_step", arguments)
    return out


def feed_forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """w2(silu(w1 x) * (w3 x)) of x (..., D), contiguous, in fp32."""
    out = torch.empty_like(x)
    call("feed_forward", x, w1, w2, w3, out, x.numel() // x.shape[-1], x.shape[-1], w1.shape[0])
    return out


def route(
    scores: Tensor, bias: Tensor, top_k: int, groups: tuple[int, int, int], normalise: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """Group-limited top-k; arguments as in models/moe.py.

    scores: (B, E) fp32. groups: how many there are, how many may be used, affinities of a group that count (1 or 2).
    Returns (weights (B, K) fp32, experts (B, K) int64); of equal affinities the lower expert is chosen.
    """
    weights = torch.empty(scores.shape[0], top_k)
    experts = torch.empty(scores.shape[0], top_k, dtype=torch.int64)
    call("route", scores, bias, weights, experts, *scores.shape, top_k, *groups, int(normalise), factor)
    return weights, experts


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token per row of logits (B, V) fp32, contiguous; arguments and results as in engine/sampler.py."""
    tokens, log_probs = torch.empty(logits.shape[0], dtype=torch.int64), torch.empty(logits.shape[0])
    call("draw", logits, temperature, uniform, tokens, log_probs, *logits.shape)
    return tokens, log_probs
