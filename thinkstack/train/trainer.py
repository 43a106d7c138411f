"""One optimizer step on a batch of packed rows: micro-batches, working precision, clipping, expert balance.

The batch defines the trained targets and their weights; the loss function passed to `step` defines the objective.
Pre-training and reinforcement learning differ only in these two.
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
from thinkstack.train.passes import LossFunction, StepContext, combine_stats, split_micro_batches
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.train.workers import Workers
from thinkstack.types import Batch, TrainingError

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 3
"""Number of consecutive steps with non-finite gradients after which training fails."""


class Trainer:
    """A model, its optimizer and the number of completed steps."""

    def __init__(self, model: Transformer, cfg: TrainerConfig, total_steps: int, dump_folder: Path | None = None):
        """model: fp32 weights, trained in place; with cfg.lora.rank adapters are added and the weights are frozen.
        total_steps: length of the learning-rate schedule. dump_folder: folder for dumps of batches with non-finite
        gradients."""
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
        """Run one optimizer step on `batch`; returns its statistics as means over the trained tokens of the step.

        progress: share of the run before this step, for the learning-rate schedule; None: computed from the step count.
        batch.weights: None means token_weights(batch, "token"). A step with non-finite gradients is skipped and
        counted; MAX_BAD_STEPS consecutive such steps raise TrainingError."""
        if batch.weights is None:
            batch = batch.with_weights(token_weights(batch, "token"))
        totals = sum_over_ranks(torch.stack((batch.loss_mask.sum(), (batch.document_ids > 0).sum().float())))
        context = StepContext(loss, temperature, with_entropy, *(1 / total.clamp(min=1).item() for total in totals))
        batch = batch.to(next(self.model.parameters()).device)
        started = time.monotonic()
        results = self.workers.run(split_micro_batches(batch, self.cfg.micro_batch_tokens), context)
        if self.cfg.compile and self.step_count == 0:
            log.info(
                "forward and backward passes of the first step took %.0f s, compilation included",
                time.monotonic() - started,
            )
        stats: Stats = {}
        for name, value in (item for result in results for item in result.stats.items()):
            stats[name] = combine_stats(name, stats.get(name), value)
        stats = reduce_stats(stats)
        self._sum_gradients([result.gradients for result in results])
        counts = [
            sum_over_ranks(torch.stack(layer).sum(0))
            for layer in zip(*(result.counts for result in results), strict=True)
        ]
        progress = self.step_count / self.total_steps if progress is None else progress
        return self._update(batch, stats, counts, learning_rate(self.cfg.optim, self.step_count, progress))

    @torch.no_grad()
    def _sum_gradients(self, results: list[list[Tensor | None]]) -> None:
        """Sum the gradients of a step over workers and ranks into the fp32 model."""
        for parameter, *gradients in zip(self.model.parameters(), *results, strict=True):
            present = [gradient for gradient in gradients if gradient is not None]
            if present:
                parameter.grad = present[0]
                for gradient in present[1:]:
                    parameter.grad += gradient
                sum_over_ranks(parameter.grad)

    def _update(self, batch: Batch, stats: Stats, counts: list[Tensor], rate: float) -> dict[str, float]:
        """Clip the gradients, step the optimizer and update the biases, or skip a step with non-finite gradients."""
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
            self.workers.update_copies()
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
        """Count a step with non-finite gradients and dump the batch; raise TrainingError after MAX_BAD_STEPS
        consecutive such steps."""
        self.bad_steps += 1
        where = ""
        if self.dump_folder is not None:
            path = self.dump_folder / f"bad_batch_{self.step_count}.safetensors"
            save_file({name: value.contiguous() for name, value in vars(batch).items() if value is not None}, path)
            where = f"; its batch is in {path}"
        log.warning("step %d has non-finite gradients and is skipped%s", self.step_count, where)
        if self.bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{MAX_BAD_STEPS} consecutive steps at step {self.step_count} had non-finite losses or gradients{where}"
                f"; lower learning_rate={self.cfg.optim.learning_rate} or use dtype='fp32', then resume"
            )

    def weights(self) -> Transformer:
        """The trained model; tensors are shared, not copied."""
        return self.model


def reduce_stats(stats: Stats) -> Stats:
    """Combine the statistics of a step over all ranks, with the same rules as over micro-batches."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stats
    reduced = {name: value.clone() for name, value in sorted(stats.items())}
    for name, value in reduced.items():
        largest, total = torch.distributed.ReduceOp.MAX, torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(value, op=largest if name.endswith("_max") else total)
    return reduced
