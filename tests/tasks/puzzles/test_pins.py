"""Pinned problems and corpus of the measured demo: a change invalidates every published number, so it must be
deliberate."""

import random
from itertools import islice

import pytest

from tests.problems import rows, sample_problems
from thinkstack.tasks.puzzles.corpus import CorpusConfig, documents
from thinkstack.tasks.puzzles.puzzle import digest, generate_puzzle, solve
from thinkstack.tasks.table import puzzle_tasks

DEMO = ["chain", "nested", "cups", "kinship"]


def hash_of(items) -> str:
    """Return a short hash of the text of the records."""
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
    sampled = sample_problems(DEMO, split, 2, 400, unseen_wordings=unseen)
    assert hash_of((p.question, p.answer, p.task, p.language, p.level, p.key, p.wording) for p in sampled) == pin


@pytest.mark.parametrize(
    ("name", "pin"),
    [
        ("chain", "7229979d3d253b79"),
        ("nested", "aca6a4d36c8aa24d"),
        ("cups", "999c2f53574722f8"),
        ("kinship", "9f90f85fc0e2265e"),
    ],
)
def test_each_demo_tasks_problems_are_pinned(name, pin):
    sampled = sample_problems([name], "train", 0, 300)
    assert hash_of((p.question, p.answer, p.key) for p in sampled) == pin


def test_the_demos_corpus_is_pinned():
    """The composition of the recipe and the default one, 600 documents each."""
    recipe = CorpusConfig(drill_share=0.15, worked_share=0.45, wrong_working_share=0.5)
    sampled = [islice(documents(puzzle_tasks(rows(*DEMO)), cfg, 0), 600) for cfg in (recipe, CorpusConfig())]
    assert [hash_of((item.question, item.text) for item in items) for items in sampled] == [
        "3d492c73404e2ef7",
        "2c4c062f813758db",
    ]


def test_wrong_solutions_are_pinned():
    found = []
    for task in puzzle_tasks(rows(*DEMO)):
        for seed in range(100):
            solution = solve(task, generate_puzzle(task, "train", 4, seed), "en", random.Random(seed))
            found.append((solution.lines, solution.answer, solution.is_correct))
    assert hash_of(found) == "8587b7f87c0f1e49"
