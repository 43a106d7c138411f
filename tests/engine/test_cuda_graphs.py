"""Recorded decoding steps, as far as a CPU can tell: what is brought to a recording and taken from it, when recordings
are made anew, and that a step asks a device for nothing while it runs."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.requests import FUSED, LONG, SMALL, how, prompt
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.engine.cuda_graphs import Graphs, Inputs, can_record
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.runner import Runner
from thinkstack.kernels import triton as cuda
from thinkstack.models.precision import Quantization
from thinkstack.models.transformer import Transformer


def call_again(work):
    """A recording that runs the function again, as a graph does: with the same input and output memory."""
    outputs = work()

    def replay():
        for old, new in zip(outputs, work(), strict=True):
            if old is not None:
                old.copy_(new)

    return outputs, replay


def recording(engine: Engine, most: int) -> Engine:
    engine.runner.graphs = Graphs(engine.runner.compute, most, call_again)
    return engine


@pytest.mark.parametrize("with_experts", [False, True])
@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
def test_recorded_steps_sample_the_tokens_of_plain_ones(cfg, with_experts):
    """One to six rows, which end one after the other; steps with a chunk of a prompt are not recorded."""
    if with_experts and cfg.moe is None:
        pytest.skip("no experts to return")
    model, prompt_token_ids, samplings = tiny_model(cfg, **LONG), [prompt(n, n) for n in (5, 90, 64, 63, 1, 30)], how(6)
    settings = replace(SMALL, return_routed_experts=with_experts, max_prefill_tokens=50)
    expected = Engine(model, settings).generate(prompt_token_ids, samplings)
    engine = recording(Engine(model, settings), 8)
    found = engine.generate(prompt_token_ids, samplings)
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]
    if with_experts:
        assert all(torch.equal(a.experts, b.experts) for [a], [b] in zip(found, expected, strict=True))
    assert sorted(engine.runner.graphs._recordings) == [1, 2, 4, 8]


def test_a_recording_takes_the_next_larger_number_of_rows():
    graphs = Graphs(lambda given: None, 100, call_again)
    assert [graphs.size_for(n) for n in (1, 2, 3, 5, 9, 16, 17, 33, 97, 100)] == [1, 2, 4, 8, 16, 16, 32, 48, 100, 100]


def meta_model(cfg, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg).to(dtype)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "available", lambda: True)


class Operators(TorchDispatchMode):
    """Records the operators that run; none may have inputs on the CPU."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        assert all(x.is_meta for x in tensors), func
        return found


def traced(cfg, dtype: torch.dtype, weights: Quantization = "none") -> list[str]:
    """Operators of a decoding step of 4 rows on the meta device, which has no values to synchronize for."""
    runner = Runner(meta_model(cfg, dtype), 4, "bf16" if dtype == torch.bfloat16 else "fp32", quantization=weights)
    numbers = (torch.empty(4, dtype=torch.int64, device="meta") for _ in range(3))
    given = Inputs(*numbers, *(torch.empty(n, dtype=torch.int32, device="meta") for n in ((4,), (5, 2))))
    with torch.no_grad():
        runner.compute(given)  # as before a recording: the rope table is copied to the device once
        with Operators() as seen:
            runner.compute(given)
    return seen.names


@pytest.mark.parametrize("cfg", [FUSED, GQA_TINY], ids=["mla", "gqa"])
def test_a_recorded_step_never_waits_for_the_device(cfg, with_triton):
    assert can_record(meta_model(cfg, torch.bfloat16))
    names = traced(cfg, torch.bfloat16)
    assert names.count("thinkstack.paged_attention.default") == cfg.num_layers
    assert any("grouped_mm" in name for name in names) == (cfg.moe is not None)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_matrices_are_multiplied_directly(weights, with_triton):
    names = traced(GQA_TINY, torch.bfloat16, weights)
    assert names.count("thinkstack.quantized_linear.default") == 7 * GQA_TINY.num_layers


def test_passes_that_synchronize_are_not_recorded(with_triton, monkeypatch):
    """Experts in fp32 are counted; so the trace above can fail."""
    assert not can_record(meta_model(FUSED, torch.float32))
    with pytest.raises(RuntimeError, match="bincount"):
        traced(FUSED, torch.float32)
    assert can_record(meta_model(GQA_TINY, torch.float32))
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert not can_record(meta_model(GQA_TINY, torch.float32))


def test_other_weights_and_a_new_cache_are_recorded_again(with_triton, monkeypatch):
    """A recording contains the addresses of both; weights that change in place keep theirs."""
    models = [meta_model(GQA_TINY, torch.float32) for _ in range(2)]
    runner = Runner(models[0], 4, "fp32", max_graph_rows=8)
    first = runner.graphs
    runner.load(models[0])
    assert runner.graphs is first is not None
    monkeypatch.setattr(runner, "_addresses", lambda: [1])
    runner.load(models[0])
    assert runner.graphs not in (first, None)
    first = runner.graphs
    runner.load(models[1])
    assert runner.graphs not in (first, None)
    second = runner.graphs
    runner.free_cache()
    assert runner.graphs not in (first, second, None)


def test_a_cpu_records_nothing():
    assert Engine(tiny_model(), EngineConfig()).runner.graphs is None
