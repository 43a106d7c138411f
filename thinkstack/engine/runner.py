"""One forward pass over the tokens of a step, whichever sequences they belong to: prompts and decoding together."""

# Shapes in this file: N tokens of the step, B rows, D hidden size, V vocabulary size.

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from thinkstack.engine.blocks import BLOCK
from thinkstack.engine.kv_cache import KVCache, View
from thinkstack.engine.scheduler import Plan
from thinkstack.engine.table import SequenceTable
from thinkstack.models.blocked import multiply
from thinkstack.models.config import ModelConfig
from thinkstack.models.layers import keep_blocked
from thinkstack.models.moe import ROW_TILE
from thinkstack.models.pages import Pages
from thinkstack.models.precision import DTYPES, Precision, Stored, inference_copy, refresh
from thinkstack.models.transformer import Transformer
from thinkstack.models.whole import whole_model, widened
from thinkstack.types import ConfigError


class Places(NamedTuple):
    """Where the tokens of a pass belong; padding, beyond `total`, belongs to the row after the last."""

    owner: numpy.ndarray
    """Row of each token, (N,)."""
    positions: numpy.ndarray
    """Its place in the row's context."""
    slots: numpy.ndarray
    """Its place in the cache: block * BLOCK + place in it."""
    total: int
    """Tokens without padding."""


