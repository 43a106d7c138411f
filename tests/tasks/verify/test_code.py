"""Verdicts about programs: right ones pass, and nothing that a program does makes a wrong one pass."""

import math
from collections import Counter, OrderedDict, defaultdict, deque

import pytest

from tests.tasks.verify import forgeries
from thinkstack.tasks.verify.code import (
    Call,
    Case,
    grade_calls,
    grade_scripts,
    grade_tests,
    results_of,
    same_output,
    same_tokens,
)
from thinkstack.tasks.verify.remote import Candidate
from thinkstack.tasks.verify.sandbox import CONTAINED, SandboxLimits, probe

SECONDS = 60.0
"""Time for programs that end by themselves."""
RUNG = next((rung for rung in CONTAINED if probe(rung) is None), None)
pytestmark = pytest.mark.skipif(RUNG is None, reason="no sandbox: neither bubblewrap nor sandlock holds here")


def verdict(code, tests=forgeries.TESTS, names=(forgeries.NAMES,), seconds=SECONDS, **namespace):
    return grade_tests(code, names, tests, namespace, RUNG, seconds)


def test_a_right_program_passes_and_the_verdict_names_grader_and_rung():
    found = verdict(forgeries.SOLUTION)
    assert found.passed and found.reason == ""
    score = found.score()
    assert (score.total, score.grader, score.detail) == (1.0, f"calls, {RUNG}", "")


@pytest.mark.parametrize("name", forgeries.ALL_FORMS)
def test_no_forgery_passes(name):
    found = verdict(forgeries.ALL_FORMS[name])
    assert not found.passed and found.reason


@pytest.mark.parametrize("name", forgeries.ENDLESS)
def test_a_program_without_end_fails_at_the_deadline(name):
    found = verdict(forgeries.ENDLESS[name], seconds=1.0)
    assert not found.passed and found.reason in ("deadline", "cpu")


@pytest.mark.parametrize("name", ["always_equal", "exits_in_the_call", "raises", "system_exit", "no_function"])
def test_tests_that_swallow_exceptions_do_not_pass_a_program_that_is_gone(name):
    tests = "try:\n    secret_sum(3)\nexcept Exception:\n    pass\nassert secret_sum(3) == 48611"
    assert not verdict(forgeries.ALL_FORMS[name], tests=tests).passed


def test_tests_that_catch_everything_do_not_pass_a_dead_process():
    tests = "try:\n    assert secret_sum(3) == 48611\nexcept BaseException:\n    pass"
    assert not verdict(forgeries.ALL_FORMS["exits_in_the_call"], tests=tests).passed
    assert not verdict("while True: pass", tests=tests, seconds=1.0).passed


def test_tests_that_call_nothing_do_not_pass():
    assert verdict("def f(): pass", tests="assert True", names=("f",)).reason == "no test calls the code"


def test_expected_exceptions_cross_by_type():
    tests = """
try:
    f(0)
    assert False
except ZeroDivisionError as error:
    assert "zero" in str(error)
try:
    f("x")
    assert False
except KeyError:
    pass
"""
    code = "class Own(KeyError): pass\ndef f(x):\n    if x: raise Own('no')\n    return 1 / x"
    assert verdict(code, tests=tests, names=("f",)).passed
    assert not verdict("def f(x): raise ValueError", tests=tests, names=("f",)).passed
    assert not verdict("def f(x): return 1", tests=tests, names=("f",)).passed


PLAIN = [
    *(None, True, 0, -7, 2**70, 10**20000, 1.5, -0.0, math.inf, -math.inf, 1 + 2j, complex(math.inf, -0.5)),
    *("", "a\n\0\ud800\u4e2d", b"\0\xff", [], [1, [2.5, (3,)]], (), ((1, 2), [3]), range(1, 9, 2), int, dict),
    *({1, 2}, frozenset({(1, 2)}), {"a": [1], (1, 2): {3: None}}, {}, Counter("aab"), OrderedDict(b=1, a=2)),
    *(defaultdict(list, a=[1]), defaultdict(int), deque([1, 2], 5)),
]


def test_plain_values_come_back_as_they_went():
    with Candidate(RUNG, SandboxLimits()) as candidate:
        candidate.set_deadline(SECONDS)
        candidate.run("def same(value): return value")
        for value in PLAIN:
            found = candidate.call({"name": "same"}, [value], {})
            assert type(found) is type(value) and (found == value or repr(found) == repr(value))
            assert not isinstance(value, float | complex) or repr(found) == repr(value)  # with the sign of 0
        assert math.isnan(candidate.call({"name": "same"}, [math.nan], {}))


def test_other_values_arrive_as_plain_data():
    code = """
from collections import namedtuple
from enum import IntEnum
from fractions import Fraction
Pair = namedtuple("Pair", "one other")
Color = IntEnum("Color", "RED")
class Text(str): pass
def f(kind):
    return {"pair": Pair(1, [2]), "enum": Color.RED, "text": Text("x"), "map": map(str, [1, 2]), "keys": {1: 2}.keys(),
            "generator": (x for x in "ab"), "dict": type("D", (dict,), {})(a=1)}[kind]
"""
    tests = """
assert f("pair") == (1, [2]) and type(f("pair")) is tuple
assert f("enum") == 1 and f("text") == "x" and f("dict") == {"a": 1}
assert list(f("map")) == ["1", "2"] and list(f("keys")) == [1] and list(f("generator")) == ["a", "b"]
"""
    found = verdict(code, tests=tests, names=("f",))
    assert found.passed and found.grader == "calls"


