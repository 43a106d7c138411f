"""The CUDA paths, tested on a CPU by the same torch operators: fused attention, block masks, grouped experts."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.kernels import ops
from thinkstack.kernels.masks import PackedMask, additive_mask, document_block_mask, kv_range_of
from thinkstack.kernels.reference import eager_attention, fused_attention, grouped_experts, padded_experts

BOTH = pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_attention_and_its_gradients_are_those_of_plain_products(groups):
    """Values narrower than keys, as in MLA, and several queries a key, as in GQA."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 20, groups, 4 // groups, 12), (2, 20, groups, 12), (2, 20, groups, 8)
    given = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    kv_range = kv_range_of(torch.tensor([[1] * 7 + [2] * 9 + [0] * 4, [3] * 20]))
    grad = torch.randn(2, 20, groups, 4 // groups, 8, generator=generator)
    mask = PackedMask(kv_range=kv_range)
    plain, fused = eager_attention(*given, mask, 0.3), fused_attention(*given, mask, 0.3)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(out, given, grad) for out in (fused, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_block_mask_equals_the_additive_mask():
    kv_range = kv_range_of(torch.tensor([[1] * 70 + [2] * 120 + [0] * 10, [3] * 150 + [4] * 50]))
    blocks = document_block_mask(kv_range)
    dense = create_mask(blocks.mask_mod, 2, None, 200, 200, device="cpu")
    mask = additive_mask(kv_range, torch.float32)
    assert torch.equal(dense, mask == 0)


@BOTH
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_models_logits(cfg, monkeypatch):
    """Uncompiled, forward only: torch has no backward pass of it on a CPU."""
    model, batch = tiny_model(cfg), random_batch([9, 5, 12, 3], 16)
    plain = model(batch.ids, batch.positions, batch.document_ids)
    (with_blocks, _), _ = ops.TABLE["packed_mask"]
    monkeypatch.setitem(ops.TABLE, "packed_mask", ((with_blocks, lambda *_: True),))
    found = model(batch.ids, batch.positions, batch.document_ids)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    assert not torch.equal(found, plain), "another path computed it"


@BOTH
def test_sdpa_gives_the_models_logits_and_gradients(cfg, monkeypatch):
    """The CUDA path without compilation, forced in place of plain products."""
    batch, found = random_batch([9, 5, 12, 3], 16), []
    monkeypatch.setattr("thinkstack.kernels.cpu.calls.available", lambda: False)
    for attention in (eager_attention, fused_attention):
        model = tiny_model(cfg)
        monkeypatch.setitem(ops.TABLE, "softmax_attention", ((attention, lambda *_: True),))
        logits = model(batch.ids, batch.positions, batch.document_ids)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        found.append((logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (fused, others) = found
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == others.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(others[name], value, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_and_their_gradients_are_those_of_the_reference(dtype):
    """One expert gets no token."""
    generator = torch.Generator().manual_seed(1)
    experts = torch.randint(6, (40, 2), generator=generator)
    experts[experts == 3] = 4
    shapes = (40, 16), (40, 2), (6, 48, 16), (6, 16, 24)
    given = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    given[1] = given[1].detach().float().requires_grad_()
    x, weights, w_in, w_out = given
    grad = torch.randn(40, 16, generator=generator).to(dtype)
    outs = [run(x, weights, experts, w_in, w_out) for run in (grouped_experts, padded_experts)]
    bounds = {"atol": 1e-3, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2.0, "rtol": 0.1}
    torch.testing.assert_close(*outs, **bounds)
    for ours, theirs in zip(*(torch.autograd.grad(out, given, grad) for out in outs), strict=True):
        torch.testing.assert_close(ours, theirs, **bounds)
