"""Rows of every step, and shares of the run in tokens."""

import pytest

from thinkstack.train.schedule import BatchSchedule
from thinkstack.types import ConfigError


def test_without_a_ramp_all_steps_are_alike():
    plan = BatchSchedule(steps=4, rows=8)
    assert plan.rows == [8, 8, 8, 8]
    assert [plan.progress(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]


def test_a_ramp_by_hand():
    """64 rows, the first 32 of them in the ramp: 2 + 6 * seen / 32, rounded down, is 2, 2, 2, 3, 3, 4, 5, 5, 6."""
    plan = BatchSchedule(steps=8, rows=8, rows_start=2, ramp_share=0.5)
    assert plan.rows == [2, 2, 2, 3, 3, 4, 5, 5, 6, 8, 8, 8, 8]
    assert plan.before == [0, 2, 4, 6, 9, 12, 16, 21, 26, 32, 40, 48, 56]
    assert plan.progress(9) == 0.5


def test_a_ramp_changes_the_number_of_steps_and_not_the_tokens():
    for start in range(1, 17):
        plan = BatchSchedule(steps=50, rows=16, rows_start=start, ramp_share=0.4)
        assert plan.rows == sorted(plan.rows) and plan.rows[0] == start and plan.rows[-1] == 16
        assert 800 <= sum(plan.rows) < 816
        assert all(rows == 16 for rows, before in zip(plan.rows, plan.before, strict=True) if before >= 320)


def test_the_published_ramp():
    """V3: 14.8T tokens in rows of 4,096, 3,072 to 15,360 rows over the first 469B."""
    tokens = 4096 * 15360
    plan = BatchSchedule(round(14.8e12 / tokens), 15360, 3072, 469e9 / 14.8e12)
    ramp = sum(1 for before in plan.before if before * 4096 < 469e9)
    assert plan.rows[0] == 3072 and plan.rows[ramp] == 15360
    assert plan.before[ramp] * 4096 == pytest.approx(469e9, rel=1e-3)
    assert sum(plan.rows) * 4096 == pytest.approx(14.8e12, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows_start": 9, "ramp_share": 0.5},
        {"rows_start": 4},
        {"ramp_share": 0.5},
        {"rows_start": 4, "ramp_share": 1.5},
        {"rows_start": -1, "ramp_share": 0.5},
    ],
)
def test_a_ramp_that_is_none_is_refused(changes):
    with pytest.raises(ConfigError, match="rows_start"):
        BatchSchedule(steps=4, rows=8, **changes)
