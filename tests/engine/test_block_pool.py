"""Invariants of blocks and rows under random traffic (a state machine), and a brute-force prefix search."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.tiny import GQA_TINY, tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE, BlockPool, BlockTokens, root_hash
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.types import ConfigError, SamplingParams

MODEL = tiny_model(GQA_TINY, num_layers=1, mtp_layers=1, max_positions=400)


class Traffic(RuleBasedStateMachine):
    """Requests of many shapes arrive, run, are aborted and preempted, and the weights change."""

    drafts = 0

    def __init__(self) -> None:
        super().__init__()
        cfg = EngineConfig(
            max_num_seqs=6, cache_tokens=7 * BLOCK_SIZE, max_prefill_tokens=90, num_speculative_tokens=self.drafts
        )
        self.engine, self.requests, self.version = Engine(MODEL, cfg), [], 0

    @rule(
        start=st.integers(0, 2),
        length=st.integers(1, 200),
        tokens=st.integers(1, 150),
        n=st.integers(1, 4),
        priority=st.integers(-1, 1),
    )
    def submit(self, start: int, length: int, tokens: int, n: int, priority: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, n=n, seed=length)
        self.requests.append(self.engine.submit([start] * length, sampling, priority))

    @rule(times=st.integers(1, 40))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        before = [c for c in request.completions if c is not None]
        self.engine.abort(request)
        assert request.is_finished and not request.rows and not request.queue_entries
        assert all(c in request.completions for c in before)

    @rule(running=st.sampled_from(["drain", "abort", "keep"]))
    def change_weights(self, running: str) -> None:
        self.version += 1
        self.engine.load_weights(MODEL, self.version, running)

    @invariant()
    def adds_up(self) -> None:
        self.engine.scheduler.check_invariants()

    def teardown(self) -> None:
        for _ in range(5000):
            if all(request.is_finished for request in self.requests):
                break
            self.engine.step()
        for request in self.requests:
            assert request.is_finished, "somebody waits for ever"
            for c in request.completions:
                assert c.finish_reason == "abort" or len(c.token_ids) == request.sampling.max_tokens
        self.engine.scheduler.check_invariants()
        assert self.engine.scheduler.pool.num_free_blocks == 7


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


class DraftTraffic(Traffic):
    """The same with draft tokens."""

    drafts = 2


TestGuessing = DraftTraffic.TestCase
TestGuessing.settings = settings(max_examples=6, stateful_step_count=15, deadline=None)


@pytest.mark.slow
class TestTenThousandDraftSteps(DraftTraffic.TestCase):
    settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


@pytest.mark.slow
class TestTenThousandSteps(Traffic.TestCase):
    settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def block_tokens(parent: bytes, tokens: list[int]) -> BlockTokens:
    return BlockTokens(parent, torch.tensor(tokens).numpy().tobytes())


def test_the_least_recently_used_block_is_evicted_first_and_ends_before_beginnings():
    pool, root = BlockPool(4), root_hash(0)
    first, second = pool.allocate(2)
    name = pool.cache_block(first, block_tokens(root, [1]))
    pool.cache_block(second, block_tokens(name, [2]))
    (other,) = pool.allocate(1)
    pool.cache_block(other, block_tokens(root, [3]))
    pool.free([other])
    pool.free([first, second])
    assert list(pool.cached_blocks) == [other, second, first]
    assert pool.allocate(2)[1] == other  # the free one, then the least recently used
    assert pool.find_cached(block_tokens(root, [3])) is None
    assert pool.find_cached(block_tokens(root, [1])) == first
    pool.add_reference([first])
    pool.allocate(1)
    assert pool.find_cached(block_tokens(name, [2])) is None
    pool.check_invariants()


def test_root_hashes_differ_between_versions_and_salts():
    assert len({root_hash(version, cache_salt) for version in range(3) for cache_salt in ("", "a", "b")}) == 9


def test_an_empty_cache_is_refused():
    with pytest.raises(ConfigError, match="is too small"):
        BlockPool(0)
