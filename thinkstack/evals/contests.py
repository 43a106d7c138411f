"""Ratings in contests of Codeforces from the completions of an evaluation, by the user's standings; a protocol of ours.

DeepSeek reports ratings and percentiles whose problems, tests and standings are not published; figures of this file are
comparable with each other alone. The completions of a problem are attempts in their order, up to the first correct one:

- with points of the problem in the data: these minus 50 for each wrong attempt before, at least 0;
- without: 1 point, and a penalty of 10 for each wrong attempt before;
- a problem without a correct attempt, or that is not in the data: nothing. Time costs nothing.

The rating in a contest is the one whose expected place is the place of this result. Source: CodeElo, arXiv:2501.01257,
and calc_rating.py of QwenLM/CodeElo at 0bffc84. There the place counts from 0 and equal results are ahead; here the
place is that of the standings: one more than the number of better results.
"""

import bisect
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
from numpy.typing import NDArray

from thinkstack.evals.records import ProblemRecord
from thinkstack.evals.statistics import ErrorEstimate, mean_error
from thinkstack.tasks.benchmarks.datasets import load_rows
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.types import ConfigError

RATED = "codeforces"
"""The task whose evaluations have contests."""
POINTS_LOST, PENALTY = 50.0, 10.0
"""Cost of a wrong attempt before the first correct one: of a problem with points, and of one without."""
LOWEST_RATING, ABOVE_HIGHEST = 0.0, 100.0
"""Lowest rating of a contest; how much the highest one lies above that of the best participant, as in CodeElo."""
MOST_PROBLEMS = 30.0
"""Standings with more points than this do not count solved problems."""
FEW_PARTICIPANTS = 200
"""CodeElo leaves out contests with so few participants; here they are named."""
RESAMPLES = 1000
"""Repetitions of the evaluation by which the re-run error is estimated."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One row of the standings of a contest."""

    rating: float
    """Rating of the participant before the contest."""
    points: float
    penalty: float = 0.0
    """Decides among equal points; less is better."""


class Contest:
    """The standings of one contest: the place of a result, and the rating of a place."""

    def __init__(self, standings: Sequence[Standing]):
        assert standings, "a contest has participants"
        self.num_participants = len(standings)
        self._results = sorted((-row.points, row.penalty) for row in standings)
        self.ratings, self._counts = numpy.unique([row.rating for row in standings], return_counts=True)
        self._found: dict[int, float] = {}

    @property
    def most_points(self) -> float:
        return -self._results[0][0]

    def rank(self, points: float, penalty: float) -> int:
        """Return the place of a result, from 1: one more than the number of participants who did better."""
        return 1 + bisect.bisect_left(self._results, (-points, penalty))

    def expected_rank(self, rating: float) -> float:
        """Return the expected place of a participant with a rating: 1 + sum of 1 / (1 + 10 ** ((r - r_i) / 400))."""
        return self.num_participants + 1 - self.expected_beaten(rating)

    def expected_beaten(self, rating: float) -> float:
        """Return the expected number of participants below one with a rating."""
        return float((self._counts / (1 + 10 ** ((self.ratings - rating) / 400))).sum())

    def rating_of(self, rank: int) -> float:
        """Return the rating whose expected place is `rank`, within the limits of LOWEST_RATING and ABOVE_HIGHEST."""
        if rank not in self._found:
            low, high = LOWEST_RATING, float(self.ratings[-1]) + ABOVE_HIGHEST
            for _ in range(50):  # to 1e-12 points
                middle = (low + high) / 2
                low, high = (low, middle) if self.expected_rank(middle) < rank else (middle, high)
            self._found[rank] = low
        return self._found[rank]


@dataclass(frozen=True, kw_only=True)
class ContestResult:
    """The result of a model in one contest."""

    contest: str
    num_problems: int
    """Problems of the contest in the evaluation."""
    num_solved: int
    points: float
    penalty: float
    rank: int
    num_participants: int
    rating: float


@dataclass(frozen=True, kw_only=True)
class ContestRating:
    """The rating of a model over contests."""

    rating: float
    """Mean over contests."""
    over_contests: ErrorEstimate | None
    """Error of the rating over contests, by t; None for one contest."""
    rerun_error: float | None
    """Standard error of the rating over re-runs of the same problems; None if a problem has a single completion."""
    percentile: float
    """Expected share of the participants of these contests that a participant of this rating beats."""
    num_attempts: int
    """Most completions of a problem."""
    seed: int
    """Seed of the re-run error."""
    results: tuple[ContestResult, ...]


def read_standings(path: str | Path) -> dict[str, Contest]:
    """Return the contests of a file. Fields of a row: contest_id, rating, points; optional: penalty."""
    rows: dict[str, list[Standing]] = {}
    for where, row in load_rows(path, ("contest_id", "rating", "points"), "the standings of your contests"):
        values = {key: row.get(key, 0.0) for key in ("rating", "points", "penalty")}
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not numpy.isfinite(value):
                raise ConfigError(f"{where}: {key} is {value!r}, not a number; correct it")
        rows.setdefault(str(row["contest_id"]), []).append(Standing(**values))
    return {name: Contest(standings) for name, standings in rows.items()}


