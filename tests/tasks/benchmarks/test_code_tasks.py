"""Benchmarks of code on three invented rows each, in the published layouts, and on the published files."""

import base64
import json
import zlib

import pytest

from thinkstack.evals.results import answer_class
from thinkstack.tasks.benchmarks.evalplus import is_right, typed
from thinkstack.tasks.reward import Reward, RewardConfig, score
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.tasks.verify.sandbox import CONTAINED, probe
from thinkstack.types import ConfigError, Response

RUNG = next((rung for rung in CONTAINED if probe(rung) is None), None)
needs_sandbox = pytest.mark.skipif(RUNG is None, reason="no sandbox: neither bubblewrap nor sandlock holds here")


def task_with(folder, name, rows, split="test", **settings):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return make_task(name, TaskConfig(data=str(folder), **settings))


def problems_of(task, split="test"):
    return sorted(task.read(task.file(split)), key=lambda problem: problem.metadata["id"])


def fenced(code):
    return Response(text=f"<think>Let me see.</think>\nHere it is:\n```python\n{code}\n```\n")


def check_task(task, right, wrong):
    """Every problem accepts its right answer and refuses the wrong one; right, wrong: in the order of identifiers."""
    problems = problems_of(task)
    assert len(problems) == len(right) == len(wrong) == 3
    for problem, good, bad in zip(problems, right, wrong, strict=True):
        assert task.prompt(problem)[0][-1].role == "user"
        found = task.verify(problem, fenced(good))
        assert found.total == 1.0 and found.grader and not found.detail, found
        assert task.verify(problem, fenced(bad)).total == 0.0
        assert task.verify(problem, Response(text=f"<think>\n```python\n{good}\n```")).total == 0.0
        assert task.verify_seconds(problem) > task.test_seconds


def humaneval_row(number, name, solution, checks, head=""):
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'{head}def {name}(x: int):\n    """ Say. """\n',
        "entry_point": name,
        "canonical_solution": f"    {solution}\n",
        "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n    {checks}\n",
    }


HELPER = "from typing import List\n\ndef half(x):\n    return x / 2\n\n\n"
HUMANEVAL = [
    humaneval_row(0, "twice", "return 2 * x", "assert candidate(3) == 6"),
    humaneval_row(1, "double", "return 2 * x", "assert half(candidate(3)) == 3", HELPER),
    humaneval_row(2, "first", "return x[0]", "assert candidate([1, 2]) == 1"),
]
TWICE = ("def twice(x): return 2 * x", "def double(x) -> List[int]: return 2 * x", "def first(x): return x[0]")
WRONG = ("def twice(x): return x", "def half(x): return 3\ndef double(x): return 1", "def first(x): return None")


@needs_sandbox
def test_humaneval_on_three_rows(tmp_path):
    """The second wrong program replaces a helper function of the prompt, which the test uses."""
    task = task_with(tmp_path, "humaneval", HUMANEVAL)
    check_task(task, TWICE, WRONG)
    problem = problems_of(task)[0]
    assert problem.answer.endswith("    return 2 * x\n") and "def twice" in problem.question
    assert task.verify(problem, Response(text="    return x + x\n\nprint(twice(1))\ndef f(")).total == 1.0
    assert task.verify(problem, Response(text="I cannot.")).total == 0.0


@needs_sandbox
def test_humaneval_plus_on_three_rows(tmp_path):
    inputs = ([[[3]], [[1.5]]], [[[3]], [[0]]], [[[[1, 2]]], [[[5]], ["x"]]])
    rows = [
        {key: value for key, value in row.items() if key != "test"}
        | {"base_input": base, "plus_input": plus, "atol": 0}
        for row, (base, plus) in zip(HUMANEVAL, inputs, strict=True)
    ]
    check_task(task_with(tmp_path, "humaneval_plus", rows), TWICE, WRONG)


MBPP = [
    {
        "task_id": 11,
        "text": "Write a function to add.",
        "code": "import math\r\ndef add(a, b):\r\n    return a + b",
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.1, 0.2), 0.3)"],
        "challenge_test_list": [],
    },
    {
        "task_id": 12,
        "text": "Write a function to sum.",
        "code": "def sum(a, b):\n    return a + b",
        "test_setup_code": "",
        "test_list": ["assert sum(1, 2) == 3"],
        "challenge_test_list": [],
    },
    {
        "task_id": 13,
        "text": "Write a function to find the height of a tree.",
        "code": "class Node:\n    def __init__(self, v):\n        self.left = None\n\ndef height(n):\n    return 0",
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
        "test_list": ["assert height(root) == 2"],
        "challenge_test_list": [],
    },
]
TREE = "class Node:\n    def __init__(self, v): self.left = None\n"
HEIGHT = "def height(n): return 0 if n is None else 1 + height(n.left)"


