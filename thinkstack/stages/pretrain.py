"""Pre-training: a tokenizer, a fresh model, and next-token prediction over the generated corpus and the user's texts.

Leaves `model/` in Hugging Face layout, and `model-ema/` where an average of the weights is kept. Given `start`, it goes
on from that checkpoint instead, with a longer context if `model` says so.
"""

import copy
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.hf_config import to_hf
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.peft import save_adapter
from thinkstack.checkpoint.state import load_state, save_state
from thinkstack.data import PackedStream
from thinkstack.log import CURVE, Progress, Run, timed
from thinkstack.models.lora import merged
from thinkstack.models.transformer import Transformer
from thinkstack.stages.documents import make_source
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.stages.talk import keep_limit
from thinkstack.tasks.corpus import documents
from thinkstack.tasks.puzzles import digest
from thinkstack.tasks.table import families
from thinkstack.text.chat import ChatFormat, chat_format
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN
from thinkstack.text.tokenizer import CONTROL, FIM, train_tokenizer
from thinkstack.train.ema import MovingAverage
from thinkstack.train.loss import next_token_loss
from thinkstack.train.passes import batch_log_probs
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.types import Batch, Interrupted

MODEL, AVERAGE, STATE = "model", "model-ema", "state"
ADAPTER = "adapter"
"""Beside the merged model, where adapters were trained."""
TOKENIZER_DOCUMENTS = 4000
"""Documents the tokenizer is trained on."""
HELD_OUT = 1 << 40
"""Documents from here on are never trained on; losses by position are measured on them."""
HELD_OUT_TOKENS = 1 << 14
"""Tokens they are measured on, in whole rows."""


def pretrain(cfg: PretrainConfig, run: Run) -> None:
    """Train and write run.folder/model; resumes from run.folder/state where that exists."""
    Pretraining(cfg, run).run_to_the_end()


class Pretraining:
    """A model on its way through a corpus. What a state holds is all that changes from step to step."""

    def __init__(self, cfg: PretrainConfig, run: Run):
        """Opens or makes the model, and goes back to the state in run.folder where there is one."""
        self.cfg, self.run, self.plan = cfg, run, cfg.batch_plan()
        self.model, self.chat = open_model(cfg)
        self.stream = PackedStream(
            make_source(cfg, families(cfg.families), self.chat), cfg.rows, cfg.row_tokens, isolated=cfg.document_mask
        )
        self.trainer = Trainer(self.model, cfg.trainer, len(self.plan.rows), dump_folder=run.folder)
        self.average = MovingAverage(self.model, cfg.ema_decay) if cfg.ema_decay else None
        state = load_state(run.folder / STATE)
        if state is not None:
            tensors, numbers = state
            restore_trainer(self.trainer, tensors, numbers)
            self.stream.restore(numbers["stream"])
            if self.average:
                self.average.restore(tensors)
        run.rewind(state[1]["rows"] if state else {})

    def save(self) -> None:
        """Write the state to resume from."""
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
        rate = float(batch.loss_mask.sum()) / times["time/step_seconds"]
        return metrics | times | {"train/tokens_per_second": rate, "train/rows": float(self.plan.rows[step])}

    def run_to_the_end(self) -> None:
        """Take all steps that are left, then write the model. Raises Interrupted when asked to stop."""
        cfg, trainer, total = self.cfg, self.trainer, len(self.plan.rows)
        if trainer.step_count == 0:
            self.measure_positions()
        with Progress("pre-training", total, trainer.step_count) as progress:
            while trainer.step_count < total:
                metrics = self.step()
                self.run.log(trainer.step_count, metrics)
                note = f"loss {metrics['loss/next_token_nats']:.3f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"
                progress.advance(1, note)
                if (cfg.save_steps and trainer.step_count % cfg.save_steps == 0) or self.run.is_stopping():
                    self.save()
                if self.run.is_stopping():
                    raise Interrupted
        self.measure_positions()
        self.write_models()

    def write_models(self) -> None:
        """Write the model, and its average, with the limit of what they can read."""
        models = {MODEL: self.model}
        if self.average:
            models[AVERAGE] = copy.deepcopy(self.model)
            self.average.write_to(models[AVERAGE])
        if self.cfg.trainer.lora.rank:
            save_adapter(self.run.folder / ADAPTER, self.model, self.cfg.trainer.lora, self.cfg.start)
        for name, model in models.items():
            plain = merged(model)
            save_model(self.run.folder / name, plain, self.chat.tokenizer, self.chat)
            keep_limit(self.run.folder / name, plain, self.chat, families(self.cfg.families))

    def measure_positions(self) -> None:
        """Append the loss by position on held-out rows to the curve, where edges are given."""
        cfg = self.cfg
        if cfg.position_edges:
            rows = -(-HELD_OUT_TOKENS // cfg.row_tokens)
            held_out = PackedStream(self.stream.source, rows, cfg.row_tokens, isolated=cfg.document_mask)
            held_out.restore({"position": HELD_OUT, "waiting": []})
            found = loss_by_position(self.model, held_out.take(), cfg.position_edges, cfg.trainer.micro_tokens)
            self.run.append(CURVE, {"step": self.trainer.step_count, "loss_by_position": found})


def open_model(cfg: PretrainConfig) -> tuple[Transformer, ChatFormat]:
    """The model to train and the format of its questions: fresh ones, or those of cfg.start.

    Raises ConfigError for a model that could not be saved after it was trained.
    """
    if cfg.start:
        return with_context(load_model(cfg.start), cfg), load_chat(cfg.start)
    model_cfg = cfg.model_config
    to_hf(model_cfg)
    corpus = documents(families(cfg.families), cfg.corpus, cfg.seed)
    texts = [f"{doc.question}\n{doc.text}" for doc in islice(corpus, TOKENIZER_DOCUMENTS)]
    texts += [Path(path).read_text(encoding="utf-8", errors="replace") for path in cfg.text_files]
    control = (*CONTROL, *FIM) if cfg.fim_rate else CONTROL
    whole, joined = (ANSWER_OPEN, ANSWER_CLOSE), cfg.boundary_split_share > 0
    tokenizer = train_tokenizer(texts, model_cfg.vocab_size, whole, control, joined)
    generator = torch.Generator().manual_seed(digest("weights", cfg.seed) % 2**63)
    return Transformer(model_cfg).initialise(generator), chat_format(cfg.chat_format, tokenizer)


def with_context(model: Transformer, cfg: PretrainConfig) -> Transformer:
    """The model with the stage's rotary settings and longest context: the same weights, other positions."""
    changed = cfg.extended(model.cfg)
    to_hf(changed)
    if changed == model.cfg:
        return model
    extended = Transformer(changed)
    extended.load_state_dict(model.state_dict())
    return extended


@torch.no_grad()
def loss_by_position(
    model: Transformer, batch: Batch, edges: tuple[int, ...], micro_tokens: int
) -> list[dict[str, Any]]:
    """Mean cross-entropy in nats of the trained targets between each two of 0, edges, and the end of the row.

    One table per interval that has any: "from" and "to" (positions, the latter excluded), "nats", "tokens".
    """
    losses = -batch_log_probs(model, batch, 1.0, micro_tokens)
    bounds = (0, *edges, int(batch.positions.max()) + 1)
    found = []
    for low, high in pairwise(bounds):
        inside = (batch.positions >= low) & (batch.positions < high) & (batch.loss_mask > 0)
        if inside.any():
            mean = float(losses[inside].mean())
            found.append({"from": low, "to": high, "nats": mean, "tokens": int(inside.sum())})
    return found
