"""Metrics of one evaluation, for all problems and by task, level and language, computed from recorded completions.

Records contain every completion, so `summarize` can recompute all metrics from samples.jsonl.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from thinkstack.evals.metrics import cons_at_k, mean_and_stderr, pass_at_k
from thinkstack.files import lines
from thinkstack.log import write_text
from thinkstack.types import ConfigError

CONS_SAMPLES = 16
"""Number of samples that vote in cons@16; all samples if there are fewer."""
SHOWN_ANSWERS = 3
"""Number of completions per task that an Evaluation stores as text."""
CURVE = (
    "pass_at_1",
    "stderr",
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
class AnswerRecord:
    """One sampled completion and its evaluation."""

    text: str
    """The complete turn: prefill and completion."""
    answer: str | int | None
    """The normalized answer; None if no answer could be read."""
    correct: bool | None
    """Whether the reward function found the answer correct; None if it is unscorable."""
    well_formed: bool
    """Whether the turn has the expected format (text/parse.py)."""
    truncated: bool
    """Whether the engine stopped the completion at max_tokens."""
    num_tokens: int
    """Sampled tokens, including the end token."""
    rule: str | None = None
    """The rule in text/final_answer.py that found the answer, with thinking_format="flexible_extract"."""
    unscorable: str | None = None
    """Reason why there is no score; None if the completion is scored."""
    grader: str = ""
    """The grader that decided and, for code, the sandbox, as in "calls, bwrap"; empty if the task has one grader."""
    detail: str = ""
    """Why the answer is wrong, if the grader says so."""
    measures: dict[str, float] = field(default_factory=dict)
    """Measures that only some tasks have, by name: of puzzles `worked`, whether the thinking contains worked steps."""

    @property
    def worked(self) -> bool | None:
        """Whether the thinking contains worked steps; None if the task has no such measure."""
        return bool(self.measures["worked"]) if "worked" in self.measures else None


@dataclass(frozen=True, kw_only=True)
class ProblemRecord:
    """One problem and its completions, in sampling order."""

    key: str
    task: str
    level: int
    language: str
    wording: int
    question: str
    reference: str
    """The reference answer."""
    answers: tuple[AnswerRecord, ...]

    @property
    def scored(self) -> tuple[AnswerRecord, ...]:
        """The completions that could be scored."""
        return tuple(answer for answer in self.answers if answer.correct is not None)

    @property
    def num_correct(self) -> int:
        return sum(bool(answer.correct) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """Metrics over a set of problems. A metric is None if it is undefined (no problem could be scored)."""

    problems: int
    """Number of problems with at least one scored completion; means over problems use these problems."""
    samples: int
    """Number of sampled completions per problem."""
    pass_at_1: float | None
    """Mean over problems of the share of correct completions."""
    stderr: float | None
    """Standard error of pass_at_1 over problems; None for a single problem."""
    pass_at_k: dict[int, float]
    """Unbiased pass@k, k = 1, 2, 4, ... up to samples, over problems with at least k scored completions."""
    cons_at_16: float | None
    """Majority vote of the first 16 scored completions (of all, if fewer)."""
    answer_rate: float
    """Share of completions with an answer in the configured thinking_format; if it is 0, the accuracy is
    meaningless."""
    format_rate: float
    """Share of well-formed completions."""
    truncation_rate: float
    """Share of completions truncated at max_tokens."""
    mean_tokens: float
    """Mean tokens per completion, including the end token."""
    unscorable: int
    """Number of completions that could not be scored; they are excluded from every metric of correctness."""
    worked_share: float | None
    """Share of completions whose thinking contains worked steps, among those of tasks with worked solutions; None if
    there are none."""
    worked_accuracy: float | None
    """Share of correct completions among the completions with worked steps."""
    direct_accuracy: float | None
    """Share of correct completions among the completions without worked steps."""


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
_RECORD_ADAPTER = TypeAdapter(ProblemRecord)


def summarize(
    records: Sequence[ProblemRecord], seconds: float, chance: Mapping[str, float] | None = None
) -> Evaluation:
    """Compute all metrics of `records`. Raises ConfigError if there are none."""
    if not records:
        raise ConfigError("there are no completions to evaluate; give at least one problem")
    tasks = _group_by(records, lambda record: record.task)
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
        seconds=seconds,
        shown={name: _shown_answers(part) for name, part in tasks.items()},
        records=tuple(records),
    )


def compute_metrics(records: Sequence[ProblemRecord]) -> EvalMetrics:
    """Compute the metrics of one set of problems."""
    answers = [answer for record in records for answer in record.answers]
    scored_records = [record for record in records if record.scored]
    samples = max(len(record.answers) for record in records)
    mean, stderr = (
        mean_and_stderr([r.num_correct / len(r.scored) for r in scored_records]) if scored_records else (None, None)
    )
    votes = [
        cons_at_k([a.answer for a in r.scored], [bool(a.correct) for a in r.scored], CONS_SAMPLES)
        for r in scored_records
    ]
    return EvalMetrics(
        problems=len(scored_records),
        samples=samples,
        pass_at_1=mean,
        stderr=stderr,
        pass_at_k=_pass_at_powers_of_two(scored_records, samples),
        cons_at_16=_mean(votes),
        answer_rate=_mean([answer.answer is not None for answer in answers]) or 0.0,
        format_rate=_mean([answer.well_formed for answer in answers]) or 0.0,
        truncation_rate=_mean([answer.truncated for answer in answers]) or 0.0,
        mean_tokens=_mean([answer.num_tokens for answer in answers]) or 0.0,
        unscorable=sum(answer.correct is None for answer in answers),
        worked_share=_mean([answer.worked for answer in answers if answer.worked is not None]),
        worked_accuracy=_mean([a.correct for a in answers if a.correct is not None and a.worked]),
        direct_accuracy=_mean([a.correct for a in answers if a.correct is not None and a.worked is False]),
    )


def _pass_at_powers_of_two(scored_records: Sequence[ProblemRecord], samples: int) -> dict[int, float]:
    """Return pass@k for k = 1, 2, 4, ... <= samples, as long as some problem has k scored completions."""
    out, k = {}, 1
    while k <= samples:
        values = [pass_at_k(len(r.scored), r.num_correct, k) for r in scored_records if len(r.scored) >= k]
        if values:
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


def write_samples(path: Path, records: Iterable[ProblemRecord]) -> None:
    """Write one problem with all its completions per line, atomically."""
    lines = (json.dumps(_RECORD_ADAPTER.dump_python(record, mode="json"), ensure_ascii=False) for record in records)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_samples(path: Path) -> list[ProblemRecord]:
    """Read the records of a samples.jsonl. Raises ConfigError with the number of an invalid line."""
    records = []
    for number, line in enumerate(lines(path), start=1):
        try:
            records.append(_RECORD_ADAPTER.validate_json(line))
        except ValidationError as error:
            raise ConfigError(
                f"{path} line {number} is not a problem in the format of samples.jsonl: {error}"
            ) from error
    return records


def curve_point(step: int, evaluation: Evaluation, held_out: EvalMetrics | None = None) -> dict[str, Any]:
    """Return one point of the learning curve, in the format that plots.py expects.

    held_out: metrics of a level excluded from training, or None.
    """
    point: dict[str, Any] = {"step": step} | {name: getattr(evaluation, name) for name in CURVE}
    point["by_task"] = {name: part.pass_at_1 for name, part in evaluation.by_task.items()}
    if held_out is not None:
        point["held_out_level"] = {"pass_at_1": held_out.pass_at_1, "stderr": held_out.stderr}
    return point
