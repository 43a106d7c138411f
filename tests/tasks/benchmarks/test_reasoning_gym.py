"""reasoning-gym behind our names: hashed seeds, no shared questions, a strict scorer. Skipped without the package."""

import importlib.util
import random

import pytest

from thinkstack.tasks.benchmarks import reasoning_gym as gym
from thinkstack.tasks.puzzles.corpus import CorpusConfig, document
from thinkstack.tasks.puzzles.puzzle import split_of
from thinkstack.tasks.table import accepts, families, problems
from thinkstack.types import ConfigError

HAS_GYM = importlib.util.find_spec("reasoning_gym") is not None
needs_gym = pytest.mark.skipif(not HAS_GYM, reason="reasoning-gym is not installed (pip install '.[gym]')")
NAMES = ["gym/chain_sum", "gym/spell_backward", "gym/simple_equations"]


@pytest.mark.skipif(HAS_GYM, reason="reasoning-gym is installed")
def test_without_the_package_the_way_out_is_named():
    with pytest.raises(ConfigError, match=r"pip install 'thinkstack\[gym\]'"):
        families(["gym/chain_sum"])


@needs_gym
def test_problems_are_a_function_of_seed_and_index():
    assert problems(families(NAMES), "train", 1, 9) == problems(families(NAMES), "train", 1, 9)
    assert [problem.task for problem in problems(families(NAMES), "train", 1, 3)] == NAMES


@needs_gym
def test_neighbouring_seeds_share_next_to_nothing():
    """The package's own seeds 42 and 43 share 99 of 100 items."""
    asked = [{p.question for p in problems(families(["gym/chain_sum"]), "train", s, 60, levels=[3])} for s in (42, 43)]
    assert len(asked[0] & asked[1]) <= 3


@needs_gym
def test_the_question_decides_the_split():
    asked = {s: problems(families(["gym/chain_sum"]), s, 0, 150, levels=[1]) for s in ("train", "test")}
    assert not {p.question for p in asked["train"]} & {p.question for p in asked["test"]}
    for split, found in asked.items():
        assert {split_of(problem.key) for problem in found} == {split}
    by_question = {}
    for problem in asked["train"]:
        by_question.setdefault(problem.question, set()).add(problem.key[8:])
    assert {len(keys) for keys in by_question.values()} == {1}


@needs_gym
def test_only_the_whole_answer_counts():
    """The package gives .18 for "The answer is 214" and .5 for 11 instead of 1."""
    for problem in problems(families(NAMES), "test", 0, 30):
        assert accepts(problem, problem.answer) and accepts(problem, f" {problem.answer} ")
        for text in (
            f"The answer is {problem.answer}",
            problem.answer * 2,
            f"{problem.answer} 7",
            "",
            problem.question,
        ):
            assert not accepts(problem, text)


@needs_gym
def test_the_scorer_of_the_package_is_asked_about_other_forms_of_an_answer(monkeypatch):
    (problem,) = problems(families(["gym/chain_sum"]), "test", 0, 1)
    family = gym.family("gym/chain_sum")
    made, item = gym._made_again(family, problem.level, int(problem.key[:8], 16))
    assert item["question"] == problem.question
    for found, expected in ((1.0, True), (0.99, False)):
        monkeypatch.setattr(type(made), "score_answer", lambda *_, found=found: found)
        assert accepts(problem, "123456") is expected

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(type(made), "score_answer", broken)
    assert not accepts(problem, "123456")


@needs_gym
def test_a_scorer_that_evaluates_what_the_model_wrote_is_never_called(monkeypatch):
    """countdown, spiral_matrix and others run the answer as Python."""
    family = gym.family("gym/spiral_matrix")
    assert family.is_evaluating and not gym.family("gym/chain_sum").is_evaluating
    (problem,) = problems([family], "test", 0, 1)

    def never(*_):
        raise AssertionError("called")

    monkeypatch.setattr(gym, "_made_again", never)
    assert not accepts(problem, "[1, 2]")
    assert accepts(problem, problem.answer)


@needs_gym
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym/chain_sun", r"unknown task 'gym/chain_sun'; did you mean chain_sum\?"),
        ("gym/boxnet", "cannot be made"),
        ("gym/coin_flip", "nearly always the same"),
        ("gym/graph_color", "no reference answer"),
    ],
)
def test_data_sets_that_cannot_be_used_say_why(name, message):
    with pytest.raises(ConfigError, match=message):
        families([name])


@needs_gym
def test_a_corpus_of_gym_problems_is_refused():
    cfg = CorpusConfig(prose_share=0.0, drill_share=0.0, worked_share=1.0)
    with pytest.raises(ConfigError, match="no worked solutions; use it for RL or evaluation"):
        document(families(["gym/chain_sum"]), cfg, 0, 0)


@needs_gym
def test_the_chance_of_a_blind_guess_is_measured():
    assert gym.family("gym/spell_backward").chance == 0.0
    assert 0.1 < gym.family("gym/gcd").chance < 0.7


@needs_gym
def test_levels_are_steps_of_the_curriculum():
    family = gym.family("gym/chain_sum")
    lengths = [
        sum(len(family.draw(random.Random(seed), level).start[1]) for seed in range(40)) for level in family.levels
    ]
    assert family.levels == (1, 2, 3) and lengths == sorted(lengths) and lengths[0] < lengths[2]
