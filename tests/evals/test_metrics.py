from itertools import combinations

import pytest

from thinkstack.evals.metrics import cons_at_k, mean_and_stderr, pass_at_k


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


def test_a_tie_goes_to_the_answer_seen_first():
    assert cons_at_k([7, 3], [True, False], k=2) == 1.0
    assert cons_at_k([3, 7], [False, True], k=2) == 0.0
    assert cons_at_k([3, 7, 7, 3], [False, True, True, False], k=4) == 0.0


def test_unreadable_answers_do_not_vote():
    assert cons_at_k([None, None, 7], [False, False, True], k=3) == 1.0
    assert cons_at_k([None, None], [False, False], k=2) == 0.0


def test_only_the_first_k_samples_vote():
    assert cons_at_k([7, 3, 3], [True, False, False], k=1) == 1.0


def test_fewer_than_k_samples_all_vote():
    assert cons_at_k([7, 7, 3], [True, True, False], k=16) == 1.0


def test_stderr_is_over_problems_not_samples():
    # means 0, 1, 0, 1: sample variance 1/3, divided by 4 problems
    mean, stderr = mean_and_stderr([0.0, 1.0, 0.0, 1.0])
    assert mean == 0.5
    assert stderr == pytest.approx((1 / 3 / 4) ** 0.5)


def test_one_problem_has_no_stderr_and_none_has_no_mean():
    assert mean_and_stderr([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="at least one problem"):
        mean_and_stderr([])
