"""Grade stored completions again, without a model: verdicts of several graders and where they disagree."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from thinkstack.config import build, did_you_mean
from thinkstack.evals.metrics import cons_at_k
from thinkstack.evals.records import LOGLIKELIHOOD, ProblemRecord, read_samples
from thinkstack.evals.results import answer_class
from thinkstack.evals.runner import held_out_problems
from thinkstack.evals.sampling import EvalConfig
from thinkstack.evals.statistics import question_error
from thinkstack.files import read_object
from thinkstack.log import PROVENANCE
from thinkstack.tasks.reward import verify
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.task import Task, final_answer
from thinkstack.tasks.verify.answers import normalize
from thinkstack.tasks.verify.graders import GRADERS, GraderName, check_grader, grade_all
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.parse import ThinkingFormat, parse_sampled
from thinkstack.types import ConfigError, Message, Problem

STORED, OWN = "stored", "task"
"""Names of the verdicts in the samples, and of those of the task's own verifier, beside those of the graders."""
SAMPLES = "samples.jsonl"
log = logging.getLogger(__name__)
Verdict = bool | None
"""True: correct; False: wrong; None: the grader could not score the answer."""


@dataclass(frozen=True, kw_only=True)
class Regraded:
    """Verdicts of every grader on every stored completion."""

    records: list[ProblemRecord]
    answers: list[list[str | None]]
    """Final answer of each completion of each problem; None if there is none."""
    verdicts: dict[str, list[list[Verdict]]]
    """Verdict on each completion of each problem, by grader."""


def find_samples(run: Path) -> Path:
    """Return the samples.jsonl of an evaluation: the file, its folder, or a folder with one evaluation.

    Raises ConfigError if there is none, or several.
    """
    found = [run] if run.is_file() else sorted({*run.glob(SAMPLES), *run.glob(f"*/{SAMPLES}")})
    if not found:
        raise ConfigError(f"{run} has no {SAMPLES}; give the folder of an evaluation, such as runs/eval/NAME")
    if len(found) > 1:
        raise ConfigError(f"{run} has several evaluations; give one of {', '.join(str(path.parent) for path in found)}")
    return found[0]


