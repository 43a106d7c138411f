"""From recorded answers to figures: what one evaluation found, for all problems and by family, level and language.

Records keep every answer, so each figure can be computed again from samples.jsonl by `summarize`, the function that
computed it the first time.
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
"""Samples that vote in cons@16; all of them where fewer were drawn."""
SHOWN_ANSWERS = 3
"""Answers per family kept as text in an Evaluation."""
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
"""Figures of a point of the learning curve."""


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """One sampled answer and what was found about it."""

    text: str
    """The whole turn: prefill and completion."""
    answer: str | int | None
    """The normalized answer; None if there was none to read."""
    correct: bool | None
    """Verdict of the reward function; None when it could not judge."""
    well_formed: bool
    """Whether the turn keeps its form: text/parse.py."""
    worked: bool
    """The thinking holds worked steps: runner.is_worked."""
    truncated: bool
    """Cut off at max_tokens, as the engine said."""
    num_tokens: int
    """Tokens drawn, the end token included."""
    rule: str | None = None
    """The rule that found the answer, in the form "flexible_extract": text/final_answer.py."""


@dataclass(frozen=True, kw_only=True)
class ProblemRecord:
    """One problem and its sampled answers, in the order drawn."""

    key: str
    task: str
    level: int
    language: str
    wording: int
    question: str
    reference: str
    """The right answer."""
    answers: tuple[AnswerRecord, ...]

    @property
    def scored(self) -> tuple[AnswerRecord, ...]:
        """The answers that could be judged."""
        return tuple(answer for answer in self.answers if answer.correct is not None)

    @property
    def num_correct(self) -> int:
        return sum(bool(answer.correct) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures over a set of problems. A figure is None where nothing defines it (no problem could be judged)."""

    problems: int
    """Problems with at least one judged answer; means over problems run over these."""
    samples: int
    """Answers drawn per problem."""
    pass_at_1: float | None
    """Mean over problems of the share of right answers."""
    stderr: float | None
    """Standard error of pass_at_1 over problems; None for a single problem."""
    pass_at_k: dict[int, float]
    """Unbiased pass@k, k = 1, 2, 4, ... up to samples, over problems with at least k judged answers."""
    cons_at_16: float | None
    """Majority vote of the first 16 judged answers (of all, if fewer)."""
    answer_rate: float
    """Share of answers that could be read in the form asked for; where it is 0, accuracy says nothing."""
    format_rate: float
    """Share of well-formed answers."""
    truncation_rate: float
    """Share of answers cut off at max_tokens."""
    mean_tokens: float
    """Tokens per answer, the end token included."""
    unscorable: int
    """Answers without a verdict; they are left out of every figure about correctness."""
    worked_share: float
    """Share of answers whose thinking shows worked steps."""
    worked_accuracy: float | None
    """Share of right ones among worked answers."""
    direct_accuracy: float | None
    """Share of right ones among the others."""


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """An answer kept as text for the report."""

    question: str
    reference: str
    text: str
    correct: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figures):
    """Figures over all problems, the same for their parts, and answers to look at."""

    by_task: dict[str, Figures]
    by_level: dict[int, Figures]
    by_task_level: dict[str, dict[int, Figures]]
    by_language: dict[str, Figures]
    chance: dict[str, float] = field(default_factory=dict)
    """Probability of a blind guess being right, per family."""
    seconds: float
    """Wall time of drawing and judging."""
    shown: dict[str, tuple[ShownAnswer, ...]]
    """First answers to the first problems of each family."""
    records: tuple[ProblemRecord, ...] = field(default=(), repr=False, compare=False)
    """Everything the figures come from; kept in samples.jsonl, not in `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of everything but the records."""
        return _EVALUATION.dump_python(self, mode="json", exclude={"records"})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`. Raises ConfigError for anything else."""
        try:
            return _EVALUATION.validate_python(data)
        except ValidationError as error:
            raise ConfigError(f"this is not an evaluation: {error}") from error


_EVALUATION = TypeAdapter(Evaluation)
_RECORD = TypeAdapter(ProblemRecord)


def summarize(
    records: Sequence[ProblemRecord], seconds: float, chance: Mapping[str, float] | None = None
) -> Evaluation:
    """All figures of `records`. Raises ConfigError without any."""
    if not records:
        raise ConfigError("there are no answers to evaluate; ask at least one problem")
    tasks = _split(records, lambda record: record.task)
    return Evaluation(
        **vars(figures(records)),
        by_task={name: figures(part) for name, part in tasks.items()},
        by_level={level: figures(part) for level, part in _split(records, lambda r: r.level).items()},
        by_task_level={
            name: {level: figures(cell) for level, cell in _split(part, lambda r: r.level).items()}
            for name, part in tasks.items()
        },
        by_language={name: figures(part) for name, part in _split(records, lambda r: r.language).items()},
        chance=dict(chance or {}),
        seconds=seconds,
        shown={name: _shown(part) for name, part in tasks.items()},
        records=tuple(records),
    )


def figures(records: Sequence[ProblemRecord]) -> Figures:
    """The figures of one set of problems."""
    answers = [answer for record in records for answer in record.answers]
    judged = [record for record in records if record.scored]
    samples = max(len(record.answers) for record in records)
    mean, stderr = mean_and_stderr([r.num_correct / len(r.scored) for r in judged]) if judged else (None, None)
    votes = [cons_at_k([a.answer for a in r.scored], [bool(a.correct) for a in r.scored], CONS_SAMPLES) for r in judged]
    return Figures(
        problems=len(judged),
        samples=samples,
        pass_at_1=mean,
        stderr=stderr,
        pass_at_k=_pass_at_powers(judged, samples),
        cons_at_16=_mean(votes),
        answer_rate=_mean([answer.answer is not None for answer in answers]) or 0.0,
        format_rate=_mean([answer.well_formed for answer in answers]) or 0.0,
        truncation_rate=_mean([answer.truncated for answer in answers]) or 0.0,
        mean_tokens=_mean([answer.num_tokens for answer in answers]) or 0.0,
        unscorable=sum(answer.correct is None for answer in answers),
        worked_share=_mean([answer.worked for answer in answers]) or 0.0,
        worked_accuracy=_mean([a.correct for a in answers if a.correct is not None and a.worked]),
        direct_accuracy=_mean([a.correct for a in answers if a.correct is not None and not a.worked]),
    )


def _pass_at_powers(judged: Sequence[ProblemRecord], samples: int) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ... <= samples, where some problem has k judged answers."""
    out, k = {}, 1
    while k <= samples:
        values = [pass_at_k(len(r.scored), r.num_correct, k) for r in judged if len(r.scored) >= k]
        if values:
            out[k] = sum(values) / len(values)
        k *= 2
    return out


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _split(records: Sequence[ProblemRecord], name: Callable[[ProblemRecord], Any]) -> dict[Any, list[ProblemRecord]]:
    """Records by name, names sorted."""
    return {key: [r for r in records if name(r) == key] for key in sorted({name(r) for r in records})}


def _shown(records: Sequence[ProblemRecord]) -> tuple[ShownAnswer, ...]:
    return tuple(
        ShownAnswer(question=r.question, reference=r.reference, text=r.answers[0].text, correct=r.answers[0].correct)
        for r in records[:SHOWN_ANSWERS]
    )


def write_samples(path: Path, records: Iterable[ProblemRecord]) -> None:
    """One problem a line, with all its answers; written whole or not at all."""
    lines = (json.dumps(_RECORD.dump_python(record, mode="json"), ensure_ascii=False) for record in records)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_samples(path: Path) -> list[ProblemRecord]:
    """The records of a samples.jsonl. Raises ConfigError naming the line that is none."""
    records = []
    for number, line in enumerate(lines(path), start=1):
        try:
            records.append(_RECORD.validate_json(line))
        except ValidationError as error:
            raise ConfigError(f"{path}:{number} is not a recorded problem: {error}") from error
    return records


def curve_point(step: int, evaluation: Evaluation, held_out: Figures | None = None) -> dict[str, Any]:
    """One point of the learning curve, as plots.py reads it.

    held_out: figures of a level that training never asks, or None.
    """
    point: dict[str, Any] = {"step": step} | {name: getattr(evaluation, name) for name in CURVE}
    point["by_task"] = {name: part.pass_at_1 for name, part in evaluation.by_task.items()}
    if held_out is not None:
        point["held_out_level"] = {"pass_at_1": held_out.pass_at_1, "stderr": held_out.stderr}
    return point
