"""Whether a model has seen the questions of a test: overlap with training text, completed half questions, dates."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy

from thinkstack.evals.records import ProblemRecord
from thinkstack.evals.sampling import Generate
from thinkstack.evals.statistics import LEVEL, ErrorEstimate, question_error, t_quantile
from thinkstack.tasks.overlap import Overlap, OverlapIndex, split_words
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError, Problem, SamplingParams

CONTAMINATED_SHARE = 0.5
"""Share of a question's runs of words above which it counts as contained in a document."""
EXACT_WORDS = 5
"""Words after the first half of a question that count as recited if the model writes them."""
PERMUTATIONS = 10_000
"""Permutations of the comparison of dates."""
LONGEST_HALF_TOKENS = 256
"""Tokens of a second half that are compared."""


@dataclass(frozen=True, kw_only=True)
class CorpusOverlap:
    """The test problems that occur in a training text."""

    num_documents: int
    num_problems: int
    too_short: tuple[Hashable, ...]
    """Problems with too few words to be searched."""
    found: dict[Hashable, Overlap] = field(default_factory=dict)
    """The largest overlap of each problem with a document."""
    documents: dict[Hashable, str] = field(default_factory=dict)
    """The address of this document."""

    @property
    def contaminated(self) -> list[Hashable]:
        """The problems of whose runs more than CONTAMINATED_SHARE occur in one document. Fewer are common phrases."""
        return [key for key, overlap in self.found.items() if overlap.share > CONTAMINATED_SHARE]


def corpus_overlap(problems: Sequence[Problem], documents: Iterable[tuple[str, str]]) -> CorpusOverlap:
    """Search the questions of test problems in documents, given as (address, text).

    Raises ConfigError without a document.
    """
    index = OverlapIndex({problem.key: problem.question for problem in problems})
    found: dict[Hashable, Overlap] = {}
    where: dict[Hashable, str] = {}
    count = 0
    for address, text in documents:
        count += 1
        for key, overlap in index.find(text).items():
            if key not in found or overlap.share > found[key].share:
                found[key], where[key] = overlap, address
    if not count:
        raise ConfigError("there are no documents to search; give text files or JSON lines")
    return CorpusOverlap(
        num_documents=count, num_problems=len(problems), too_short=tuple(index.too_short), found=found, documents=where
    )


@dataclass(frozen=True, kw_only=True)
class Recited:
    """What a model writes after the first half of a question."""

    key: str
    expected: str
    """The second half."""
    text: str
    """The model's text, as long as the second half in tokens."""
    is_exact: bool
    """Whether the first EXACT_WORDS words are those of the second half."""
    similarity: float
    """ROUGE-L of the words: the F1 score of their longest common subsequence."""
    chance: float
    """The same for the second half of another question, the next one of the list: what the topic alone gives."""


def complete_halves(
    generate: Generate, tokenizer: Tokenizer, problems: Sequence[Problem], stop_token_ids: Sequence[int]
) -> list[Recited]:
    """Let a model continue the first half of each question greedily, as plain text without a chat template.

    A question that was trained on is recited. Questions of fewer than 4 * EXACT_WORDS words are left out.
    Source: Golchin and Surdeanu, arXiv:2308.08493, who compare with ROUGE-L. Raises ConfigError if all are too short.
    """
    halves = [(problem, *split_question(problem.question)) for problem in problems]
    halves = [half for half in halves if len(split_words(half[0].question)) >= 4 * EXACT_WORDS]
    if not halves:
        raise ConfigError(f"no question has {4 * EXACT_WORDS} words or more, so none can be completed from its half")
    prompts = [[*tokenizer.begin_ids, *tokenizer.encode(first)] for _, first, _ in halves]
    sizes = [min(len(tokenizer.encode(second)), LONGEST_HALF_TOKENS) for _, _, second in halves]
    samplings = [
        SamplingParams(temperature=0.0, max_tokens=max(size, 1), stop_token_ids=tuple(stop_token_ids)) for size in sizes
    ]
    found = []
    for place, (completion,) in enumerate(generate(prompts, samplings)):
        problem, _, second = halves[place]
        other = halves[(place + 1) % len(halves)][2]
        text = tokenizer.decode(list(completion.token_ids))
        found.append(
            Recited(
                key=problem.key,
                expected=second,
                text=text,
                is_exact=split_words(text)[:EXACT_WORDS] == split_words(second)[:EXACT_WORDS],
                similarity=rouge_l(split_words(second), split_words(text)),
                chance=rouge_l(split_words(other), split_words(text)),
            )
        )
    return found


