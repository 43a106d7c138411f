"""A verifier that hangs, crashes or raises loses only its own score."""

import os
import threading
from multiprocessing.connection import wait

import pytest

from tests import HANG_SECONDS
from thinkstack.tasks.verify.pool import START_SECONDS, VerifierPool
from thinkstack.types import ConfigError, Score

LIMIT = float(HANG_SECONDS)


def echo(value: float) -> Score:
    return Score(total=value)


def hang_on_negative(value: float) -> Score:
    if value < 0:
        threading.Event().wait()
    return Score(total=value)


def crash_on_negative(value: float) -> Score:
    if value < 0:
        os._exit(1)
    return Score(total=value)


def refuse_negative(value: float) -> Score:
    if value < 0:
        raise ArithmeticError("cannot verify this")
    return Score(total=value)


def loop_in_c(digits: int) -> Score:
    return Score(total=float(len(str(9**digits))))


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(num_workers=2, timeout_seconds=LIMIT) as pool:
        yield pool


class Clock:
    """A simulated clock for a pool, independent of the speed of the machine."""

    def __init__(self, pool: VerifierPool, monkeypatch: pytest.MonkeyPatch):
        self.pool, self.now, self.pauses = pool, 0.0, []
        monkeypatch.setattr("thinkstack.tasks.verify.pool.time", self)

    def monotonic(self) -> float:
        return self.now

    def wait_for_one_that_hangs(self, pipes, pause):
        """Time passes only once a single call is left and has started."""
        if len(pipes) > 1 or not any(worker.has_started for worker in self.pool._workers if worker.pipe in pipes):
            return wait(pipes)
        self.now += pause
        return []

    def wait_a_while(self, pipes, pause):
        """Every message takes 30 s."""
        self.now += 30.0
        self.pauses.append(pause)
        return wait(pipes)


def test_results_keep_the_order_of_the_calls(pool):
    scores = pool.run(echo, [(float(value),) for value in range(20)])
    assert [score.total for score in scores] == list(range(20))


def test_a_verifier_that_hangs_is_killed(pool, monkeypatch):
    """A runaway verifier blocks the complete reward step; its score must become unscorable and the others be
    returned."""
    monkeypatch.setattr("thinkstack.tasks.verify.pool.wait", Clock(pool, monkeypatch).wait_for_one_that_hangs)
    scores = pool.run(hang_on_negative, [(1.0,), (-1.0,), (2.0,)])
    assert [score.total for score in scores if score.unscorable is None] == [1.0, 2.0]
    assert scores[1].unscorable == f"ran longer than {LIMIT:g} s"


def test_a_verifier_stuck_in_c_code_is_killed():
    """Signal-based timeouts never fire inside one long C call, such as a tower of powers."""
    with VerifierPool(num_workers=1, timeout_seconds=0.2) as pool:
        assert pool.run(loop_in_c, [(10**8,)])[0].unscorable == "ran longer than 0.2 s"


def test_time_in_the_queue_does_not_count(monkeypatch):
    """If the timeout started at submission, the last of 12 calls of 30 s would exceed a limit of 100 s."""
    with VerifierPool(num_workers=1, timeout_seconds=100.0) as pool:
        clock = Clock(pool, monkeypatch)
        monkeypatch.setattr("thinkstack.tasks.verify.pool.wait", clock.wait_a_while)
        assert all(score.unscorable is None for score in pool.run(echo, [(1.0,)] * 12))
        assert clock.pauses == [START_SECONDS, 100.0] * 12


def test_a_worker_that_dies_is_replaced(pool):
    scores = pool.run(crash_on_negative, [(-1.0,), (-1.0,), (3.0,), (-1.0,), (4.0,)])
    assert [score.unscorable for score in scores] == ["its process died"] * 2 + [None, "its process died", None]


def test_an_exception_is_the_reason(pool):
    scores = pool.run(refuse_negative, [(-1.0,), (1.0,)])
    assert scores[0].unscorable == "ArithmeticError: cannot verify this"
    assert scores[1] == Score(total=1.0)


def test_a_worker_that_died_while_idle_is_replaced(pool):
    pool.run(echo, [(1.0,), (2.0,)])
    for worker in pool._workers:
        worker.process.kill()
        worker.process.join()
    assert [score.total for score in pool.run(echo, [(1.0,), (2.0,), (3.0,)])] == [1.0, 2.0, 3.0]


def test_no_calls_start_no_worker():
    pool = VerifierPool(num_workers=2, timeout_seconds=1.0)
    assert pool.run(echo, []) == []
    assert pool._workers == []


def test_closing_leaves_no_process():
    pool = VerifierPool(num_workers=1, timeout_seconds=LIMIT)
    pool.run(echo, [(1.0,)])
    process = pool._workers[0].process
    pool.close()
    assert not process.is_alive()


@pytest.mark.parametrize(("workers", "seconds"), [(-1, 1.0), (1, 0.0)])
def test_an_unusable_pool_is_refused(workers, seconds):
    with pytest.raises(ConfigError):
        VerifierPool(num_workers=workers, timeout_seconds=seconds)
