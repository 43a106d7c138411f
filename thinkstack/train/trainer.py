"""One optimizer step over a batch of packed rows: micro-batches, working precision, clipping, expert balance, resume.

The trainer knows tensors only. What is learnt is decided by the batch (which targets, with which weights) and by the
loss function passed to `step`; pre-training and reinforcement learning differ in nothing else.
"""

import logging
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from thinkstack.machine import pick_device
from thinkstack.models.lora import adapt, adapters
from thinkstack.models.transformer import Transformer
from thinkstack.train.balance import max_violation, moe_layers, update_bias
from thinkstack.train.loss import Stats, sum_over_ranks, token_weights
from thinkstack.train.optim import gradient_norm, learning_rate, make_optimizer
from thinkstack.train.passes import LossFunction, Plan, combine, micro_batches
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.train.workers import Workers
from thinkstack.types import Batch, TrainingError

log = logging.getLogger(__name__)

BAD_STEPS = 3
"""Consecutive steps without a finite gradient after which training gives up."""


class Trainer:
    """A model, its optimizer and the count of steps taken."""

    def __init__(self, model: Transformer, cfg: TrainerConfig, total_steps: int, dump_folder: Path | None = None):
        """model: fp32 weights, trained in place; where cfg.lora asks for adapters it gets them and is frozen.
        total_steps: what the schedule spans. dump_folder: where a batch without finite gradients is written for
        inspection."""
        self.model, self.cfg, self.total_steps, self.dump_folder = model, cfg, total_steps, dump_folder
        if cfg.lora.rank and not adapters(model):
            adapt(model, cfg.lora)
        model.to(pick_device(cfg.device) if cfg.workers == 1 else "cpu")
        self.workers = Workers(model, cfg)
        self.optimizer = make_optimizer(model, cfg.optim)
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
        plan = Plan(loss, temperature, with_entropy, *(1 / total.clamp(min=1).item() for total in totals))
        batch = batch.to(next(self.model.parameters()).device)
        started = time.monotonic()
        parts = self.workers.run(micro_batches(batch, self.cfg.micro_batch_tokens), plan)
        if self.cfg.compile and self.step_count == 0:
            log.info("the passes of the first step took %.0f s, compilation included", time.monotonic() - started)
        stats: Stats = {}
        for name, value in (item for part in parts for item in part.stats.items()):
            stats[name] = combine(name, stats.get(name), value)
        stats = reduce_stats(stats)
        self._sum_gradients([part.gradients for part in parts])
        counts = [
            sum_over_ranks(torch.stack(layer).sum(0)) for layer in zip(*(part.counts for part in parts), strict=True)
        ]
        progress = self.step_count / self.total_steps if progress is None else progress
        return self._update(batch, stats, counts, learning_rate(self.cfg.optim, self.step_count, progress))

    @torch.no_grad()
    def _sum_gradients(self, parts: list[list[Tensor | None]]) -> None:
        """Gradients of the step over workers and ranks, into the fp32 model."""
        for parameter, *mine in zip(self.model.parameters(), *parts, strict=True):
            known = [gradient for gradient in mine if gradient is not None]
            if known:
                parameter.grad = known[0]
                for gradient in known[1:]:
                    parameter.grad += gradient
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
            self.workers.refresh()
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


def reduce_stats(stats: Stats) -> Stats:
    """Statistics of the step over all ranks, combined as over micro-batches."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stats
    joined = {name: value.clone() for name, value in sorted(stats.items())}
    for name, value in joined.items():
        largest, total = torch.distributed.ReduceOp.MAX, torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(value, op=largest if name.endswith("_max") else total)
    return joined
