"""Graders: the rules by which a final answer is compared with the reference, by name.

A result names its grader, since graders disagree: docs/evaluation.md lists where. Which text is the final answer
is decided before (text/parse.py). An answer that states several candidates is wrong under every grader.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from thinkstack.tasks.verify import answers, latex
from thinkstack.tasks.verify.pool import VerifierPool, checked, unscorable
from thinkstack.tasks.verify.quantities import parse_quantity
from thinkstack.types import ConfigError, Problem, Score

GraderName = Literal["text", "number", "choice", "strict", "latex", "math-verify"]


def _same_text(problem: Problem, answer: str) -> bool:
    inside = latex.unbox(answer)
    return inside is not None and answers.is_correct(problem.answer, inside)


def _same_number(problem: Problem, answer: str) -> bool:
    inside = latex.unbox(answers.strip_answer(answer).removeprefix("####"))
    may_be_percent = "percent" in problem.question.casefold()
    found = None if inside is None else parse_quantity(inside, may_be_percent)
    return found is not None and found == parse_quantity(problem.answer)


def _same_choice(problem: Problem, answer: str) -> bool:
    inside = latex.unbox(answer)
    return inside is not None and answers.same_choice(answers.strip_wrappers(problem.answer).strip("()"), inside)


def _same_spelling(problem: Problem, answer: str) -> bool:
    return latex.same_spelling(problem.answer, answer)


def _never(problem: Problem, answer: str) -> bool:
    return False


def _needs_math_verify(problem: Problem, answer: str) -> bool:
    return latex.needs_math_verify(problem.answer, answer)


def _has_one_answer(problem: Problem, answer: str) -> bool:
    return bool(latex.unbox(answer))


@dataclass(frozen=True, kw_only=True)
class Grader:
    """A rule in one or two steps: a comparison in this process, then math-verify in a process that can be killed."""

    accepts: Callable[[Problem, str], bool]
    """Whether the answer is correct, without math-verify."""
    asks_math_verify: Callable[[Problem, str], bool] = _never
    """Whether math-verify decides about an answer that is not accepted."""


GRADERS: dict[GraderName, Grader] = {
    "text": Grader(accepts=_same_text),
    "number": Grader(accepts=_same_number),
    "choice": Grader(accepts=_same_choice),
    "strict": Grader(accepts=_same_spelling),
    "latex": Grader(accepts=_same_spelling, asks_math_verify=_needs_math_verify),
    "math-verify": Grader(accepts=_never, asks_math_verify=_has_one_answer),
}
"""text: equal up to case, full stop and width. number: the same value, with unit and currency. choice: the same letter.
strict: the same number, or the same LaTeX up to spelling, in which sets, unions and lists have no order. latex: strict,
then math-verify for formulas that it reads safely. math-verify: the library alone, whatever it accepts."""


def check_grader(name: GraderName) -> None:
    """Raise ConfigError if a grader cannot run here."""
    if name == "math-verify" and not latex.has_math_verify():
        raise ConfigError("the grader math-verify needs its package: pip install 'thinkstack[math]'")


def may_hang(name: GraderName, problem: Problem, answer: str | None) -> bool:
    """Whether `grade` must run in a process that can be killed (pool.py)."""
    grader = GRADERS[name]
    return answer is not None and not grader.accepts(problem, answer) and grader.asks_math_verify(problem, answer)


def grade(name: GraderName, problem: Problem, answer: str | None) -> Score:
    """Return the Score of an answer, 1 or 0; no answer is wrong."""
    if answer is not None and may_hang(name, problem, answer):
        return latex.are_equivalent(problem.answer, answer)
    return Score(total=float(answer is not None and GRADERS[name].accepts(problem, answer)))


def grade_all(name: GraderName, pairs: Sequence[tuple[Problem, str | None]], pool: VerifierPool) -> list[Score]:
    """Return the Score of each (problem, answer), in order; what may hang runs in `pool`.

    An answer whose comparison hangs or fails is unscorable; the others keep their scores.
    """
    scores: list[Score | None] = []
    waiting: list[tuple[Any, ...]] = []
    for pair in pairs:
        found = _grade_here(name, *pair)
        scores.append(found)
        waiting += [] if found else [pair]
    late = iter(pool.run(partial(grade, name), waiting, prepare_math_verify) if waiting else ())
    return [next(late) if found is None else found for found in scores]


def _grade_here(name: GraderName, problem: Problem, answer: str | None) -> Score | None:
    """Grade in process; None if the comparison may hang."""
    try:
        return None if may_hang(name, problem, answer) else checked(grade(name, problem, answer))
    except Exception as error:  # the boundary: whatever a comparison raises becomes the reason
        return unscorable(f"{type(error).__name__}: {error}")


def prepare_math_verify() -> None:
    """Import math-verify, before the time of a call starts."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