@needs_sandbox
def test_mbpp_on_three_rows(tmp_path):
    task = task_with(tmp_path, "mbpp", MBPP)
    add = "def add(a, b): return a + b"
    wrong = ("def add(a, b): return 3", "def sum(*values): return 1", f"{TREE}def height(n): return 3")
    check_task(task, (add, "def sum(a, b): return a + b", TREE + HEIGHT), wrong)
    assert task.verify(problems_of(task)[2], fenced(TREE + HEIGHT)).grader == f"calls+objects, {RUNG}"


def test_a_published_file_of_mbpp_has_its_splits(tmp_path):
    rows = [MBPP[0] | {"task_id": number} for number in (5, 11, 510, 511, 601, 974)]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task("mbpp", TaskConfig(data=str(tmp_path)))
    for split, ids in (("test", {"11", "510"}), ("train", {"601", "974"})):
        assert {problem.metadata["id"] for problem in task.problems(split, 0).take(2)} == ids


@needs_sandbox
def test_mbpp_plus_on_three_rows(tmp_path):
    def row(number, name, code, assertion, base, plus, atol=0):
        return {
            "task_id": f"Mbpp/{number}",
            "prompt": f'"""\nWrite a function {name}.\nassert ...\n"""\n',
            "entry_point": name,
            "canonical_solution": f"\n{code}\n",
            "base_input": base,
            "plus_input": plus,
            "atol": atol,
            "contract": "",
            "assertion": f"\n{assertion}\n",
        }

    join = "def join(a, b):\n    return a + b if isinstance(a, tuple) else 1 / 0"
    mean = "def mean(x):\n    return sum(x) / len(x)"
    turn = "import cmath\ndef turn(x):\n    return cmath.phase(x)"
    rows = [
        row(2, "join", join, "assert join((1,), (2,)) == (1, 2)", [[[1], [2]]], [[[], [3]]]),
        row(3, "mean", mean, "assert mean([1, 2]) == 1.5", [[[1, 2]]], [[[0.1, 0.2, 0.3]]]),
        row(4, "turn", turn, "assert turn(1j) > 1", [["1j"]], [["-1+0j"]]),
    ]
    close = "def mean(x): return sum(reversed(x)) / len(x) + 1e-9"
    wrong = ("def join(a, b): return list(a + b)", "def mean(x): return sum(x)", "def turn(x): return 1.57")
    check_task(task_with(tmp_path, "mbpp_plus", rows), (join, close, turn), wrong)


def test_results_of_evalplus_are_compared_as_published():
    assert is_right("f", [], [1.0, 2.0], [1.0 + 1e-9, 2.0], 0)
    assert not is_right("f", [], [1.0], [1.0, 2.0], 0) and not is_right("f", [], [1], [2], 0)
    assert not is_right("f", [], True, 1.5, 0) and not is_right("f", [], (1.1,), [1.0], 0.5)
    assert is_right("find_zero", [[-2, 1]], 2.00001, None, 1e-4) and not is_right("find_zero", [[-2, 1]], 3, None, 1e-4)
    assert is_right("similar_elements", [], (5, 4), (4, 5), 0) and is_right("check_str", [], object(), True, 0)
    assert not is_right("sum_div", [], 0, 7, 0), "the published rule accepts 0 for every number"


def test_inputs_of_mbpp_plus_have_the_types_of_the_assertions():
    assert typed([[[1, 2], [3]], 1], [([(1, 2)], 3)]) == [[(1, 2), (3,)], 1]
    assert typed([{"a": [1]}, [2]], [({"x": (1,)}, [1])]) == [{"a": (1,)}, [2]]
    assert typed([[[1], []]], [([{1}, {}],)]) == [[{1}, {}]]
    assert typed([[1, [2, [3]]]], [((1, (2,)),)]) == [(1, (2, (3,)))]
    assert typed(["0.5", "1j", "2"], [(0, 1j, "x")]) == [0.5, 1j, "2"]


def lcb_row(number, cases, starter="", name=None, packed=False, date="2024-08-01"):
    hidden = json.dumps(cases[1:])
    if packed:  # as a pickle of the text, protocol 4
        data = hidden.encode()
        pickled = b"\x80\x04X" + len(data).to_bytes(4, "little") + data + b"."
        hidden = base64.b64encode(zlib.compress(pickled)).decode()
    return {
        "question_title": "T",
        "question_content": "Add the numbers.",
        "platform": "leetcode" if name else "atcoder",
        "question_id": f"q{number}",
        "contest_id": "c",
        "contest_date": f"{date}T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(cases[:1]),
        "private_test_cases": hidden,
        "metadata": json.dumps({"func_name": name} if name else {}),
    }