def test_arguments_that_a_call_changes_in_place_are_changed_here():
    tests = "x = [3, 1, 2]\nassert f(x) is None\nassert x == [1, 2, 3]\ny = {1: 2}\nf(y)\nassert y == {}"
    code = "def f(x):\n    x.sort() if isinstance(x, list) else x.clear()"
    assert verdict(code, tests=tests, names=("f",)).passed


def test_objects_of_the_candidate_stay_there_and_the_grader_says_so():
    code = """
class Node:
    def __init__(self, data): self.data, self.left = data, None
    def __eq__(self, other): return True
def depth(node): return 0 if node is None else 1 + depth(node.left)
"""
    tests = "root = Node(1)\nroot.left = Node(2)\nassert root.left.data == 2\nassert depth(root) == 2"
    found = verdict(code, tests=tests, names=("depth", "Node"))
    assert found.passed and found.grader == "calls+objects"
    for wrong in ("assert Node(1) == 5", "assert not Node(1)", "assert Node(1) == Node(1)"):
        assert not verdict(code, tests=f"depth(None)\n{wrong}", names=("depth", "Node")).passed


def test_names_of_the_judge_are_not_the_candidates():
    code = "def helper(x): return 0\ndef f(x): return 1"
    assert not verdict(code, tests="assert helper(f(1)) == 0", names=("f",), helper=lambda x: x).passed


def test_the_code_of_a_program_does_not_run_as_main():
    assert verdict(forgeries.SOLUTION + "if __name__ == '__main__':\n    secret_sum(input())").passed


def test_calls_are_compared_one_by_one():
    calls = [Call(arguments=[value], expected=value * 2) for value in (1, 2, "a")]
    limits, equal = [SECONDS] * 3, lambda found, expected: found == expected
    assert grade_calls("def f(x): return x * 2", "f", calls, RUNG, limits, equal).passed
    found = grade_calls("def f(x): return x + x if x != 2 else 5", "f", calls, RUNG, limits, equal)
    assert found.reason == "wrong result of call 2 of 3"
    method = "class Solution:\n    def f(self, x): return x * 2"
    assert grade_calls(method, "Solution.f", calls, RUNG, limits, equal).passed


def test_a_reference_solution_is_timed_in_a_sandbox():
    found = results_of("def f(x): return [x]", "f", [[1], ["a"]], RUNG, SECONDS)
    assert [result for result, _ in found] == [[1], ["a"]]
    assert all(0 < seconds < SECONDS for _, seconds in found)


CASES = [Case(standard_input="1 2\n", output="3\n"), Case(standard_input="5 7\n", output="12\n")]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print(sum(map(int, input().split())))", ""),
        ("import sys\nprint(sum(int(word) for word in sys.stdin.read().split()))\nsys.exit()", ""),
        ("import os\nprint(sum(map(int, open(0).read().split())))", ""),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", ""),
        ("print(3)", "wrong output in case 2 of 2"),
        ("print(3); 1 / 0", "exit code 1 in case 1 of 2"),
        ("", "the code is empty"),
        ("import os\nprint(3, flush=True)\nos._exit(0)", "wrong output in case 2 of 2"),
        ("import sys\nprint(sum(map(int, input().split())), file=sys.stderr)", "wrong output in case 1 of 2"),
    ],
)
def test_scripts_are_compared_by_their_output(code, reason):
    found = grade_scripts(code, CASES, RUNG, SECONDS)
    assert (found.reason, found.passed, found.grader) == (reason, not reason, "scripts")


def test_a_script_has_its_time_for_each_case():
    code = "import time\ntime.sleep(0.7)\nprint(sum(map(int, input().split())))"
    assert grade_scripts(code, CASES * 2, RUNG, 5.0).passed
    assert grade_scripts("while True: pass", CASES, RUNG, 1.0).reason == "deadline in case 1 of 2"


@pytest.mark.parametrize(
    ("found", "expected", "is_same"),
    [
        ("1 2\n3\n\n", "1 2\n3", True),
        (" 1 2 \n 3", "1 2\n3\n", True),
        ("1.0 2", "1 2.00", True),
        ("1  2", "1 2", True),
        ("1 2 3", "1 2\n3", False),
        ("0.333", "0.3333", False),
        ("yes", "YES", False),
        ("a  b", "a b", False),
        ("50000000000000000", "50000000000000001", False),
    ],
)
def test_outputs_are_compared_as_livecodebench_does(found, expected, is_same):
    assert same_output(found, expected) == is_same


def test_outputs_are_compared_word_by_word():
    assert same_tokens("a  b\nc", "a b c\n")
    assert not same_tokens("a b", "ab")
