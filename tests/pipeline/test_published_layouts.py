"""`thinkstack eval` on three invented rows of each set without a file here: layouts, verdicts, results, report."""

import csv
import json

import pytest

from tests.evals.test_swe_bench import harness_report
from tests.tasks.benchmarks.test_code_tasks import LCB, RUNG, STARTER, cf_row
from tests.tasks.benchmarks.test_swe_bench import DIFF, row
from thinkstack import cli
from thinkstack.evals.records import read_samples
from thinkstack.stages.evaluate import read_evaluation
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig

GPQA_COLUMNS = (
    "Pre-Revision Question", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2",
    "Incorrect Answer 3", "Explanation", "Subdomain", "Record ID",
)  # fmt: skip
GPQA = [
    [
        f"old {number}",
        f"Which is {number} squared,\nexactly?",
        f"{number**2}",
        "1000",
        "2000",
        " 3000",
        "",
        "Number",
        "r",
    ]
    for number in (7, 8, 9)
]
MMLU_REDUX = [
    {"question": f"What is {number} and 1?", "choices": ["3", "4", "5", "6"], "answer": 0, "error_type": kind,
     "source": "", "correct_answer": correct, "potential_reason": "", "subject": "sums"}
    for number, kind, correct in ((2, "ok", None), (4, "wrong_groundtruth", "2"), (9, "no_correct_answer", None))
]  # fmt: skip


def plus_row(name, prompt, entry_point, solution, inputs, **fields):
    """A row of HumanEval+ or MBPP+ with one base input and further ones."""
    return {
        "task_id": name, "prompt": prompt, "entry_point": entry_point, "canonical_solution": solution,
        "base_input": inputs[:1], "plus_input": inputs[1:], "contract": "", "atol": 0, **fields,
    }  # fmt: skip


HUMANEVAL_PLUS = [
    plus_row("HumanEval/0", "def neg(x):\n    '''Negative.'''\n", "neg", "    return -x\n", [[1], [-5], [0]]),
    plus_row("HumanEval/1", "def half(x):\n    '''Half.'''\n", "half", "    return x / 2\n", [[1], [3], [10**6]]),
    plus_row("HumanEval/2", "def rev(x):\n    '''Reverse.'''\n", "rev", "    return x[::-1]\n", [["ab"], [""]]),
]
MBPP_PLUS = [
    plus_row("Mbpp/2", '"""Sum of two."""\n', "add", "def add(a, b):\n    return a + b", [[1, 2], [5, -5]],
             assertion="assert add(1, 2) == 3"),
    plus_row("Mbpp/3", '"""Join tuples."""\n', "join", "def join(a, b):\n    return a + b", [[[1], [2]], [[], [3]]],
             assertion="assert join((1,), (2,)) == (1, 2)"),
    plus_row("Mbpp/4", '"""Last."""\n', "last", "def last(x):\n    return x[-1]", [[[1, 2]], [[3]]],
             assertion="assert last([1, 2]) == 2"),
]  # fmt: skip
SUM_CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7\n", "output": "12\n"}]
CODEFORCES = [
    cf_row("7/A", SUM_CASES, contest_id="7", index="A", points=500.0, rating=800, time_limit=2.0, memory_limit=256.0),
    cf_row("7/B", SUM_CASES, contest_id="7", index="B", points=1000.0),
    cf_row("8/A", SUM_CASES, contest_id="8", index="A", points=500.0),
]
STANDINGS = [
    {"contest_id": contest, "handle": f"h{place}", "rating": 1200 + 100 * place, "points": 500 * place, "penalty": 0}
    for contest in (7, 8)
    for place in range(4)
]
SWE_BENCH = [row(number, text="Mend.") for number in range(3)]
ROWS = {
    "mmlu_redux": MMLU_REDUX, "humaneval_plus": HUMANEVAL_PLUS, "mbpp_plus": MBPP_PLUS, "livecodebench": LCB,
    "codeforces": CODEFORCES, "swe_bench_verified": SWE_BENCH,
}  # fmt: skip
ADD, SUBTRACT = "print(sum(map(int, input().split())))", "print(3 if input() == '1 2' else 0)"
CODE = {"humaneval_plus", "mbpp_plus", "livecodebench", "codeforces"}
TASKS = ["gpqa", *ROWS]
"""In the order of the command."""


def fenced(code):
    return f"<think>Let me see: ```python\nraise\n```</think>\nSo:\n```python\n{code}\n```\n"