@dataclass(frozen=True)
class Attempts:
    """Which attempts at a problem are correct, in order, and the points of the problem; None: it has none."""

    correct: tuple[bool, ...]
    points: float | None

    @cached_property
    def results(self) -> NDArray[numpy.float64]:
        """(n + 1, 2): points and penalty if 0, 1, ... wrong attempts come before a correct one; last: if none does."""
        wrong = numpy.arange(len(self.correct) + 1, dtype=numpy.float64)
        if self.points is None:
            found = numpy.stack([numpy.ones_like(wrong), PENALTY * wrong], axis=1)
        else:
            found = numpy.stack([numpy.maximum(self.points - POINTS_LOST * wrong, 0.0), 0.0 * wrong], axis=1)
        found[-1] = 0.0
        return found

    @property
    def num_wrong(self) -> int:
        """Wrong attempts before the first correct one; all attempts if none is correct."""
        return self.correct.index(True) if True in self.correct else len(self.correct)

    def resampled(self, generator: numpy.random.Generator, count: int) -> NDArray[numpy.int64]:
        """Return (count,) `num_wrong` of as many attempts, sampled from these with replacement."""
        size = len(self.correct)
        flags = numpy.asarray(self.correct)[generator.integers(size, size=(count, size))]
        return numpy.where(flags.any(axis=1), flags.argmax(axis=1), size)


def rate(
    records: Sequence[ProblemRecord], contests: dict[str, Contest], seed: int = 0, resamples: int = RESAMPLES
) -> ContestRating:
    """Return the rating of a model by its records of the task `codeforces`.

    Raises ConfigError for a problem without a contest, a contest without standings, and points that the problems and
    the standings of a contest do not both have.
    """
    attempts: dict[str, list[Attempts]] = {}
    for record in records:
        name = record.metadata.get("contest_id")
        if name is None:
            raise ConfigError(f"the problem {record.key} has no contest_id; add it to the rows of the data")
        points = record.metadata.get("points")
        flags = tuple(bool(answer.correct) for answer in record.answers)
        attempts.setdefault(str(name), []).append(Attempts(flags, None if points is None else float(points)))
    missing = [name for name in attempts if name not in contests]
    if missing or not attempts:
        raise ConfigError(f"no standings of the contests {', '.join(missing) or '(none given)'}; add their rows")
    attempts, results = dict(sorted(attempts.items())), []
    for name, problems in attempts.items():
        _check_points(name, problems, contests[name])
        total = numpy.sum([one.results[one.num_wrong] for one in problems], axis=0)
        rank = contests[name].rank(*map(float, total))
        results.append(
            ContestResult(
                contest=name,
                num_problems=len(problems),
                num_solved=sum(any(one.correct) for one in problems),
                points=float(total[0]),
                penalty=float(total[1]),
                rank=rank,
                num_participants=contests[name].num_participants,
                rating=contests[name].rating_of(rank),
            )
        )
    found = [one.rating for one in results]
    rating, used = statistics.fmean(found), [contests[name] for name in attempts]
    beaten = sum(contest.expected_beaten(rating) for contest in used)
    return ContestRating(
        rating=rating,
        over_contests=mean_error(found),
        rerun_error=_rerun_error(attempts, contests, seed, resamples),
        percentile=beaten / sum(contest.num_participants for contest in used),
        num_attempts=max(len(one.correct) for problems in attempts.values() for one in problems),
        seed=seed,
        results=tuple(results),
    )


def _check_points(name: str, problems: Sequence[Attempts], contest: Contest) -> None:
    with_points = sum(one.points is not None for one in problems)
    if 0 < with_points < len(problems):
        raise ConfigError(f"contest {name}: {with_points} of {len(problems)} problems have points; give all or none")
    if not with_points and contest.most_points > MOST_PROBLEMS:
        raise ConfigError(
            f"contest {name}: its standings have up to {contest.most_points:g} points and its problems have none; add "
            "the field points to the rows of the data"
        )
    if with_points and contest.most_points <= MOST_PROBLEMS and contest.most_points > 0:
        raise ConfigError(
            f"contest {name}: its standings count solved problems (at most {contest.most_points:g}), and its problems "
            "have points; leave out the field points"
        )


def _rerun_error(
    attempts: dict[str, list[Attempts]], contests: dict[str, Contest], seed: int, resamples: int
) -> float | None:
    """Return the standard deviation of the rating over evaluations whose attempts are sampled from those of this one.

    None if a problem has a single attempt, of which every repetition is the same.
    """
    if any(len(one.correct) < 2 for problems in attempts.values() for one in problems):
        return None
    ratings = numpy.zeros(resamples)
    for name, problems in attempts.items():
        generator = numpy.random.default_rng(digest("contest", seed, name))
        total = sum(one.results[one.resampled(generator, resamples)] for one in problems)  # (resamples, 2)
        results, which = numpy.unique(total, axis=0, return_inverse=True)
        contest = contests[name]
        found = [contest.rating_of(contest.rank(float(points), float(penalty))) for points, penalty in results]
        ratings += numpy.asarray(found)[which.reshape(-1)] / len(attempts)
    return float(ratings.std(ddof=1))


def contest_summary(found: ContestRating) -> str:
    """Return the rating with its errors, what it is, and which contests have few participants, in sentences."""
    contests, rerun = found.over_contests, found.rerun_error
    over = "unknown from one contest"
    if contests:
        over = f"{contests.standard_error:.0f} (95 % interval {contests.low:.0f} to {contests.high:.0f})"
    again = "unknown from one completion of a problem" if rerun is None else f"{rerun:.0f}"
    few = [one.contest for one in found.results if one.num_participants < FEW_PARTICIPANTS]
    warning = f" Contests with fewer than {FEW_PARTICIPANTS} participants: {', '.join(few)}." if few else ""
    return (
        f"Rating {found.rating:.0f}, which beats {100 * found.percentile:.1f} % of the participants in expectation. "
        f"Error over contests: {over}; re-run error: {again}. The protocol is thinkstack's: the {found.num_attempts} "
        "completions of a problem are attempts in their order, wrong ones before the first correct one cost points or "
        f"penalty, time costs nothing.{warning}"
    )
