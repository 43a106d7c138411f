"""Rewards: pure functions of a problem and the text of a turn. Training and evaluation call the same functions."""

import re
from dataclasses import dataclass, field
from typing import Literal

from thinkstack.config import Weight
from thinkstack.tasks.custom_reward import call_reward, load_reward
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import verify
from thinkstack.tasks.verify.language import language_share
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN, ThinkingFormat, parse_turn
from thinkstack.types import ConfigError, Problem, Score

MAX_ANSWER_CHARACTERS = 64
"""A longer answer counts as no answer, since it could contain several answers. If the reference is longer than this,
the limit is twice the length of the reference."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Parts of the reward and how they are combined."""

    combine: Literal["gated", "additive", "format_only", "random"] = "gated"
    """How the total is computed. "gated": accuracy * format. "additive": accuracy + format_weight * format (R1 paper).
    "format_only" and "random" are controls: the format alone, or a coin flip by a hash of the turn's text."""
    thinking_format: ThinkingFormat = "think_answer_tags"
    """The expected format of a turn: text/parse.py."""
    format_weight: Weight = 1.0
    """Weight of the format part with combine="additive"."""
    language_weight: Weight = 0.0
    """Weight of the language part, added to the total (R1 paper, stage 1); 0 leaves it out."""

    parts: dict[str, float] = field(default_factory=dict)
    """Weights of user-defined parts by PATH.py:FUNCTION; each is added to the total (tasks/custom_reward.py). In a
    recipe, reward = "PATH.py:FUNCTION" is short for one part of weight 1."""

    def __post_init__(self) -> None:
        for name in self.parts:
            load_reward(name)
        if self.language_weight < 0:
            raise ConfigError(
                f"reward.language_weight={self.language_weight} would reward mixed languages; use 0 or more"
            )
        if self.language_weight and self.combine in ("format_only", "random"):
            raise ConfigError(
                f"reward.combine={self.combine!r} is a control that ignores the language; remove "
                f"language_weight={self.language_weight}, or use combine='gated' or combine='additive'"
            )
        if self.format_weight < 0:
            raise ConfigError(
                f"reward.format_weight={self.format_weight} would punish the correct format; use 0 or more"
            )


def extract_answer(problem: Problem, text: str, thinking_format: ThinkingFormat = "think_answer_tags") -> str | None:
    """Return the single final answer of a turn, outside its thinking; None if there is none or if it is too long.

    The length limit applies to the answer, not to the text around it.
    """
    answer = parse_turn(text, thinking_format).answer
    longest = MAX_ANSWER_CHARACTERS if len(problem.answer) <= MAX_ANSWER_CHARACTERS else 2 * len(problem.answer)
    return answer if answer is not None and len(answer) <= longest else None


def accuracy_reward(problem: Problem, text: str, thinking_format: ThinkingFormat = "think_answer_tags") -> float:
    """Return 1 if the final answer of the turn is correct, else 0."""
    return float(verify(problem, extract_answer(problem, text, thinking_format)))


def format_reward(text: str, thinking_format: ThinkingFormat = "think_answer_tags") -> float:
    """Return 1 if the turn is well-formed (text/parse.py), else 0.

    With thinking_format="flexible_extract", a turn is well-formed if an answer is found.
    """
    return float(parse_turn(text, thinking_format).is_well_formed)


def language_reward(problem: Problem, text: str) -> float:
    """Return the share of the question's language in the text of the turn without its answer.

    Unclosed thinking is included. Returns 1 if the text has too few words to tell its language.
    """
    text_outside_answer = re.sub(f"{ANSWER_OPEN}.*?{ANSWER_CLOSE}", " ", text, flags=re.DOTALL)
    share = language_share(text_outside_answer, problem.language, quoted=problem.question)
    return 1.0 if share is None else share


def score(problem: Problem, text: str, cfg: RewardConfig) -> Score:
    """Compute the reward of one assistant turn (prefill and completion, without the end token)."""
    parts = {
        "accuracy": accuracy_reward(problem, text, cfg.thinking_format),
        "format": format_reward(text, cfg.thinking_format),
    }
    total = {
        "gated": parts["accuracy"] * parts["format"],
        "additive": parts["accuracy"] + cfg.format_weight * parts["format"],
        "format_only": parts["format"],
        "random": float(digest("random reward", problem.key, text) % 2),
    }[cfg.combine]
    if cfg.language_weight:
        parts["language"] = language_reward(problem, text)
        total += cfg.language_weight * parts["language"]
    for name, weight in cfg.parts.items():
        parts[name] = call_reward(name, problem, text)
        total += weight * parts[name]
    return Score(total=total, parts=parts)