def split_question(question: str) -> tuple[str, str]:
    """Return the two halves of a question, split at a blank; the second half starts with the blank."""
    middle = len(question) // 2
    at = question.find(" ", middle)
    return (question[:at], question[at:]) if at > 0 else (question[:middle], question[middle:])


def rouge_l(expected: Sequence[str], found: Sequence[str]) -> float:
    """Return the F1 score of the longest common subsequence of two lists of words. Source: Lin, 2004."""
    lengths = [0] * (len(found) + 1)
    for word in expected:
        before = 0
        for place, other in enumerate(found, start=1):
            above = lengths[place]
            lengths[place] = before + 1 if word == other else max(above, lengths[place - 1])
            before = above
    total = len(expected) + len(found)
    return 2 * lengths[-1] / total if total else 0.0


def memorization(found: Sequence[Recited]) -> ErrorEstimate | None:
    """Return the mean of similarity minus chance with its error over questions.

    Names and numbers of the first half alone raise it above 0: compare models, or questions of two dates.
    """
    return question_error([one.similarity - one.chance for one in found])


@dataclass(frozen=True, kw_only=True)
class DateComparison:
    """Accuracy on problems from before and after a date."""

    before: ErrorEstimate
    after: ErrorEstimate
    num_before: int
    num_after: int
    difference: float
    """After minus before; newer problems may be harder as well."""
    low: float
    high: float
    p_value: float
    """Of a permutation test: how often problems that are dealt to the two sides at random differ as much."""


def compare_dates(records: Sequence[ProblemRecord], cutoff: str, seed: int = 0) -> DateComparison:
    """Compare problems dated before `cutoff` (YYYY-MM-DD), which a model may have seen, with the later ones.

    seed: of the permutations. Raises ConfigError if there are fewer than two problems with a date on either side.
    """
    shares = {
        is_after: [one.share_correct for one in records if one.date and (one.date >= cutoff) == is_after]
        for is_after in (False, True)
    }
    before, after = question_error(shares[False]), question_error(shares[True])
    if before is None or after is None:
        raise ConfigError(
            f"{len(shares[False])} problems are from before {cutoff} and {len(shares[True])} from after it; both need "
            "two; choose another date, or a set with dates such as livecodebench"
        )
    low, high = _interval(before, after)
    return DateComparison(
        before=before,
        after=after,
        num_before=len(shares[False]),
        num_after=len(shares[True]),
        difference=after.mean - before.mean,
        low=low,
        high=high,
        p_value=_permutation_p(shares[False], shares[True], seed),
    )


def _interval(before: ErrorEstimate, after: ErrorEstimate) -> tuple[float, float]:
    """The interval of the difference, by Welch. If neither side varies, that of the ends of both intervals."""
    variances = [one.standard_error**2 for one in (before, after)]
    if not any(variances):
        return after.low - before.high, after.high - before.low
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / before.degrees + variances[1] ** 2 / after.degrees)
    half = math.sqrt(sum(variances)) * t_quantile(1 - LEVEL / 2, degrees)
    return after.mean - before.mean - half, after.mean - before.mean + half


def _permutation_p(before: Sequence[float], after: Sequence[float], seed: int) -> float:
    """The share of PERMUTATIONS of all problems over the two sides that differ as much; the observed one is among
    them."""
    values = numpy.array([*before, *after])
    shuffled = numpy.random.default_rng(seed).permuted(numpy.tile(values, (PERMUTATIONS, 1)), axis=1)
    found = shuffled[:, len(before) :].mean(axis=1) - shuffled[:, : len(before)].mean(axis=1)
    observed = abs(sum(after) / len(after) - sum(before) / len(before))
    return float(1 + (abs(found) >= observed - 1e-12).sum()) / (PERMUTATIONS + 1)
