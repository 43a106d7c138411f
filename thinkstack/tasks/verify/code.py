"""Graders of programs. The tests run here; the candidate's code runs in a sandboxed process and never enters this one.

A candidate cannot forge a verdict: its process holds no test and no expected value, and what it sends is read as plain
data (values.py). Test code and reference solutions of a benchmark are as trusted as the package that grades: they are
the published files, or the user's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from thinkstack.tasks.verify.remote import Candidate, RemoteFunction
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.tasks.verify.sandbox import SandboxLimits, run_script
from thinkstack.types import Score

MARGIN_SECONDS = 30.0
"""Time that the supervisor allows beside that of the tests, whose end the judge's own deadlines decide."""
MEMORY_BYTES = SandboxLimits.memory_bytes
REPLY_BYTES = 4 << 20
"""Longest result of a call. As objects it may take 50 times as much of our memory."""
MIN_OUTPUT_BYTES, OUTPUT_FACTOR = 1 << 20, 4
"""A script may write the first, or the second times the expected output if that is more."""


@dataclass(frozen=True, kw_only=True)
class CodeVerdict:
    """Whether a program passes, and how this was found."""

    passed: bool
    grader: str
    """ "calls", "scripts" or "literals"; with "+objects" where objects of the candidate took part, so that its code
    answers for their attributes."""
    rung: Rung | None
    """Where the code ran; None if no code ran."""
    reason: str = ""
    """Why it failed; empty if it passed."""

    def score(self) -> Score:
        """Return the accuracy, with the grader and the rung."""
        where = f"{self.grader}, {self.rung or 'not run'}"
        return Score(total=float(self.passed), grader=where, detail=self.reason)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the candidate's function and what it must return."""

    arguments: Sequence[Any]
    expected: Any
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of a script and the output that it must have."""

    standard_input: str
    output: str


Compare = Callable[[Any, Any], bool]
"""(what the candidate returned, what is expected) -> whether it is right."""


def grade_tests(
    code: str, names: Sequence[str], tests: str, namespace: Mapping[str, Any], rung: Rung, seconds: float
) -> CodeVerdict:
    """Run published test code with the candidate's functions in place of the names.

    names: what the tests use of the candidate; it must define the first. namespace: further names of the tests.
    seconds: of the candidate's code and the tests together, from the start of the code.
    """

    def judge(candidate: Candidate) -> str:
        functions = {name: RemoteFunction(candidate, name) for name in names}
        exec(compile(tests, "tests", "exec"), {"__name__": "tests", **namespace, **functions})
        return "" if candidate.num_calls else "no test calls the code"

    return _grade(code, names[:1], judge, rung, _limits(seconds), seconds)


def grade_calls(
    code: str,
    name: str,
    calls: Sequence[Call],
    rung: Rung,
    seconds: Sequence[float],
    compare: Compare,
    memory_bytes: int = MEMORY_BYTES,
) -> CodeVerdict:
    """Compare the results of calls with the expected ones. seconds: of each call; the code itself has the first's."""

    def judge(candidate: Candidate) -> str:
        function = RemoteFunction(candidate, name)
        for index, (call, call_seconds) in enumerate(zip(calls, seconds, strict=True)):
            candidate.set_deadline(call_seconds)
            if not compare(function(*call.arguments, **call.keywords), call.expected):
                return f"wrong result of call {index + 1} of {len(calls)}"
        return ""

    return _grade(code, (name,), judge, rung, _limits(sum(seconds) + seconds[0], memory_bytes), seconds[0])


def _grade(
    code: str,
    names: Sequence[str],
    judge: Callable[[Candidate], str],
    rung: Rung,
    limits: SandboxLimits,
    seconds: float,
) -> CodeVerdict:
    """Run the code, then `judge`, which returns why it fails or raises; a process that has ended never passes."""
    reason, num_objects = "the code is empty", 0
    if code.strip():
        with Candidate(rung, limits) as candidate:
            try:
                candidate.set_deadline(seconds)
                candidate.run(code)
                reason = judge(candidate) if candidate.has(names) else f"the code defines no {names[0]}"
            except Exception as error:  # the boundary: whatever the candidate or a test raises fails it
                reason = f"{type(error).__name__}: {error}"[:200]
            reason, num_objects = candidate.failure or reason, candidate.num_objects
    grader = "calls+objects" if num_objects else "calls"
    return CodeVerdict(passed=not reason, grader=grader, rung=rung, reason=reason)


def results_of(
    code: str,
    name: str,
    arguments: Sequence[Sequence[Any]],
    rung: Rung,
    seconds: float,
    memory_bytes: int = MEMORY_BYTES,
) -> list[tuple[Any, float]]:
    """Return (result, seconds) of each call of a reference solution, which runs in a sandbox too.

    seconds: of all calls together. Raises what it raises, and SandboxError.
    """
    results = []
    with Candidate(rung, _limits(seconds, memory_bytes)) as candidate:
        candidate.set_deadline(seconds)
        candidate.run(code)
        function = RemoteFunction(candidate, name)
        for values in arguments:
            start = time.monotonic()
            results.append((function(*values), time.monotonic() - start))
    return results


def grade_scripts(
    code: str,
    cases: Sequence[Case],
    rung: Rung,
    seconds: float,
    memory_bytes: int = MEMORY_BYTES,
    compare: Callable[[str, str], bool] | None = None,
) -> CodeVerdict:
    """Run the code as a script once per case, each in a process of its own with a limit of `seconds`.

    memory_bytes: of the tree. compare: (output, expected output) -> whether it is
    right; None: `same_output`.
    """
    compare = compare or same_output
    limits = replace(_limits(seconds, memory_bytes), wall_seconds=seconds)
    if not code.strip():
        return CodeVerdict(passed=False, grader="scripts", rung=rung, reason="the code is empty")
    for index, case in enumerate(cases):
        output_bytes = max(MIN_OUTPUT_BYTES, OUTPUT_FACTOR * len(case.output.encode()))
        limits = replace(limits, output_bytes=output_bytes)
        found = run_script(code, case.standard_input.encode(), rung, limits)
        reason = found.reason or (f"exit code {found.exit_code}" if found.exit_code else "")
        if not reason and not compare(found.output.decode("utf-8", errors="replace"), case.output):
            reason = "wrong output"
        if reason:
            where = f"{reason} in case {index + 1} of {len(cases)}"
            return CodeVerdict(passed=False, grader="scripts", rung=rung, reason=where)
    return CodeVerdict(passed=True, grader="scripts", rung=rung)


def same_output(found: str, expected: str) -> bool:
    """Compare outputs as LiveCodeBench does: as many lines, and each equal up to outer blanks or number by number.

    Numbers are compared as exact decimals: 1.0 is 1, and 0.333 is not 0.3333.
    """
    lines, expected_lines = found.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def _same_line(found: str, expected: str) -> bool:
    if found.strip() == expected.strip():
        return True
    try:
        return [Decimal(word) for word in found.split()] == [Decimal(word) for word in expected.split()]
    except InvalidOperation:
        return False


def same_tokens(found: str, expected: str) -> bool:
    """Whether both consist of the same words, whatever the blanks and line breaks."""
    return found.split() == expected.split()


def _limits(seconds: float, memory_bytes: int = MEMORY_BYTES) -> SandboxLimits:
    total = seconds + MARGIN_SECONDS
    return SandboxLimits(wall_seconds=total, cpu_seconds=total, memory_bytes=memory_bytes, output_bytes=REPLY_BYTES)
