"""CUDA graphs of decoding steps: Python launches one graph per step instead of every kernel.

A graph is captured for a fixed number of rows; a step uses the next larger graph, with padding. Prefill and steps with
draft tokens run without graphs.
"""

# Shapes in this file: N tokens, one per row; R rows of the engine, the last row is for padding; M blocks of the longest
# sequence, D hidden size, L layers with experts, K experts per token.

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinkstack.engine.fused.blocks import has_hooks
from thinkstack.kernels import ops
from thinkstack.kernels.memory import staging_bytes
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer

WARM_UPS = 2
"""Number of runs before a capture, in which kernels are compiled and libraries allocate memory."""


class Inputs(NamedTuple):
    """The inputs of a forward pass over N tokens."""

    ids: Tensor
    """Token ids, (N,) int64; positions and slots have the same shape and dtype."""
    positions: Tensor
    """Position of each token in its sequence."""
    slots: Tensor
    """Slot of each token in the cache: block * BLOCK_SIZE + offset."""
    seq_index: Tensor
    """Row of each token, (N,) int32."""
    block_tables: Tensor
    """The blocks of each row, (R, M) int32."""


class Outputs(NamedTuple):
    """The results of a forward pass."""

    hidden: Tensor
    """Hidden states, (N, D)."""
    experts: Tensor | None
    """Routed experts of each token, (L, N, K) int64; None for a model without experts."""


Compute = Callable[[Inputs], Outputs]
Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""Function that runs another function once; returns the result and a function that replays it into the same memory."""


def can_record(model: Transformer) -> bool:
    """Whether decoding steps can be captured, because they never synchronize with the device. Models that are sharded
    across ranks are not captured."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if any(map(has_hooks, model.layers)) or any(layer.expert_module is not None for layer in layers):
        return False
    return ops.never_synchronizes(model.embed.weight, [(layer.stack("w_in"), layer.stack("w_out")) for layer in layers])


class Graphs:
    """CUDA graphs of `compute` by number of rows, captured on first use."""

    def __init__(self, compute: Compute, max_rows: int, record: Record | None = None):
        """max_rows: maximum number of rows of a step. record: None captures CUDA graphs; tests pass a function that
        calls `compute` again."""
        self.max_rows = max_rows
        self._compute, self._record = compute, record or Recorder()
        self._recordings: dict[int, _Recording] = {}

    def size_for(self, count: int) -> int:
        """Number of rows of the graph for a step of `count` rows: powers of 2 up to 16, then multiples of 16."""
        size = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
        return min(size, self.max_rows)

    def run(self, inputs: Inputs, device: torch.device) -> Outputs:
        """Run `compute` for as many tokens as `size_for` returned; inputs are on the CPU. The result is valid until the
        next call."""
        recording = self._recordings.get(len(inputs.ids))
        if recording is None:
            recording = _Recording(inputs, device)
            recording.take(inputs)
            recording.outputs, recording.replay = self._record(lambda: self._compute(recording.inputs))
            self._recordings[len(inputs.ids)] = (
                recording  # stored only after success, so that a failed capture is repeated
            )
        recording.take(inputs)
        recording.replay()
        return recording.outputs


class _Recording:
    """The input memory of a graph: one buffer on the host and one on the device, so that one copy transfers all."""

    outputs: Outputs
    replay: Callable[[], None]

    def __init__(self, like: Inputs, device: torch.device):
        size = sum(value.nbytes for value in like)
        self._here = staging_bytes(size, device)
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._given, self.inputs = _inputs_in(self._here, like), _inputs_in(self._there, like)

    def take(self, inputs: Inputs) -> None:
        """Copy these inputs to the device."""
        for mine, value in zip(self._given, inputs, strict=True):
            mine.copy_(value)
        self._there.copy_(self._here, non_blocking=True)


def _inputs_in(memory: Tensor, like: Inputs) -> Inputs:
    """Consecutive views of `memory` with the shapes and dtypes of `like`."""
    parts = memory.split([value.nbytes for value in like])
    return Inputs(*(part.view(value.dtype).view(value.shape) for part, value in zip(parts, like, strict=True)))


class Recorder:
    """Captures CUDA graphs that share a memory pool; only one graph runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Capture `work`; see `Record`."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = work()
        self._pool = graph.pool()
        return outputs, graph.replay