def thinking_format_of(samples: Path, given: str) -> ThinkingFormat:
    """Return the thinking format of an evaluation: the given one, or that in its provenance.

    Raises ConfigError if there is neither, or for an unknown one.
    """
    path = samples.parent / PROVENANCE
    found = given or (str(read_object(path).get("config", {}).get("thinking_format", "")) if path.exists() else "")
    for name in get_args(ThinkingFormat):
        if name == found:
            return name  # type: ignore[no-any-return]
    if found:
        raise ConfigError(f"unknown thinking format {found!r}{did_you_mean(found, get_args(ThinkingFormat))}")
    raise ConfigError(f"{samples} does not say how answers were read; give --thinking-format")


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown grader, or one that cannot run here."""
    if not names:
        raise ConfigError(f"no grader is given; choose from {', '.join((STORED, OWN, *GRADERS))}")
    for name in names:
        if name not in (STORED, OWN, *GRADERS):
            raise ConfigError(f"unknown grader {name!r}{did_you_mean(name, [STORED, OWN, *GRADERS])}")
        if name in GRADERS:
            check_grader(name)


@dataclass(frozen=True)
class RunTasks:
    """The tasks of an evaluation and its problems, by `address`."""

    tasks: Mapping[str, Task]
    problems: Mapping[tuple[str, str, str, int], Problem]

    @staticmethod
    def of(samples: Path) -> "RunTasks | None":
        """Return the tasks and problems of a run by its settings; None, with a warning, without settings or data."""
        path = samples.parent / PROVENANCE
        config = read_object(path).get("config", {}) if path.exists() else {}
        if not config:
            return None
        known = {one.name for one in fields(EvalConfig)}
        try:
            cfg = build(EvalConfig, {name: value for name, value in config.items() if name in known})
            return RunTasks(make_tasks(cfg.tasks), {address(one): one for one in held_out_problems(cfg)})
        except ConfigError as error:
            log.warning("answers are read by the general rule, without the task: %s", error)
            return None


def address(one: Problem | ProblemRecord) -> tuple[str, str, str, int]:
    """Return what identifies a problem of an evaluation."""
    return one.task, one.key, one.language, one.wording


def regrade(
    records: Sequence[ProblemRecord],
    names: Sequence[str],
    thinking_format: ThinkingFormat,
    pool: VerifierPool,
    source: RunTasks | None = None,
) -> Regraded:
    """Return the verdicts of the graders `names` on stored completions.

    The final answer is read again from the text, as the task of `source` reads it; without one by the general rule
    (`final_answer`). The stored answer is normalized. Raises ConfigError for the grader "task" without its data.
    """
    check_names(names)
    known = source.problems if source else {}
    if OWN in names and not all(address(record) in known for record in records):
        raise ConfigError("the grader 'task' needs the problems of the run; put its data where they were")
    problems = [known.get(address(record)) or _problem(record) for record in records]
    responses = [
        [parse_sampled(answer.text, thinking_format, answer.truncated) for answer in record.answers]
        for record in records
    ]
    answers = [
        [
            source.tasks[problem.task].read_answer(problem, one)
            if source and address(problem) in known
            else final_answer(problem, one)
            for one in some
        ]
        for problem, some in zip(problems, responses, strict=True)
    ]
    verdicts: dict[str, list[list[Verdict]]] = {}
    for name in names:
        if name == STORED:
            verdicts[name] = [[answer.correct for answer in record.answers] for record in records]
            continue
        if name == OWN and source:
            turns = [(problem, one) for problem, some in zip(problems, responses, strict=True) for one in some]
            scores = iter(verify(turns, source.tasks, pool))
        else:
            pairs = [(problem, answer) for problem, some in zip(problems, answers, strict=True) for answer in some]
            scores = iter(grade_all(_grader(name), pairs, pool))
        found = [[next(scores) for _ in some] for some in answers]
        verdicts[name] = [[None if one.unscorable else one.total == 1.0 for one in some] for some in found]
    return Regraded(records=list(records), answers=answers, verdicts=verdicts)


def _grader(name: str) -> GraderName:
    return next(each for each in GRADERS if each == name)


def _problem(record: ProblemRecord) -> Problem:
    return Problem(
        messages=(Message(role="user", content=record.question),),
        answer=record.reference,
        task=record.task,
        language=record.language,
        key=record.key,
    )


def grader_rows(found: Regraded) -> list[tuple[str, list[str]]]:
    """Return a row per grader with the cells of GRADER_HEAD; pass@1 with its question error, majority vote of all."""
    silent = sum(answer is None for some in found.answers for answer in some)
    rows = []
    for name, verdicts in found.verdicts.items():
        flat = [verdict for some in verdicts for verdict in some]
        error = question_error(
            [sum(map(bool, some)) / len(some) for some in verdicts],
            [(record.task, record.cluster or record.key) for record in found.records],
        )
        mean = sum(sum(map(bool, some)) / len(some) for some in verdicts) / len(verdicts)
        votes = [
            cons_at_k(
                [None if a is None else answer_class(normalize(a)) for a in some], list(map(bool, right)), len(some)
            )
            for some, right in zip(found.answers, verdicts, strict=True)
        ]
        spread = "" if error is None else f" \N{PLUS-MINUS SIGN} {100 * error.standard_error:.1f}"
        counts = [sum(verdict is value for verdict in flat) for value in (True, False, None)]
        cells = [*map(str, counts), str(silent), f"{100 * mean:.1f}{spread}", f"{100 * sum(votes) / len(votes):.1f}"]
        rows.append((name, cells))
    return rows


GRADER_HEAD = ("grader", "correct", "wrong", "not scored", "no answer", "pass@1", "majority")


def pair_rows(found: Regraded) -> list[tuple[str, list[str]]]:
    """Return a row per pair of graders: how often both accept, only one, neither. Not scored counts as wrong."""
    rows = []
    for first, second in itertools.combinations(found.verdicts, 2):
        pairs = [
            (bool(one), bool(other))
            for some, others in zip(found.verdicts[first], found.verdicts[second], strict=True)
            for one, other in zip(some, others, strict=True)
        ]
        cells = [str(pairs.count(pair)) for pair in ((True, True), (True, False), (False, True), (False, False))]
        rows.append((f"{first}, {second}", cells))
    return rows


PAIR_HEAD = ("graders", "both", "only the first", "only the second", "neither")


def disagreements(found: Regraded) -> list[dict[str, Any]]:
    """Return a row for each completion on which the graders disagree."""
    rows = []
    for place, (record, answers) in enumerate(zip(found.records, found.answers, strict=True)):
        for sample, answer in enumerate(answers):
            verdicts = {name: some[place][sample] for name, some in found.verdicts.items()}
            if len(set(verdicts.values())) > 1:
                rows.append(
                    {
                        "key": record.key,
                        "task": record.task,
                        "sample": sample,
                        "reference": record.reference,
                        "answer": answer,
                        "verdicts": verdicts,
                        "question": record.question,
                    }
                )
    return rows


def load(run: Path, thinking_format: str) -> tuple[Path, list[ProblemRecord], ThinkingFormat]:
    """Return the samples file of a run, its records, and the thinking format by which its answers are read."""
    samples = find_samples(run)
    records = read_samples(samples)
    sampled = [record for record in records if not record.grader.startswith(LOGLIKELIHOOD)]
    if len(sampled) < len(records):
        log.warning("%d questions were answered by log-likelihood; they are left out", len(records) - len(sampled))
    if not sampled:
        raise ConfigError(f"{samples} has no sampled text to grade")
    return samples, sampled, thinking_format_of(samples, thinking_format)
