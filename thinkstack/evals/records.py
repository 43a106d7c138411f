"""Records of an evaluation: one problem with its prompt, its completions and their verdicts, as in samples.jsonl."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from thinkstack.evals.metrics import Sampled
from thinkstack.evals.protocol import SamplerFacts
from thinkstack.files import lines
from thinkstack.log import write_text
from thinkstack.tasks.benchmarks.code_task import NOT_RUN
from thinkstack.types import ConfigError, Problem

LOGLIKELIHOOD = "log-likelihood"
"""Start of the grader of questions that are answered without text."""


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
    """Measures of the text by name (evals/text_measures.py), and those that only some tasks have: of puzzles `worked`,
    whether the thinking contains worked steps."""
    token_ids: tuple[int, ...] = ()
    """The sampled tokens; empty if the sampler gives text alone."""

    @property
    def worked(self) -> bool | None:
        """Whether the thinking contains worked steps; None if the task has no such measure."""
        return bool(self.measures["worked"]) if "worked" in self.measures else None


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """The prompt of a problem and the seed of its completions."""

    sha256: str
    """Hash of the token ids as decimal numbers with commas; without ids, of the messages as JSON."""
    token_ids: tuple[int, ...] = ()
    """The prompt as the model read it; empty for an endpoint, which applies a template of its own."""
    num_tokens: int = 0
    """Tokens of the prompt; 0: unknown."""
    num_bos: int | None = None
    """BOS tokens at its start; None if unknown or if the tokenizer has no BOS."""
    seed: int = 0
    """Seed of the completions."""


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
    cluster: str = ""
    """Source that the question shares with others, such as a passage or a template; empty: the key, which translations
    and wordings of one problem share."""
    grader: str = ""
    """Name of the grader: tasks/verify/graders.py, or the task's name; empty in files that do not have it."""
    date: str = ""
    """Date of the problem, YYYY-MM-DD; empty if the set has none."""
    metadata: dict[str, str | int | float] = field(default_factory=dict)
    """Facts of the problem that a figure needs (RECORDED), by name."""
    prompt: PromptRecord | None = None
    """None in files that do not have it."""
    sampler: SamplerFacts | None = None
    """What sampled the completions; None in files that do not have it."""

    @property
    def num_correct(self) -> int:
        """Correct completions; an unscorable completion counts as wrong."""
        return sum(bool(answer.correct) for answer in self.answers)

    @property
    def share_correct(self) -> float:
        """Share of correct completions among the completions that are present."""
        return self.num_correct / len(self.answers)

    @property
    def sampled(self) -> list[Sampled]:
        return [(answer.num_tokens, bool(answer.correct), not answer.truncated) for answer in self.answers]


RECORDED = ("contest_id", "points")
"""Names in the metadata of a problem that its record keeps."""
RECORD_ADAPTER = TypeAdapter(ProblemRecord)


def record_problem(
    problem: Problem,
    answers: Sequence[AnswerRecord],
    grader: str,
    prompt: PromptRecord | None = None,
    sampler: SamplerFacts | None = None,
) -> ProblemRecord:
    """Return the record of a problem and its answers."""
    return ProblemRecord(
        key=problem.key,
        task=problem.task,
        level=problem.level,
        language=problem.language,
        wording=problem.wording,
        question=problem.question,
        reference=problem.answer,
        cluster=str(problem.metadata.get("cluster", "")),
        grader=grader,
        date=str(problem.metadata.get("date", "")),
        metadata={name: problem.metadata[name] for name in RECORDED if name in problem.metadata},
        prompt=prompt,
        sampler=sampler,
        answers=tuple(answers),
    )


def grader_of(records: Sequence[ProblemRecord]) -> str:
    """Return the grader of a task: of code with the sandbox, as most completions that have a program were graded."""
    found = Counter(one.grader for record in records for one in record.answers if one.grader not in ("", NOT_RUN))
    return found.most_common(1)[0][0] if found else records[0].grader


def write_samples(path: Path, records: Iterable[ProblemRecord]) -> None:
    """Write one problem with all its completions per line, atomically."""
    lines = (json.dumps(RECORD_ADAPTER.dump_python(record, mode="json"), ensure_ascii=False) for record in records)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_samples(path: Path) -> list[ProblemRecord]:
    """Read the records of a samples.jsonl. Raises ConfigError with the number of an invalid line."""
    records = []
    for number, line in enumerate(lines(path), start=1):
        try:
            records.append(RECORD_ADAPTER.validate_json(line))
        except ValidationError as error:
            raise ConfigError(
                f"{path} line {number} is not a problem in the format of samples.jsonl: {error}"
            ) from error
    return records
