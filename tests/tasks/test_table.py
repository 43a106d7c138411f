"""Tasks by name, and problems by index."""

from itertools import pairwise

import pytest

from tests.problems import rows, sample_problems
from thinkstack.config import build
from thinkstack.evals.sampling import EvalConfig
from thinkstack.tasks.puzzles import puzzle as puzzles
from thinkstack.tasks.puzzles.generated import alternate
from thinkstack.tasks.table import BENCHMARKS, PUZZLES, make_task, make_tasks, puzzle_tasks
from thinkstack.tasks.task import DEFAULT_TASKS, TaskConfig
from thinkstack.types import ConfigError

ALL = list(make_tasks(rows(*PUZZLES)).values())


def test_every_task_is_listed_under_its_own_name():
    assert [task.name for task in PUZZLES.values()] == list(PUZZLES)
    assert not set(BENCHMARKS) & set(PUZZLES)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("chian", {}, r"unknown task 'chian'; did you mean chain\? .a task of your own needs tasks.chian.data=FOLDER"),
        ("zzz", {}, "known: chain, nested, cups, kinship, modular"),
        ("gsm8k", {}, "the task gsm8k needs its data: set tasks.gsm8k.data=FOLDER, with train.jsonl"),
        ("chain", {"data": "files"}, "chain is generated and reads no files"),
        ("chain", {"verifier": "text"}, "tasks.chain.verifier='text' has no effect"),
        ("math", {"data": "files", "unseen_wordings": True}, "math is not generated"),
        ("chain", {"levels": (1,)}, "chain has none of the levels"),
        ("kinship", {"languages": ("zh",)}, "kinship has none of the languages"),
    ],
)
def test_a_row_that_does_not_fit_its_task_is_refused(name, row, message):
    with pytest.raises(ConfigError, match=message):
        make_task(name, TaskConfig(**row))


def test_stages_without_a_task_and_corpora_of_data_sets_are_refused():
    with pytest.raises(ConfigError, match="no task is given"):
        make_tasks({})
    with pytest.raises(ConfigError, match="the task math has no worked solutions; leave tasks"):
        puzzle_tasks({"chain": TaskConfig(), "math": TaskConfig(data="files")})


def test_a_list_of_names_is_short_for_rows_without_settings():
    listed = build(EvalConfig, {"tasks": ["chain", "cups"]}, "stages.eval")
    assert listed.tasks == {"chain": TaskConfig(), "cups": TaskConfig()}
    assert build(EvalConfig, {"tasks": {"chain": {"levels": [3]}}}).tasks["chain"].levels == (3,)
    with pytest.raises(ConfigError, match=r"unknown key stages.eval.tasks.chain.level; did you mean .*levels"):
        build(EvalConfig, {"tasks": {"chain": {"level": [3]}}}, "stages.eval")


def test_tasks_alternate():
    assert [problem.task for problem in sample_problems(PUZZLES, "train", 0, 2 * len(ALL))] == list(PUZZLES) * 2


def test_a_restored_stream_continues_as_if_uninterrupted():
    straight = alternate(ALL, "train", 7).take(20)
    first, second = (alternate(ALL, "train", 7) for _ in range(2))
    head = first.take(9)
    second.restore(first.state())
    assert head + second.take(11) == straight == [second[index] for index in range(20)]


def test_the_number_of_problems_per_call_does_not_matter():
    stream = alternate(ALL, "test", 3)
    assert [stream.take(1)[0] for _ in range(6)] == sample_problems(PUZZLES, "test", 3, 6)


def test_exactly_the_allowed_levels_are_sampled():
    sampled = sample_problems(DEFAULT_TASKS, "train", 1, 200, levels=(2, 5, 9))
    assert {problem.level for problem in sampled} == {2, 5}


@pytest.mark.parametrize("unseen", [False, True])
def test_wordings_are_all_seen_or_all_unseen(unseen):
    for problem in sample_problems(PUZZLES, "test", 0, 400, unseen_wordings=unseen):
        allowed = puzzles.unseen_wordings if unseen else puzzles.seen_wordings
        assert problem.wording in allowed(PUZZLES[problem.task], problem.language)


def test_both_languages_and_every_allowed_wording_occur():
    sampled = sample_problems(PUZZLES, "train", 2, 3600)
    found = {(problem.task, problem.language, problem.wording) for problem in sampled}
    expected = {
        (task.name, language, wording)
        for task in PUZZLES.values()
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
            for problem in sample_problems(PUZZLES, split, seed, count, unseen_wordings=bool(seed % 2))
        }
        for split in puzzles.SPLITS
    }
    assert not keys["train"] & keys["test"]


def test_streams_of_neighboring_seeds_are_unrelated():
    """Item i of seed s + 1 must not be item i + 1 of seed s, as with seeds computed by addition."""
    streams = [[p.key for p in sample_problems(DEFAULT_TASKS, "train", seed, 200, levels=(6,))] for seed in range(3)]
    for first, second in pairwise(streams):
        assert len(set(first) & set(second)) < 20


def test_the_stream_is_pinned():
    """A change of the sampled problems invalidates every published number; it must be deliberate."""
    assert [problem.key for problem in sample_problems(DEFAULT_TASKS, "test", 0, 4)] == [
        "47ee0090291e3a10",
        "71e388a0d7589678",
        "601aaca011880778",
        "febbb051443af520",
    ]
