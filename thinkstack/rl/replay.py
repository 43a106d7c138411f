"""Replay of a logged step: compare the log-probabilities of completions under a checkpoint and in the engine.

Each completion has the version of the weights that sampled it. With these weights, in fp32, the log-probabilities
differ by rounding only; a larger difference means that engine and model compute different functions, or that the
checkpoint is from a different step.
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
"""Mean difference in nats that is too large for fp32 rounding."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Differences between recomputed and logged log-probabilities of one step, in nats."""

    num_completions: int
    num_tokens: int
    weights_versions: tuple[int, ...]
    """Versions (optimizer steps) of the weights that sampled the completions."""
    mean_abs: float
    max_abs: float
    position: tuple[int, int, int]
    """Position of the largest difference: group, completion and token, each from 0."""
    logged: float
    """The logged log-probability at that position."""
    recomputed: float
    """The recomputed log-probability at that position."""


def replay(folder: Path, step: int, model: Transformer, temperature: float = 1.0) -> Replay:
    """Recompute the log-probabilities of the completions of a step. temperature: the sampling temperature of the run.

    Raises ConfigError if the step was not logged, has no tokens, or does not fit the model.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} must be positive; use the temperature of training (usually 1.0)")
    groups = read_rollouts(folder, step)
    completions = [completion for group in groups for completion in group["completions"]]
    if not any(completion["token_ids"] for completion in completions):
        raise ConfigError(f"the completions of step {step} in {folder} have no tokens; choose another step")
    _check_fits(groups, model, folder)
    position, sum_abs, max_abs = (0, 0, 0), 0.0, -1.0
    logged_there, recomputed_there = 0.0, 0.0
    for group_index, group in enumerate(groups):
        for index, completion in enumerate(group["completions"]):
            logged = torch.tensor(completion["logprobs"], dtype=torch.float64)
            experts = tensor_from_dict(completion["experts"]) if "experts" in completion else None
            recomputed = completion_logprobs(
                model, group["prompt_token_ids"], completion["token_ids"], temperature, experts
            )
            difference = (recomputed - logged).abs()
            sum_abs += float(difference.sum())
            if len(difference) and float(difference.max()) > max_abs:
                token = int(difference.argmax())
                max_abs, position = float(difference[token]), (group_index, index, token)
                logged_there, recomputed_there = float(logged[token]), float(recomputed[token])
    num_tokens = sum(len(completion["token_ids"]) for completion in completions)
    return Replay(
        num_completions=len(completions),
        num_tokens=num_tokens,
        weights_versions=tuple(sorted({completion["weights_version"] for completion in completions})),
        mean_abs=sum_abs / num_tokens,
        max_abs=max_abs,
        position=position,
        logged=logged_there,
        recomputed=recomputed_there,
    )


def _check_fits(groups: Sequence[dict[str, Any]], model: Transformer, folder: Path) -> None:
    """Raise ConfigError if the vocabulary or the context of the model is too small for the completions."""
    rows = [[*group["prompt_token_ids"], *c["token_ids"]] for group in groups for c in group["completions"]]
    max_id, length = max(max(row) for row in rows), max(map(len, rows))
    if max_id >= model.cfg.vocab_size or length > model.cfg.max_positions:
        raise ConfigError(
            f"the rollouts in {folder} have token ids up to {max_id} and {length} tokens; the model has a vocabulary "
            f"of {model.cfg.vocab_size} and a context of {model.cfg.max_positions}: use a checkpoint of that run"
        )


@torch.no_grad()
def completion_logprobs(
    model: Transformer,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    temperature: float,
    experts: Tensor | None = None,
) -> Tensor:
    """Log-probability of each token of a completion, (len(token_ids),) float64.

    experts: as in Completion.experts, if the run logged them.
    """
    if not token_ids:
        return torch.zeros(0, dtype=torch.float64)
    ids = torch.tensor([[*prompt_token_ids, *token_ids[:-1]]])
    hidden = model.trunk(ids, experts=None if experts is None else experts.short().unsqueeze(0)).hidden
    logits = model.head(hidden)[0, len(prompt_token_ids) - 1 :].double() / temperature  # (tokens, V)
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1)


def describe_replay(result: Replay) -> str:
    """The result as text for a terminal."""
    versions = ", ".join(map(str, result.weights_versions))
    group, completion, token = result.position
    lines = [
        f"{result.num_completions:,} completions, {result.num_tokens:,} tokens, "
        f"sampled with the weights of step {versions}",
        f"log-probabilities differ by {result.mean_abs:.2e} nats on average, {result.max_abs:.2e} at most",
        f"largest at group {group}, completion {completion}, token {token}: {result.logged:.6f} logged, "
        f"{result.recomputed:.6f} recomputed",
    ]
    if result.mean_abs > WRONG_WEIGHTS:
        lines.append(f"too large for rounding: wrong checkpoint for step {versions}, or not an fp32 run")
    return "\n".join(lines)
