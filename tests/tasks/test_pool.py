"""Checkers that hang, crash or raise cost their own score and nobody else's."""

import os
import time

import pytest

from thinkstack.tasks.pool import CheckerPool
from thinkstack.types import ConfigError, Score


def echo(value: float) -> Score:
    return Score(total=value)


def hang_on_negative(value: float) -> Score:
    if value < 0:
        time.sleep(600)
    return Score(total=value)


def crash_on_negative(value: float) -> Score:
    if value < 0:
        os._exit(1)
    return Score(total=value)


def refuse_negative(value: float) -> Score:
    if value < 0:
        raise ArithmeticError("cannot judge this")
    return Score(total=value)


def busy(seconds: float) -> Score:
    time.sleep(seconds)
    return Score(total=seconds)


def loop_in_c(digits: int) -> Score:
    return Score(total=float(len(str(9**digits))))


@pytest.fixture(scope="module")
def pool():
    with CheckerPool(num_workers=2, timeout_seconds=0.5) as pool:
        yield pool


def test_results_keep_the_order_of_the_calls(pool):
    scores = pool.run(echo, [(float(value),) for value in range(20)])
    assert [score.total for score in scores] == list(range(20))


def test_a_checker_that_hangs_is_killed(pool):
    """E2.57: one runaway check held the whole reward step; it must become unscorable and the others be judged."""
    scores = pool.run(hang_on_negative, [(1.0,), (-1.0,), (2.0,)])
    assert [score.total for score in scores if score.unscorable is None] == [1.0, 2.0]
    assert scores[1].unscorable == "ran over 0.5 s"


def test_a_checker_stuck_in_c_code_is_killed(pool):
    """E2.57: signal-based time-outs never fire inside one long C call, such as a tower of powers."""
    assert pool.run(loop_in_c, [(10**7,)])[0].unscorable == "ran over 0.5 s"


def test_waiting_in_the_queue_does_not_count(pool):
    """E2.57: with a clock started at submission, 12 calls of 0.1 s on 2 workers would lose the last ones to 0.5 s."""
    assert all(score.unscorable is None for score in pool.run(busy, [(0.1,)] * 12))


def test_a_worker_that_dies_is_replaced(pool):
    scores = pool.run(crash_on_negative, [(-1.0,), (-1.0,), (3.0,), (-1.0,), (4.0,)])
    assert [score.unscorable for score in scores] == ["its process died"] * 2 + [None, "its process died", None]


def test_an_exception_is_the_reason(pool):
    scores = pool.run(refuse_negative, [(-1.0,), (1.0,)])
    assert scores[0].unscorable == "ArithmeticError: cannot judge this"
    assert scores[1] == Score(total=1.0)


def test_a_worker_that_died_while_idle_is_replaced(pool):
    pool.run(echo, [(1.0,), (2.0,)])
    for worker in pool._workers:
        worker.process.kill()
        worker.process.join()
    assert [score.total for score in pool.run(echo, [(1.0,), (2.0,), (3.0,)])] == [1.0, 2.0, 3.0]


def test_no_calls_start_no_worker():
    pool = CheckerPool(num_workers=2, timeout_seconds=1.0)
    assert pool.run(echo, []) == []
    assert pool._workers == []


def test_closing_leaves_no_process():
    pool = CheckerPool(num_workers=1, timeout_seconds=5.0)
    pool.run(echo, [(1.0,)])
    process = pool._workers[0].process
    pool.close()
    assert not process.is_alive()


@pytest.mark.parametrize(("workers", "seconds"), [(0, 1.0), (1, 0.0)])
def test_a_pool_that_could_not_check_is_refused(workers, seconds):
    with pytest.raises(ConfigError):
        CheckerPool(num_workers=workers, timeout_seconds=seconds)
