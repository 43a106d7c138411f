"""Ratings from standings: places, points and errors by hand, and against brute force."""

import itertools
import json
import math
import random
import statistics

import pytest

from thinkstack.evals.contests import Contest, Standing, contest_summary, rate, read_standings
from thinkstack.evals.records import AnswerRecord, ProblemRecord
from thinkstack.types import ConfigError


def contest(*rows):
    """rows: rating, points and optionally penalty of each participant."""
    return Contest([Standing(**dict(zip(("rating", "points", "penalty"), row, strict=False))) for row in rows])


def problem(contest_id, correct, points=None):
    """correct: one character for each completion: 1 correct, 0 wrong, ? not scored."""
    answers = tuple(
        AnswerRecord(
            text="", answer=None, correct={"1": True, "0": False, "?": None}[one], well_formed=True, truncated=False,
            num_tokens=0,
        )
        for one in correct
    )  # fmt: skip
    metadata = {"contest_id": contest_id} | ({} if points is None else {"points": points})
    return ProblemRecord(
        key=f"{contest_id}{correct}{points}", task="codeforces", level=1, language="en", wording=0, question="",
        reference="", answers=answers, metadata=metadata,
    )  # fmt: skip


def test_a_place_is_one_more_than_the_number_of_better_results():
    found = contest((1, 3.0, 4.0), (1, 3.0, 9.0), (1, 1.0), (1, 2.0, 1.0))
    assert [found.rank(*one) for one in ((4, 0), (3, 4), (3, 5), (3, 9), (3, 10), (2, 1), (2, 2), (1, 0), (0, 0))] == [
        1, 1, 2, 2, 3, 3, 4, 4, 5
    ]  # fmt: skip


def test_the_rating_of_a_place_is_the_one_that_expects_it():
    """Among three participants of 1500, place 3 expects two of three above: 10 ** (x / 400) = 1 / 2."""
    equals = contest(*[(1500, points) for points in (1, 2, 3)])
    assert equals.rating_of(3) == pytest.approx(1500 - 400 * math.log10(2))
    assert contest((1500, 1), (1500, 3)).rating_of(2) == pytest.approx(1500)
    assert equals.rating_of(1) == pytest.approx(1600), "no rating expects the first place: 100 above the best"
    assert equals.rating_of(2) == pytest.approx(1600), "1500 + 400 * log10(2) is above this limit"
    assert equals.rating_of(4) == 0, "nor the last one"


def test_ratings_and_places_equal_those_of_a_search_over_all_participants():
    chooser = random.Random(0)
    for _ in range(20):
        rows = [
            (chooser.randrange(400, 2600), chooser.randrange(6), chooser.randrange(3))
            for _ in range(chooser.randrange(1, 40))
        ]
        found = contest(*rows)
        for points, penalty in itertools.product(range(7), range(3)):
            rank = 1 + sum(p > points or (p == points and q < penalty) for _, p, q in rows)
            assert found.rank(points, penalty) == rank
            highest, rating = max(rating for rating, _, _ in rows) + 100, found.rating_of(rank)
            expects = [
                number for number in range(highest + 1)
                if 1 + sum(1 / (1 + 10 ** ((number - one) / 400)) for one, _, _ in rows) >= rank
            ]  # fmt: skip
            assert math.floor(rating + 1e-9) == max(expects, default=0)


@pytest.mark.parametrize(
    ("problems", "points", "penalty", "solved"),
    [
        ([("1000", None)], 1, 0, 1),
        ([("0011", None), ("01", None)], 2, 30, 2),
        ([("0000", None), ("?1", None)], 1, 10, 1),
        ([("1", 500), ("001", 1000), ("000", 1500)], 1400, 0, 2),
        ([("0" * 12 + "1", 500)], 0, 0, 1),
    ],
)
def test_points_are_those_of_the_first_correct_attempt_less_the_wrong_ones(problems, points, penalty, solved):
    scale = 100.0 if problems[0][1] else 1.0
    contests = {"7": contest((1500, 5 * scale), (1400, 0))}
    found = rate([problem(7, flags, worth) for flags, worth in problems], contests)
    (one,) = found.results
    assert (one.points, one.penalty, one.num_solved, one.num_problems) == (points, penalty, solved, len(problems))


