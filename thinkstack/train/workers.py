"""Who runs the passes of a step: one model on all cores, or a thread a core with a copy of the weights each."""

from concurrent.futures import ThreadPoolExecutor

import torch

from thinkstack.models.precision import refresh
from thinkstack.models.transformer import Transformer
from thinkstack.train.passes import Part, Plan, gradient_memory, model_to_run, run_share
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch


class Workers:
    """Micro-batches are dealt to the workers in turn: small matrices gain more from two independent passes than from
    two threads in one. Sums are taken in the order of the workers, so a result depends on their number, never on their
    timing.
    """

    def __init__(self, model: Transformer, cfg: TrainerConfig):
        """model: the fp32 weights."""
        self.model, self.cfg = model, cfg
        self.copies = [model_to_run(model, cfg, always_copy=cfg.workers > 1) for _ in range(cfg.workers)]
        self.sums = [None if copy is model else gradient_memory(model) for copy in self.copies]
        self.pool = None
        if cfg.workers > 1:
            self.pool = ThreadPoolExecutor(cfg.workers, initializer=torch.set_num_threads, initargs=(1,))

    @property
    def running(self) -> Transformer:
        """A model that computes as the passes do."""
        return self.copies[0]

    def run(self, micros: list[Batch], plan: Plan) -> list[Part]:
        """Worker w takes micro-batches w, w + workers, ...; one result per worker that had any."""
        jobs = [
            (copy, micros[place :: len(self.copies)], plan, self.cfg, sums)
            for place, (copy, sums) in enumerate(zip(self.copies, self.sums, strict=True))
            if place < len(micros)
        ]
        if self.pool is None:
            return [run_share(*job) for job in jobs]
        tasks = [self.pool.submit(run_share, *job) for job in jobs]
        return [task.result() for task in tasks]

    def refresh(self) -> None:
        """Take over the model's weights."""
        for copy in self.copies:
            refresh(copy, self.model)
