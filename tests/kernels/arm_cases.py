"""Calls of kernels that training makes, for test_arm.py."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.test_kernels import MLA_ALIGNED, MLA_ODD, branches_of, random_tensor, with_gradients
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.kernels.cpu import operators
from thinkstack.kernels.cpu import rows as row_kernels
from thinkstack.kernels.masks import PackedMask, kv_range_of
from thinkstack.kernels.ops import dequantize_, rotate, swiglu
from thinkstack.models.attention import GQA, MLA, AttentionContext
from thinkstack.models.config import MoEConfig
from thinkstack.models.layers import RMSNorm, rope_table
from thinkstack.models.moe import route
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.quant.int8 import Int8
from thinkstack.train.loss import token_logprobs

FP32, BF16 = torch.float32, torch.bfloat16
BOUND = {FP32: 2e-6, BF16: 1e-2}
"""Bounds of the norm of a difference relative to the norm, as in test_kernels.py."""


class Case(NamedTuple):
    """The same computation by two implementations."""

    mine: Callable[[], list[Tensor]]
    """With kernels."""
    theirs: Callable[[], list[Tensor]]
    """On torch's operators."""
    bound: float


def alike(run: Callable[[], list[Tensor]], bound: float) -> Case:
    return Case(run, run, bound)


def attention(tokens: int, branched: bool, dtype: torch.dtype) -> Case:
    """Latent attention with a shared part of the keys, at odd widths; with documents, or a document with branches."""
    cfg = replace(MLA_TINY.attention, num_heads=2, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3)
    module = MLA(replace(MLA_TINY, attention=cfg), 0)
    context = among(tokens, branched, 4)
    inputs = [random_tensor(2, tokens, 2, 9), random_tensor(2, tokens, 16, seed=1), random_tensor(2, tokens, 4, seed=2)]
    return attended(lambda *x: module.attend_packed(*x, module.expanded_layout, context), inputs, dtype)


def grouped_attention(tokens: int, branched: bool, dtype: torch.dtype) -> Case:
    module, context = GQA(GQA_TINY, 0), among(tokens, branched, 8)
    inputs = [random_tensor(2, tokens, 4, 8), random_tensor(2, tokens, 32, seed=1)]
    return attended(lambda q, kv: module.attend_packed(q, kv, None, module.layout, context), inputs, dtype)


def among(tokens: int, branched: bool, width: int) -> AttentionContext:
    documents = torch.arange(tokens)[None] // (1000 if branched else 37)
    kv_range = kv_range_of(documents, branches_of(tokens) if branched else None)
    rope = rope_table(torch.arange(tokens)[None], width, MLA_TINY.rope)
    return AttentionContext(rope=rope, mask=PackedMask(kv_range=kv_range))


