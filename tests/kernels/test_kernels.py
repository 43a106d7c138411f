"""The C++ kernels against torch's operators, their reference."""

import functools
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.kernels import ops, reference
from thinkstack.kernels.cpu import build, calls, inference, operators, rows
from thinkstack.kernels.masks import PackedMask, kv_range_of
from thinkstack.kernels.paging import KVLayout, Pages
from thinkstack.models.attention import MLA, AttentionContext
from thinkstack.models.config import MoEConfig
from thinkstack.models.layers import RMSNorm, rope_table
from thinkstack.models.moe import route
from thinkstack.train.loss import token_logprobs
from thinkstack.types import SamplingParams

pytestmark = pytest.mark.skipif(not calls.available(), reason="no C++ compiler")


def with_gradients(function, *inputs):
    """Result and gradients of a function of tensors, under a fixed weighting of its result."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    (out * weighting).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_close(mine, theirs, relative):
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert float((a.float() - b.float()).norm()) <= relative * float(b.float().norm())


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


BOTH_DTYPES = pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
MLA_ALIGNED = replace(MLA_TINY, moe=replace(MLA_TINY.moe, moe_intermediate_size=16))
"""Its expert sizes are multiples of LANES; the experts of MLA_TINY run on torch's operators."""
MLA_ODD = replace(
    MLA_TINY,
    attention=replace(
        MLA_TINY.attention,
        num_heads=3,
        kv_lora_rank=14,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=7,
    ),
)


@pytest.mark.parametrize("cfg", [MLA_ALIGNED, MLA_ODD, GQA_TINY], ids=["whole vectors", "odd widths", "gqa"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_logits_and_gradients_equal_those_of_torchs_operators(cfg, interleaved, on_torch):
    """Two documents and padding in a row of 61 tokens: blocks, vectors and documents all end in different places."""
    if not interleaved and cfg is not GQA_TINY:
        cfg = replace(cfg, rope=replace(cfg.rope, interleaved=False))
    model = tiny_model(cfg)
    ids = torch.randint(cfg.vocab_size, (2, 61), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[1] * 23 + [2] * 30 + [0] * 8, [3] * 61])

    def run():
        model.zero_grad()
        logits = model(ids, None, documents)
        logits.logsumexp(-1).square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    assert_close(run(), on_torch(run), 3e-5)


def branches_of(tokens):
    """20 shared tokens, then continuations of 61: long enough that a block of queries skips whole vectors of keys."""
    return ((torch.arange(tokens) - 20).clamp(min=-61) // 61 + 1)[None]


@BOTH_DTYPES
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 50, 100, 230])
def test_attention_of_any_length(tokens, branched, dtype, relative, on_torch):
    """Lengths around the sizes of vectors and blocks; a head of 5 + 4 rotated, values of 3; documents, or one
    with branches."""
    cfg = replace(MLA_TINY.attention, num_heads=2, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3)
    module = MLA(replace(MLA_TINY, attention=cfg), 0).to(dtype)
    documents = torch.arange(tokens)[None] // (1000 if branched else 37)
    rope = rope_table(torch.arange(tokens)[None], 4, MLA_TINY.rope)
    kv_range = kv_range_of(documents, branches_of(tokens) if branched else None)
    q, kv, shared = (
        random_tensor(2, tokens, 2, 9),
        random_tensor(2, tokens, 16, seed=1),
        random_tensor(2, tokens, 4, seed=2),
    )

    def run(*inputs):
        return module.attend_packed(
            *inputs, module.expanded_layout, AttentionContext(rope=rope, mask=PackedMask(kv_range=kv_range))
        )

    inputs = [x.to(dtype) for x in (q, kv, shared)]
    exact = on_torch(with_gradients, run, *(x.float() for x in inputs))
    mine = [x.float() for x in with_gradients(run, *inputs)]
    for a, b in zip(mine, exact, strict=True):
        assert float((a - b).norm()) <= relative * float(b.norm()) + 1e-6 * b.numel() ** 0.5


def test_another_document_in_the_row_changes_no_bit():
    q, kv = random_tensor(1, 40, 2, 8), random_tensor(1, 40, 32, seed=1)
    heads = KVLayout(2, 8, 16, 8, 16, 8)
    rope = rope_table(torch.arange(40)[None], 8, MLA_TINY.rope)
    mask = PackedMask(kv_range=kv_range_of((torch.arange(40)[None] >= 20).long()))
    expected = operators.attend(q, kv, None, rope, mask, heads, 0.3, True)
    kv[:, :20] *= 100
    got = operators.attend(q, kv, None, rope, mask, heads, 0.3, True)
    assert torch.equal(got[:, 20:], expected[:, 20:])
    assert not torch.equal(got[:, :20], expected[:, :20])


