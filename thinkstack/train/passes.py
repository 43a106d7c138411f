"""Forward and backward passes over micro-batches: the work of one worker in an optimizer step.

workers.py runs these functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thinkstack.kernels.precision import DTYPES, resolve_precision
from thinkstack.models.moe import Routing
from thinkstack.models.precision import cast_copy
from thinkstack.models.transformer import Transformer, Trunk
from thinkstack.models.value_head import ValueModel
from thinkstack.train.balance import expert_counts, moe_layers, sequence_balance_loss
from thinkstack.train.fp8 import use_fp8
from thinkstack.train.loss import Stats, TrainedTokens, token_logprobs
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.train.value_loss import ValueTokens, value_tokens
from thinkstack.types import Batch

LossFunction = Callable[[Any], tuple[Tensor, Stats]]
"""Function of TrainedTokens, or ValueTokens for a ValueModel; returns the loss and statistics."""


class StepContext(NamedTuple):
    """Arguments common to all micro-batches of a step."""

    loss: LossFunction
    temperature: float
    with_entropy: bool
    trained_share: float
    """1 / number of trained tokens of the step."""
    real_share: float
    """1 / number of tokens of the step, without padding."""


@dataclass
class WorkerResult:
    """Sums of one worker over its micro-batches of a step."""

    stats: Stats
    counts: list[Tensor]
    """(E,) number of tokens per expert, for each layer with experts."""
    gradients: list[Tensor | None]
    """fp32 gradients in the order of the parameters; None for parameters without gradient."""


def working_model(model: Transformer, cfg: TrainerConfig, always_copy: bool) -> Transformer:
    """The model that the passes run on: `model` itself, or a copy in the working precision."""
    requested = cfg.dtype if cfg.fp8 == "off" else "bf16"
    dtype = DTYPES[resolve_precision(requested, next(model.parameters()).device)]
    copy = cast_copy(model, dtype, always_copy or cfg.compile)
    if cfg.fp8 != "off":
        use_fp8(copy, power_of_two=cfg.fp8 == "ue8m0")
    for block in copy.blocks():
        block.checkpoints_activations = cfg.checkpoint_layers
        if cfg.compile:
            block.compile()
    copy.is_compiled = cfg.compile
    return copy


def run_worker(
    model: Transformer, micro_batches: list[Batch], context: StepContext, cfg: TrainerConfig, sums: list[Tensor] | None
) -> WorkerResult:
    """Forward and backward passes of one worker.

    sums: fp32 buffers for the gradients, in the order of the parameters; None leaves the gradients in the model.
    """
    parameters = list(model.parameters())
    counts = [torch.zeros(layer.cfg.num_experts, device=layer.bias.device) for layer in moe_layers(model)]
    result = WorkerResult({}, counts, [None] * len(parameters))
    for micro_batch in micro_batches:
        loss, stats, routings = compute_loss(model, micro_batch, context, cfg)
        loss.backward()
        for name, value in stats.items():
            result.stats[name] = combine_stats(name, result.stats.get(name), value)
        for count, routing in zip(result.counts, routings, strict=False):
            count += expert_counts(routing, micro_batch.document_ids > 0)
        if sums is None:
            result.gradients = [parameter.grad for parameter in parameters]
        else:
            add_gradients(result.gradients, parameters, sums)
    return result


def compute_loss(
    model: Transformer, micro_batch: Batch, context: StepContext, cfg: TrainerConfig
) -> tuple[Tensor, Stats, list[Routing]]:
    """The weighted sum of all losses of one micro-batch, with statistics and routings."""
    trunk = run_trunk(model, micro_batch)
    tokens = trained_tokens(
        model, trunk.hidden, micro_batch, context.trained_share, context.temperature, context.with_entropy
    )
    total, stats = context.loss(tokens)
    routings = list(trunk.routing)
    if model.mtp and cfg.mtp_weight:
        mtp_nats, mtp_routings = mtp_loss(model, trunk, micro_batch, context.trained_share, cfg.mtp_detached)
        routings += mtp_routings
        total = total + cfg.mtp_weight * mtp_nats
        stats["loss/mtp_nats"] = mtp_nats.detach()
    if routings and cfg.balance_weight:
        balance = torch.stack([sequence_balance_loss(r, micro_batch.document_ids > 0) for r in routings]).mean()
        total = total + cfg.balance_weight * context.real_share * balance
        stats["router/balance_loss"] = context.real_share * balance.detach()
    return total, stats, routings


def run_trunk(model: Transformer, batch: Batch) -> Trunk:
    """The model's hidden states of a batch, before the head."""
    return model.trunk(batch.ids, batch.positions, batch.document_ids, experts=batch.experts, branches=batch.branches)


