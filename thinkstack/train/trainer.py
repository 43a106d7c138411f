"""One optimizer step over a batch of packed rows: micro-batches, working precision, clipping, expert balance, resume.

The trainer knows tensors only. What is learnt is decided by the batch (which targets, with which weights) and by the
loss function passed to `step`; pre-training and reinforcement learning differ in nothing else.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from thinkstack.models.heads import ValueModel
from thinkstack.models.moe import Routing
from thinkstack.models.precision import refresh, working_copy
from thinkstack.models.transformer import Transformer
from thinkstack.train.balance import expert_counts, max_violation, moe_layers, sequence_balance_loss, update_bias
from thinkstack.train.loss import Stats, TrainedTokens, sum_over_ranks, token_log_probs, token_weights
from thinkstack.train.optim import OptimConfig, gradient_norm, learning_rate, make_optimizer
from thinkstack.train.value_loss import ValueTokens, valued_tokens
from thinkstack.types import Batch, ConfigError, TrainingError

log = logging.getLogger(__name__)

LossFunction = Callable[[Any], tuple[Tensor, Stats]]
"""Takes TrainedTokens, or ValueTokens where the model is a ValueModel."""
BAD_STEPS = 3
"""Consecutive steps without a finite gradient after which training gives up."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How steps are taken."""

    optim: OptimConfig = OptimConfig()
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of matrix products and activations; weights, gradients and the optimizer are fp32 in both."""
    micro_tokens: int = 2048
    """Tokens of one forward and backward pass; more passes add up to a step."""
    workers: int = 1
    """Threads that take micro-batches in turn, each on one core with a copy of the weights."""
    checkpoint_layers: bool = False
    """Activation checkpointing: keep each block's input alone and compute the rest again in the backward pass."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss (lambda in the V3 report, section 2.2)."""
    mtp_detached: bool = False
    """Let that loss train the MTP modules only, not the trunk, embedding and head they look at."""
    balance_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (alpha)."""
    bias_speed: float = 1e-3
    """Step of the balance bias (gamma); 0 freezes it."""

    def __post_init__(self) -> None:
        if self.micro_tokens < 1 or self.workers < 1:
            raise ConfigError(f"micro_tokens={self.micro_tokens} and workers={self.workers} must be at least 1")


class _Pass(NamedTuple):
    """What all micro-batches of a step share."""

    loss: LossFunction
    temperature: float
    with_entropy: bool
    trained_share: float
    """1 / trained tokens of the step."""
    real_share: float
    """1 / tokens of the step, without padding."""


@dataclass
class _Part:
    """What one worker adds to a step."""

    stats: Stats
    counts: list[Tensor]
    gradients: list[Tensor | None] | None
    """fp32, in the order of the parameters; None where they went into the model itself."""


class Trainer:
    """A model, its optimizer and the count of steps taken.

    Micro-batches are dealt to `workers` threads in turn, each with its own working copy and one core: small matrices
    gain more from two independent passes than from two threads in one. Sums are taken in the order of the workers, so a
    result depends on their number, never on their timing.
    """

    def __init__(self, model: Transformer, cfg: TrainerConfig, total_steps: int, dump_folder: Path | None = None):
        """model: fp32 weights, trained in place. total_steps: what the schedule spans. dump_folder: where a batch
        without finite gradients is written for inspection."""
        self.model, self.cfg, self.total_steps, self.dump_folder = model, cfg, total_steps, dump_folder
        dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
        self.workers = [working_copy(model, dtype, always=cfg.workers > 1) for _ in range(cfg.workers)]
        for block in (block for worker in self.workers for block in worker.blocks()):
            block.keeps_input_only = cfg.checkpoint_layers
        self.optimizer = make_optimizer(model, cfg.optim)
        self.pool = None
        if cfg.workers > 1:
            self.pool = ThreadPoolExecutor(cfg.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.step_count = 0
        self.bad_steps = 0

    def step(
        self,
        batch: Batch,
        loss: LossFunction,
        temperature: float = 1.0,
        with_entropy: bool = False,
        progress: float | None = None,
    ) -> dict[str, float]:
        """Take one optimizer step on `batch`; returns its statistics, means over the trained tokens of the step.

        progress: share of the run that lies before this step, for the schedule; by default a share of its steps.
        batch.weights: the share of each target (token_weights(batch, "token") if None). A step without finite gradients
        is skipped and counted; after BAD_STEPS in a row TrainingError is raised.
        """
        if batch.weights is None:
            batch = batch.with_weights(token_weights(batch, "token"))
        totals = sum_over_ranks(torch.stack((batch.loss_mask.sum(), (batch.document_ids > 0).sum().float())))
        plan = _Pass(loss, temperature, with_entropy, *(1 / total.clamp(min=1).item() for total in totals))
        parts = self._map_workers(micro_batches(batch, self.cfg.micro_tokens), plan)
        stats: Stats = {}
        for name, value in (item for part in parts for item in part.stats.items()):
            stats[name] = combine(name, stats.get(name), value)
        stats = join_ranks(stats)
        self._sum_gradients([part.gradients for part in parts])
        counts = [
            sum_over_ranks(torch.stack(layer).sum(0)) for layer in zip(*(part.counts for part in parts), strict=True)
        ]
        progress = self.step_count / self.total_steps if progress is None else progress
        return self._update(batch, stats, counts, learning_rate(self.cfg.optim, self.step_count, progress))

    def _map_workers(self, micros: list[Batch], plan: _Pass) -> list[_Part]:
        """Run worker w on micro-batches w, w + workers, ...; one result per worker that had any."""
        shares = [micros[worker :: len(self.workers)] for worker in range(len(self.workers))]
        jobs = [(worker, share) for worker, share in zip(self.workers, shares, strict=True) if share]
        if self.pool is None:
            return [self._run(worker, share, plan) for worker, share in jobs]
        tasks = [self.pool.submit(self._run, worker, share, plan) for worker, share in jobs]
        return [task.result() for task in tasks]

    def _run(self, model: Transformer, micros: list[Batch], plan: _Pass) -> _Part:
        """Forward and backward passes of one worker."""
        part = _Part({}, [torch.zeros(layer.cfg.num_experts) for layer in moe_layers(model)], None)
        for micro in micros:
            loss, stats, routings = self._loss(model, micro, plan)
            loss.backward()
            for name, value in stats.items():
                part.stats[name] = combine(name, part.stats.get(name), value)
            for count, routing in zip(part.counts, routings, strict=False):
                count += expert_counts(routing, micro.document_ids > 0)
            if model is not self.model:
                part.gradients = add_gradients(part.gradients, model)
        return part

    def _loss(self, model: Transformer, micro: Batch, plan: _Pass) -> tuple[Tensor, Stats, list[Routing]]:
        """The weighted sum of all losses of one micro-batch."""
        trunk = model.trunk(micro.ids, micro.positions, micro.document_ids, experts=micro.experts)
        tokens = trained_tokens(model, trunk.hidden, micro, plan.trained_share, plan.temperature, plan.with_entropy)
        total, stats = plan.loss(tokens)
        routings = list(trunk.routing)
        if model.mtp and self.cfg.mtp_weight:
            ahead, chosen = mtp_loss(model, trunk, micro, plan.trained_share, self.cfg.mtp_detached)
            routings += chosen
            total = total + self.cfg.mtp_weight * ahead
            stats["loss/mtp_nats"] = ahead.detach()
        if routings and self.cfg.balance_weight:
            balance = torch.stack([sequence_balance_loss(r, micro.document_ids > 0) for r in routings]).mean()
            total = total + self.cfg.balance_weight * plan.real_share * balance
            stats["router/balance_loss"] = plan.real_share * balance.detach()
        return total, stats, routings

    @torch.no_grad()
    def _sum_gradients(self, parts: list[list[Tensor | None] | None]) -> None:
        """Gradients of the step over workers and ranks, into the fp32 model."""
        for index, parameter in enumerate(self.model.parameters()):
            mine = [part[index] for part in parts if part is not None]
            known = [gradient for gradient in mine if gradient is not None]
            if known:
                parameter.grad = known[0]
                for gradient in known[1:]:
                    parameter.grad += gradient
            if parameter.grad is not None:
                sum_over_ranks(parameter.grad)

    def _update(self, batch: Batch, stats: Stats, counts: list[Tensor], rate: float) -> dict[str, float]:
        """Clip, step at this learning rate, move the biases; or skip a step whose gradient is not finite."""
        cfg = self.cfg.optim
        norm = gradient_norm(self.model.parameters())
        if torch.isfinite(norm):
            for parameter in self.model.parameters():
                if parameter.grad is not None and norm > cfg.clip_norm:
                    parameter.grad.mul_(cfg.clip_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            for layer, count in zip(moe_layers(self.model), counts, strict=True):
                if self.cfg.bias_speed:
                    update_bias(layer, count, self.cfg.bias_speed)
            for worker in self.workers:
                refresh(worker, self.model)
            self.step_count += 1
            self.bad_steps = 0
        else:
            self._skip(batch)
        self.optimizer.zero_grad(set_to_none=True)
        numbers = {name: float(value) for name, value in stats.items()}
        if counts:
            numbers["router/max_violation"] = float(torch.stack([max_violation(count) for count in counts]).mean())
        return numbers | {
            "train/grad_norm": float(norm),
            "train/learning_rate": rate,
            "train/skipped": float(self.bad_steps > 0),
        }

    def _skip(self, batch: Batch) -> None:
        """Count a step without finite gradient and keep its batch; give up after BAD_STEPS in a row."""
        self.bad_steps += 1
        where = ""
        if self.dump_folder is not None:
            path = self.dump_folder / f"bad_batch_{self.step_count}.safetensors"
            save_file({name: value.contiguous() for name, value in vars(batch).items() if value is not None}, path)
            where = f"; its batch is in {path}"
        log.warning("step %d has no finite gradient and is skipped%s", self.step_count, where)
        if self.bad_steps >= BAD_STEPS:
            raise TrainingError(
                f"{BAD_STEPS} steps in a row at step {self.step_count} gave no finite loss or gradient{where}; "
                f"lower learning_rate={self.cfg.optim.learning_rate} or use dtype=fp32, then resume"
            )

    def weights(self) -> Transformer:
        """The model that is being trained; its tensors are shared, not copied."""
        return self.model


def micro_batches(batch: Batch, micro_tokens: int) -> list[Batch]:
    """Cut a batch into pieces of whole rows, each of at most micro_tokens (but at least a row)."""
    rows = max(micro_tokens // batch.ids.shape[1], 1)
    return [batch.rows(slice(start, start + rows)) for start in range(0, batch.ids.shape[0], rows)]


@torch.no_grad()
def add_gradients(sums: list[Tensor | None] | None, model: Transformer) -> list[Tensor | None]:
    """Move a working copy's gradients into fp32 sums, one place per parameter."""
    sums = sums or [None] * len(list(model.parameters()))
    for index, parameter in enumerate(model.parameters()):
        gradient, known = parameter.grad, sums[index]
        if gradient is not None:
            sums[index] = gradient.float() if known is None else known.add_(gradient)
        parameter.grad = None
    return sums


