"""Several engines side by side, one core each, over the same weights.

Small models gain more from that than from threads inside a product. A request draws the same tokens wherever it runs,
so the split changes nothing but time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, Sampling


class EnginePool:
    """`workers` engines that share a model. With one worker, products use all of torch's threads."""

    def __init__(self, model: Transformer, cfg: EngineConfig, workers: int = 1, version: int = 0):
        self.engines = [Engine(model, cfg, version) for _ in range(workers)]
        self.threads = (
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """As Engine.generate: sampling.n completions for each prompt, in the prompts' order.

        on_progress is told how many prompts were finished since it was last called; from the workers' threads.
        """
        count = len(self.engines)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # similar lengths prefill together
        shares = [order[worker::count] for worker in range(count)]

        def answer(worker: int) -> list[list[Completion]]:
            mine = shares[worker]
            return self.engines[worker].generate([prompts[i] for i in mine], [samplings[i] for i in mine], on_progress)

        if self.threads is None:
            answers = [answer(0)]
        else:
            jobs = [self.threads.submit(answer, worker) for worker in range(count)]
            wait(jobs)
            answers = [job.result() for job in jobs]
        placed: dict[int, list[Completion]] = {}
        for mine, found in zip(shares, answers, strict=True):
            placed |= zip(mine, found, strict=True)
        return [placed[index] for index in range(len(prompts))]

    def load_weights(self, model: Transformer, version: int) -> None:
        """Take over new weights everywhere."""
        for engine in self.engines:
            engine.load_weights(model, version)