UNCLOSED = "<think>The program is\n```python\nprint(3)\n```\n The answer is \\boxed{A}"
"""An answer inside thinking that never ends."""
COMPLETIONS = {
    "humaneval_plus": [
        [fenced("def neg(x):\n    return -x"), fenced("def neg(x):\n    return -1")],  # right on the base input alone
        [fenced("def half(x): return x * .5"), "I cannot."],
        [UNCLOSED, fenced("def rev(x): return x")],
    ],
    "mbpp_plus": [
        [fenced("def add(a, b): return a + b"), fenced("def add(a, b): return 3")],
        [fenced("def join(a, b): return (*a, *b)"), fenced("def join(a, b): return [*a, *b]")],
        [UNCLOSED, ""],
    ],
    "livecodebench": [
        None,  # before the window
        [fenced(f"{STARTER}return [*x, y]"), fenced(f"{STARTER}return [1, 2, 3]")],
        [UNCLOSED, fenced(ADD)],
    ],
    "codeforces": [
        [fenced(ADD), fenced(SUBTRACT)],
        [fenced(SUBTRACT), fenced(ADD)],
        [UNCLOSED, fenced("import os; os._exit(0)")],
    ],
    "mmlu_redux": [["Answer: A", "Answer: B"], ["Answer: C", "Answer: A"], None],
    "swe_bench_verified": [
        [f"<patch>\n{DIFF}</patch>", f"```diff\n{DIFF}```"],
        [f"```diff\n{DIFF}```", "<think>no end <patch>x</patch>"],
        ["", f"<patch>{DIFF}</patch>"],
    ],
}
RIGHT, WRONG, SILENT, OPEN = (True, True), (False, True), (False, False), (None, True)
"""Verdict, and whether an answer was read."""
EXPECTED = {
    "gpqa": [[RIGHT, WRONG], [RIGHT, SILENT], [SILENT, WRONG]],
    "mmlu_redux": [[RIGHT, WRONG], [RIGHT, WRONG]],
    "humaneval_plus": [[RIGHT, WRONG], [RIGHT, WRONG], [SILENT, WRONG]],
    "mbpp_plus": [[RIGHT, WRONG], [RIGHT, WRONG], [SILENT, SILENT]],
    "livecodebench": [[RIGHT, WRONG], [SILENT, RIGHT]],
    "codeforces": [[RIGHT, WRONG], [WRONG, RIGHT], [SILENT, WRONG]],
    "swe_bench_verified": [[OPEN, OPEN], [OPEN, SILENT], [SILENT, OPEN]],
}
GRADERS = {
    "gpqa": "choice", "mmlu_redux": "choice", "swe_bench_verified": "official harness", "codeforces": f"scripts, {RUNG}"
}  # fmt: skip
WINDOW = "2024-08-01"


def letter(problem, text):
    return "ABCD"[problem.metadata["choices"].index(text)]