def attended(run: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> Case:
    """Result and gradients; the reference computes in fp32."""
    own = [x.to(dtype) for x in inputs]

    def theirs() -> list[Tensor]:
        return with_gradients(run, *(x.float() for x in own))

    return Case(lambda: with_gradients(run, *own), theirs, BOUND[dtype])


def experts(dtype: torch.dtype) -> Case:
    """Some experts have more pairs than a block, the last one has none."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(3, (150, 1), generator=generator)
    chosen = torch.cat((chosen, (chosen + 1) % 4), 1)
    chosen[chosen == 3] = 2
    weights = torch.rand(150, 2, generator=generator)
    inputs = [
        x.to(dtype)
        for x in (random_tensor(150, 48), random_tensor(4, 64, 48, seed=6) / 7, random_tensor(4, 48, 32, seed=7) / 6)
    ]

    def plain(x: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        gate, up = torch.einsum("nd,nkid->nki", x, w_in[chosen]).chunk(2, -1)
        return torch.einsum("nki,nkdi,nk->nd", F.silu(gate) * up, w_out[chosen], weights)

    def mine() -> list[Tensor]:
        x, w_in, w_out = inputs
        with torch.no_grad():
            alone = operators.experts(x, weights, chosen, w_in, w_out)
        run = lambda x, weights, w_in, w_out: operators.experts(x, weights, chosen, w_in, w_out)  # noqa: E731
        return [alone, *with_gradients(run, x, weights, w_in, w_out)]

    def theirs() -> list[Tensor]:
        x, w_in, w_out = (one.float() for one in inputs)
        found = with_gradients(plain, x, weights, w_in, w_out)
        return [found[0], *found]

    return Case(mine, theirs, BOUND[dtype])


def model(name: str, interleaved: bool) -> Case:
    """Logits and gradients of a model."""
    cfg = {"whole vectors": MLA_ALIGNED, "odd widths": MLA_ODD, "gqa": GQA_TINY}[name]
    built = tiny_model(replace(cfg, rope=replace(cfg.rope, interleaved=interleaved)))
    ids = torch.randint(cfg.vocab_size, (2, 61), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[1] * 23 + [2] * 30 + [0] * 8, [3] * 61])

    def run() -> list[Tensor]:
        built.zero_grad()
        logits = built(ids, None, documents)
        logits.logsumexp(-1).square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in built.parameters() if p.grad is not None)]

    return alike(run, 3e-5)


def rows(width: int, dtype: torch.dtype) -> Case:
    """Norms, activations and rotations with their gradients."""
    x, y = random_tensor(3, 5, width, dtype=dtype), random_tensor(3, 5, width, seed=1, dtype=dtype)
    norm = RMSNorm(width, 1e-6)
    norm.weight.data = random_tensor(width, seed=2)
    wide, pairs = random_tensor(3, 5, width + 3, dtype=dtype), random_tensor(3, 5, 2, 2 * width, dtype=dtype)
    table = rope_table(torch.arange(5)[None], 2 * width, MLA_TINY.rope)

    def run() -> list[Tensor]:
        found = with_gradients(lambda x: norm(x[..., :width]), wide) + with_gradients(swiglu, x, y)
        for interleaved in (True, False):
            found += with_gradients(functools.partial(rotate, table=table, interleaved=interleaved), pairs)
        return [*found, *with_gradients(norm, x), norm.weight.grad.clone()]

    def fresh() -> list[Tensor]:
        norm.weight.grad = None
        return run()

    return alike(fresh, BOUND[dtype])


def halves(dtype: torch.dtype) -> Case:
    """The operations between the products of a dense model."""
    x, change, both = (random_tensor(5, 37, seed=s, dtype=dtype) for s in (0, 1, 2))
    both, weight = torch.cat((x, both), 1), random_tensor(37, seed=3)

    def mine() -> list[Tensor]:
        total = x.clone()
        normed = row_kernels.add_norm(total, change, weight, 1e-6)
        return [total, normed, row_kernels.swiglu_halves(both)]

    def theirs() -> list[Tensor]:
        total = (x.float() + change.float()).to(dtype)
        normed = F.rms_norm(total.float(), (37,), weight, 1e-6)
        return [total, normed, F.silu(x.float()) * both[:, 37:].float()]

    return Case(mine, theirs, BOUND[dtype])


def log_probabilities(dtype: torch.dtype) -> Case:
    hidden, weight = random_tensor(9, 12, dtype=dtype), random_tensor(53, 12, seed=1, dtype=dtype)
    index, targets = torch.tensor([0, 2, 3, 8]), torch.tensor([52, 0, 17, 48])

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, entropy = token_logprobs(hidden, index, weight, targets, temperature=0.7, with_entropy=True)
        return logprobs + entropy

    return alike(lambda: with_gradients(run, hidden, weight), BOUND[dtype])


def dequantized(dtype: torch.dtype) -> Case:
    """All numbers of e4m3, and int8, bit for bit."""
    qweight = torch.arange(256, dtype=torch.uint8).repeat(2, 150, 1)[..., :202].contiguous().view(torch.float8_e4m3fn)
    qweight.view(torch.uint8)[:, 140:, :54] += 202
    scale, parts = random_tensor(2, 2, 2), Int8().quantize(random_tensor(3, 5, 70, seed=1))

    def run() -> list[Tensor]:
        out, plain = torch.empty(qweight.shape, dtype=dtype), torch.empty(3, 5, 70, dtype=dtype)
        dequantize_(FP8Blocks(), {"qweight": qweight, "scale": scale}, out)
        dequantize_(Int8(), parts, plain)
        return [out.isnan().int(), out.nan_to_num(), plain]

    return alike(run, 0)


def routing(group_score: str, normalize: bool) -> Case:
    sizes = dict(num_experts=12, num_experts_per_tok=3, moe_intermediate_size=16, num_groups=4, top_groups=2)
    cfg = MoEConfig(**sizes, group_score=group_score, norm_topk_prob=normalize)
    scores, bias = torch.rand(200, 12, generator=torch.Generator().manual_seed(0)), random_tensor(12, seed=1) * 0.2

    @torch.no_grad()
    def run() -> list[Tensor]:
        weights, chosen = route(scores, bias, cfg)
        chosen, order = chosen.sort(-1)
        return [chosen, weights.gather(1, order)]

    return alike(run, BOUND[FP32])


def products(count: int, wide: int, narrow: int) -> Case:
    """With and without a bias, and the gradients; sums longer than a panel."""
    x, weight, bias, grad = (
        random_tensor(count, wide),
        random_tensor(narrow, wide, seed=1),
        random_tensor(narrow, seed=2),
        random_tensor(count, narrow),
    )

    def mine() -> list[Tensor]:
        found = [row_kernels.linear(x, weight, None), row_kernels.linear(x, weight, bias)]
        return [*found, row_kernels.linear_grad_x(grad, weight), row_kernels.linear_grad_weight(grad, x)]

    def theirs() -> list[Tensor]:
        found = x.double() @ weight.double().T
        return [found, found + bias, grad.double() @ weight.double(), grad.double().T @ x.double()]

    return Case(mine, theirs, BOUND[FP32])