def split_micro_batches(batch: Batch, micro_batch_tokens: int) -> list[Batch]:
    """Split a batch into micro-batches of complete rows with at most micro_batch_tokens each, but at least one row."""
    rows = max(micro_batch_tokens // batch.ids.shape[1], 1)
    return [batch.rows(slice(start, start + rows)) for start in range(0, batch.ids.shape[0], rows)]


@torch.no_grad()
def add_gradients(gradients: list[Tensor | None], parameters: list[nn.Parameter], sums: list[Tensor]) -> None:
    """Add the gradients of `parameters` to the fp32 buffers `sums` and clear them; `gradients` lists the buffers in
    use."""
    for index, (parameter, total) in enumerate(zip(parameters, sums, strict=True)):
        if parameter.grad is not None:
            is_first = gradients[index] is None
            gradients[index] = total.copy_(parameter.grad) if is_first else total.add_(parameter.grad)
        parameter.grad = None


def gradient_buffers(model: Transformer) -> list[Tensor]:
    """An fp32 buffer for the gradient of each parameter; empty for frozen parameters."""
    return [torch.empty(p.shape if p.requires_grad else 0, device=p.device) for p in model.parameters()]


def combine_stats(name: str, first: Tensor | None, second: Tensor) -> Tensor:
    """Combine a statistic of two micro-batches: by maximum if its name ends in "_max", otherwise by sum."""
    if first is None:
        return second
    return torch.maximum(first, second) if name.endswith("_max") else first + second


def trained_tokens(
    model: Transformer, hidden: Tensor, batch: Batch, share: float, temperature: float, with_entropy: bool = False
) -> TrainedTokens | ValueTokens:
    """The trained targets of `batch`, with log-probabilities (or values) under `model`. hidden: (R, T, D)."""
    if isinstance(model, ValueModel):
        return value_tokens(model, hidden, batch, share)
    index = batch.loss_mask.flatten().nonzero().squeeze(1)

    def select(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.flatten()[index]

    targets = batch.targets.flatten()[index]
    logprobs, entropy = token_logprobs(
        hidden.flatten(0, 1), index, model.head.weight, targets, temperature, with_entropy
    )
    weights = select(batch.weights)
    assert weights is not None
    return TrainedTokens(
        logprobs=logprobs,
        weights=weights,
        share=share,
        entropy=entropy,
        advantages=select(batch.advantages),
        rollout_logprobs=select(batch.rollout_logprobs),
        old_logprobs=select(batch.old_logprobs),
        reference_logprobs=select(batch.reference_logprobs),
        sequences=batch.sequence_ids.flatten()[index],
    )


def mtp_loss(model, trunk, batch: Batch, share: float, detached: bool):  # type: ignore[no-untyped-def]
    """Mean cross-entropy of the multi-token-prediction modules; returns (loss, routings of the modules).

    At position i, the module of depth k predicts the target of position i + k; that target must be trained and in the
    same sequence. detached: no gradient reaches the trunk, the embedding or the head.
    """
    states, routings = model.mtp_hidden_states(trunk, batch.ids, detached)
    head = model.head.weight.detach() if detached else model.head.weight
    total = trunk.hidden.new_zeros((), dtype=torch.float32)
    for depth, hidden in enumerate(states, start=1):
        same_sequence = batch.sequence_ids[:, depth:] == batch.sequence_ids[:, :-depth]
        mask = torch.nn.functional.pad(batch.loss_mask[:, depth:] * same_sequence, (0, depth))
        index = mask.flatten().nonzero().squeeze(1)
        targets = batch.targets.flatten()[index + depth]
        logprobs, _ = token_logprobs(hidden.flatten(0, 1), index, head, targets)
        total = total - logprobs.sum() * share
    return total / len(states), routings


@torch.no_grad()
def batch_logprobs(model: Transformer, batch: Batch, temperature: float, micro_batch_tokens: int) -> Tensor:
    """Log-probabilities of all trained targets, (R, T) fp32, 0 elsewhere, with the same arithmetic as `Trainer.step`.

    The model may be on another device than the batch; the result is on the device of the batch.
    """
    rows = []
    for micro_batch in split_micro_batches(batch.to(next(model.parameters()).device), micro_batch_tokens):
        trunk = run_trunk(model, micro_batch)
        hidden = trunk.hidden.flatten(0, 1)
        index = micro_batch.loss_mask.flatten().nonzero().squeeze(1)
        logprobs, _ = token_logprobs(
            hidden, index, model.head.weight, micro_batch.targets.flatten()[index], temperature
        )
        rows.append(
            logprobs.new_zeros(micro_batch.ids.numel()).index_copy_(0, index, logprobs).view_as(micro_batch.ids)
        )
    return torch.cat(rows).to(batch.ids.device)
