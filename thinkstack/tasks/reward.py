"""The reward: a weighted sum of named parts of a batch of responses.

RL, evaluation and rejection sampling call the same function, `score`. To add a part, write a function and add it to
PARTS, or name a function of your own file as PATH.py:FUNCTION in a recipe.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from thinkstack.config import did_you_mean
from thinkstack.tasks.custom_reward import call_reward, load_reward
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.task import Task
from thinkstack.tasks.verify.language import language_share
from thinkstack.tasks.verify.pool import VerifierPool, checked, unscorable
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN, ThinkingFormat
from thinkstack.types import ConfigError, Problem, Response, Score

Pairs = Sequence[tuple[Problem, Response]]


def accuracy_part(problem: Problem, response: Response, accuracy: float) -> float:
    """Return the accuracy from the task's verifier: 1 if the final answer is correct, else 0."""
    return accuracy


def format_part(problem: Problem, response: Response, accuracy: float) -> float:
    """Return 1 if the turn is well-formed (text/parse.py), else 0."""
    return float(response.is_well_formed)


def accuracy_if_formatted_part(problem: Problem, response: Response, accuracy: float) -> float:
    """Return the accuracy of a well-formed turn, else 0: the format alone earns nothing."""
    return accuracy * float(response.is_well_formed)


def language_part(problem: Problem, response: Response, accuracy: float) -> float:
    """Return the share of the question's language in the text of the turn without its answer (R1 paper, stage 1).

    Unclosed thinking is included. Returns 1 if the text has too few words to tell its language.
    """
    text_outside_answer = re.sub(f"{ANSWER_OPEN}.*?{ANSWER_CLOSE}", " ", response.text, flags=re.DOTALL)
    share = language_share(text_outside_answer, problem.language, quoted=problem.question)
    return 1.0 if share is None else share


def no_repetition_part(problem: Problem, response: Response, accuracy: float) -> float:
    """Return the share of distinct runs of 6 words (characters of Chinese) in the text of the turn.

    Text in a loop tends to 0; a text of fewer than 6 words has 1. "Demystifying Long CoT" (arXiv:2502.03373) penalizes
    repeated n-grams, because policies that are rewarded for length repeat themselves.
    """
    words = re.findall(r"[\u4e00-\u9fff]|\w+|[^\w\s]", response.text)
    runs = list(zip(*(words[start:] for start in range(6)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def random_part(problem: Problem, response: Response, accuracy: float) -> float:
    """Return a coin flip by a hash of the turn's text: a control."""
    return float(digest("random reward", problem.key, response.text) % 2)


PARTS: dict[str, Callable[[Problem, Response, float], float]] = {
    "accuracy": accuracy_part,
    "format": format_part,
    "accuracy_if_formatted": accuracy_if_formatted_part,
    "language": language_part,
    "no_repetition": no_repetition_part,
    "random": random_part,
}
"""The parts by name: functions of (problem, response, accuracy)."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Parts of the reward and the expected format of a turn."""

    parts: dict[str, float] = field(default_factory=lambda: {"accuracy_if_formatted": 1.0})
    """Weight of each part; the reward is the weighted sum. Parts: "accuracy"; "format"; "accuracy_if_formatted", their
    product; "language", the share of the question's language; "no_repetition", the share of distinct runs of words;
    "random", a control; and functions of your own, PATH.py:FUNCTION (tasks/custom_reward.py). The R1 paper uses
    accuracy = 1 and format = 1."""
    thinking_format: ThinkingFormat = "think_answer_tags"
    """The expected format of a turn: text/parse.py."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError(f"reward.parts has no part; choose from {', '.join(PARTS)}, or PATH.py:FUNCTION")
        for name, weight in self.parts.items():
            if name in PARTS and weight < 0:
                raise ConfigError(f"reward.parts.{name}={weight} would punish what {name} rewards; use 0 or more")
            if name not in PARTS and ":" not in name and not name.endswith(".py"):
                raise ConfigError(f"unknown part reward.parts.{name!r}{did_you_mean(name, PARTS)}")
            if name not in PARTS:
                load_reward(name)


@dataclass(frozen=True)
class Reward:
    """The reward function of a run: its settings, and the tasks that verify answers."""

    cfg: RewardConfig
    tasks: Mapping[str, Task]


def score(pairs: Pairs, reward: Reward, pool: VerifierPool) -> list[Score]:
    """Return the score of each response, in order.

    A response whose verifier, or whose part of the user's, hangs, raises or returns nonsense is unscorable; the reason
    starts with the name of the task or part. pool: runs the functions that may hang.
    """
    accuracies = verify(pairs, reward.tasks, pool)
    own = {
        name: pool.run(call_reward, [(name, *_portable(pair)) for pair in pairs], partial(load_reward, name))
        for name in reward.cfg.parts
        if name not in PARTS
    }
    return [
        _combine(*pair, accuracies[index], {name: found[index] for name, found in own.items()}, reward.cfg)
        for index, pair in enumerate(pairs)
    ]


def verify(pairs: Pairs, tasks: Mapping[str, Task], pool: VerifierPool) -> list[Score]:
    """Return the accuracy of each response by the verifier of its task, which runs in `pool` where it may hang."""
    scores: dict[int, Score] = {}
    waiting: dict[str, list[int]] = defaultdict(list)
    for index, (problem, response) in enumerate(pairs):
        found = _verify_here(tasks[problem.task], problem, response)
        if found is None:
            waiting[problem.task].append(index)
        else:
            scores[index] = found
    for name, indices in waiting.items():
        task, calls = tasks[name], [_portable(pairs[index]) for index in indices]
        seconds = [task.verify_seconds(problem) for problem, _ in calls]
        scores |= zip(indices, pool.run(task.verify, calls, task.prepare, seconds), strict=True)
    return [scores[index] for index in range(len(pairs))]


def _verify_here(task: Task, problem: Problem, response: Response) -> Score | None:
    """Verify in process; None if the verifier may hang."""
    try:
        return None if task.may_hang(problem, response) else checked(task.verify(problem, response))
    except Exception as error:  # the boundary: whatever a verifier raises becomes the reason
        return unscorable(f"{type(error).__name__}: {error}")


def _portable(pair: tuple[Problem, Response]) -> tuple[Problem, Response]:
    """A pair without tensors, for another process."""
    problem, response = pair
    if response.completion is None or response.completion.experts is None:
        return pair
    return problem, replace(response, completion=replace(response.completion, experts=None))


def _combine(
    problem: Problem, response: Response, verdict: Score, own: Mapping[str, Score], cfg: RewardConfig
) -> Score:
    """Add up the parts. own: the values of the user's parts, by name."""
    for name, found in ((problem.task, verdict), *own.items()):
        if found.unscorable is not None:
            return unscorable(f"{name}: {found.unscorable}")
    values = {name: found.total for name, found in own.items()}
    for name in dict.fromkeys(("accuracy", "format", *cfg.parts)):
        if name in PARTS:
            values[name] = PARTS[name](problem, response, verdict.total)
    total = sum(weight * values[name] for name, weight in cfg.parts.items())
    values.pop("accuracy_if_formatted", None)  # the product of two parts that are listed
    return Score(total=total, parts=values, grader=verdict.grader, detail=verdict.detail)