def lcb_cases(kind, *pairs):
    return [{"input": given, "output": output, "testtype": kind} for given, output in pairs]


STDIN = lcb_cases("stdin", ("1 2\n", "3\n"), ("5 7\n", "12\n"))
CALLS = lcb_cases("functional", ("[1, 2]\n3", "[1, 2, 3]"), ("[]\n7", "[7]"))
STARTER = "class Solution:\n    def add(self, x: List[int], y: int) -> List[int]:\n        "
LCB = [
    lcb_row(1, STDIN, date="2024-07-31"),
    lcb_row(2, CALLS, STARTER, "add", packed=True),
    lcb_row(3, STDIN, packed=True, date="2025-01-31"),
]


def test_the_answer_of_code_is_the_program(tmp_path):
    """The general rule takes the last number of the text: a program without one counted as no answer."""
    task = task_with(tmp_path, "humaneval", HUMANEVAL)
    problem, response = problems_of(task)[0], fenced("def twice(x): return x + x")
    assert task.read_answer(problem, response) == "def twice(x): return x + x\n"
    assert task.read_answer(problem, Response(text="<think>\n```python\nx = 1\n```")) is None
    assert answer_class("1/2") == answer_class(r"\frac12") and answer_class("x = 1/2\n" * 99) == "x = 1/2\n" * 99


@needs_sandbox
def test_livecodebench_on_three_rows(tmp_path):
    task = task_with(tmp_path, "livecodebench", LCB)
    script = "print(sum(map(int, input().split())))"
    wrong = ("print(3)", f"{STARTER}return x", "print(3)")
    check_task(task, (script, f"{STARTER}return (*x, y)", script), wrong)
    messages, _ = task.prompt(problems_of(task)[1])
    assert messages[0].role == "system" and STARTER in messages[1].content
    assert [task.num_tests(problem) for problem in problems_of(task)] == [2, 2, 2] and task.test_seconds == 6.0


@pytest.mark.parametrize(
    ("window", "ids"),
    [
        ({}, "q1 q2 q3"),
        ({"since": "2024-08-01"}, "q2 q3"),
        ({"since": "2024-08-01", "until": "2025-01-30"}, "q2"),
        ({"until": "2024-07-31"}, "q1"),
    ],
)
def test_livecodebench_has_a_date_window(tmp_path, window, ids):
    assert [p.metadata["id"] for p in problems_of(task_with(tmp_path, "livecodebench", LCB, **window))] == ids.split()


@needs_sandbox
def test_cruxeval_on_three_rows(tmp_path):
    rows = [
        {"id": "sample_0", "code": "def f(x):\n    return x * 2", "input": "[1]", "output": "[1, 1]"},
        {"id": "sample_1", "code": "def f(a, b):\n    return {a: b}", "input": "'k', b=3", "output": "{'k': 3}"},
        {"id": "sample_2", "code": "def f(n):\n    while n > 5: pass\n    return n", "input": "4", "output": "4"},
    ]
    output = task_with(tmp_path, "cruxeval_output", rows)
    check_task(output, ("assert f([1]) == [1,1]", "{'k': 3}", "f(4) == 4"), ("[1]", "dict(k=3)", "[].__class__"))
    task = task_with(tmp_path, "cruxeval_input", rows, time_limit_seconds=1.0)
    check_task(task, ("f([1])", "assert f('k', b=3) == {'k': 3}", "4"), ("f([1, 1])", "f(*['k', 3])", "f(9)"))
    tagged = Response(text="</think>[ANSWER]\nassert f(4) == 4\n[/ANSWER]")
    assert task.verify(problems_of(task)[2], tagged).total == 1.0
    assert output.verify(problems_of(output)[2], tagged).grader == "literals, not run"


def cf_row(name, cases, **fields):
    texts = {"description": "Add.", "input_format": "Two numbers.", "output_format": "Their sum."}
    return {"id": name, **texts, "official_tests": cases, "examples": cases[:1], **fields}


