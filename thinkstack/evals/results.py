"""Metrics of one evaluation, for all problems and by task, level and language, computed from recorded completions.

Records contain every completion, so `summarize` can recompute all metrics from samples.jsonl.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from thinkstack.evals.contests import ContestRating
from thinkstack.evals.metrics import (
    BudgetPoint,
    ForcedPoint,
    accuracy_over_tokens,
    cons_at_k,
    pass_at_k,
    tokens_per_solution,
)
from thinkstack.evals.protocol import SamplerFacts, TaskProtocol
from thinkstack.evals.records import LOGLIKELIHOOD, ProblemRecord, grader_of
from thinkstack.evals.statistics import ErrorEstimate, question_error, rerun_error
from thinkstack.tasks.verify.latex import normalize_latex
from thinkstack.types import ConfigError

CONS_SAMPLES = 16
"""Number of samples that vote in the majority vote of the learning curve; all samples if there are fewer."""
PERCENTILES = (10, 50, 90, 100)
"""Percentiles of the number of tokens."""
LONGEST_FORMULA = 256
"""Characters of the longest answer that may be a formula."""
SHOWN_ANSWERS = 3
"""Number of completions per task that an Evaluation stores as text."""
CURVE = (
    "pass_at_1",
    "question_error",
    "rerun_error",
    "cons_at_16",
    "mean_tokens",
    "truncation_rate",
    "format_rate",
    "worked_share",
    "worked_accuracy",
    "direct_accuracy",
)
"""Metrics of a point of the learning curve."""


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """Metrics over a set of problems. Means are over problems, and over the completions that a problem has."""

    problems: int
    """Number of problems."""
    samples: int
    """Largest number of completions per problem."""
    fewest_samples: int
    """Smallest number of completions per problem."""
    pass_at_1: float
    """Mean over problems of the share of correct completions; an unscorable completion counts as wrong."""
    pass_at_1_bound: float
    """pass_at_1 if every unscorable completion were correct; pass_at_1 is the other bound."""
    over_questions: ErrorEstimate | None
    """Error of pass_at_1 over questions, clustered by ProblemRecord.cluster; None with fewer than two clusters."""
    over_reruns: ErrorEstimate | None
    """Error of pass_at_1 over re-runs of the same questions; None if a problem has a single completion."""
    pass_at_k: dict[int, float]
    """Unbiased pass@k, k = 1, 2, 4, ... up to samples, over problems with at least k completions."""
    cons_at_k: dict[int, float]
    """Majority vote of k completions, k = 2, 4, ... up to samples, averaged over subsets of k; all completions of a
    problem vote if it has fewer."""
    pass_at_1_finished: float | None
    """Share of correct completions among those that were not truncated; None if all were."""
    truncation_rate: float
    """Share of completions truncated at max_tokens."""
    answer_rate: float
    """Share of completions with an answer in the configured thinking_format; if it is 0, the accuracy is
    meaningless."""
    format_rate: float
    """Share of well-formed completions."""
    mean_tokens: float
    """Mean tokens per completion, including the end token."""
    tokens_per_solution: float | None
    """Sampled tokens of all completions per correct completion; None if none is correct."""
    unscorable: int
    """Number of completions that could not be scored; they count as wrong."""
    worked_share: float | None
    """Share of completions whose thinking contains worked steps, among those of tasks with worked solutions; None if
    there are none."""
    worked_accuracy: float | None
    """Share of correct completions among the completions with worked steps."""
    direct_accuracy: float | None
    """Share of correct completions among the completions without worked steps."""
    num_completions: int = 0
    """Completions of all problems."""
    num_correct: int = 0
    """Correct completions."""
    num_prompt_tokens: int = 0
    """Tokens of the prompts, once for each completion; 0: unknown."""
    tokens_at: dict[int, int] = field(default_factory=dict)
    """Tokens of a completion at the percentiles 10, 50, 90 and 100."""
    measures: dict[str, float] = field(default_factory=dict)
    """Mean of each other measure of the completions that have it (evals/text_measures.py), by name."""

    @property
    def question_error(self) -> float | None:
        """Standard error of pass_at_1 over questions."""
        return self.over_questions.standard_error if self.over_questions else None

    @property
    def rerun_error(self) -> float | None:
        """Standard error of pass_at_1 over re-runs."""
        return self.over_reruns.standard_error if self.over_reruns else None

    @property
    def num_clusters(self) -> int:
        """Number of independent questions: clusters of them."""
        return int(self.over_questions.degrees) + 1 if self.over_questions else 1

    @property
    def cons_at_16(self) -> float:
        """Majority vote of CONS_SAMPLES completions, or of all if there are fewer; pass@1 for a single completion."""
        votes = max((k for k in self.cons_at_k if k <= CONS_SAMPLES), default=1)
        return self.cons_at_k.get(votes, self.pass_at_1)


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """A completion that the report shows as text."""

    question: str
    reference: str
    text: str
    correct: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(EvalMetrics):
    """Metrics over all problems and over subsets of them, and example completions."""

    by_task: dict[str, EvalMetrics]
    by_level: dict[int, EvalMetrics]
    by_task_level: dict[str, dict[int, EvalMetrics]]
    by_language: dict[str, EvalMetrics]
    chance: dict[str, float] = field(default_factory=dict)
    """Probability that a blind guess is correct, by task."""
    graders: dict[str, str] = field(default_factory=dict)
    """Name of the grader, by task."""
    over_tokens: tuple[BudgetPoint, ...] = ()
    """Accuracy if every completion had ended at a token budget."""
    protocols: dict[str, TaskProtocol] = field(default_factory=dict)
    """How each task was evaluated; empty in evaluations during training."""
    sampler: SamplerFacts | None = None
    """What sampled the completions; None in evaluations during training."""
    forced: dict[str, tuple[ForcedPoint, ...]] = field(default_factory=dict)
    """Accuracy if thinking is closed by force at a budget (evals/budgets.py), by task."""
    contests: ContestRating | None = None
    """Rating of `codeforces` by the standings of its contests (evals/contests.py), if they were given."""
    seconds: float
    """Wall time of sampling and scoring."""
    shown: dict[str, tuple[ShownAnswer, ...]]
    """First completions for the first problems of each task."""
    records: tuple[ProblemRecord, ...] = field(default=(), repr=False, compare=False)
    """The records from which the metrics are computed; they are stored in samples.jsonl, not in `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the records as plain JSON values."""
        return _EVALUATION_ADAPTER.dump_python(self, mode="json", exclude={"records"})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Evaluation":
        """Inverse of `to_dict`. Raises ConfigError for any other data."""
        try:
            return _EVALUATION_ADAPTER.validate_python(data)
        except ValidationError as error:
            raise ConfigError(f"not an evaluation in the format of report.json: {error}") from error


_EVALUATION_ADAPTER = TypeAdapter(Evaluation)


def summarize(
    records: Sequence[ProblemRecord], seconds: float, chance: Mapping[str, float] | None = None
) -> Evaluation:
    """Compute all metrics of `records`. Raises ConfigError if there are none."""
    if not records:
        raise ConfigError("there are no completions to evaluate; give at least one problem")
    tasks = _group_by(records, lambda record: record.task)
    sampled = [record.sampled for record in records if not record.grader.startswith(LOGLIKELIHOOD)]
    return Evaluation(
        **vars(compute_metrics(records)),
        by_task={name: compute_metrics(part) for name, part in tasks.items()},
        by_level={level: compute_metrics(part) for level, part in _group_by(records, lambda r: r.level).items()},
        by_task_level={
            name: {level: compute_metrics(cell) for level, cell in _group_by(part, lambda r: r.level).items()}
            for name, part in tasks.items()
        },
        by_language={name: compute_metrics(part) for name, part in _group_by(records, lambda r: r.language).items()},
        chance=dict(chance or {}),
        graders={name: grader_of(part) for name, part in tasks.items() if part[0].grader},
        over_tokens=tuple(accuracy_over_tokens(sampled)) if sampled else (),
        seconds=seconds,
        shown={name: _shown_answers(part) for name, part in tasks.items()},
        records=tuple(records),
    )


def compute_metrics(records: Sequence[ProblemRecord]) -> EvalMetrics:
    """Compute the metrics of one set of problems."""
    answers = [answer for record in records for answer in record.answers]
    samples = max(len(record.answers) for record in records)
    shares = [record.share_correct for record in records]
    bounds = [sum(answer.correct is not False for answer in record.answers) / len(record.answers) for record in records]
    return EvalMetrics(
        problems=len(records),
        samples=samples,
        fewest_samples=min(len(record.answers) for record in records),
        pass_at_1=math.fsum(shares) / len(shares),
        pass_at_1_bound=math.fsum(bounds) / len(bounds),
        over_questions=question_error(shares, [(record.task, record.cluster or record.key) for record in records]),
        over_reruns=rerun_error([(record.num_correct, len(record.answers)) for record in records]),
        pass_at_k=_pass_at_powers_of_two(records, samples),
        cons_at_k={k: math.fsum(_majority(record, k) for record in records) / len(records) for k in _powers(samples)},
        pass_at_1_finished=_mean([bool(answer.correct) for answer in answers if not answer.truncated]),
        truncation_rate=_mean([answer.truncated for answer in answers]) or 0.0,
        answer_rate=_mean([answer.answer is not None for answer in answers]) or 0.0,
        format_rate=_mean([answer.well_formed for answer in answers]) or 0.0,
        mean_tokens=_mean([answer.num_tokens for answer in answers]) or 0.0,
        tokens_per_solution=tokens_per_solution([record.sampled for record in records]),
        unscorable=sum(answer.correct is None for answer in answers),
        worked_share=_mean([answer.worked for answer in answers if answer.worked is not None]),
        worked_accuracy=_mean([bool(answer.correct) for answer in answers if answer.worked]),
        direct_accuracy=_mean([bool(answer.correct) for answer in answers if answer.worked is False]),
        num_completions=len(answers),
        num_correct=sum(bool(answer.correct) for answer in answers),
        num_prompt_tokens=sum(len(record.answers) * record.prompt.num_tokens for record in records if record.prompt),
        tokens_at=_percentiles([answer.num_tokens for answer in answers]),
        measures=_mean_measures(answer.measures for answer in answers),
    )


def _percentiles(values: Sequence[int]) -> dict[int, int]:
    """Return the smallest value that at least a share of the values does not exceed, by percentile."""
    ordered = sorted(values)
    return {share: ordered[max(math.ceil(share / 100 * len(ordered)) - 1, 0)] for share in PERCENTILES}


def _mean_measures(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for measures in found:
        for name, value in measures.items():
            values.setdefault(name, []).append(value)
    return {name: sum(values[name]) / len(values[name]) for name in sorted(values.keys() - {"worked"})}


def _powers(samples: int) -> list[int]:
    """Return 2, 4, ... up to `samples`, and `samples` itself if there are several."""
    found = [1 << power for power in range(1, samples.bit_length())]
    return found if samples in (1, *found) else [*found, samples]


def _majority(record: ProblemRecord, k: int) -> float:
    classes = [None if answer.answer is None else answer_class(answer.answer) for answer in record.answers]
    return cons_at_k(classes, [bool(answer.correct) for answer in record.answers], k)


def answer_class(answer: str | int) -> str:
    """Return the class of a wrong answer in a majority vote: its normalized LaTeX, so that 1/2 and 0.5 are one.

    A program or another long text is its own class: it is no formula, and would take milliseconds.
    """
    text = str(answer)
    return _normalized(text) if len(text) <= LONGEST_FORMULA else text


@functools.lru_cache(maxsize=65536)
def _normalized(answer: str) -> str:
    return normalize_latex(answer)


def _pass_at_powers_of_two(records: Sequence[ProblemRecord], samples: int) -> dict[int, float]:
    """Return pass@k for k = 1, 2, 4, ... <= samples."""
    out, k = {}, 1
    while k <= samples:
        values = [pass_at_k(len(r.answers), r.num_correct, k) for r in records if len(r.answers) >= k]
        out[k] = sum(values) / len(values)
        k *= 2
    return out


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _group_by(records: Sequence[ProblemRecord], name: Callable[[ProblemRecord], Any]) -> dict[Any, list[ProblemRecord]]:
    """Group records by `name`; keys are sorted."""
    return {key: [r for r in records if name(r) == key] for key in sorted({name(r) for r in records})}


def _shown_answers(records: Sequence[ProblemRecord]) -> tuple[ShownAnswer, ...]:
    return tuple(
        ShownAnswer(question=r.question, reference=r.reference, text=r.answers[0].text, correct=r.answers[0].correct)
        for r in records[:SHOWN_ANSWERS]
    )


def curve_point(step: int, evaluation: Evaluation, held_out: EvalMetrics | None = None) -> dict[str, Any]:
    """Return one point of the learning curve, in the format that plots.py expects.

    held_out: metrics of a level excluded from training, or None.
    """
    point: dict[str, Any] = {"step": step} | {name: getattr(evaluation, name) for name in CURVE}
    point["by_task"] = {name: part.pass_at_1 for name, part in evaluation.by_task.items()}
    if held_out is not None:
        point["held_out_level"] = {"pass_at_1": held_out.pass_at_1, "question_error": held_out.question_error}
    return point
