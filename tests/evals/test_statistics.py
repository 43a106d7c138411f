"""Errors and comparisons: values worked out by hand, and coverage in simulated evaluations."""

import math

import numpy
import pytest

from thinkstack.evals.statistics import (
    compare,
    few_questions,
    holm,
    question_error,
    rerun_error,
    sign_flip_p,
    smallest_detectable,
    t_cdf,
    t_quantile,
)

RUNS, SAMPLES = 1500, 16


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 10, 2.2281),
        (0.975, 29, 2.0452),
        (0.975, 199, 1.9720),
        (0.8, 29, 0.8542),
        (0.95, 5, 2.0150),
        (0.975, 1e6, 1.9600),
        (0.025, 10, -2.2281),
        (0.5, 7, 0.0),
    ],
)
def test_t_quantiles_are_those_of_the_tables(probability, degrees, value):
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=5e-5)
    assert t_cdf(t_quantile(probability, degrees), degrees) == pytest.approx(probability, abs=1e-9)


def test_t_with_one_and_two_degrees_has_closed_forms():
    for value in (-30.0, -1.0, 0.2, 3.0, 700.0):
        assert t_cdf(value, 1) == pytest.approx(0.5 + math.atan(value) / math.pi, abs=1e-12)
        assert t_cdf(value, 2) == pytest.approx(0.5 + value / (2 * math.sqrt(2 + value**2)), abs=1e-12)


def test_the_question_error_is_over_questions_not_samples():
    # means 0, 1, 0, 1: sample variance 1/3, divided by 4 questions; t with 3 degrees of freedom: 3.1824
    found = question_error([0.0, 1.0, 0.0, 1.0])
    assert (found.mean, found.degrees) == (0.5, 3)
    assert found.standard_error == pytest.approx((1 / 3 / 4) ** 0.5)
    assert found.high == pytest.approx(0.5 + 3.18245 * (1 / 12) ** 0.5, abs=1e-5)


