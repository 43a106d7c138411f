"""Tasks by name, and problems by index."""

from itertools import pairwise

import pytest

from thinkstack.tasks.puzzles import puzzle as puzzles
from thinkstack.tasks.table import PUZZLES, ProblemStream, generate_problem, problems, puzzle_tasks
from thinkstack.types import ConfigError

ALL = puzzle_tasks(list(PUZZLES))
DEMO = puzzle_tasks(["chain", "nested", "cups", "kinship"])


def test_every_task_is_listed_under_its_own_name():
    assert [task.name for task in PUZZLES.values()] == list(PUZZLES)


def test_a_misspelt_task_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown task 'chian'; did you mean chain\?"):
        puzzle_tasks(["chian"])
    with pytest.raises(ConfigError, match="known: chain, nested, cups, kinship, modular"):
        puzzle_tasks(["zzz"])
    with pytest.raises(ConfigError, match="no task is given"):
        puzzle_tasks([])


def test_tasks_alternate():
    assert [problem.task for problem in problems(ALL, "train", 0, 2 * len(ALL))] == list(PUZZLES) * 2


def test_a_restored_stream_continues_as_if_uninterrupted():
    straight = ProblemStream(ALL, "train", 7).take(20)
    first = ProblemStream(ALL, "train", 7)
    head = first.take(9)
    second = ProblemStream(ALL, "train", 7)
    second.restore(first.state())
    assert head + second.take(11) == straight


def test_the_number_of_problems_per_call_does_not_matter():
    stream = ProblemStream(ALL, "test", 3)
    assert [stream.take(1)[0] for _ in range(6)] == problems(ALL, "test", 3, 6)


def test_exactly_the_allowed_levels_are_sampled():
    sampled = problems(DEMO, "train", 1, 200, levels=[2, 5, 9])
    assert {problem.level for problem in sampled} == {2, 5}


def test_levels_that_a_task_lacks_are_refused():
    with pytest.raises(ConfigError, match="chain has none of the levels"):
        generate_problem(DEMO, "train", 0, 0, levels=[1])


@pytest.mark.parametrize("unseen", [False, True])
def test_wordings_are_all_seen_or_all_unseen(unseen):
    for problem in problems(ALL, "test", 0, 400, unseen_wordings=unseen):
        allowed = puzzles.unseen_wordings if unseen else puzzles.seen_wordings
        assert problem.wording in allowed(PUZZLES[problem.task], problem.language)


def test_both_languages_and_every_allowed_wording_occur():
    sampled = problems(ALL, "train", 2, 3600)
    found = {(problem.task, problem.language, problem.wording) for problem in sampled}
    expected = {
        (task.name, language, wording)
        for task in ALL
        for language in task.wordings
        for wording in puzzles.seen_wordings(task, language)
    }
    assert found == expected


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_splits_share_no_problem_whatever_the_seeds(count):
    """Same and neighboring seeds, seen and unseen wordings."""
    keys = {
        split: {
            problem.key
            for seed in range(6)
            for problem in problems(ALL, split, seed, count, unseen_wordings=bool(seed % 2))
        }
        for split in puzzles.SPLITS
    }
    assert not keys["train"] & keys["test"]


def test_streams_of_neighboring_seeds_are_unrelated():
    """Item i of seed s + 1 must not be item i + 1 of seed s, as with seeds computed by addition."""
    streams = [[p.key for p in problems(DEMO, "train", seed, 200, levels=[6])] for seed in range(3)]
    for first, second in pairwise(streams):
        assert len(set(first) & set(second)) < 20


def test_the_stream_is_pinned():
    """A change of the sampled problems invalidates every published number; it must be deliberate."""
    assert [problem.key for problem in problems(DEMO, "test", 0, 4)] == [
        "47ee0090291e3a10",
        "71e388a0d7589678",
        "601aaca011880778",
        "febbb051443af520",
    ]
