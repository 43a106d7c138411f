"""Metrics of repeated sampling as pure functions: pass@k, majority vote, accuracy at token budgets, cost of a solution.

The errors of these metrics are in statistics.py.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction


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
    """Return the probability that the majority answer of k of the samples is correct.

    answers: the class of each sample's answer, equal for equivalent answers; None (no answer could be read) does not
    vote. correct: whether each sample is correct. All correct samples are one class, for they equal the reference. A
    tie counts as its expected value: 1/3 if the correct answer and two others have the most votes. With more than k
    samples the result is the exact mean over all subsets of k; with fewer, all vote. Without votes it is 0.
    Source: majority voting, arXiv:2203.11171; cons@k in the R1 paper, arXiv:2501.12948, which states neither ties nor
    subsets.
    """
    assert len(answers) == len(correct), "one flag per answer"
    num_correct = sum(map(bool, correct))
    pairs = list(zip(answers, correct, strict=True))
    wrong = Counter(answer for answer, is_correct in pairs if not is_correct and answer is not None)
    num_silent = sum(answer is None and not is_correct for answer, is_correct in pairs)
    return _majority_share(num_correct, tuple(sorted(wrong.values())), num_silent, min(k, len(answers)))


@functools.lru_cache(maxsize=65536)
def _majority_share(num_correct: int, wrong: tuple[int, ...], num_silent: int, k: int) -> float:
    """The mean over all subsets of k samples. wrong: samples of each wrong answer; num_silent: samples without one."""
    total = num_correct + sum(wrong) + num_silent
    won = Fraction(0)
    for votes in range(1, min(num_correct, k) + 1):
        # (votes of the wrong answers so far, wrong answers with as many votes as the correct one) -> number of subsets
        ways = {(0, 0): math.comb(num_correct, votes)}
        for size in wrong:
            grown: dict[tuple[int, int], int] = defaultdict(int)
            for (others, ties), count in ways.items():
                for more in range(min(size, votes, k - votes - others) + 1):
                    grown[others + more, ties + (more == votes)] += count * math.comb(size, more)
            ways = grown
        for (others, ties), count in ways.items():
            won += Fraction(count * math.comb(num_silent, k - votes - others), ties + 1)
    return float(won / math.comb(total, k))


@dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """Accuracy if every completion had ended at a token budget."""

    budget_tokens: int
    pass_at_1: float
    """Mean over problems; a completion that is longer than the budget is wrong."""
    finished: float
    """Share of completions that end within the budget."""


@dataclass(frozen=True, kw_only=True)
class ForcedPoint:
    """Accuracy if thinking is closed by force after a budget, after which the model answers."""

    budget_tokens: int
    """Thinking tokens."""
    pass_at_1: float
    """Mean over problems."""
    forced: float
    """Share of completions whose thinking was closed by force."""
    mean_tokens: float
    """Tokens per completion, answer included."""


Sampled = tuple[int, bool, bool]
"""Tokens of a completion, whether it is correct, and whether it ended before max_tokens."""


def accuracy_over_tokens(problems: Sequence[Sequence[Sampled]]) -> list[BudgetPoint]:
    """Return the accuracy at budgets of 1, 2, 4 ... tokens, up to the longest completion, from one run.

    problems: the completions of each problem. A cut completion counts as wrong: an answer that a model gives when its
    thinking is closed by force is not in the samples of one run, so the curve is a lower bound of budget forcing.
    """
    longest = max(tokens for samples in problems for tokens, _, _ in samples)
    budgets = [1 << power for power in range((longest - 1).bit_length())] + [longest] if longest else []
    points = []
    for budget in budgets:
        shares = [sum(right and size <= budget for size, right, _ in one) / len(one) for one in problems]
        ends = [ended and size <= budget for samples in problems for size, _, ended in samples]
        points.append(
            BudgetPoint(budget_tokens=budget, pass_at_1=math.fsum(shares) / len(shares), finished=sum(ends) / len(ends))
        )
    return points


def tokens_per_solution(problems: Sequence[Sequence[Sampled]]) -> float | None:
    """Return the sampled tokens of all completions per correct completion; None without a correct one or a token.

    Tokens of wrong completions count: this is what a solution costs if one samples until it is right.
    """
    num_correct = sum(right for samples in problems for _, right, _ in samples)
    num_tokens = sum(size for samples in problems for size, _, _ in samples)
    return num_tokens / num_correct if num_correct and num_tokens else None


def cost_per_solution(
    num_prompt_tokens: int, num_sampled_tokens: int, num_correct: int, prompt_price: float, sampled_price: float
) -> float | None:
    """Return the price of all tokens per correct completion; None if there is none. Prices: per million tokens."""
    if not num_correct:
        return None
    return (num_prompt_tokens * prompt_price + num_sampled_tokens * sampled_price) / 1e6 / num_correct