def combine(name: str, first: Tensor | None, second: Tensor) -> Tensor:
    """Join a statistic of two micro-batches: names ending in _max by maximum, all others by sum."""
    if first is None:
        return second
    return torch.maximum(first, second) if name.endswith("_max") else first + second


def join_ranks(stats: Stats) -> Stats:
    """Statistics of the step over all ranks, combined as over micro-batches."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stats
    joined = {name: value.clone() for name, value in sorted(stats.items())}
    for name, value in joined.items():
        largest, total = torch.distributed.ReduceOp.MAX, torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(value, op=largest if name.endswith("_max") else total)
    return joined


def trained_tokens(
    model: Transformer, hidden: Tensor, batch: Batch, share: float, temperature: float, with_entropy: bool = False
) -> TrainedTokens | ValueTokens:
    """The trained targets of `batch` with their log-probabilities (or values) by `model`. hidden: (R, T, D)."""
    if isinstance(model, ValueModel):
        return valued_tokens(model, hidden, batch, share)
    index = batch.loss_mask.flatten().nonzero().squeeze(1)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.flatten()[index]

    targets = batch.targets.flatten()[index]
    log_probs, entropy = token_log_probs(
        hidden.flatten(0, 1), index, model.head.weight, targets, temperature, with_entropy
    )
    weights = pick(batch.weights)
    assert weights is not None
    return TrainedTokens(
        log_probs=log_probs,
        weights=weights,
        share=share,
        entropy=entropy,
        advantages=pick(batch.advantages),
        rollout_log_probs=pick(batch.rollout_log_probs),
        old_log_probs=pick(batch.old_log_probs),
        reference_log_probs=pick(batch.reference_log_probs),
        sequences=batch.document_ids.flatten()[index],
    )


def mtp_loss(model, trunk, batch: Batch, share: float, detached: bool):  # type: ignore[no-untyped-def]
    """Cross-entropy of the multi-token-prediction modules, mean over modules; returns (loss, their routings).

    The module of depth k predicts at position i the target of position i + k; that target must be trained and lie in
    the same document. detached: no gradient reaches the trunk, the embedding or the head.
    """
    states, routings = model.look_ahead(trunk, batch.ids, detached)
    head = model.head.weight.detach() if detached else model.head.weight
    total = trunk.hidden.new_zeros((), dtype=torch.float32)
    for depth, hidden in enumerate(states, start=1):
        same = batch.document_ids[:, depth:] == batch.document_ids[:, :-depth]
        mask = torch.nn.functional.pad(batch.loss_mask[:, depth:] * same, (0, depth))
        index = mask.flatten().nonzero().squeeze(1)
        targets = batch.targets.flatten()[index + depth]
        log_probs, _ = token_log_probs(hidden.flatten(0, 1), index, head, targets)
        total = total - log_probs.sum() * share
    return total / len(states), routings


@torch.no_grad()
def batch_log_probs(model: Transformer, batch: Batch, temperature: float, micro_tokens: int) -> Tensor:
    """Log-probabilities of all trained targets, (R, T) fp32, 0 elsewhere; the same arithmetic as in `Trainer.step`."""
    rows = []
    for micro in micro_batches(batch, micro_tokens):
        trunk = model.trunk(micro.ids, micro.positions, micro.document_ids, experts=micro.experts)
        hidden = trunk.hidden.flatten(0, 1)
        index = micro.loss_mask.flatten().nonzero().squeeze(1)
        log_probs, _ = token_log_probs(hidden, index, model.head.weight, micro.targets.flatten()[index], temperature)
        rows.append(torch.zeros(micro.ids.numel()).index_copy_(0, index, log_probs).view_as(micro.ids))
    return torch.cat(rows)
