import random
import time
from collections import Counter
from itertools import combinations

import pytest

from thinkstack.evals.metrics import accuracy_over_tokens, cons_at_k, cost_per_solution, pass_at_k, tokens_per_solution


def test_pass_at_k_equals_counting_all_subsets_of_k_answers():
    for n in range(1, 9):
        for c in range(n + 1):
            answers = [index < c for index in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(answers, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_by_hand():
    # 4 answers, 1 correct: 3 of the 6 pairs contain it
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0


def test_pass_at_1_is_the_share_of_correct_answers():
    assert pass_at_k(16, 5, 1) == pytest.approx(5 / 16)


def test_pass_at_k_stays_exact_where_binomials_overflow_floats():
    # C(5000, 2500) is about 10**1503; half of the subsets of size n / 2 contain the one correct answer
    assert pass_at_k(5000, 1, 2500) == pytest.approx(0.5, rel=1e-9)


def test_pass_at_k_differs_from_the_biased_formula():
    biased = 1 - (1 - 1 / 4) ** 2
    assert pass_at_k(4, 1, 2) > biased + 0.05


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_the_most_frequent_answer_wins():
    assert cons_at_k([7, 3, 3], [True, False, False], k=3) == 0.0
    assert cons_at_k([3, 7, 7], [False, True, True], k=3) == 1.0


def test_a_tie_counts_as_its_expected_value():
    """Regression: a tie went to the answer that occurred first."""
    assert cons_at_k([7, 3], [True, False], k=2) == cons_at_k([3, 7], [False, True], k=2) == 0.5
    assert cons_at_k([3, 7, 5, 7, 3, 5], [False, True, False, True, False, False], k=6) == pytest.approx(1 / 3)
    assert cons_at_k([3, 3, 5, 5, 7], [False, False, False, False, True], k=5) == 0.0


def test_unreadable_answers_do_not_vote():
    assert cons_at_k([None, None, 7], [False, False, True], k=3) == 1.0
    assert cons_at_k([None, None], [False, False], k=2) == 0.0


def test_correct_answers_of_different_spelling_are_one_class():
    """Regression: 1/2 and 0.5 were two answers, and 3 won with two votes of five."""
    assert cons_at_k(["1/2", "0.5", "3", "3", "2/4"], [True, True, False, False, True], k=5) == 1.0


def test_the_vote_is_averaged_over_all_subsets_of_k():
    # pairs of one correct and two equal wrong answers: right+wrong twice (a tie, 1/2 each), wrong+wrong once
    assert cons_at_k([7, 3, 3], [True, False, False], k=2) == pytest.approx(1 / 3)
    assert cons_at_k([7, 3, 3], [True, False, False], k=1) == pytest.approx(1 / 3)


def brute_force(answers, correct, k):
    total, subsets = 0.0, list(combinations(range(len(answers)), k))
    for subset in subsets:
        votes = Counter("right" if correct[i] else answers[i] for i in subset if correct[i] or answers[i] is not None)
        best = max(votes.values(), default=0)
        tied = [answer for answer, count in votes.items() if count == best]
        total += ("right" in tied) / max(len(tied), 1)
    return total / len(subsets)


def test_the_vote_equals_counting_all_subsets():
    generator = random.Random(4)
    for _ in range(60):
        answers = [generator.choice([1, 2, 3, 4, None]) for _ in range(8)]
        correct = [answer == 1 for answer in answers]
        for k in range(1, 9):
            assert cons_at_k(answers, correct, k) == pytest.approx(brute_force(answers, correct, k), abs=1e-12)


def test_fewer_than_k_samples_all_vote():
    assert cons_at_k([7, 7, 3], [True, True, False], k=16) == 1.0


def test_a_vote_of_16_among_64_different_answers_is_exact_and_fast():
    answers, correct = list(range(64)), [index < 16 for index in range(64)]
    start = time.process_time()
    found = cons_at_k(answers, correct, 16)
    assert time.process_time() - start < 1.0
    # the correct class has at least two votes in almost every subset, and the 48 wrong answers have one each
    assert 0.9 < found < 1.0


# 10, 20 and 40 tokens; the longest is truncated, the first two are correct
THREE = [(10, True, True), (20, True, True), (40, False, False)]


def test_accuracy_over_tokens_by_hand():
    points = accuracy_over_tokens([THREE, [(16, True, True)]])
    assert [point.budget_tokens for point in points] == [1, 2, 4, 8, 16, 32, 40]
    assert [point.pass_at_1 for point in points] == pytest.approx([0, 0, 0, 0, (1 / 3 + 1) / 2, (2 / 3 + 1) / 2, 5 / 6])
    assert [point.finished for point in points] == [0, 0, 0, 0, 0.5, 0.75, 0.75]


def test_tokens_and_cost_of_a_solution_by_hand():
    assert tokens_per_solution([THREE, [(16, True, True)]]) == pytest.approx(86 / 3)
    assert tokens_per_solution([[(5, False, True)]]) is None
    # 1,000 * 0.5 + 4,000 * 2 dollars per million, for 2 solutions
    assert cost_per_solution(1000, 4000, 2, 0.5, 2.0) == pytest.approx(0.00425)
    assert cost_per_solution(1000, 4000, 0, 0.5, 2.0) is None
