"""One function scores a batch; a verifier that hangs, raises or returns nonsense loses only its own score."""

import math
import threading

import pytest

from tests import HANG_SECONDS
from tests.problems import make_problem
from tests.tasks.verify.test_pool import Clock
from thinkstack.tasks.reward import Reward, RewardConfig, score
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.task import Task, TaskConfig
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.parse import parse_response, parse_turn
from thinkstack.types import Completion, Score

PROBLEM = make_problem(task="mine")


class FaultyTask(Task):
    """Its verifier does what the answer says."""

    name, cfg, chance = "mine", TaskConfig(), None

    def __init__(self, runs_in_pool: bool):
        self.runs_in_pool = runs_in_pool

    def may_hang(self, problem, response):
        return self.runs_in_pool

    def verify(self, problem, response):
        if response.answer == "hang":
            threading.Event().wait()
        if response.answer == "raise":
            raise ArithmeticError("cannot verify this")
        return {"none": None, "number": 1.0, "nan": Score(total=math.nan)}.get(response.answer, Score(total=1.0))


def responses(*answers):
    return [(PROBLEM, parse_turn(f"<think>x</think><answer>{answer}</answer>")) for answer in answers]


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(num_workers=2, timeout_seconds=float(HANG_SECONDS)) as pool:
        yield pool


@pytest.mark.parametrize("runs_in_pool", [False, True])
def test_a_verifier_that_raises_or_returns_nonsense_makes_its_response_unscorable_by_name(pool, runs_in_pool):
    reward = Reward(RewardConfig(), {"mine": FaultyTask(runs_in_pool)})
    found = score(responses("raise", "4", "none", "number", "nan", "5"), reward, pool)
    assert [one.unscorable for one in found] == [
        "mine: ArithmeticError: cannot verify this",
        None,
        "mine: returned None, not a finite score",
        "mine: returned 1.0, not a finite score",
        "mine: returned Score(total=nan, parts={}, unscorable=None, grader='', detail=''), not a finite score",
        None,
    ]
    assert [one.total for one in found] == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_a_verifier_that_hangs_is_killed_and_named(pool, monkeypatch):
    monkeypatch.setattr("thinkstack.tasks.verify.pool.wait", Clock(pool, monkeypatch).wait_for_one_that_hangs)
    found = score(responses("4", "hang", "5"), Reward(RewardConfig(), {"mine": FaultyTask(True)}), pool)
    assert [one.unscorable for one in found] == [None, f"mine: ran longer than {HANG_SECONDS:g} s", None]


def test_a_reward_function_that_hangs_is_killed_and_named(pool, monkeypatch, tmp_path):
    """Regression: a user's reward function ran in the trainer's process, and one that hung stopped the run."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import threading\ndef part(problem, response):\n"
        "    return 0.5 if response.answer != 'stay' else threading.Event().wait()\n"
    )
    monkeypatch.setattr("thinkstack.tasks.verify.pool.wait", Clock(pool, monkeypatch).wait_for_one_that_hangs)
    reward = Reward(RewardConfig(parts={f"{path}:part": 1.0}), {"mine": FaultyTask(False)})
    first, second, third = score(responses("4", "stay", "5"), reward, pool)
    assert first == third == Score(total=0.5, parts={"accuracy": 1.0, "format": 1.0, f"{path}:part": 0.5})
    assert second.unscorable == f"{path}:part: ran longer than {HANG_SECONDS:g} s"


def test_each_response_is_verified_by_the_task_of_its_problem():
    tasks = make_tasks({"quadratic": TaskConfig(), "kinship": TaskConfig()})
    turn = parse_turn("<think>x</think><answer>x=-2 or x=-3</answer>")
    problems = [make_problem(answer="-3, -2", task="quadratic"), make_problem(answer="-3, -2", task="kinship")]
    pool = VerifierPool()
    found = score([(problem, turn) for problem in problems], Reward(RewardConfig(), tasks), pool)
    assert [one.total for one in found] == [1.0, 0.0] and pool._workers == []


def test_a_truncated_turn_earns_no_format_reward():
    """Regression: it earned 1 in training and counted as malformed in evaluation."""

    class Echo:
        def text_of(self, token_ids):
            return "<think>\n2+2=4\n</think>\n\nIt is \\boxed{4} bec"

    reward = Reward(
        RewardConfig(parts={"accuracy": 1.0, "format": 1.0}, thinking_format="think_then_answer"),
        make_tasks({"chain": TaskConfig()}),
    )
    totals = []
    for reason in ("stop", "length"):
        completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason=reason, weights_version=0)
        response = parse_response(Echo(), completion, reward.cfg.thinking_format)
        totals.append(score([(make_problem(), response)], reward, VerifierPool())[0].total)
    assert totals == [2.0, 1.0]
