"""Metrics of repeated sampling as pure functions: pass@k, majority vote, mean with standard error."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that k of n completions, sampled without replacement, include a correct completion.

    c: number of correct completions. The result is 1 - C(n - c, k) / C(n, k), the unbiased estimate of pass@k, computed
    as a product to avoid large binomials.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n. Source: Chen et al., arXiv:2107.03374, section 2.1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def cons_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Return 1 if the most frequent answer of the first k samples is correct, else 0.

    answers: one normalized answer per sample; None (no answer could be read) does not vote. correct: whether each
    sample is correct; the flag of the first sample with the winning answer decides. Ties go to the answer that occurs
    first; without votes the result is 0. If there are fewer than k samples, all vote. Source: majority voting,
    arXiv:2203.11171; cons@k in the R1 paper, arXiv:2501.12948.
    """
    assert len(answers) == len(correct), "one flag per answer"
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return 0.0
    winner = max(votes, key=votes.__getitem__)  # a Counter keeps insertion order, and max returns the first maximum
    return float(correct[list(answers).index(winner)])


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over problems and its standard error: sample standard deviation / sqrt(number of problems).

    values: one number per problem (for pass@1, the mean over its samples), since problems are independent and the
    samples of one problem are not. The error is None for a single problem. Raises ValueError without values.
    """
    if not values:
        raise ValueError("a mean needs at least one problem")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
