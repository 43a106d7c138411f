"""Reference solutions and forgeries on the published files of HumanEval and MBPP; the counts are printed."""

import os
from pathlib import Path

import pytest

from tests.tasks.verify import forgeries
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.tasks.verify.sandbox import CONTAINED, choose_rung, probe

DATA = Path(os.environ.get("THINKSTACK_DATA", "data"))
needs_sandbox = pytest.mark.skipif(
    all(probe(rung) is not None for rung in CONTAINED), reason="no sandbox: neither bubblewrap nor sandlock holds here"
)


def needs_data(folder):
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"THINKSTACK_DATA is not a folder with {folder}/")


def count_right(task, program):
    """(number of problems whose program passes, reasons of those that fail)."""
    problems = task.read(task.file("test"))
    rung = choose_rung()
    verdicts = [(problem.metadata["id"], task.grade(problem, program(problem), rung)) for problem in problems]
    failed = {name: found.reason for name, found in verdicts if not found.passed}
    graders = {found.grader for _, found in verdicts}
    shown = failed if len(failed) < 20 else ""
    print(task.name, len(problems) - len(failed), "of", len(problems), "pass,", sorted(graders), rung, shown)
    return len(problems) - len(failed), failed


@pytest.mark.slow
@needs_sandbox
@needs_data("humaneval")
def test_the_reference_solutions_of_humaneval_pass():
    task = make_task("humaneval", TaskConfig(data=str(DATA / "humaneval"), time_limit_seconds=60.0))
    assert count_right(task, lambda problem: problem.answer)[0] == 164


@pytest.mark.slow
@needs_sandbox
@needs_data("mbpp")
def test_the_reference_solutions_of_mbpp_pass():
    task = make_task("mbpp", TaskConfig(data=str(DATA / "mbpp"), time_limit_seconds=60.0))
    assert count_right(task, lambda problem: problem.answer)[0] >= 965


@pytest.mark.slow
@needs_sandbox
@needs_data("humaneval")
@pytest.mark.parametrize("name", ["empty", "always_equal", "gc", "exits_at_import", "forged_output", "patched_assert"])
def test_no_forgery_passes_a_problem_of_humaneval(name):
    task = make_task("humaneval", TaskConfig(data=str(DATA / "humaneval"), time_limit_seconds=60.0))
    form = forgeries.ALL_FORMS[name].replace("secret_sum(value)", "secret_sum(*value)")
    assert count_right(task, lambda p: form.replace(forgeries.NAMES, p.metadata["entry_point"]))[0] == 0
