"""The fused passes and the small-M kernels against torch's operators."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from tests.kernels.test_kernels import random_tensor
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.fused import fused_pass
from thinkstack.engine.fused import gqa as dense
from thinkstack.engine.fused.gqa import FusedGQA
from thinkstack.engine.fused.mla import FusedMLA
from thinkstack.engine.kv_cache import KVCache, KVCacheView
from thinkstack.kernels import choice
from thinkstack.kernels.conditions import fits_small_m
from thinkstack.kernels.cpu import calls, inference, prepacked
from thinkstack.kernels.cpu.prepacked import can_prepack, prepacked_linear
from thinkstack.kernels.paging import Pages
from thinkstack.kernels.sizes import SMALL_M
from thinkstack.models.config import GQAConfig
from thinkstack.models.layers import prepack_weights
from thinkstack.models.lora import LoRAConfig, adapt
from thinkstack.models.precision import cast_copy, inference_copy
from thinkstack.models.quantized import dequantize_model, quantizable_matrices, quantize_model
from thinkstack.models.transformer import Transformer
from thinkstack.quant.int8 import Int8
from thinkstack.train.fp8 import FP8Experts
from thinkstack.types import SamplingParams

pytestmark = pytest.mark.skipif(not calls.available(), reason="no C++ compiler")
WIDE = replace(
    GQA_TINY,
    hidden_size=64,
    attention=GQAConfig(num_heads=6, num_kv_heads=2, head_dim=16),
    intermediate_size=160,
    max_positions=300,
)
KINDS = {
    "llama": WIDE,
    "biases": replace(WIDE, attention=replace(WIDE.attention, qkv_bias=True, out_bias=True)),
    "normed": replace(WIDE, attention=replace(WIDE.attention, qk_norm=True)),
    "interleaved": replace(WIDE, rope=replace(WIDE.rope, interleaved=True)),
    "tiles": replace(WIDE, hidden_size=192, attention=replace(WIDE.attention, head_dim=32)),
}


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("width", [32, 96, 576])
def test_small_m_products(count, width):
    x, weight = (
        random_tensor(count, width, dtype=torch.bfloat16),
        random_tensor(50, width, seed=1, dtype=torch.bfloat16),
    )
    exact = x.double() @ weight.double().T
    with torch.no_grad():
        assert fits_small_m(x, weight)
        assert relative(inference.small_m_linear(x, weight), exact) < 3e-3  # half a unit in bf16's last place
    assert not fits_small_m(random_tensor(9, width, dtype=torch.bfloat16), weight)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["none", "int8"])
@torch.no_grad()
def test_the_fused_gqa_pass_equals_torchs_operators(weights, kind, count, on_torch, monkeypatch):
    """Hidden states and cache entries; three of the tokens are consecutive in one sequence."""
    if count > SMALL_M and (weights == "int8" or not can_prepack(torch.empty(0, dtype=torch.bfloat16))):
        pytest.skip("many tokens at once take matrices in oneDNN's layout")
    exact = tiny_model(KINDS[kind])
    model = inference_copy(exact, torch.bfloat16, weights)
    prepack_weights(model)
    if weights == "int8":
        quantize_model(exact, Int8(), quantizable_matrices(exact))
        dequantize_model(exact)
    cache = KVCache(model.cfg, 4 * count + 1, torch.bfloat16)
    cache.data.copy_(random_tensor(*cache.data.shape, seed=3))
    copied = KVCache(model.cfg, 4 * count + 1, torch.bfloat16)
    copied.data.copy_(cache.data)
    before = cache.data.clone()
    wide = KVCache(model.cfg, 4 * count + 1, torch.float32)
    wide.data.copy_(cache.data)
    seq_index = torch.tensor([0, 0, 0, *range(1, count)][:count])
    places = torch.tensor([130, 131, 132, *((9 + 31 * n) % 240 for n in range(count))][:count])
    block_tables = (1 + torch.randperm(4 * count, generator=torch.Generator().manual_seed(1))).view(count, 4).int()
    slots = block_tables[seq_index, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
    ids = torch.randint(48, (count,), generator=torch.Generator().manual_seed(2))

    def pages(of: KVCache) -> Pages:
        return Pages(of.data[0], block_tables, seq_index.int())

    def unfused(of: Transformer, into: KVCache) -> torch.Tensor:
        return of.trunk(ids.unsqueeze(1), places.unsqueeze(1), cache=KVCacheView(into, pages(into), slots)).hidden[:, 0]

    fused = fused_pass(model)
    assert isinstance(fused, FusedGQA) and fused.is_int8 == (weights == "int8")
    mine, _ = fused.hidden(ids, places, pages(cache), cache.data)
    monkeypatch.setattr(choice.choices(), "emulates_bf16", False)  # torch's products in bf16
    theirs, true = on_torch(unfused, model, copied), on_torch(unfused, exact, wide)
    assert relative(mine, true) < 2 * relative(theirs, true) < 0.1  # both round, with similar errors
    assert relative(cache.data, wide.data) < 1.3 * relative(copied.data, wide.data) + 1e-4
    changed = (cache.data != before).flatten(3).any(-1).any(0).flatten().nonzero().flatten()
    assert set(changed.tolist()) <= set(slots.tolist())


SMALL = replace(
    MLA_TINY,
    moe=replace(MLA_TINY.moe, moe_intermediate_size=16),
    max_positions=300,
)
LATENT = {
    "v3": SMALL,
    "direct query": replace(SMALL, attention=replace(SMALL.attention, q_lora_rank=0)),
    "no shared experts": replace(SMALL, moe=replace(SMALL.moe, num_shared_experts=0)),
    "v2": replace(SMALL, moe=replace(SMALL.moe, scoring="softmax", group_score="max", norm_topk_prob=False)),
    "dense": replace(SMALL, moe=None),
    "halves": replace(SMALL, rope=replace(SMALL.rope, interleaved=False)),
}


@pytest.mark.parametrize("count", [1, 5, 16, 150])
@pytest.mark.parametrize("kind", [*LATENT, *KINDS])
@torch.no_grad()
def test_a_fused_model_in_fp32_equals_torchs_operators(kind, count, on_torch):
    """Hidden states, entries and experts of a chunk of a prompt together with decoding; alone bit for bit the same."""
    model = tiny_model((LATENT | KINDS)[kind])
    cache = KVCache(model.cfg, 21, torch.float32)
    cache.data.copy_(random_tensor(*cache.data.shape, seed=3))
    copied = KVCache(model.cfg, 21, torch.float32)
    copied.data.copy_(cache.data)
    chunk = max(count - 4, 1)
    seq_index = torch.tensor([0] * chunk + [1, 2, 3, 4])[:count]
    places = torch.cat((torch.arange(70, 70 + chunk), torch.tensor([9, 200, 64, 0])))[:count]
    block_tables = (1 + torch.randperm(20, generator=torch.Generator().manual_seed(1))).view(5, 4).int()
    slots = block_tables[seq_index, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
    ids = torch.randint(48, (count,), generator=torch.Generator().manual_seed(2))

    def unfused() -> tuple[torch.Tensor, list[torch.Tensor]]:
        view = KVCacheView(copied, Pages(copied.data[0], block_tables, seq_index.int()), slots)
        trunk = model.trunk(ids.unsqueeze(1), places.unsqueeze(1), cache=view)
        return trunk.hidden[:, 0], [routing.experts[:, 0] for routing in trunk.routing]

    fused = fused_pass(model)
    assert isinstance(fused, FusedGQA if kind in KINDS else FusedMLA)
    assert fused.max_num_tokens >= count
    mine, experts = fused.hidden(ids, places, Pages(cache.data[0], block_tables, seq_index.int()), cache.data)
    theirs, chosen = on_torch(unfused)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.data, copied.data, rtol=1e-4, atol=1e-4)
    assert (experts is None) == (not chosen)
    if experts is not None:
        assert torch.equal(experts.sort(-1).values, torch.stack(chosen).sort(-1).values)
    last = count - 1
    alone = Pages(cache.data[0], block_tables, seq_index[last:].int())
    again, _ = fused.hidden(ids[last:], places[last:], alone, cache.data)
    assert torch.equal(again[0], mine[last])
    assert fused.prepacked_head is not None
    assert torch.equal(
        prepacked_linear(again, fused.prepacked_head)[0], prepacked_linear(mine, fused.prepacked_head)[last]
    )


@pytest.mark.parametrize("kind", LATENT)
@torch.no_grad()
def test_a_small_model_over_a_bf16_cache_is_close_and_batch_invariant(kind):
    """The cache is rounded, the computation is not; 20 tokens of one sequence, across the edge of a block."""
    fused = fused_pass(tiny_model(LATENT[kind]))
    exact, cache = (KVCache(LATENT[kind], 3, dtype) for dtype in (torch.float32, torch.bfloat16))
    cache.data.copy_(random_tensor(*cache.data.shape, seed=3))
    exact.data.copy_(cache.data)
    block_tables, seq_index, places = (
        torch.tensor([[2, 1]], dtype=torch.int32),
        torch.zeros(20, dtype=torch.int32),
        torch.arange(50, 70),
    )
    ids = torch.randint(48, (20,), generator=torch.Generator().manual_seed(2))

    def hidden(into: KVCache, rows: slice) -> torch.Tensor:
        return fused.hidden(ids[rows], places[rows], Pages(into.data[0], block_tables, seq_index[rows]), into.data)[0]

    together = hidden(cache, slice(None))
    assert 0 < relative(together, hidden(exact, slice(None))) < 1e-2
    assert torch.equal(hidden(cache, slice(13, 14)), together[13:14])


@torch.no_grad()
def test_the_fused_mtp_module_of_a_small_model_equals_torchs_operators(on_torch):
    model = tiny_model(SMALL)
    cache = KVCache(model.cfg, 3, torch.float32, drafts=True)
    cache.data.copy_(random_tensor(*cache.data.shape, seed=3))
    copied = KVCache(model.cfg, 3, torch.float32, drafts=True)
    copied.data.copy_(cache.data)
    seq_index, places = torch.zeros(9, dtype=torch.int64), torch.arange(60, 69)
    block_tables = torch.tensor([[2, 1]], dtype=torch.int32)
    slots = block_tables[seq_index, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
    hidden, following = random_tensor(9, 32, seed=4), torch.arange(9)
    fused = fused_pass(model)
    assert isinstance(fused, FusedMLA)
    mine = fused.draft(hidden, following, places, Pages(cache.data[0], block_tables, seq_index.int()), cache.data)

    def unfused() -> torch.Tensor:
        view = KVCacheView(copied, Pages(copied.data[0], block_tables, seq_index.int()), slots)
        return model.draft(hidden.unsqueeze(1), following.unsqueeze(1), places.unsqueeze(1), view)[:, 0]

    torch.testing.assert_close(mine, on_torch(unfused), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.data, copied.data, rtol=1e-4, atol=1e-4)


def hooked(model: Transformer) -> Transformer:
    model.layers[0].ffn.register_forward_hook(lambda *_: None)
    return model


def adapted(model: Transformer) -> Transformer:
    adapt(model, LoRAConfig(rank=2))
    return model


def with_expert_module(model: Transformer) -> Transformer:
    model.layers[1].ffn.expert_module = FP8Experts(power_of_two=False)
    return model


def with_output(model: Transformer, dtype: torch.dtype) -> Transformer:
    model.layers[1].attention.wo.to(dtype)
    return model


BF16 = torch.bfloat16
REFUSED = {
    "latents in bf16": (lambda: cast_copy(tiny_model(SMALL), BF16), "latent|grouped", "in torch.bfloat16 on cpu"),
    "odd experts": (lambda: tiny_model(MLA_TINY), "grouped-query", "sizes of experts that are not multiples of 16"),
    "wide": (lambda: tiny_model(SMALL, hidden_size=1040), "grouped-query", "a hidden size above 1024"),
    "adapters": (lambda: adapted(cast_copy(tiny_model(WIDE), BF16)), "adapters", "adapters"),
    "adapted latents": (lambda: adapted(tiny_model(SMALL)), "grouped-query", "adapters"),
    "int8 in fp32": (lambda: inference_copy(tiny_model(WIDE), torch.float32, "int8"), "quantized", "quantized"),
    "fp8": (lambda: inference_copy(tiny_model(WIDE), BF16, "fp8"), "other than int8", "quantized weights"),
    "quantized experts": (lambda: inference_copy(tiny_model(SMALL), torch.float32, "int8"), "grouped", "quantized"),
    "ranks": (lambda: hooked(cast_copy(tiny_model(WIDE), BF16)), "forward hooks", "forward hooks"),
    "a device": (lambda: tiny_model(WIDE).to("meta"), "no kernels for torch.float32 on meta", "latent attention"),
    "grouped queries with experts": (lambda: tiny_model(WIDE, moe=SMALL.moe), "experts", "latent attention"),
    "fp8 experts": (lambda: with_expert_module(tiny_model(SMALL)), "grouped-query", "FP8Experts"),
    "an fp32 matrix": (
        lambda: with_output(cast_copy(tiny_model(WIDE), BF16), torch.float32),
        "several dtypes: .*32",
        "latent",
    ),
    "a bf16 matrix": (lambda: with_output(tiny_model(SMALL), BF16), "grouped-query", "several dtypes: .*bfloat16"),
    "dense latents": (lambda: tiny_model(SMALL).to("meta"), "grouped-query", "in torch.float32 on meta"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_a_fused_pass_refuses_by_name_what_it_does_not_support(name, caplog):
    make, gqa, mla = REFUSED[name]
    with caplog.at_level(logging.DEBUG, "thinkstack.engine.fused"):
        assert fused_pass(make()) is None
    first, second = caplog.messages
    assert re.match(rf"FusedGQA: .*({gqa})", first), first
    assert re.match(rf"FusedMLA: .*({mla})", second), second


@torch.no_grad()
def test_plain_and_int8_weights_use_a_fused_pass():
    model = cast_copy(tiny_model(WIDE), BF16)
    assert fused_pass(model) is not None
    assert fused_pass(inference_copy(tiny_model(WIDE), BF16, "int8")) is not None


@torch.no_grad()
def test_a_fused_pass_in_fp32_needs_memory_and_batch_invariant_matmuls(monkeypatch):
    model = tiny_model(WIDE)
    assert fused_pass(model) is not None
    with monkeypatch.context() as change:
        change.setattr(dense, "is_batch_invariant", lambda *_: False)
        assert "(160, 64) are not batch-invariant" in (FusedGQA.refusal(model) or "")
        assert fused_pass(model) is None
    monkeypatch.setattr(prepacked, "MAX_MEMORY_SHARE", 0)
    assert "no memory or no oneDNN" in (FusedGQA.refusal(model) or "")


@torch.no_grad()
def test_a_narrow_model_in_bf16_has_no_small_m_kernel(monkeypatch):
    """32 inputs at a time; it runs with prepacked matrices, or not at all."""
    model = cast_copy(tiny_model(WIDE, hidden_size=40), BF16)
    assert (made := fused_pass(model)) is not None and made.max_num_tokens > SMALL_M
    monkeypatch.setattr(prepacked, "MAX_MEMORY_SHARE", 0)
    assert "no small-M kernel for these matrices in torch.bfloat16; no memory" in (FusedGQA.refusal(model) or "")


@pytest.mark.parametrize("weights", ["none", "int8"])
def test_an_engine_for_one_user_generates_as_on_torch(weights, on_torch):
    model = tiny_model(WIDE)
    prompt_token_ids = [torch.randint(48, (70,), generator=torch.Generator().manual_seed(3)).tolist()]

    def generate():
        how = SamplingParams(max_tokens=40, temperature=0.0)
        engine = Engine(model, EngineConfig(dtype="bf16", quantization=weights, max_num_seqs=2))
        return engine.generate(prompt_token_ids, [how])[0][0]

    mine, theirs = generate(), on_torch(generate)
    agreed = next((n for n, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=True)) if a != b), 40)
    assert agreed > 3
    for a, b in zip(mine.logprobs[:agreed], theirs.logprobs[:agreed], strict=True):
        assert a == pytest.approx(b, abs=0.1)