def test_questions_of_one_source_count_as_one():
    # two clusters with deviations -1/2 - 1/2 and +1/2 + 1/2: 2/1 * (1 + 1) / 16 = 1/4
    found = question_error([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])
    assert (found.standard_error, found.degrees) == (0.5, 1)
    # two clusters whose deviations cancel
    assert question_error([0.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"]).standard_error == 0.0


def test_one_question_has_no_question_error():
    assert question_error([0.25]) is None
    assert question_error([0.25, 0.5], ["a", "a"]) is None


def test_an_accuracy_of_0_or_1_has_the_exact_binomial_bound():
    # 30 questions, none solved: (1 - p)^30 = 0.025 at p = 0.1157
    found = question_error([0.0] * 30)
    assert (found.low, found.high) == (0.0, pytest.approx(0.11570, abs=1e-5))
    assert question_error([1.0] * 30).low == pytest.approx(1 - 0.11570, abs=1e-5)


def test_the_rerun_error_by_hand():
    # 1 of 2 correct: p (1 - p) / (n - 1) = 1/4; 0 of 2: 0; the mean of 2 questions has variance 1/4 / 4
    found = rerun_error([(1, 2), (0, 2)])
    assert (found.mean, found.standard_error) == (0.25, 0.25)
    assert rerun_error([(1, 1), (0, 2)]) is None and rerun_error([]) is None
    assert rerun_error([(0, 4), (4, 4)]).standard_error == 0.0


def test_aime_with_64_samples_has_a_rerun_error_of_at_most_1_1_points():
    # p = 1/2 everywhere: sqrt(1/4 / 63 / 30)
    assert rerun_error([(32, 64)] * 30).standard_error == pytest.approx(0.0115, abs=5e-5)


def simulated(generator, num_questions, cluster_size=1):
    """(success probability of each question, its cluster) from Beta(0.6, 0.6), whose mean is 1/2."""
    shared = generator.beta(0.6, 0.6, num_questions // cluster_size).repeat(cluster_size)
    own = generator.beta(0.6, 0.6, num_questions)
    is_shared = generator.random(num_questions) < 0.5 if cluster_size > 1 else numpy.zeros(num_questions, bool)
    return numpy.where(is_shared, shared, own), (numpy.arange(num_questions) // cluster_size).tolist()


def coverage(num_questions, cluster_size=1):
    """Share of RUNS simulated evaluations whose intervals of 95 % contain the truth: (over questions, over re-runs)."""
    generator, hits = numpy.random.default_rng(num_questions + cluster_size), [0, 0]
    for _ in range(RUNS):
        truth, clusters = simulated(generator, num_questions, cluster_size)
        correct = generator.binomial(SAMPLES, truth)
        over_questions = question_error((correct / SAMPLES).tolist(), clusters)
        over_runs = rerun_error([(int(count), SAMPLES) for count in correct])
        hits[0] += over_questions.low <= 0.5 <= over_questions.high
        hits[1] += over_runs.low <= truth.mean() <= over_runs.high
    return hits[0] / RUNS, hits[1] / RUNS


@pytest.mark.parametrize("cluster_size", [1, 4])
def test_intervals_of_200_questions_cover_the_truth_in_95_percent_of_simulated_runs(cluster_size):
    over_questions, over_runs = coverage(200, cluster_size)
    few = coverage(30 if cluster_size == 1 else 32, cluster_size)
    print(f"\nclusters of {cluster_size}, coverage over questions and over re-runs:")
    print(f"  200 questions {over_questions:.3f}, {over_runs:.3f}; about 30 {few[0]:.3f}, {few[1]:.3f}")
    assert 0.93 <= over_questions <= 0.97
    assert 0.93 <= over_runs <= 0.97


def test_ignoring_shared_sources_gives_intervals_that_are_too_short():
    generator, hits = numpy.random.default_rng(5), 0
    for _ in range(RUNS):
        truth, _ = simulated(generator, 200, 4)
        found = question_error(truth.tolist())
        hits += found.low <= 0.5 <= found.high
    assert hits / RUNS < 0.93


def test_fewer_than_100_questions_warn():
    assert few_questions(100) is None
    assert "30 questions are fewer than 100" in few_questions(30)


def test_two_models_with_equal_accuracy_differ_falsely_in_5_percent_of_simulated_runs():
    generator, findings = numpy.random.default_rng(11), 0
    for run in range(RUNS):
        truth, _ = simulated(generator, 200)
        first, second = (generator.binomial(SAMPLES, truth) / SAMPLES for _ in range(2))
        findings += sign_flip_p((second - first).tolist(), num_flips=999, seed=run) <= 0.05
    print(f"\nfalse positives at level 5 %: {findings / RUNS:.3f}")
    assert 0.03 <= findings / RUNS <= 0.07


def test_identical_runs_have_p_1_and_a_difference_of_0():
    scores = {str(index): index / 40 for index in range(40)}
    found = compare(scores, dict(scores))
    assert (found.p_value, found.difference, found.standard_error) == (1.0, 0.0, 0.0)
    assert found.smallest_detectable is None


def test_a_comparison_by_hand():
    # differences +1, +1, +1, -1 on the common questions: of 16 sign patterns 1 + 4 have sum >= 2, and as many <= -2
    first, second = {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1}, {"a": 1, "b": 1, "c": 1, "d": 0, "f": 1}
    found = compare(first, second)
    assert (found.num_questions, found.difference, found.p_value) == (4, 0.5, 10 / 16)
    assert found.standard_error == pytest.approx(0.5)  # variance (3/4 + 9/4) / 3 = 1, over 4 questions
    assert compare(second, first).difference == -0.5
    with pytest.raises(ValueError, match="no question in common"):
        compare({"a": 1.0}, {"b": 1.0})


def test_questions_of_one_source_are_flipped_together():
    first, second = dict.fromkeys("abcd", 0.0), dict.fromkeys("abcd", 1.0)
    assert compare(first, second).p_value == 2 / 16
    assert compare(first, second, {"a": 1, "b": 1, "c": 2, "d": 2}).p_value == 2 / 4


def test_random_sign_flips_agree_with_all_of_them():
    values = [0.1 * index - 0.3 for index in range(12)]
    exact = sign_flip_p(values)
    assert sign_flip_p([*values, 1e-9], num_flips=20_000) == pytest.approx(exact, abs=0.02)


def test_the_smallest_detectable_difference_by_hand():
    # many questions: 1.95996 + 0.84162 standard errors
    assert smallest_detectable(0.01, 1e6) == pytest.approx(0.0280159, abs=1e-6)


def test_holm_by_hand():
    # 0.01 * 3, 0.02 * 2, 0.04 * 1 raised to 0.04
    assert holm({"c": 0.04, "a": 0.01, "b": 0.02}) == pytest.approx({"c": 0.04, "a": 0.03, "b": 0.04})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