@BOTH_DTYPES
@pytest.mark.parametrize("width", [2, 16, 37, 128])
def test_norms_activations_and_rotations(width, dtype, relative, on_torch):
    x, y = random_tensor(3, 5, width, dtype=dtype), random_tensor(3, 5, width, seed=1, dtype=dtype)
    norm = RMSNorm(width, 1e-6)
    norm.weight.data = random_tensor(width, seed=2)
    rows = random_tensor(3, 5, width + 3, dtype=dtype)
    table = rope_table(torch.arange(5)[None], 2 * width, MLA_TINY.rope)
    pairs = random_tensor(3, 5, 2, 2 * width, dtype=dtype)
    for run, inputs in (
        (lambda x, w: torch.nn.functional.linear(norm(x), torch.eye(width, dtype=dtype)) * w.to(dtype), (x, y)),
        (lambda wide: norm(wide[..., :width]), (rows,)),
        (ops.swiglu, (x, y)),
        (lambda p: ops.rotate(p, table, True), (pairs,)),
        (lambda p: ops.rotate(p, table, False), (pairs,)),
    ):
        assert_close(with_gradients(run, *inputs), on_torch(with_gradients, run, *inputs), relative)


@BOTH_DTYPES
def test_log_probabilities_entropy_and_their_gradients(dtype, relative, on_torch):
    hidden, weight = random_tensor(9, 12, dtype=dtype), random_tensor(53, 12, seed=1, dtype=dtype)
    index, targets = torch.tensor([0, 2, 3, 8]), torch.tensor([52, 0, 17, 48])

    def run(hidden, weight):
        logprobs, entropy = token_logprobs(hidden, index, weight, targets, temperature=0.7, with_entropy=True)
        return logprobs + entropy

    assert_close(with_gradients(run, hidden, weight), on_torch(with_gradients, run, hidden, weight), relative)


@pytest.mark.parametrize("group_score", ["top2", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_chooses_as_torch_does(group_score, normalize, on_torch):
    cfg = MoEConfig(
        **dict(num_experts=12, num_experts_per_tok=3, moe_intermediate_size=16, num_groups=4, top_groups=2),
        group_score=group_score,
        norm_topk_prob=normalize,
    )
    scores = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    bias = random_tensor(12, seed=1) * 0.2
    with torch.no_grad():
        mine, theirs = route(scores, bias, cfg), on_torch(route, scores, bias, cfg)
    assert torch.equal(mine[1].sort(-1).values, theirs[1].sort(-1).values)
    order, other = mine[1].argsort(-1), theirs[1].argsort(-1)
    torch.testing.assert_close(mine[0].gather(1, order), theirs[0].gather(1, other))


@pytest.mark.parametrize("cfg", [MLA_ALIGNED, MLA_ODD, GQA_TINY], ids=["whole vectors", "odd widths", "gqa"])
def test_an_engine_samples_the_same_tokens_with_and_without_kernels(cfg, on_torch):
    model = tiny_model(cfg)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [7] * 20]

    def run():
        engine = Engine(model, EngineConfig(max_num_seqs=8))
        groups = engine.generate(prompts, [SamplingParams(max_tokens=16, temperature=0.0, n=2)] * 3)
        return [(c.token_ids, c.logprobs) for group in groups for c in group]

    for (mine, my_logprobs), (theirs, logprobs) in zip(run(), on_torch(run), strict=True):
        assert mine == theirs
        assert my_logprobs == pytest.approx(logprobs, abs=2e-5)


def test_the_kernels_are_batch_invariant():
    """Bit for bit, so that a request samples the same tokens in any batch."""
    x, y = random_tensor(130, 32), random_tensor(130, 32, seed=1)
    experts = torch.randint(4, (130, 1), generator=torch.Generator().manual_seed(5))
    experts = torch.cat((experts, (experts + 1) % 4), 1)
    weights, w_in, w_out = torch.rand(130, 2), random_tensor(4, 32, 32, seed=6), random_tensor(4, 32, 16, seed=7)

    def routed(rows):
        return operators.experts(*(t[rows].contiguous() for t in (x, weights, experts)), w_in, w_out)

    with torch.no_grad():
        for run in (
            lambda s: operators.experts(
                x[s].contiguous(), weights[s].contiguous(), experts[s].contiguous(), w_in, w_out
            ),
            lambda s: rows.swiglu(x[s].contiguous(), y[s].contiguous()),
        ):
            together = run(slice(None))
            for part in (slice(0, 1), slice(77, 78), slice(40, 73)):
                assert torch.equal(run(part), together[part])


def test_without_a_compiler_torchs_operators_run_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert build.load.__wrapped__() is None
    assert "no C++ compiler" in caplog.text and "install g++" in caplog.text


def test_with_a_failing_compiler_torch_is_used(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "cannot do that" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert build.load.__wrapped__() is None
    assert "cannot do that" in caplog.text
    assert [path.name for path in (tmp_path / "cache" / "thinkstack").iterdir()] == [build.LOCK]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "no-such-wrapper g++"])
