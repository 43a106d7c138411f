"""Errors of an evaluation and comparisons of two: pure functions of one value per question.

An accuracy has two errors with different meanings, which are never added or pooled. The question error says how far the
accuracy on these questions is from that on all questions of the kind; the re-run error says how far it is from the
accuracy on the same questions with infinitely many samples. Beside a published figure, whose questions are the same,
only the re-run error applies. Sources: Miller, arXiv:2411.00640; "A Sober Look", arXiv:2504.07086.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy

LEVEL = 0.05
"""Level of the tests; intervals have a confidence of 1 - LEVEL."""
POWER = 0.8
"""Probability of detecting the smallest detectable difference."""
MIN_QUESTIONS = 100
"""With fewer questions, or fewer clusters of them, an interval over questions is stated with a warning."""
MAX_EXACT_FLIPS = 12
"""Up to this many clusters with a difference, all assignments of signs are enumerated."""


@dataclass(frozen=True, kw_only=True)
class ErrorEstimate:
    """A mean with its standard error and its interval of confidence 1 - LEVEL."""

    mean: float
    standard_error: float
    low: float
    high: float
    degrees: float
    """Degrees of freedom of the t distribution."""


def question_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> ErrorEstimate | None:
    """Return the mean over questions and its error over questions: does the accuracy generalize?

    values: one number from 0 to 1 per question, such as the share of its correct samples. clusters: the source of each
    question; questions of one source (a passage, a template, a translated question) are not independent. None: all
    questions are independent. The variance is G / (G - 1) * sum over G clusters of (sum of deviations)^2 / n^2, which
    is s^2 / n without clusters; the interval is that of t with G - 1 degrees of freedom. If all values are 0 or all are
    1, the variance says nothing, and the open end of the interval is the exact binomial bound for G questions.
    None if there are fewer than two clusters. Source: Miller, arXiv:2411.00640, section 2.2, which has the normal
    distribution in place of t and no G / (G - 1): its intervals are too short for few clusters.
    """
    found = mean_error(values, clusters)
    if found is not None and found.standard_error == 0 and found.mean in (0, 1):
        bound = 1 - (LEVEL / 2) ** (1 / (found.degrees + 1))
        return replace(found, low=1 - bound if found.mean else 0.0, high=1.0 if found.mean else bound)
    return found


def mean_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> ErrorEstimate | None:
    """Return the mean of values on any scale and its error, as `question_error`; None for fewer than two clusters."""
    sums = _cluster_sums(values, clusters)
    count = len(sums)
    if count < 2:
        return None
    error = math.sqrt(count / (count - 1) * math.fsum(total**2 for total in sums)) / len(values)
    return _interval(math.fsum(values) / len(values), error, count - 1)


def _cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[float]:
    """Return for each cluster the sum of the deviations of its values from the mean of all values."""
    if clusters is None:
        clusters = range(len(values))
    assert len(clusters) == len(values), "one cluster per value"
    mean = math.fsum(values) / max(len(values), 1)
    sums: dict[Hashable, float] = dict.fromkeys(clusters, 0.0)
    for cluster, value in zip(clusters, values, strict=True):
        sums[cluster] += value - mean
    # values that are equal deviate by a rounding error
    return [total if abs(total) > 1e-12 else 0.0 for total in sums.values()]


def rerun_error(counts: Sequence[tuple[int, int]]) -> ErrorEstimate | None:
    """Return the mean over questions and its error over re-runs: would the same evaluation give the same figure?

    counts: (correct, sampled) of each question. The error is sqrt(mean(p (1 - p) / n) / Q) over Q questions; each
    p (1 - p) / n is estimated by its unbiased c (n - c) / (n^2 (n - 1)). The degrees of freedom are those of Welch and
    Satterthwaite. None if a question has a single sample, from which no error can be estimated.
    """
    if not counts or any(sampled < 2 for _, sampled in counts):
        return None
    variances = [c / n * (1 - c / n) / (n - 1) for c, n in counts]
    total = math.fsum(variances)
    degrees = total**2 / math.fsum(v**2 / (n - 1) for v, (_, n) in zip(variances, counts, strict=True)) if total else 1
    return _interval(math.fsum(c / n for c, n in counts) / len(counts), math.sqrt(total) / len(counts), degrees)


def _interval(mean: float, error: float, degrees: float) -> ErrorEstimate:
    half = error * t_quantile(1 - LEVEL / 2, degrees) if error else 0.0
    return ErrorEstimate(mean=mean, standard_error=error, low=mean - half, high=mean + half, degrees=degrees)


def few_questions(num_questions: int) -> str | None:
    """Return a warning if there are fewer than MIN_QUESTIONS questions or clusters."""
    if num_questions >= MIN_QUESTIONS:
        return None
    return f"{num_questions} questions are fewer than {MIN_QUESTIONS}: the interval over questions may be too short"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of two evaluations on their common questions: second minus first."""

    num_questions: int
    """Common questions."""
    num_clusters: int
    """Clusters of common questions."""
    first: float
    """Mean of the first evaluation on the common questions."""
    second: float
    """Mean of the second."""
    difference: float
    """Mean difference."""
    standard_error: float | None
    """Question error of the difference; None with fewer than two clusters."""
    low: float | None
    """Lower end of the interval of the difference."""
    high: float | None
    """Upper end of the interval."""
    p_value: float
    """Probability of a difference at least this large if both are equally good."""
    smallest_detectable: float | None
    """The true difference that these questions would show at LEVEL with probability POWER; None if no value differs."""


