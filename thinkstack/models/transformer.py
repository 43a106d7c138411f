"""The model of the package: one class for training, generation, evaluation and serving of all model families.

The code is for a single device; other modules apply parallelism, compilation and casts to an existing model.
"""

# Shapes in this file: B rows, T tokens, D hidden size, V vocabulary size.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkstack.kernels import ops
from thinkstack.kernels.masks import kv_range_of
from thinkstack.models.attention import AttentionContext, LayerCache
from thinkstack.models.block import Block
from thinkstack.models.config import ModelConfig
from thinkstack.models.layers import Embedding, Linear, RMSNorm, rope_table
from thinkstack.models.moe import Routing
from thinkstack.models.mtp import MTPModule
from thinkstack.types import RequestError


class Trunk(NamedTuple):
    """The output of the main model before the head."""

    hidden: Tensor
    """Hidden states (B, T, D) after the final norm."""
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, in layer order."""
    context: AttentionContext
    """Attention mask and rotary tables, for the multi-token-prediction modules."""


class Transformer(nn.Module):
    """Decoder-only transformer described by a ModelConfig."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.head = Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.is_compiled = False
        """Whether the blocks are compiled; set by the caller."""
        self.mtp = nn.ModuleList(MTPModule(cfg, cfg.num_layers + depth) for depth in range(cfg.mtp_layers))

    def blocks(self) -> list[Block]:
        """All blocks in layer order, blocks of multi-token-prediction modules last."""
        return [*self.layers, *(module.block for module in self.mtp)]  # type: ignore[list-item, union-attr]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> "Transformer":
        """Initialize matrices from N(0, cfg.init_std), norms to 1 and biases to 0; returns self."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                parameter.normal_(0.0, self.cfg.init_std, generator=generator)
        if self.cfg.embed_init_std:
            self.embed.weight.mul_(self.cfg.embed_init_std / self.cfg.init_std)
        for buffer in self.buffers():
            buffer.zero_()
        return self

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Next-token logits (B, T, V) for token ids (B, T) int64; arguments as in `trunk`."""
        return self.head(self.trunk(ids, positions, document_ids, cache).hidden)

    def trunk(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LayerCache | None = None,
        experts: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Trunk:
        """Run all blocks and the final norm.

        ids: (B, T) int64. positions: (B, T) int64; None: 0, 1, 2, ... document_ids: (B, T) int64; a run of equal ids is
        a document, and tokens attend only within their document; None: each row is one document. cache: the KV cache of
        the engine; with a cache, ids are (N, 1), positions count from the start of each sequence, and the caller has
        validated both. experts: (B, T, L, K) integers, the experts to use in each of the L mixture-of-experts layers
        instead of the experts chosen by the router; -1 uses the router. branches: (B, T) int64, the branch of each
        token within its document, as in types.Batch. Raises RequestError for a token id outside the vocabulary or a
        position beyond max_positions."""
        if cache is None:
            self.check(ids, positions)
        hidden = self.embed(ids)  # (B, T, D)
        rows = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        if cache is not None:
            assert positions is not None, "a cache needs positions"
            context = self.cached_context(positions, cache)
        else:
            kv_range = kv_range_of(torch.zeros_like(rows) if document_ids is None else document_ids, branches)
            rope = rope_table(rows if positions is None else positions, self.cfg.attention.rope_dim, self.cfg.rope)
            context = AttentionContext(rope=rope, mask=ops.packed_mask(kv_range, self.is_compiled))
        routing: list[Routing] = []
        for block in self.layers:
            routed_experts = None if experts is None else experts[:, :, len(routing)]
            hidden, chosen = block(hidden, context, routed_experts)
            if chosen is not None:
                routing.append(chosen)
        return Trunk(self.norm(hidden), routing, context)

    def cached_context(self, positions: Tensor, cache: LayerCache) -> AttentionContext:
        """The attention context of new tokens at positions (N, 1) of their cached sequences."""
        rope = rope_table(positions, self.cfg.attention.rope_dim, self.cfg.rope)
        return AttentionContext(rope=rope, positions=positions, cache=cache)

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, cache: LayerCache) -> Tensor:
        """Hidden states (N, 1, D) of the first multi-token-prediction module, which predicts token i+2 at position i.

        hidden: (N, 1, D), normed hidden states of the tokens at positions (N, 1). following: (N, 1) int64, the next
        token of each. cache: as in `trunk`, with a layer for the module.
        """
        return self.mtp[0](hidden, self.embed(following), self.cached_context(positions, cache))[0]

    def mtp_hidden_states(
        self, trunk: Trunk, ids: Tensor, detached: bool = False
    ) -> tuple[list[Tensor], list[Routing]]:
        """Hidden states of the multi-token-prediction modules; module k (from 0) predicts token i+2+k at position i.

        detached: stop gradients to the trunk and the embedding. Returns (one (B, T, D) per module, one Routing per
        module with experts). The last k + 1 positions of a document have a token of the next document, or padding, as
        input; the loss masks these positions.
        """
        hidden, states, routing = trunk.hidden.detach() if detached else trunk.hidden, [], []
        for depth, module in enumerate(self.mtp):
            following = F.pad(ids[:, depth + 1 :], (0, depth + 1))
            embedded = self.embed(following).detach() if detached else self.embed(following)
            hidden, chosen = module(hidden, embedded, trunk.context)
            states.append(hidden)
            if chosen is not None:
                routing.append(chosen)
        return states, routing

    def check(self, ids: Tensor, positions: Tensor | None = None) -> None:
        """Raise RequestError for ids outside the vocabulary, an empty batch, or positions beyond max_positions."""
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise RequestError(
                f"token ids have shape {tuple(ids.shape)}; the shape must be (rows, tokens) with at least one token"
            )
        if torch.compiler.is_compiling():
            return
        length = ids.shape[1] if positions is None else int(positions.max()) + 1
        if length > self.cfg.max_positions:
            raise RequestError(
                f"{length} tokens exceed this model's maximum context length of {self.cfg.max_positions} tokens; "
                "shorten the prompt"
            )
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.cfg.vocab_size:
            raise RequestError(
                f"token id {high if low >= 0 else low} is outside the vocabulary, 0..{self.cfg.vocab_size - 1}"
            )
