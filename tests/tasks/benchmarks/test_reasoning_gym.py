"""reasoning-gym tasks: hashed seeds, no shared questions, strict verification. Skipped without the package."""

import importlib.util
import random

import pytest

from tests.problems import rows, sample_problems, verify
from thinkstack.tasks.benchmarks import reasoning_gym as gym
from thinkstack.tasks.puzzles.corpus import CorpusConfig, document
from thinkstack.tasks.puzzles.puzzle import split_of
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.types import ConfigError

HAS_GYM = importlib.util.find_spec("reasoning_gym") is not None
needs_gym = pytest.mark.skipif(not HAS_GYM, reason="reasoning-gym is not installed (pip install '.[gym]')")
NAMES = ["gym/chain_sum", "gym/spell_backward", "gym/simple_equations"]


@pytest.mark.skipif(HAS_GYM, reason="reasoning-gym is installed")
def test_without_the_package_the_message_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install 'thinkstack\[gym\]'"):
        puzzle_tasks(rows("gym/chain_sum"))


@needs_gym
def test_problems_are_a_function_of_seed_and_index():
    assert sample_problems(NAMES, "train", 1, 9) == sample_problems(NAMES, "train", 1, 9)
    assert [problem.task for problem in sample_problems(NAMES, "train", 1, 3)] == NAMES


@needs_gym
def test_neighboring_seeds_share_almost_no_questions():
    """The package's own seeds 42 and 43 share 99 of 100 items."""
    generated = [
        {p.question for p in sample_problems(["gym/chain_sum"], "train", s, 60, levels=(3,))} for s in (42, 43)
    ]
    assert len(generated[0] & generated[1]) <= 3


@needs_gym
def test_the_question_decides_the_split():
    generated = {s: sample_problems(["gym/chain_sum"], s, 0, 150, levels=(1,)) for s in ("train", "test")}
    assert not {p.question for p in generated["train"]} & {p.question for p in generated["test"]}
    for split, found in generated.items():
        assert {split_of(problem.key) for problem in found} == {split}
    by_question = {}
    for problem in generated["train"]:
        by_question.setdefault(problem.question, set()).add(problem.key[8:])
    assert {len(keys) for keys in by_question.values()} == {1}


@needs_gym
def test_only_the_exact_answer_counts():
    """The package gives .18 for "The answer is 214" and .5 for 11 instead of 1."""
    for problem in sample_problems(NAMES, "test", 0, 30):
        assert verify(problem, problem.answer) and verify(problem, f" {problem.answer} ")
        for text in (
            f"The answer is {problem.answer}",
            problem.answer * 2,
            f"{problem.answer} 7",
            "",
            problem.question,
        ):
            assert not verify(problem, text)


@needs_gym
def test_the_packages_scorer_verifies_other_spellings(monkeypatch):
    (problem,) = sample_problems(["gym/chain_sum"], "test", 0, 1)
    task = gym.puzzle_task("gym/chain_sum")
    made, item = gym._remake_item(task.name, problem.level, int(problem.key[:8], 16))
    assert item["question"] == problem.question
    for found, expected in ((1.0, True), (0.99, False)):
        monkeypatch.setattr(type(made), "score_answer", lambda *_, found=found: found)
        assert verify(problem, "123456") is expected

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(type(made), "score_answer", broken)
    assert not verify(problem, "123456")


@needs_gym
def test_a_scorer_that_evaluates_model_output_is_never_called(monkeypatch):
    """countdown, spiral_matrix and others run the answer as Python."""
    task = gym.puzzle_task("gym/spiral_matrix")
    assert task.evaluates_answers and not gym.puzzle_task("gym/chain_sum").evaluates_answers
    (problem,) = sample_problems(["gym/spiral_matrix"], "test", 0, 1)

    def never(*_):
        raise AssertionError("called")

    monkeypatch.setattr(gym, "_remake_item", never)
    assert not verify(problem, "[1, 2]")
    assert verify(problem, problem.answer)


@needs_gym
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym/chain_sun", r"unknown task 'gym/chain_sun'; did you mean chain_sum\?"),
        ("gym/boxnet", "cannot be created"),
        ("gym/coin_flip", "nearly all its answers are the same"),
        ("gym/graph_color", "no reference answer"),
    ],
)
def test_unusable_data_sets_are_refused_with_the_reason(name, message):
    with pytest.raises(ConfigError, match=message):
        puzzle_tasks(rows(name))


@needs_gym
def test_a_corpus_of_gym_problems_is_refused():
    cfg = CorpusConfig(prose_share=0.0, drill_share=0.0, worked_share=1.0)
    with pytest.raises(ConfigError, match="no worked solutions; use it for RL or evaluation"):
        document(puzzle_tasks(rows("gym/chain_sum")), cfg, 0, 0)


@needs_gym
def test_the_chance_of_a_blind_guess_is_measured():
    assert gym.puzzle_task("gym/spell_backward").chance == 0.0
    assert 0.1 < gym.puzzle_task("gym/gcd").chance < 0.7


@needs_gym
def test_levels_are_steps_of_the_curriculum():
    task = gym.puzzle_task("gym/chain_sum")
    lengths = [
        sum(len(task.generate(random.Random(seed), level).start[1]) for seed in range(40)) for level in task.levels
    ]
    assert task.levels == (1, 2, 3) and lengths == sorted(lengths) and lengths[0] < lengths[2]