def gpqa_completions(problems):
    """The choices are shuffled: the letters come from the problems."""
    first, second, third = problems
    return [
        [f"Answer: {letter(first, '49')}", f"Answer: {letter(first, '1000')}"],
        [f"<think>x</think>\nSo\n\nANSWER: {letter(second, '64')}", "I do not know."],
        [UNCLOSED, f"Answer: {letter(third, '3000')}"],
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One evaluation of all sets by the command line; the tasks that run code only with a sandbox."""
    folder = tmp_path_factory.mktemp("layouts")
    tasks = [name for name in TASKS if RUNG or name not in CODE]
    answers = []
    for name in tasks:
        (folder / "data" / name).mkdir(parents=True)
        if name == "gpqa":
            path = folder / "data" / name / "gpqa_diamond.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([GPQA_COLUMNS, *GPQA])
        else:
            path = folder / "data" / name / "test.jsonl"
            path.write_text("".join(json.dumps(one) + "\n" for one in ROWS[name]), encoding="utf-8")
        problems = make_task(name, TaskConfig(data=str(path.parent))).read(path)
        some = gpqa_completions(problems) if name == "gpqa" else COMPLETIONS[name]
        answers += [
            {"task": name, "key": problem.key, "completions": turns}
            for problem, turns in zip(
                problems, [one for one in some if one] if name == "mmlu_redux" else some, strict=True
            )
            if turns
        ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers), encoding="utf-8")
    (folder / "standings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in STANDINGS), encoding="utf-8")
    settings = ["--set", f"tasks.livecodebench.since={WINDOW}", "--standings", "standings.jsonl"] if RUNG else []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["--task", ",".join(tasks), "--data", "data", "--answers", "answers.jsonl", "--samples", "2"]
        patch.setattr("sys.argv", ["thinkstack", "eval", *words, *settings, "--out", "out", "--report", "report"])
        cli.main()
    return folder


def records_of(folder, task):
    """The records of a task, by the order of its rows."""
    names = {"gpqa": "Which is", "mmlu_redux": "What is"}
    found = [one for one in read_samples(folder / "out" / "evaluate" / "samples.jsonl") if one.task == task]
    if task in names:
        return sorted(found, key=lambda one: one.question)
    problems = make_task(task, TaskConfig(data=str(folder / "data" / task))).read(folder / "data" / task / "test.jsonl")
    places = {problem.key: place for place, problem in enumerate(problems)}
    return sorted(found, key=lambda one: places[one.key])


@pytest.mark.parametrize("task", TASKS)
def test_each_completion_of_a_published_row_has_its_verdict(run, task):
    if task in CODE and not RUNG:
        pytest.skip("no sandbox: neither bubblewrap nor sandlock holds here")
    found = [[(one.correct, one.answer is not None) for one in record.answers] for record in records_of(run, task)]
    assert found == EXPECTED[task]
    result = read_evaluation(run / "out" / "evaluate", "sampled.json")
    verdicts = [verdict for verdicts in EXPECTED[task] for verdict, _ in verdicts]
    part, protocol = result.by_task[task], result.protocols[task]
    assert part.pass_at_1 == pytest.approx(sum(map(bool, verdicts)) / len(verdicts))
    assert (part.unscorable, protocol.samples, protocol.num_problems) == (verdicts.count(None), 2, len(verdicts) // 2)
    assert protocol.since == (WINDOW if task == "livecodebench" else "")
    graders = {one.grader for record in records_of(run, task) for one in record.answers if one.correct}
    assert all(name.endswith(f", {RUNG}") for name in graders) if task in CODE else graders <= {""}
    assert protocol.grader == GRADERS.get(task, f"calls, {RUNG}") == result.graders[task]
    assert f"| {task}" in (run / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(RUNG is None, reason="no sandbox: neither bubblewrap nor sandlock holds here")
def test_contests_are_rated_by_their_standings(run):
    """Contest 7: A at once, B at the second attempt, 500 + 950, the place behind 1,500 points. Contest 8: nothing."""
    found = read_evaluation(run / "out" / "evaluate", "sampled.json").contests
    assert [(one.contest, one.points, one.rank) for one in found.results] == [("7", 1450.0, 2), ("8", 0.0, 4)]
    assert found.rerun_error and found.over_contests and found.num_attempts == 2
    assert "| 7 | 2 of 2 | 1450 | 0 | 2 of 4 |" in (run / "report" / "report.md").read_text(encoding="utf-8")


def test_reports_of_the_harness_complete_an_evaluation(run, monkeypatch, capsys):
    """Of three instances and two completions the harness resolves one patch, and one is left open by an error."""
    monkeypatch.chdir(run)
    monkeypatch.setattr("sys.argv", ["thinkstack", "eval", "swe-bench", "out", "--predictions", "p.jsonl"])
    cli.main()
    printed = capsys.readouterr().out
    assert "p-1.jsonl: 3 instances, 1 without a patch, as answers-" in printed and "p-2.jsonl: 3 instances" in printed
    first = harness_report(run / "p-1.jsonl", run / "reports", resolved=(0,))
    second = harness_report(run / "p-2.jsonl", run / "reports", resolved=(), error=(2,))
    words = ["eval", "swe-bench", "out", "--reports", str(second), str(first), "--report", "judged"]
    monkeypatch.setattr("sys.argv", ["thinkstack", *words])
    cli.main()
    assert "not scored: 1 of the harness has no result" in capsys.readouterr().out
    found = [[one.correct for one in record.answers] for record in records_of(run, "swe_bench_verified")]
    assert found == [[True, False], [False, False], [False, None]]
    part = read_evaluation(run / "out" / "evaluate", "sampled.json").by_task["swe_bench_verified"]
    assert part.pass_at_1 == pytest.approx(1 / 6) and part.rerun_error
    assert "| swe_bench_verified | 16.7" in (run / "judged" / "report.md").read_text(encoding="utf-8")
