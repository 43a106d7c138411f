"""Parameters, operations and cache size of a model, computed from its ModelConfig without allocating memory."""

from thinkstack.models.config import MLAConfig, ModelConfig


def count_parameters(cfg: ModelConfig) -> int:
    """Number of trained parameters of the main model: with embedding and head (once if tied), without MTP modules and
    the router's balance bias (which has no gradient). This is the published convention: 671.03B for V3, 15.71B for
    V2-Lite."""
    blocks = sum(block_parameters(cfg, cfg.is_moe_layer(layer)) for layer in range(cfg.num_layers))
    tables = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    return tables + blocks + cfg.hidden_size


def count_active_parameters(cfg: ModelConfig) -> int:
    """Number of active parameters of the main model per token: includes num_experts_per_tok routed experts and the
    head, but not the embedding, which is only a lookup. This is the convention of the V3 report (37B) and the V2 report
    (2.4B for V2-Lite)."""
    blocks = sum(block_parameters(cfg, cfg.is_moe_layer(layer)) for layer in range(cfg.num_layers))
    return cfg.vocab_size * cfg.hidden_size + blocks + cfg.hidden_size - _inactive_parameters(cfg)


def mtp_parameters(cfg: ModelConfig) -> int:
    """Number of parameters of the multi-token-prediction modules, without shared embedding and head (11.6B in V3)."""
    merge = sum(mtp_merge(cfg))
    return sum(
        block_parameters(cfg, cfg.is_moe_layer(cfg.num_layers + depth)) + merge for depth in range(cfg.mtp_layers)
    )


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """Floating-point operations of the forward pass for one token that attends to `context` tokens, itself included.

    2 per active matrix element, plus 2 * context * num_heads * (query/key width + value width) per layer for scores
    and weighted values (MLA expanded, as in training). Norms, activations and the top-k of the router are not counted.
    A causal sequence of T tokens has a mean context of T / 2; forward and backward pass together need three times as
    many operations.
    """
    a = cfg.attention
    widths = a.qk_head_dim + a.v_head_dim if isinstance(a, MLAConfig) else 2 * a.head_dim
    vectors = cfg.hidden_size + cfg.num_layers * block_vectors(cfg)
    attention = 2.0 * context * a.num_heads * widths * cfg.num_layers
    return 2.0 * (count_active_parameters(cfg) - vectors) + attention


def weight_bytes(cfg: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes of all weights, MTP modules included; 2 bytes per element (bf16) by default."""
    return (count_parameters(cfg) + mtp_parameters(cfg)) * bytes_per_element


def fp8_bytes(cfg: ModelConfig) -> int:
    """Bytes of all weights with the matrices of blocks in e4m3, one scale per 128 x 128 block, and others in bf16."""
    blocks = [cfg.is_moe_layer(layer) for layer in range(cfg.num_layers + cfg.mtp_layers)]
    routers = sum(blocks) * cfg.hidden_size * cfg.moe.num_experts if cfg.moe else 0
    inside = sum(block_parameters(cfg, kind) - block_vectors(cfg) for kind in blocks) - routers
    return round(inside * (1 + 4 / 128**2)) + 2 * (count_parameters(cfg) + mtp_parameters(cfg) - inside)


def training_bytes(cfg: ModelConfig) -> int:
    """Bytes of the fp32 training state, independent of the batch: weights, gradients and AdamW's two moments.
    train/memory.py adds activations and low-precision copies.
    """
    return weight_bytes(cfg, bytes_per_element=4 * 4)


def mtp_merge(cfg: ModelConfig) -> tuple[int, int]:
    """Numbers of parameters of one multi-token-prediction module outside its block: (projection, three norms)."""
    return 2 * cfg.hidden_size**2, 3 * cfg.hidden_size


def cache_bytes_per_token(cfg: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes of the KV cache per token of context, over all layers: 70,272 for V3 in bf16."""
    return cfg.num_layers * cfg.attention.cache_width * bytes_per_element


def block_parameters(cfg: ModelConfig, has_experts: bool) -> int:
    """Number of parameters of one transformer block, norms included."""
    D = cfg.hidden_size
    if not has_experts:
        return attention_matrices(cfg) + block_vectors(cfg) + 3 * D * cfg.intermediate_size
    assert cfg.moe is not None
    width = cfg.moe.num_experts * cfg.moe.moe_intermediate_size + cfg.moe.shared_size
    return attention_matrices(cfg) + block_vectors(cfg) + 3 * D * width + D * cfg.moe.num_experts


def attention_matrices(cfg: ModelConfig) -> int:
    """Number of matrix elements of one attention layer."""
    a, D = cfg.attention, cfg.hidden_size
    if not isinstance(a, MLAConfig):
        return 2 * D * a.head_dim * (a.num_heads + a.num_kv_heads)
    queries = a.num_heads * a.qk_head_dim
    query = a.q_lora_rank * (D + queries) if a.q_lora_rank else D * queries
    expansion = a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return query + D * a.cache_width + expansion + a.num_heads * a.v_head_dim * D


def block_vectors(cfg: ModelConfig) -> int:
    """Number of norm weights and biases of one block: two norms of the residual stream, norms and biases of
    attention."""
    a, D = cfg.attention, cfg.hidden_size
    if isinstance(a, MLAConfig):
        return 2 * D + a.q_lora_rank + a.kv_lora_rank
    biases = a.qkv_bias * a.head_dim * (a.num_heads + 2 * a.num_kv_heads) + a.out_bias * D
    return 2 * D + biases + a.qk_norm * 2 * a.head_dim


def _inactive_parameters(cfg: ModelConfig) -> int:
    """Number of routed-expert parameters of the main model that a token does not use."""
    if cfg.moe is None:
        return 0
    layers = sum(cfg.is_moe_layer(layer) for layer in range(cfg.num_layers))
    return (
        layers
        * (cfg.moe.num_experts - cfg.moe.num_experts_per_tok)
        * 3
        * cfg.hidden_size
        * cfg.moe.moe_intermediate_size
    )
