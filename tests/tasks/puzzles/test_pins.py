"""What the measured demo asked and read, pinned: a change changes every published number and must be meant."""

import random
from itertools import islice

import pytest

from thinkstack.tasks.puzzles.corpus import CorpusConfig, documents
from thinkstack.tasks.puzzles.puzzle import digest, generate_puzzle, work
from thinkstack.tasks.table import problems, puzzle_tasks

DEMO = ["chain", "nested", "cups", "kinship"]


def printed(items) -> str:
    """A short hash of the text of many records."""
    return f"{digest(*items):016x}"


@pytest.mark.parametrize(
    ("split", "unseen", "pin"),
    [
        ("train", False, "3cf284b536cbdd51"),
        ("test", False, "743127e52d0b93ed"),
        ("test", True, "74fdf7457d4cfd9a"),
    ],
)
def test_the_demos_problems_are_pinned(split, unseen, pin):
    drawn = problems(puzzle_tasks(DEMO), split, 2, 400, unseen_wordings=unseen)
    assert printed((p.question, p.answer, p.task, p.language, p.level, p.key, p.wording) for p in drawn) == pin


@pytest.mark.parametrize(
    ("name", "pin"),
    [
        ("chain", "7229979d3d253b79"),
        ("nested", "aca6a4d36c8aa24d"),
        ("cups", "999c2f53574722f8"),
        ("kinship", "9f90f85fc0e2265e"),
    ],
)
def test_each_demo_familys_problems_are_pinned(name, pin):
    drawn = problems(puzzle_tasks([name]), "train", 0, 300)
    assert printed((p.question, p.answer, p.key) for p in drawn) == pin


def test_the_demos_corpus_is_pinned():
    """The recipe's mix and the default one, 600 documents each."""
    recipe = CorpusConfig(drill_share=0.15, worked_share=0.45, wrong_working_share=0.5)
    drawn = [islice(documents(puzzle_tasks(DEMO), cfg, 0), 600) for cfg in (recipe, CorpusConfig())]
    assert [printed((item.question, item.text) for item in items) for items in drawn] == [
        "3d492c73404e2ef7",
        "2c4c062f813758db",
    ]


def test_wrong_workings_are_pinned():
    found = []
    for task in puzzle_tasks(DEMO):
        for seed in range(100):
            working = work(task, generate_puzzle(task, "train", 4, seed), "en", random.Random(seed))
            found.append((working.lines, working.answer, working.is_right))
    assert printed(found) == "8587b7f87c0f1e49"
