"""The training loop of pre-training and supervised fine-tuning: next-token prediction on a stream of documents."""

import copy
from collections.abc import Callable
from typing import Protocol

from thinkstack.checkpoint.model import save_model
from thinkstack.checkpoint.peft.adapter import save_adapter
from thinkstack.checkpoint.state import ADAPTER, AVERAGE, MODEL, STATE, load_state, save_state
from thinkstack.data import PackedStream
from thinkstack.log import Progress, Run, timed
from thinkstack.models.lora import merge_adapters
from thinkstack.models.transformer import Transformer
from thinkstack.text.chat import ChatFormat
from thinkstack.train.ema import MovingAverage
from thinkstack.train.loss import next_token_loss
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.schedule import BatchSchedule
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Interrupted


class SupervisedConfig(Protocol):
    """The settings that the training loop uses."""

    @property
    def start(self) -> str: ...
    @property
    def trainer(self) -> TrainerConfig: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def save_steps(self) -> int: ...


class SupervisedRun:
    """A training run over a stream of documents; the saved state contains everything that changes from step to step."""

    def __init__(
        self,
        title: str,
        cfg: SupervisedConfig,
        run: Run,
        model: Transformer,
        chat: ChatFormat,
        stream: PackedStream,
        plan: BatchSchedule,
    ):
        """Restores the state in run.folder if there is one. title: label of the progress line."""
        self.title, self.cfg, self.run, self.plan = title, cfg, run, plan
        self.model, self.chat, self.stream = model, chat, stream
        self.trainer = Trainer(model, cfg.trainer, len(plan.rows), dump_folder=run.folder)
        self.average = MovingAverage(model, cfg.ema_decay) if cfg.ema_decay else None
        state = load_state(run.folder / STATE)
        if state is not None:
            tensors, numbers = state
            restore_trainer(self.trainer, tensors, numbers)
            stream.restore(numbers["stream"])
            if self.average:
                self.average.restore(tensors)
        run.rewind(state[1]["rows"] if state else {})

    def save(self) -> None:
        """Write the training state."""
        tensors, numbers = trainer_state(self.trainer)
        tensors |= self.average.state() if self.average else {}
        save_state(self.run.folder / STATE, tensors, numbers | {"stream": self.stream.state(), "rows": self.run.mark()})

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        step, times = self.trainer.step_count, dict[str, float]()
        with timed(times, "step"):
            batch = self.stream.take(self.plan.rows[step])
            metrics = self.trainer.step(batch, next_token_loss, progress=self.plan.progress(step))
            if self.average and not metrics["train/skipped"]:
                self.average.update(self.model, self.trainer.step_count)
        rate = float((batch.document_ids > 0).sum()) / times["time/step_seconds"]
        return metrics | times | {"train/tokens_per_second": rate, "train/rows": float(self.plan.rows[step])}

    def train(self, evaluate: Callable[["SupervisedRun"], None]) -> None:
        """Run the remaining steps; evaluate before the first and after the last step.

        Raises Interrupted on a request to stop, after saving the state.
        """
        cfg, trainer, total = self.cfg, self.trainer, len(self.plan.rows)
        if trainer.step_count == 0:
            self.evaluate(evaluate)
        with Progress(self.title, total, trainer.step_count) as progress:
            while trainer.step_count < total:
                metrics = self.step()
                self.run.log(trainer.step_count, metrics)
                note = f"loss {metrics['loss/next_token_nats']:.3f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"
                progress.advance(1, note)
                if (cfg.save_steps and trainer.step_count % cfg.save_steps == 0) or self.run.stop.is_requested:
                    self.save()
                if self.run.stop.is_requested:
                    raise Interrupted
        self.evaluate(evaluate)

    def evaluate(self, evaluate: Callable[["SupervisedRun"], None]) -> None:
        """Run an evaluation; a request to stop interrupts the evaluation, and a resumed run repeats it."""
        marks = self.run.mark()
        try:
            with self.run.stop.may_interrupt():
                evaluate(self)
        except Interrupted:
            self.run.rewind(marks)
            self.save()
            raise

    def write_models(self) -> None:
        """Write the model, and if they exist the moving average and the adapter."""
        models = {MODEL: self.model}
        if self.average:
            models[AVERAGE] = copy.deepcopy(self.model)
            self.average.write_to(models[AVERAGE])
        if self.cfg.trainer.lora.rank:
            save_adapter(self.run.folder / ADAPTER, self.model, self.cfg.trainer.lora, self.cfg.start)
        for name, model in models.items():
            folder = self.run.folder / name
            save_model(folder, merge_adapters(model), self.chat.tokenizer, self.chat, like=self.cfg.start or None)
