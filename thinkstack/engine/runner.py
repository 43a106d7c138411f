"""The forward pass over all tokens of a step: prefill and decoding of all sequences together."""

# Shapes in this file: N tokens of the step, B rows, D hidden size, V vocabulary size.

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.cuda_graphs import Graphs, Inputs, Outputs, can_record
from thinkstack.engine.fused import FusedPass, fused_pass, upcast_small_model
from thinkstack.engine.kv_cache import KVCache, KVCacheView
from thinkstack.engine.scheduler import SchedulerOutput
from thinkstack.engine.sequence_table import SequenceTable
from thinkstack.kernels import ops
from thinkstack.kernels.paging import Pages
from thinkstack.kernels.precision import DTYPES, RequestedPrecision, resolve_precision
from thinkstack.models.config import ModelConfig
from thinkstack.models.layers import prepack_weights
from thinkstack.models.precision import Quantization, inference_copy, update_copy
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError


class TokenSlots(NamedTuple):
    """Rows, positions and cache slots of the tokens of a pass; padding tokens at the end have the padding row."""

    seq_index: numpy.ndarray
    """Row of each token, (N,)."""
    positions: numpy.ndarray
    """Position of each token in its sequence."""
    slots: numpy.ndarray
    """Slot of each token in the cache: block * BLOCK_SIZE + offset in the block."""


