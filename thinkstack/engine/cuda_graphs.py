"""Decoding steps recorded as CUDA graphs: the device runs a step as one piece, and Python starts nothing but it.

A recording holds for one number of rows; a step takes the next larger one and fills up with padding. Prompts, whose
lengths differ every time, and steps with guesses run as they are.
"""

# Shapes in this file: N tokens, one a row; R rows of the engine, the last one stands for padding; M blocks of the
# longest sequence, D hidden size, L layers with experts, K experts per token.

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinkstack.engine.fused import has_hooks
from thinkstack.kernels import triton as cuda
from thinkstack.models.moe import MoE, takes_grouped
from thinkstack.models.transformer import Transformer

WARM_UPS = 2
"""Runs before a recording, which compile kernels and let libraries take their memory."""


class Inputs(NamedTuple):
    """What a pass needs to know of its tokens."""

    ids: Tensor
    """(N,) int64, like the next two."""
    positions: Tensor
    """In each token's sequence."""
    slots: Tensor
    """In the cache: block * BLOCK + place in it."""
    seq_index: Tensor
    """Row of each token, (N,) int32."""
    block_tables: Tensor
    """The blocks of each row, (R, M) int32."""


class Outputs(NamedTuple):
    """What it makes of them."""

    hidden: Tensor
    """(N, D)."""
    experts: Tensor | None
    """Chosen by each token, (L, N, K) int64; None for a model without."""


Compute = Callable[[Inputs], Outputs]
Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""Runs a function once and returns its result, and what runs it again into the same memory."""


def can_record(model: Transformer) -> bool:
    """Whether decoding steps of a model never wait for its device: a Triton kernel reads the cache, and no expert needs
    its tokens counted. Models that ranks share are not recorded."""
    if not cuda.takes(model.embed.weight) or any(map(has_hooks, model.layers)):
        return False
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    return all(layer.products is None and takes_grouped(layer.w_in, layer.w_out) for layer in layers)


class Graphs:
    """Recordings of `compute`, by number of rows, made when they are first needed."""

    def __init__(self, compute: Compute, most: int, record: Record | None = None):
        """most: rows that a step may have. record: by default a CUDA graph; tests call the function again."""
        self.most = most
        self._compute, self._record = compute, record or Recorder()
        self._recordings: dict[int, _Recording] = {}

    def size_for(self, count: int) -> int:
        """Rows of the recording that a step of `count` rows takes: powers of 2, from 16 on multiples of 16."""
        size = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
        return min(size, self.most)

    def run(self, given: Inputs, device: torch.device) -> Outputs:
        """`compute` for tokens whose number `size_for` has given; inputs lie on the CPU. The result stands until the
        next call."""
        recording = self._recordings.get(len(given.ids))
        if recording is None:
            recording = _Recording(given, device)
            recording.take(given)
            recording.outputs, recording.replay = self._record(lambda: self._compute(recording.inputs))
            self._recordings[len(given.ids)] = recording  # one that failed is tried again
        recording.take(given)
        recording.replay()
        return recording.outputs


class _Recording:
    """Memory of a recording's inputs: on the device, and where it is filled, so that one copy brings it there."""

    outputs: Outputs
    replay: Callable[[], None]

    def __init__(self, like: Inputs, device: torch.device):
        size = sum(value.nbytes for value in like)
        self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._given, self.inputs = _inputs_in(self._here, like), _inputs_in(self._there, like)

    def take(self, given: Inputs) -> None:
        """Bring these inputs to the device."""
        for mine, value in zip(self._given, given, strict=True):
            mine.copy_(value)
        self._there.copy_(self._here, non_blocking=True)


def _inputs_in(memory: Tensor, like: Inputs) -> Inputs:
    """Inputs like these one after the other in bytes."""
    parts = memory.split([value.nbytes for value in like])
    return Inputs(*(part.view(value.dtype).view(value.shape) for part, value in zip(parts, like, strict=True)))


class Recorder:
    """Records CUDA graphs that share their memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """A `Record`."""
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