def test_with_a_missing_compiler_torch_is_used(monkeypatch, caplog, compiler):
    """The call of CXX for its version was not guarded, and a wrapper in CXX was taken for part of a name."""
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert build.load.__wrapped__() is None
    assert compiler.split()[0] in caplog.text


def test_a_folder_that_cannot_be_written_is_replaced_by_a_private_one(monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file, where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    folder = build.cache_folder()
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0


def test_a_model_cast_to_bf16_routes_by_its_own_bias(on_torch):
    """The kernel read the bf16 bias as fp32: other experts, and memory beyond the buffer."""
    model = tiny_model(MLA_ALIGNED).bfloat16()
    ids = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, theirs = (run(model.trunk, ids).routing[0].experts for run in (lambda f, *a: f(*a), on_torch))
    assert torch.equal(mine.sort(-1).values, theirs.sort(-1).values)


@pytest.mark.parametrize("heads", [KVLayout(1, 24, 0, 0, 0, 20), KVLayout(2, 6, 6, 12, 6, 6)], ids=["mla", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_over_scattered_blocks_equals_torchs(heads, dtype):
    """Decoding and chunks of prompts of sequences with scattered blocks; other blocks are not read."""
    entries = random_tensor(9, 4, 24).to(dtype)
    entries[0] = torch.nan
    block_tables = torch.tensor([[3, 1, 8], [7, 2, 0], [5, 4, 6]], dtype=torch.int32)
    seq_index = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    last = torch.tensor([11, 5, 7, 8, 9])
    pages = Pages(entries, block_tables, seq_index)
    query = random_tensor(5, heads.groups, 3, heads.key_width).to(dtype)
    mine = inference.paged_attention(query, pages, last, heads, 0.3)
    entries[0] = 0  # torch's implementation masks what it gathered in excess
    theirs = reference.paged_attention(query, pages, last, heads, 0.3)
    torch.testing.assert_close(
        mine.float(), theirs.float(), **({} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2})
    )
    by_parts = reference.paged_attention(query, pages, last, heads, 0.3, max_elements=1)
    torch.testing.assert_close(by_parts, theirs)


@pytest.mark.parametrize(
    "heads",
    [
        KVLayout(1, 96, 0, 0, 0, 64),
        KVLayout(1, 24, 0, 0, 0, 20),
        KVLayout(3, 64, 64, 192, 64, 64),
        KVLayout(2, 32, 32, 64, 32, 32),
    ],
    ids=["mla", "mla, odd", "gqa, 64", "gqa, 32"],
)
@pytest.mark.parametrize("per_group", [1, 3, 40])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_attention_over_long_contexts_is_batch_invariant(heads, per_group, dtype, bound):
    """Chunks of prompts across the edge of a block, contexts of several segments, which are computed in parallel for
    few sequences, and blocks with NaN after the last token."""
    width = max(heads.key_width, heads.value_at + heads.groups * heads.value_step)
    entries = random_tensor(102, 64, width).to(dtype)
    block_tables = (1 + torch.randperm(100, generator=torch.Generator().manual_seed(0))).view(2, 50).int()
    block_tables = torch.cat((block_tables, block_tables.flip(1).repeat(5, 1)))
    chunk = torch.arange(2020, 2067)
    seq_index = torch.tensor([0] * len(chunk) + list(range(1, 12)), dtype=torch.int32)
    last = torch.cat((chunk, torch.tensor([2498, 0, 63, 64, 1023, 1024, 1500, 2047, 2048, 3000, 9])))
    entries[0] = torch.nan
    block_tables[0, 32] = 101
    entries[101, 19:] = torch.nan  # after token 2066
    query = random_tensor(len(seq_index), heads.groups, per_group, heads.key_width).to(dtype)

    def read(rows):
        return inference.paged_attention(
            query[rows], Pages(entries, block_tables, seq_index[rows]), last[rows], heads, 0.2
        )

    together = read(slice(None))
    assert all(torch.equal(read(slice(n, n + 1)), together[n : n + 1]) for n in (0, 27, 28, *range(46, 58)))
    assert torch.equal(read(slice(30, 50)), together[30:50])
    wide = Pages(entries.double().nan_to_num(), block_tables, seq_index)
    exact = reference.paged_attention(query.double(), wide, last, heads, 0.2)
    assert (together.double() - exact).norm() < bound * exact.norm()  # TiledAttention rounds probabilities to bf16


def test_concurrent_threads_build_once(monkeypatch):
    """The workers of a trainer load the kernels concurrently; both compiled, on shared cores."""
    built = []
    monkeypatch.setattr(build, "load", functools.cache(lambda: built.append(build._BUILDING.locked())))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: build.binary.__wrapped__(), range(2)))
    assert built == [True], "built more than once, or without the lock"


def test_the_switch_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.load.__wrapped__() is None