class Runner:
    """A model in the engine's precision, and its KV cache.

    Tokens are the rows of every matmul, padded to full tiles, so that the result of a token does not depend on the
    number of tokens."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        dtype: RequestedPrecision,
        return_routed_experts: bool = False,
        drafts: bool = False,
        quantization: Quantization = "none",
        max_graph_rows: int = 0,
    ):
        """num_blocks: number of usable cache blocks, without the null block. drafts: whether `draft` will be called.
        weights: quantization of the matrices. max_graph_rows: maximum number of rows of a decoding step for CUDA graph
        capture; 0: no CUDA graphs."""
        if drafts and not model.cfg.mtp_layers:
            raise ConfigError(
                "num_speculative_tokens needs a multi-token-prediction module, which this model does not have; "
                "set num_speculative_tokens=0"
            )
        self.device = next(model.parameters()).device
        """The model's device; only sampled tokens and routed experts are copied back from it."""
        self._dtype = DTYPES[resolve_precision(dtype, self.device)]
        self._expert_shape = _routed_expert_shape(model.cfg) if return_routed_experts else None
        self._num_blocks, self._drafts = num_blocks, drafts
        self._cache: KVCache | None = None
        self._quantization = quantization
        self._max_graph_rows = max_graph_rows
        self.graphs: Graphs | None = None
        """CUDA graphs of decoding steps; None if the device does not support CUDA graphs."""
        self._load_copy(model)

    @property
    def cache(self) -> KVCache:
        """The KV cache of all sequences; allocated at first use."""
        if self._cache is None:
            size = self._num_blocks + 1
            self._cache = KVCache(self._model.cfg, size, self._dtype, self.device, self._expert_shape, self._drafts)
        return self._cache

    def free_cache(self) -> None:
        """Free the memory of the cache."""
        self._cache = None
        self._reset_graphs()

    def load(self, model: Transformer) -> None:
        """Load the weights of another model, or of the same model after a change."""
        if model is self._source:
            update_copy(self._model, model)
            self._prepare()
            if self.graphs is not None and self._addresses() != self._recorded:
                self._reset_graphs()
        else:
            self._load_copy(model)

    def _load_copy(self, model: Transformer) -> None:
        """Create the copy of the model to run. A quantized or upcast copy is rebuilt for new weights, because it cannot
        be updated in place; in this case no reference to `model` is stored."""
        rounded = inference_copy(model, self._dtype, self._quantization)
        self._model = upcast_small_model(rounded)
        self._source = model if self._model is rounded and self._quantization == "none" else None
        self._prepare()
        self.dtype = self._model.embed.weight.dtype
        """Dtype of matmuls; fp32 for a small bf16 model that is upcast, with a cache in bf16."""
        self._reset_graphs()

    def _addresses(self) -> list[int]:
        """The addresses of the weights."""
        return [weight.data_ptr() for weight in self._model.parameters()]

    def _reset_graphs(self) -> None:
        """Discard the captured graphs, which contain the old addresses of weights and cache."""
        self.graphs = (
            Graphs(self.compute, self._max_graph_rows) if self._max_graph_rows and can_record(self._model) else None
        )
        self._recorded = self._addresses() if self.graphs is not None else []

    def _prepare(self) -> None:
        """Prepack the current weights and build the fused pass."""
        prepack_weights(self._model)
        self._fused = fused_pass(self._model)

    def run(self, scheduled: SchedulerOutput, table: SequenceTable) -> Tensor:
        """Compute the scheduled tokens and copy blocks. Returns hidden states (N, D), in the order of `scheduled`."""
        total, longest = int(scheduled.counts.sum()), int(scheduled.counts.max())
        graphs = self.graphs if longest == 1 else None
        size = self._size(total) if graphs is None else graphs.size_for(total)
        places = _places(table, scheduled.rows, scheduled.starts, scheduled.counts, size)
        inputs = self._inputs(table, places, table.ids[places.seq_index, places.positions])
        if graphs is None:
            hidden, chosen = self.compute(Inputs(*map(self._to_device, inputs)), longest)
        else:
            hidden, chosen = graphs.run(inputs, self.device)
        if self._expert_shape is not None and chosen is not None:  # (L, N, K)
            experts = chosen[:, :total].transpose(0, 1).cpu().numpy()
            self.cache.store_routed_experts(places.slots[:total], experts)
        self.copy_blocks(scheduled)
        return hidden[:total]

    def copy_blocks(self, scheduled: SchedulerOutput) -> None:
        """Copy the blocks of siblings that start in this step."""
        for copy in scheduled.copies:
            self.cache.copy(*copy)

    def compute(self, inputs: Inputs, longest: int = 1) -> Outputs:
        """The forward pass over tokens on the device. longest: maximum number of tokens of a row."""
        view = self._view(inputs, longest)
        if (fused := self._fused_for(len(inputs.ids))) is not None:
            return Outputs(*fused.hidden(inputs.ids, inputs.positions, view.first, self.cache.data))
        trunk = self._model.trunk(inputs.ids.unsqueeze(1), inputs.positions.unsqueeze(1), cache=view)
        chosen = torch.stack([layer.experts[:, 0] for layer in trunk.routing]) if trunk.routing else None
        return Outputs(trunk.hidden[:, 0], chosen)

    def draft(
        self, table: SequenceTable, rows: numpy.ndarray, starts: numpy.ndarray, counts: numpy.ndarray, hidden: Tensor
    ) -> Tensor:
        """Run the multi-token-prediction module over computed tokens with hidden states (N, D); each row has `counts`
        tokens from position `starts`.

        Returns the module's hidden states (rows, D) at the last token of each row, which predict the token after next.
        """
        total = int(counts.sum())
        places = _places(table, rows, starts, counts, self._size(total))
        inputs = self._inputs(table, places, table.ids[places.seq_index, places.positions + 1])
        following, positions, *_ = inputs = Inputs(*map(self._to_device, inputs))
        view = self._view(inputs, int(counts.max()))
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, len(places.seq_index) - total))
        states = None
        if (fused := self._fused_for(len(hidden))) is not None:
            states = fused.draft(hidden, following, positions, view.first, self.cache.data)
        if states is None:
            following, positions = following.unsqueeze(1), positions.unsqueeze(1)
            states = self._model.draft(hidden.unsqueeze(1), following, positions, view)[:, 0]
        return states[self._to_device(torch.from_numpy(counts.cumsum() - 1))]

    def _inputs(self, table: SequenceTable, places: TokenSlots, ids: numpy.ndarray) -> Inputs:
        """The inputs, on the CPU, of a pass over tokens `ids` (N,) at `places`."""
        inputs = (ids, places.positions, places.slots, places.seq_index.astype(numpy.int32), table.block_tables)
        return Inputs(*map(torch.from_numpy, inputs))

    def _view(self, inputs: Inputs, longest: int) -> KVCacheView:
        """The cache view of these tokens. longest: maximum number of tokens of a row."""
        return KVCacheView(
            self.cache, Pages(self.cache.data[0], inputs.block_tables, inputs.seq_index, longest), inputs.slots
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) of hidden states (B, D); batch-invariant in fp32."""
        logits = None if self._fused is None else self._fused.logits(hidden)
        if logits is not None:
            return logits
        count = len(hidden)
        if padding := self._padding(count):
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
        return self._model.head(hidden)[:count]

    @property
    def ignores_threads(self) -> bool:
        """Whether completions are bit for bit independent of torch's number of threads, because the fused pass computes
        every step."""
        return self._fused is not None and self._fused.ignores_threads

    def _fused_for(self, count: int) -> FusedPass | None:
        """The fused pass, which needs no padding, if there is one for this number of tokens."""
        return self._fused if self._fused is not None and count <= self._fused.max_num_tokens else None

    def _size(self, count: int) -> int:
        """Number of tokens of a pass over `count` tokens, padding included."""
        return count if self._fused_for(count) else count + self._padding(count)

    def _padding(self, count: int) -> int:
        """Number of padding rows for a pass over `count` rows that is not fused."""
        return ops.row_padding(count, self.dtype)

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self.device)


def _places(
    table: SequenceTable, rows: numpy.ndarray, starts: numpy.ndarray, counts: numpy.ndarray, size: int
) -> TokenSlots:
    """The slots of `counts` tokens per row from position `starts`, padded to `size` with tokens of the padding row."""
    ends = counts.cumsum()
    total = int(ends[-1])
    seq_index = numpy.full(size, len(table.requests), dtype=numpy.int64)
    seq_index[:total] = rows.repeat(counts)
    positions = numpy.zeros(size, dtype=numpy.int64)
    positions[:total] = numpy.arange(total) + (starts - (ends - counts)).repeat(counts)
    slots = (
        table.block_tables[seq_index, positions // BLOCK_SIZE].astype(numpy.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    )
    return TokenSlots(seq_index, positions, slots)


def _routed_expert_shape(cfg: ModelConfig) -> tuple[int, int, str]:
    """Format of the routed experts in the cache: (layers with experts, experts per token, integer type)."""
    if cfg.moe is None:
        raise ConfigError(
            "router_replay (return_routed_experts of the engine) is set, but the model has no experts; "
            "remove the setting"
        )
    layers = sum(map(cfg.is_moe_layer, range(cfg.num_layers)))
    return layers, cfg.moe.num_experts_per_tok, "uint8" if cfg.moe.num_experts <= 256 else "int16"