@needs_sandbox
def test_codeforces_on_three_rows(tmp_path):
    cases = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7\n", "output": "12"}]
    rows = [
        cf_row("1/A", cases, time_limit=1.0, memory_limit=256.0, rating=800),
        cf_row("1/B", cases),
        cf_row("2/A", cases, time_limit=30),
    ]
    task = task_with(tmp_path, "codeforces", rows)
    add = "print(sum(map(int, input().split())))"
    check_task(
        task, (add, add.replace("print(", "print('', "), add), ("print(3)", "x = b'x' * (2 << 30)", "while 0: 0")
    )
    assert [task.seconds_of(p.metadata["time_limit"]) for p in problems_of(task)] == [1.0, 6.0, 30.0]
    assert "Time limit: 1 s" in problems_of(task)[0].question


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval", HUMANEVAL[0] | {"entry_point": "other"}, "does not define entry_point='other'"),
        ("humaneval", HUMANEVAL[0] | {"test": 3}, "test is int, not text"),
        (
            "humaneval_plus",
            HUMANEVAL[0] | {"base_input": [3], "plus_input": [], "atol": 0},
            "base_input must be a list",
        ),
        ("humaneval", {"task_id": "HumanEval/0"}, "has no prompt, entry_point, canonical_solution, test"),
        ("mbpp", MBPP[0] | {"test_list": "assert True"}, "test_list must be a list of texts"),
        ("mbpp", MBPP[0] | {"test_list": ["assert other(1)"]}, "uses no function that code defines"),
        ("mbpp", MBPP[0] | {"code": "def add("}, "code is not Python"),
        ("livecodebench", LCB[0] | {"private_test_cases": "###"}, "private_test_cases is neither JSON nor packed JSON"),
        ("livecodebench", LCB[0] | {"public_test_cases": "[1]"}, "public_test_cases has a case without"),
        ("livecodebench", LCB[0] | {"contest_date": "soon"}, "contest_date='soon' is not a date"),
        ("livecodebench", LCB[1] | {"metadata": "{}"}, "metadata has no func_name"),
        ("cruxeval_output", {"id": "1", "code": "", "input": "x", "output": "1"}, "must be literals"),
        ("codeforces", cf_row("1/A", []), "official_tests is empty"),
        ("codeforces", cf_row("1/A", [{"input": "1", "output": "1"}], time_limit="1 s"), "time_limit is '1 s'"),
        ("codeforces", cf_row("1/A", [{"input": "1", "output": "1"}], generated_checker="x"), "checkers are not run"),
        ("codeforces", cf_row("1/A", [{"input": "1", "output": "1"}], points=-5), "points is -5; use a positive"),
        ("codeforces", cf_row("1/A", [{"input": "1", "output": "1"}], contest_id=[1]), r"contest_id is \[1\]; use a"),
    ],
)
def test_rows_of_the_wrong_shape_are_refused_with_line_and_field(tmp_path, name, row, message):
    good = {"humaneval": HUMANEVAL[1], "mbpp": MBPP[1], "livecodebench": LCB[0]}.get(name)
    task = task_with(tmp_path, name, [*([good] if good else []), row])
    with pytest.raises(ConfigError, match=f"line {2 if good else 1}.*{message}"):
        task.read(task.file("test"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gsm8k", {"unsafe_code": True}, "tasks.gsm8k.unsafe_code=True has no effect on gsm8k"),
        ("chain", {"time_limit_seconds": 1.0}, "time_limit_seconds=1.0 has no effect"),
        ("humaneval", {"since": "2024-01-01"}, "since='2024-01-01' has no effect on humaneval"),
        ("livecodebench", {}, "set tasks.livecodebench.data=FOLDER, with your copy of a release of livecodebench"),
    ],
)
def test_settings_without_effect_are_refused(name, settings, message):
    data = "" if name in ("chain", "livecodebench") else "files"
    with pytest.raises(ConfigError, match=message):
        make_task(name, TaskConfig(data=data, **settings))


def test_a_window_that_is_no_date_is_refused(tmp_path):
    task = task_with(tmp_path, "livecodebench", LCB, since="August")
    with pytest.raises(ConfigError, match=r"tasks.livecodebench.since='August' is not a date; write YYYY-MM-DD"):
        task.problems("test", 0)


def test_a_missing_sandbox_is_reported_before_anything_runs(tmp_path, monkeypatch):
    task = task_with(tmp_path, "humaneval", HUMANEVAL)
    monkeypatch.setattr("thinkstack.tasks.verify.sandbox.probe", lambda rung: f"{rung} is broken")
    with pytest.raises(ConfigError, match="bwrap is broken; sandlock: sandlock is broken"):
        task.check_files("test")


@needs_sandbox
def test_programs_are_graded_in_the_pool_and_the_score_keeps_grader_and_reason(tmp_path):
    task = task_with(tmp_path, "humaneval", HUMANEVAL)
    problem = problems_of(task)[0]
    responses = [fenced(TWICE[0]), fenced(WRONG[0]), Response(text="```\n")]
    with VerifierPool(num_workers=1) as pool:
        cfg = Reward(RewardConfig(parts={"accuracy": 1.0}), {"humaneval": task})
        scores = score([(problem, response) for response in responses], cfg, pool)
    assert [found.total for found in scores] == [1.0, 0.0, 0.0]
    assert [found.grader for found in scores] == [f"calls, {RUNG}", f"calls, {RUNG}", "code, not run"]
    assert scores[1].detail.startswith("AssertionError") and "no complete code block" in scores[2].detail
