"""How long requests take, from those that are finished and those that still run, and how long the rest will take.

The finished ones alone are too short on average: of requests that started together, the short ones finish first. Those
that run are therefore counted as censored (Kaplan and Meier 1958).
"""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

BIN_RATIO = math.log(1.05)
"""Logarithm of the ratio of two bins."""
SHORTEST_SECONDS = 1e-3
STRETCH = 1.5
"""A request that runs longer than all finished ones is taken to end after this many times the longest time so far."""


class Law(NamedTuple):
    """A distribution of durations: values in ascending order and their probabilities."""

    seconds: list[float]
    probabilities: list[float]

    @property
    def mean(self) -> float:
        return sum(value * share for value, share in zip(*self, strict=True))

    def rest(self, elapsed: float) -> float:
        """The mean rest of a request that has been running for some time."""
        start = bisect.bisect_right(self.seconds, elapsed)
        weight = sum(self.probabilities[start:])
        total = sum(self.seconds[k] * self.probabilities[k] for k in range(start, len(self.seconds)))
        return total / weight - elapsed if weight else 0.0

    def last_rest(self, count: int) -> tuple[float, float]:
        """(mean, mean of the longest) rest of `count` requests that run at some moment, whenever they started.

        The rest is above r with probability G(r) = the integral of the survival function from r on, over the mean.
        """
        mean, survival, above = self.mean, 1.0, 1.0
        average = longest = start = 0.0
        for value, share in zip(*self, strict=True):
            below = above - survival * (value - start) / mean
            average += (value - start) * (above + below) / 2
            # The integral of 1 - (1 - G)^count, where G falls linearly from `above` to `below`.
            missed = ((1 - max(below, 0.0)) ** (count + 1) - (1 - above) ** (count + 1)) / (count + 1)
            longest += (value - start) - (missed * (value - start) / (above - below) if above > below else 0.0)
            above, survival, start = max(below, 0.0), survival - share, value
        return average, longest


class Durations:
    """Durations of finished requests, in bins of five percent."""

    def __init__(self) -> None:
        self._bins: dict[int, tuple[int, float]] = {}
        """By number: how many, and their sum in seconds."""
        self.count, self.total_seconds = 0, 0.0

    def add(self, seconds: float) -> None:
        """Add a finished request."""
        place = round(math.log(max(seconds, SHORTEST_SECONDS)) / BIN_RATIO)
        count, total = self._bins.get(place, (0, 0.0))
        self._bins[place] = (count + 1, total + max(seconds, SHORTEST_SECONDS))
        self.count, self.total_seconds = self.count + 1, self.total_seconds + seconds

    def law(self, running: Sequence[float]) -> Law:
        """The distribution of durations, of which at least one is finished. running: seconds of those that run."""
        running, found = sorted(running), Law([], [])
        survival, num_left = 1.0, self.count
        for count, total in (self._bins[place] for place in sorted(self._bins)):
            value = total / count
            at_risk = num_left + len(running) - bisect.bisect_right(running, value * 1.01)  # ties have ended
            found.seconds.append(value)
            found.probabilities.append(survival * count / at_risk)
            survival, num_left = survival * (1 - count / at_risk), num_left - count
        if survival > 1e-9:
            found.seconds.append(max(running[-1], found.seconds[-1]) * STRETCH)
            found.probabilities.append(survival)
        return found


def work_left(law: Law, requests: int, running: Sequence[float]) -> float:
    """Seconds of work that is left in `requests`, those in `running` included."""
    return law.mean * (requests - len(running)) + sum(law.rest(elapsed) for elapsed in running)


def seconds_left(law: Law, work: float, side_by_side: int) -> float:
    """The time until the last request ends: all places are busy until none waits, then the longest rest follows."""
    average, longest = law.last_rest(side_by_side)
    return max(work / side_by_side - average, 0.0) + min(longest, work)