def test_the_rating_is_the_mean_over_contests_with_its_error_and_expected_share():
    """Place 2 of 2 and place 1 of 1: 1500 and 1300 + 100."""
    contests = {"7": contest((1500, 1), (1500, 3)), "8": contest((1300, 0)), "9": contest((1, 1))}
    found = rate([problem(7, "1"), problem("7", "1"), problem(8, "1")], contests)
    assert [(one.contest, one.rank, round(one.rating)) for one in found.results] == [("7", 2, 1500), ("8", 1, 1400)]
    assert found.rating == pytest.approx(1450)
    assert found.over_contests.standard_error == pytest.approx(50)
    beaten = [1 / (1 + 10 ** ((rating - 1450) / 400)) for rating in (1500, 1500, 1300)]
    assert found.percentile == pytest.approx(sum(beaten) / 3)
    assert found.rerun_error is None, "one completion says nothing of another run"
    assert rate([problem(7, "1")], contests).over_contests is None
    assert "Rating 1450" in contest_summary(found) and "fewer than 200 participants: 7, 8." in contest_summary(found)


def test_the_rerun_error_is_that_of_all_equally_likely_repetitions():
    """Every problem is attempted twice again, by any two of its attempts: 16 outcomes are equally likely."""
    contests = {"7": contest((1500, 1, 0), (1700, 1, 10), (1200, 0, 0)), "8": contest((1400, 1, 10), (1000, 0))}
    flags = {"7": "01", "8": "10"}
    found = rate([problem(name, correct) for name, correct in flags.items()], contests, seed=3, resamples=40_000)
    outcomes = []
    for first, second in itertools.product(itertools.product("01", repeat=2), itertools.product("10", repeat=2)):
        again = rate([problem(7, "".join(first)), problem(8, "".join(second))], contests)
        outcomes.append(again.rating)
    assert found.rerun_error == pytest.approx(statistics.pstdev(outcomes), rel=0.02)
    assert rate([problem(7, "01")], contests, seed=3) == rate([problem(7, "01")], contests, seed=3)
    assert rate([problem(7, "11"), problem(8, "00")], contests).rerun_error < 1e-9


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([problem(9, "1")], "no standings of the contests 9; add their rows"),
        ([], r"no standings of the contests \(none given\)"),
        ([problem(None, "1")], r"the problem None1None has no contest_id; add it"),
        ([problem(7, "1"), problem(7, "0", 500)], "contest 7: 1 of 2 problems have points; give all or none"),
        ([problem(8, "1")], "its standings have up to 3250 points and its problems have none; add the field points"),
        ([problem(7, "1", 500)], r"its standings count solved problems \(at most 3\), and its problems have points"),
    ],
)
def test_standings_that_do_not_fit_are_refused(records, message):
    records = [one if one.metadata["contest_id"] else ProblemRecord(**vars(one) | {"metadata": {}}) for one in records]
    with pytest.raises(ConfigError, match=message):
        rate(records, {"7": contest((1500, 3)), "8": contest((1500, 3250))})


def test_standings_are_read_by_contest(tmp_path):
    path = tmp_path / "standings.jsonl"
    rows = [{"contest_id": 7, "rating": 1500, "points": 2}, {"contest_id": "7", "rating": 1, "points": 1, "penalty": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_standings(path)
    assert list(found) == ["7"] and (found["7"].num_participants, found["7"].rank(1, 4)) == (2, 3)
    path.write_text('{"contest_id": 7, "rating": "high", "points": 2}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1: rating is 'high', not a number"):
        read_standings(path)
    path.write_text('{"contest_id": 7, "points": 2}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1 has no rating"):
        read_standings(path)