def compare(
    first: Mapping[str, float],
    second: Mapping[str, float],
    clusters: Mapping[str, Hashable] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare two evaluations on the questions that both have.

    first, second: the share of correct samples by question. clusters: the source by question; None: independent. The
    p-value is that of `sign_flip_p`; the interval is that of `question_error` for the differences.
    Raises ValueError without common questions.
    """
    common = [key for key in first if key in second]
    if not common:
        raise ValueError("the two evaluations have no question in common")
    differences = [second[key] - first[key] for key in common]
    groups = list(range(len(common))) if clusters is None else [clusters[key] for key in common]
    sums: dict[Hashable, float] = dict.fromkeys(groups, 0.0)
    for group, value in zip(groups, differences, strict=True):
        sums[group] += value
    found = question_error(differences, groups)
    return Comparison(
        num_questions=len(common),
        num_clusters=len(sums),
        first=math.fsum(first[key] for key in common) / len(common),
        second=math.fsum(second[key] for key in common) / len(common),
        difference=math.fsum(differences) / len(common),
        standard_error=found.standard_error if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        p_value=sign_flip_p(list(sums.values()), seed=seed),
        smallest_detectable=smallest_detectable(found.standard_error, found.degrees) if found else None,
    )


def sign_flip_p(differences: Sequence[float], num_flips: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of a paired permutation test of the sum of `differences`.

    If both evaluations are equally good, each difference is as likely as its negative; p is the share of assignments of
    signs whose sum is at least as large. Up to MAX_EXACT_FLIPS differences other than 0, all assignments are counted;
    beyond that `num_flips` random ones, and the observed one among them, so that p is never 0. Without a difference p
    is 1. Source: Fisher's randomization test; Phipson and Smyth, arXiv:1603.05766.
    """
    values = numpy.array([value for value in differences if abs(value) > 1e-12])
    if not len(values):
        return 1.0
    observed = abs(values.sum()) * (1 - 1e-9)
    if len(values) <= MAX_EXACT_FLIPS:
        patterns = numpy.arange(2 ** len(values))
        signs = 1.0 - 2.0 * ((patterns[:, None] >> numpy.arange(len(values))) & 1)
        return float((abs(signs @ values) >= observed).mean())
    signs = 1.0 - 2.0 * numpy.random.default_rng(seed).integers(0, 2, (num_flips, len(values)), dtype=numpy.int8)
    return float(1 + (abs(signs @ values) >= observed).sum()) / (num_flips + 1)


def smallest_detectable(standard_error: float, degrees: float) -> float | None:
    """Return the true difference that a test at LEVEL finds with probability POWER; None if the error is 0.

    It is (t at 1 - LEVEL / 2 + t at POWER) standard errors. Source: Miller, arXiv:2411.00640, section 5.
    """
    if standard_error == 0:
        return None
    return standard_error * (t_quantile(1 - LEVEL / 2, degrees) + t_quantile(POWER, degrees))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values adjusted for their number: the chance of any false finding among them stays at the level.

    The i-th smallest of m is multiplied by m - i + 1, and is at least the one before. Source: Holm, 1979.
    """
    adjusted, largest = {}, 0.0
    for place, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(p_values) - place)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


@functools.lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t distribution, by bisection of `t_cdf`; accurate to 1e-10 of its value.

    degrees: degrees of freedom, not necessarily an integer.
    """
    if not 0 < probability < 1 or not degrees > 0:
        raise ValueError(f"t needs 0 < probability < 1 and degrees > 0; got {probability} and {degrees}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    high = 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    return _bisect(lambda value: t_cdf(value, degrees) < probability, 0.0, high)


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    while high - low > 1e-11 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def t_cdf(value: float, degrees: float) -> float:
    """Return the distribution function of Student's t.

    For t >= 0 it is 1 - I(degrees / (degrees + t^2); degrees / 2, 1 / 2) / 2.
    """
    tail = incomplete_beta(degrees / (degrees + value * value), degrees / 2, 0.5) / 2
    return 1 - tail if value >= 0 else tail


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I(x; a, b), by its continued fraction (Lentz's method).

    Source: Abramowitz and Stegun, 26.5.8.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * fraction / a
