"""Rewards: pure functions of a problem and the text of an answer. Training and evaluation call the same ones."""

import re
from dataclasses import dataclass, field
from typing import Literal

from thinkstack.config import Weight
from thinkstack.tasks.custom_reward import custom_part, load_reward
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import verify
from thinkstack.tasks.verify.language import language_share
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN, ThinkingFormat, parse_turn
from thinkstack.types import ConfigError, Problem, Score

MAX_ANSWER_CHARACTERS = 64
"""A longer answer is no answer, for it could hold several; a longer reference may be answered at twice its length."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How the parts of a reward are combined."""

    combine: Literal["gated", "additive", "format_only", "random"] = "gated"
    """"gated": accuracy counts only in the right format. "additive": accuracy + format_weight * format (R1 paper).
    "format_only" and "random" are controls: the format alone, or a coin that looks at nothing but the answer's text."""
    form: ThinkingFormat = "think_answer_tags"
    """How a turn is to look: text/parse.py."""
    format_weight: Weight = 1.0
    """Weight of the format part when additive."""
    language_weight: Weight = 0.0
    """Weight of the language part, which is added to the rest (R1 paper, stage 1); 0 leaves it out."""

    parts: dict[str, float] = field(default_factory=dict)
    """Further parts by name, PATH.py:FUNCTION -> weight; each is added to the rest (tasks/custom_reward.py). A recipe
    may say reward = "PATH.py:FUNCTION" for one part of weight 1."""

    def __post_init__(self) -> None:
        for name in self.parts:
            load_reward(name)
        if self.language_weight < 0:
            raise ConfigError(f"reward.language_weight={self.language_weight} would pay for mixing; use 0 or more")
        if self.language_weight and self.combine in ("format_only", "random"):
            raise ConfigError(
                f"reward.combine={self.combine!r} is a control that must not look at the language; leave "
                f"language_weight={self.language_weight} out, or use 'gated' or 'additive'"
            )
        if self.format_weight < 0:
            raise ConfigError(f"reward.format_weight={self.format_weight} would punish the right format; use 0 or more")


def final_answer(problem: Problem, text: str, form: ThinkingFormat = "think_answer_tags") -> str | None:
    """The turn's one answer, outside its thinking; None if there is none, or if it is too long to be one.

    The limit holds for the answer, not for the text around it.
    """
    answer = parse_turn(text, form).answer
    longest = MAX_ANSWER_CHARACTERS if len(problem.answer) <= MAX_ANSWER_CHARACTERS else 2 * len(problem.answer)
    return answer if answer is not None and len(answer) <= longest else None


def accuracy(problem: Problem, text: str, form: ThinkingFormat = "think_answer_tags") -> float:
    """1 if the turn's final answer is right."""
    return float(verify(problem, final_answer(problem, text, form)))


def format_kept(text: str, form: ThinkingFormat = "think_answer_tags") -> float:
    """1 if the turn keeps its form (text/parse.py): in "flexible_extract", if an answer is found."""
    return float(parse_turn(text, form).is_well_formed)


def language_kept(problem: Problem, text: str) -> float:
    """Share of the question's language in all the turn says but its answer, so that unclosed thinking counts too.

    1 where there is too little to tell: a short or wordless working is no foreign one.
    """
    spoken = re.sub(f"{ANSWER_OPEN}.*?{ANSWER_CLOSE}", " ", text, flags=re.DOTALL)
    share = language_share(spoken, problem.language, quoted=problem.question)
    return 1.0 if share is None else share


def score(problem: Problem, text: str, cfg: RewardConfig) -> Score:
    """Reward of one assistant turn (prefill and completion, without end token)."""
    parts = {"accuracy": accuracy(problem, text, cfg.form), "format": format_kept(text, cfg.form)}
    total = {
        "gated": parts["accuracy"] * parts["format"],
        "additive": parts["accuracy"] + cfg.format_weight * parts["format"],
        "format_only": parts["format"],
        "random": float(digest("random reward", problem.key, text) % 2),
    }[cfg.combine]
    if cfg.language_weight:
        parts["language"] = language_kept(problem, text)
        total += cfg.language_weight * parts["language"]
    for name, weight in cfg.parts.items():
        parts[name] = custom_part(name, problem, text)
        total += weight * parts[name]
    return Score(total=total, parts=parts)
