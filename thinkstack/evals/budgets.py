"""Accuracy over thinking budgets from one run: thinking that is longer than a budget is cut, closed by force, answered.

A completion whose thinking ends within the budget keeps its answer. Source: budget forcing, s1, arXiv:2501.19393.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from thinkstack.evals.metrics import ForcedPoint
from thinkstack.evals.records import ProblemRecord
from thinkstack.evals.sampling import Generate, SampledProblem
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.chat import ChatFormat, think_end_token_ids
from thinkstack.text.parse import ThinkingFormat, parse_response
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import Completion, ConfigError, Problem, SamplingParams

Grade = Callable[[Sequence[SampledProblem]], list[ProblemRecord]]
"""Scores responses: runner.grade_problems with a reward and a pool."""
SamplingFor = Callable[[Problem], SamplingParams]
"""The sampling parameters of a problem."""


@dataclass(frozen=True)
class _Cut:
    """A completion whose thinking is longer than the budget."""

    place: int
    """Place of the problem."""
    sample: int
    token_ids: tuple[int, ...]
    """The thinking within the budget, and the tokens that close it."""


def force_close(
    generate: Generate,
    chat: ChatFormat,
    sampled: Sequence[SampledProblem],
    budget: int,
    sampling_for: SamplingFor,
    answer_tokens: int,
    thinking_format: ThinkingFormat,
) -> tuple[list[SampledProblem], list[int]]:
    """Return the problems with each completion as if its thinking had been closed after `budget` tokens.

    sampling_for: the parameters of the evaluation; the answers after a forced end have at most answer_tokens and seeds
    of their own. Returns the problems and, for each, the number of completions that were cut.
    Raises ConfigError if no completion thinks, since a budget has no meaning then.
    """
    close = think_end_token_ids(chat)
    sizes = [[_thinking_tokens(response.completion, close) for response in one.responses] for one in sampled]
    texts = (response.text for one in sampled for response in one.responses)
    if not any(THINK_OPEN in text or THINK_CLOSE in text for text in texts):
        raise ConfigError(
            "thinking_budgets: no completion has thinking that could be cut; leave them out for models without thinking"
        )
    cuts = [
        _Cut(place, sample, _ids(response.completion)[:budget] + close)
        for place, one in enumerate(sampled)
        for sample, response in enumerate(one.responses)
        if _is_longer(response.completion, sizes[place][sample], budget)
    ]
    samplings = []
    for cut in cuts:
        base = sampling_for(sampled[cut.place].problem)
        seed = digest("forced", base.seed, cut.sample, budget)
        samplings.append(replace(base, n=1, max_tokens=answer_tokens, thinking_budget=None, seed=seed))
    prompts = [sampled[cut.place].prompt.token_ids + cut.token_ids for cut in cuts]
    answers = generate(prompts, samplings) if cuts else []
    responses = [list(one.responses) for one in sampled]
    for cut, (answer,) in zip(cuts, answers, strict=True):
        whole = Completion(
            token_ids=cut.token_ids + answer.token_ids,
            logprobs=(0.0,) * len(cut.token_ids) + answer.logprobs,
            finish_reason=answer.finish_reason,
            weights_version=answer.weights_version,
        )
        responses[cut.place][cut.sample] = parse_response(chat, whole, thinking_format)
    found = [
        replace(one, responses=tuple(own), num_tokens=tuple(len(_ids(each.completion)) for each in own))
        for one, own in zip(sampled, responses, strict=True)
    ]
    counts = Counter(cut.place for cut in cuts)
    return found, [counts[place] for place in range(len(sampled))]


def _ids(completion: Completion | None) -> tuple[int, ...]:
    return completion.token_ids if completion else ()


def _thinking_tokens(completion: Completion | None, close: tuple[int, ...]) -> int | None:
    """The number of tokens before those that close thinking; None if it is not closed."""
    ids = _ids(completion)
    return next((at for at in range(len(ids)) if ids[at : at + len(close)] == close), None)


def _is_longer(completion: Completion | None, thinking: int | None, budget: int) -> bool:
    """Whether the thinking is longer than the budget; without a closing tag it is if it was truncated."""
    ids = _ids(completion)
    if thinking is None:
        return completion is not None and completion.finish_reason == "length" and len(ids) > budget
    return thinking > budget


def forced_points(
    budgets: Sequence[int], close: Callable[[int], tuple[list[SampledProblem], list[int]]], grade: Grade
) -> dict[str, tuple[ForcedPoint, ...]]:
    """Return the accuracy at each budget, in increasing order, by task. close: `force_close` at a budget."""
    points: dict[str, list[ForcedPoint]] = defaultdict(list)
    for budget in sorted(set(budgets)):
        sampled, cuts = close(budget)
        records = grade(sampled)
        by_task: dict[str, list[int]] = defaultdict(list)
        for place, one in enumerate(sampled):
            by_task[one.problem.task].append(place)
        for task, places in by_task.items():
            own = [records[place] for place in places]
            answers = [answer for record in own for answer in record.answers]
            points[task].append(
                ForcedPoint(
                    budget_tokens=budget,
                    pass_at_1=math.fsum(record.share_correct for record in own) / len(own),
                    forced=sum(cuts[place] for place in places) / len(answers),
                    mean_tokens=sum(answer.num_tokens for answer in answers) / len(answers),
                )
            )
    return {task: tuple(found) for task, found in points.items()}