class Runner:
    """A model in the engine's precision, and its cache.

    Tokens are rows of every product, in whole tiles: what becomes of one does not depend on how many there are.
    """

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        dtype: Precision,
        keeps_experts: bool = False,
        drafts: bool = False,
        weights: Stored = "plain",
    ):
        """num_blocks: usable ones, beside the spare one. drafts: whether `draft` will be asked for. weights: how
        matrices are kept."""
        if drafts and not model.cfg.mtp_layers:
            raise ConfigError(
                "max_drafts asks for guesses of a multi-token-prediction module, which this model has none of; use 0"
            )
        self._asked = DTYPES[dtype]
        self.device = next(model.parameters()).device
        """Where the model lies; only drawn tokens and chosen experts come back from there."""
        self._kept = _kept_experts(model.cfg) if keeps_experts else None
        self._num_blocks, self._drafts = num_blocks, drafts
        self._cache: KVCache | None = None
        self._weights = weights
        self._take(model)

    @property
    def cache(self) -> KVCache:
        """The context of all sequences; made when it is first needed."""
        if self._cache is None:
            size = self._num_blocks + 1
            self._cache = KVCache(self._model.cfg, size, self._asked, self.device, self._kept, self._drafts)
        return self._cache

    def drop_cache(self) -> None:
        """Give the cache's memory back."""
        self._cache = None

    def load(self, model: Transformer) -> None:
        """Take over other weights, or those of the same model after a change."""
        if model is self._source:
            refresh(self._model, model)
            self._settle()
        else:
            self._take(model)

    def _take(self, model: Transformer) -> None:
        """Make the copy that answers. One that rounds and widens is made anew each time: nothing of it can be refreshed
        in place, and the model need not be kept beside it."""
        rounded = inference_copy(model, self._asked, self._weights)
        self._model = widened(rounded)
        self._source = model if self._model is rounded and self._weights == "plain" else None
        self._settle()
        self.dtype = self._model.embed.weight.dtype
        """Of products; fp32 where a small model in bf16 is widened, over a cache in bf16."""

    def _settle(self) -> None:
        """Choose how products are made, from the weights as they are now."""
        keep_blocked(self._model)
        self._whole = whole_model(self._model)

    def run(self, plan: Plan, table: SequenceTable) -> Tensor:
        """Compute the planned tokens. Returns the hidden state (N, D) of each, in the order of the plan."""
        places, view = self._lay_out(table, plan.rows, plan.starts, plan.counts)
        ids, positions = self._there(table.ids[places.owner, places.positions]), self._there(places.positions)
        if self._whole is not None and self._takes_whole(len(ids)):
            hidden, chosen = self._whole.hidden(ids, positions, view.first, self.cache.data)
        else:
            trunk = self._model.trunk(ids.unsqueeze(1), positions.unsqueeze(1), cache=view)
            hidden = trunk.hidden[:, 0]
            chosen = torch.stack([layer.experts[:, 0] for layer in trunk.routing]) if trunk.routing else None
        if self._kept is not None and chosen is not None:  # (L, N, K)
            kept = chosen[:, : places.total].transpose(0, 1).cpu().numpy()
            self.cache.keep_experts(places.slots[: places.total], kept)
        return hidden[: places.total]

    def draft(
        self, table: SequenceTable, rows: numpy.ndarray, starts: numpy.ndarray, counts: numpy.ndarray, hidden: Tensor
    ) -> Tensor:
        """Show the drafting module computed tokens: counts of each row, from starts, with their hidden states (N, D).

        Returns its states (rows, D) at the last token of each row, where it predicts the token after the next.
        """
        places, view = self._lay_out(table, rows, starts, counts)
        following, positions = (
            self._there(values) for values in (table.ids[places.owner, places.positions + 1], places.positions)
        )
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, len(places.owner) - places.total))
        states = None
        if self._whole is not None and self._takes_whole(len(hidden)):
            states = self._whole.draft(hidden, following, positions, view.first, self.cache.data)
        if states is None:
            following, positions = following.unsqueeze(1), positions.unsqueeze(1)
            states = self._model.draft(hidden.unsqueeze(1), following, positions, view)[:, 0]
        return states[self._there(counts.cumsum() - 1)]

    def _lay_out(
        self, table: SequenceTable, rows: numpy.ndarray, starts: numpy.ndarray, counts: numpy.ndarray
    ) -> tuple["Places", View]:
        """Tokens from `starts` on, counts of each row, filled up to whole tiles with tokens of the row of padding."""
        ends = counts.cumsum()
        total = int(ends[-1])
        padding = 0 if self._takes_whole(total) else self._padding(total)
        owner = numpy.full(total + padding, len(table.owner), dtype=numpy.int64)
        owner[:total] = rows.repeat(counts)
        positions = numpy.zeros(len(owner), dtype=numpy.int64)
        positions[:total] = numpy.arange(total) + (starts - (ends - counts)).repeat(counts)
        slots = table.tables[owner, positions // BLOCK].astype(numpy.int64) * BLOCK + positions % BLOCK
        pages = Pages(self.cache.data[0], self._there(table.tables), self._there(owner.astype(numpy.int32)))
        return Places(owner, positions, slots, total), View(self.cache, pages, self._there(slots))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) of hidden states (B, D); in fp32 those of a row do not depend on the others."""
        if self._whole is not None and self._whole.head is not None:
            return multiply(hidden, self._whole.head)
        count = len(hidden)
        if padding := self._padding(count):
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
        return self._model.head(hidden)[:count]

    def _takes_whole(self, count: int) -> bool:
        """Whether one kernel takes so many tokens through the model; it needs no whole tiles."""
        return self._whole is not None and count <= self._whole.most_tokens

    def _padding(self, count: int) -> int:
        """Rows that make `count` whole tiles, for fp32, where what becomes of a row then depends on no other; in bf16
        it does in any case."""
        return -count % ROW_TILE if self.dtype == torch.float32 else 0

    def _there(self, values: numpy.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _kept_experts(cfg: ModelConfig) -> tuple[int, int, str]:
    """How the cache keeps the choices of a model: layers with experts, experts per token, integer type."""
    if cfg.moe is None:
        raise ConfigError(
            "router_replay (return_experts of an engine) is asked for, but the model has no experts; leave it out"
        )
    layers = sum(map(cfg.is_moe_layer, range(cfg.num_layers)))
    return layers, cfg.moe.top_k, "uint8" if cfg.moe.num_experts <= 256 else "int16"
