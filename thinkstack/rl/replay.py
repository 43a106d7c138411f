"""A kept step once more: the log-probabilities of its answers under a checkpoint, beside those they were drawn with.

Answers name the version of the weights that drew them. Under those weights, in fp32, the two differ by rounding; more
means that engine and model are not the same function, or that the checkpoint is of another step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinkstack.models.transformer import Transformer
from thinkstack.rl.rollout_log import read_rollouts, tensor_from_dict
from thinkstack.types import ConfigError

WRONG_WEIGHTS = 1e-3
"""A mean difference in nats that no rounding of fp32 explains."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How far the log-probabilities of one step lie from those on disk, in nats."""

    num_answers: int
    num_tokens: int
    weights_versions: tuple[int, ...]
    """Optimizer steps of the weights that drew the answers."""
    mean_abs: float
    max_abs: float
    place: tuple[int, int, int]
    """Of the largest difference: group, answer and token, each from 0."""
    stored: float
    """The log-probability on disk there."""
    recomputed: float


def replay(folder: Path, step: int, model: Transformer, temperature: float = 1.0) -> Replay:
    """Recompute the log-probabilities of a step's answers. temperature: the one they were drawn at.

    Raises ConfigError if that step was not kept, kept no token, or does not fit the model.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} drew nothing at random; give the one of training (1.0 is usual)")
    groups = read_rollouts(folder, step)
    answers = [answer for group in groups for answer in group["answers"]]
    if not any(answer["token_ids"] for answer in answers):
        raise ConfigError(f"the answers of step {step} in {folder} have no tokens; choose another step")
    _check_fits(groups, model, folder)
    worst, total, apart_most = (0, 0, 0), 0.0, -1.0
    found = (0.0, 0.0)
    for place, group in enumerate(groups):
        for number, answer in enumerate(group["answers"]):
            stored = torch.tensor(answer["logprobs"], dtype=torch.float64)
            experts = tensor_from_dict(answer["experts"]) if "experts" in answer else None
            recomputed = answer_logprobs(model, group["prompt_token_ids"], answer["token_ids"], temperature, experts)
            apart = (recomputed - stored).abs()
            total += float(apart.sum())
            if len(apart) and float(apart.max()) > apart_most:
                token = int(apart.argmax())
                apart_most, worst = float(apart[token]), (place, number, token)
                found = (float(stored[token]), float(recomputed[token]))
    num_tokens = sum(len(answer["token_ids"]) for answer in answers)
    return Replay(
        num_answers=len(answers),
        num_tokens=num_tokens,
        weights_versions=tuple(sorted({answer["weights_version"] for answer in answers})),
        mean_abs=total / num_tokens,
        max_abs=apart_most,
        place=worst,
        stored=found[0],
        recomputed=found[1],
    )


def _check_fits(groups: Sequence[dict[str, Any]], model: Transformer, folder: Path) -> None:
    """Refuse a model with another vocabulary or a shorter context than the answers'."""
    rows = [[*group["prompt_token_ids"], *answer["token_ids"]] for group in groups for answer in group["answers"]]
    top, length = max(max(row) for row in rows), max(map(len, rows))
    if top >= model.cfg.vocab_size or length > model.cfg.max_positions:
        raise ConfigError(
            f"the answers in {folder} have tokens up to {top} and {length} of them; the model takes "
            f"{model.cfg.vocab_size} and {model.cfg.max_positions}: give a checkpoint of that run"
        )


@torch.no_grad()
def answer_logprobs(
    model: Transformer,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    temperature: float,
    experts: Tensor | None = None,
) -> Tensor:
    """Log-probability of each token of one answer after its prompt, (len(token_ids),) float64.

    experts: as in Completion, where the run kept them.
    """
    if not token_ids:
        return torch.zeros(0, dtype=torch.float64)
    ids = torch.tensor([[*prompt_token_ids, *token_ids[:-1]]])
    hidden = model.trunk(ids, experts=None if experts is None else experts.short().unsqueeze(0)).hidden
    logits = model.head(hidden)[0, len(prompt_token_ids) - 1 :].double() / temperature  # (tokens, V)
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1)


def describe_replay(found: Replay) -> str:
    """The figures in three lines for a terminal."""
    versions = ", ".join(map(str, found.weights_versions))
    group, answer, token = found.place
    lines = [
        f"{found.num_answers:,} answers, {found.num_tokens:,} tokens, drawn by the weights of step {versions}",
        f"log-probabilities differ by {found.mean_abs:.2e} nats in the mean, {found.max_abs:.2e} at most",
        f"most in group {group}, answer {answer}, token {token}: {found.stored:.6f} drawn, {found.recomputed:.6f} now",
    ]
    if found.mean_abs > WRONG_WEIGHTS:
        lines.append(f"more than rounding: this checkpoint is not the one of step {versions}, or the run was not fp32")
    return "\n".join(lines)
