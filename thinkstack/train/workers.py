"""Run the forward and backward passes of a step: one model on all cores, or one thread and copy of the weights per
core."""

from concurrent.futures import ThreadPoolExecutor

import torch

from thinkstack.models.precision import update_copy
from thinkstack.models.transformer import Transformer
from thinkstack.train.passes import StepContext, WorkerResult, gradient_buffers, run_worker, working_model
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch


class Workers:
    """Distributes micro-batches over workers: for small matrices, two independent passes are faster than one pass with
    two threads. Gradients are summed in the order of the workers, so that results depend on their number, not on
    timing."""

    def __init__(self, model: Transformer, cfg: TrainerConfig):
        """model: the fp32 weights."""
        self.model, self.cfg = model, cfg
        self.copies = [working_model(model, cfg, always_copy=cfg.workers > 1) for _ in range(cfg.workers)]
        self.sums = [None if copy is model else gradient_buffers(model) for copy in self.copies]
        self.pool = None
        if cfg.workers > 1:
            self.pool = ThreadPoolExecutor(cfg.workers, initializer=torch.set_num_threads, initargs=(1,))

    @property
    def compute_model(self) -> Transformer:
        """The model that the passes of the first worker run on."""
        return self.copies[0]

    def run(self, micro_batches: list[Batch], context: StepContext) -> list[WorkerResult]:
        """Worker w runs micro-batches w, w + workers, ...; returns one result per worker that has micro-batches."""
        jobs = [
            (copy, micro_batches[index :: len(self.copies)], context, self.cfg, sums)
            for index, (copy, sums) in enumerate(zip(self.copies, self.sums, strict=True))
            if index < len(micro_batches)
        ]
        if self.pool is None:
            return [run_worker(*job) for job in jobs]
        tasks = [self.pool.submit(run_worker, *job) for job in jobs]
        return [task.result() for task in tasks]

    def update_copies(self) -> None:
        """Copy the weights of the model into the copies."""
        for copy in self.copies:
            update_copy(copy, self.model)
