"""Pre-training: a tokenizer, a fresh model, and next-token prediction over the generated corpus and the user's texts.

Leaves `model/` in Hugging Face layout. Given `start`, it goes on from that checkpoint instead.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.state import load_state, save_state
from thinkstack.config import build, dump, merge
from thinkstack.data import PackedStream, Sample, Source, text_source
from thinkstack.log import Progress, Run, timed
from thinkstack.models.config import ModelConfig, named
from thinkstack.models.transformer import Transformer
from thinkstack.stages.talk import keep_limit
from thinkstack.tasks.corpus import CorpusConfig, Document, document, documents
from thinkstack.tasks.puzzles import Family, digest
from thinkstack.tasks.table import families
from thinkstack.text.chat import ChatFormat, chat_format
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN
from thinkstack.text.tokenizer import BOS, train_tokenizer
from thinkstack.train.loss import next_token_loss
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer, TrainerConfig
from thinkstack.types import ConfigError, Interrupted, Message

MODEL, STATE = "model", "state"
TOKENIZER_DOCUMENTS = 4000
"""Documents the tokenizer is trained on."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One run of pre-training."""

    size: str = "v3-tiny"
    """Named size of the model; see models/config.py."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to that size, as a table of ModelConfig."""
    start: str = ""
    """Checkpoint or earlier stage to go on from, tokenizer included; empty begins with fresh weights."""
    families: tuple[str, ...] = ("chain", "nested", "cups", "kinship")
    """Task families the corpus talks about."""
    corpus: CorpusConfig = CorpusConfig()
    """How the corpus is mixed."""
    text_files: tuple[str, ...] = ()
    """Your own UTF-8 text files, mixed into the corpus."""
    text_share: float = 0.5
    """Documents taken from text_files, where there are any."""
    chat_format: str = "r1_zero_short"
    """How questions are written; see text/chat.py."""
    steps: int = 1000
    """Optimizer steps."""
    rows: int = 16
    """Packed rows of one step."""
    row_tokens: int = 160
    """Tokens of a row."""
    trainer: TrainerConfig = TrainerConfig()
    """Precision, optimizer and auxiliary losses."""
    save_steps: int = 500
    """Steps between two states to resume from; 0 keeps none."""
    seed: int = 0
    """Fixes weights and corpus."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or self.row_tokens < 2:
            raise ConfigError(f"steps={self.steps}, rows={self.rows} and row_tokens={self.row_tokens} must be positive")
        if not 0 <= self.text_share <= 1:
            raise ConfigError(f"text_share={self.text_share} is not a probability; use a number in 0..1")
        families(self.families)
        if not self.start and self.row_tokens > self.model_config.max_positions:
            raise ConfigError(
                f"row_tokens={self.row_tokens} exceeds the model's max_positions={self.model_config.max_positions}"
            )

    @property
    def model_config(self) -> ModelConfig:
        """The model to begin with."""
        return build(ModelConfig, merge(dump(named(self.size)), self.model), "model")


def pretrain(cfg: PretrainConfig, run: Run) -> None:
    """Train and write run.folder/model; resumes from run.folder/state where that exists."""
    model, chat = open_model(cfg)
    stream = PackedStream(make_source(cfg, families(cfg.families), chat), cfg.rows, cfg.row_tokens)
    trainer = Trainer(model, cfg.trainer, cfg.steps, dump_folder=run.folder)
    state = load_state(run.folder / STATE)
    if state is not None:
        restore_trainer(trainer, *state)
        stream.restore(state[1]["stream"])
    run.rewind(state[1]["rows"] if state else {})

    def save() -> None:
        tensors, numbers = trainer_state(trainer)
        save_state(run.folder / STATE, tensors, numbers | {"stream": stream.state(), "rows": run.mark()})

    with Progress("pre-training", cfg.steps, trainer.step_count) as progress:
        while trainer.step_count < cfg.steps:
            times: dict[str, float] = {}
            with timed(times, "step"):
                batch = stream.take()
                metrics = trainer.step(batch, next_token_loss)
            rate = float(batch.loss_mask.sum()) / times["time/step_seconds"]
            run.log(trainer.step_count, metrics | times | {"train/tokens_per_second": rate})
            progress.advance(1, f"loss {metrics['loss/next_token_nats']:.3f}  {rate:,.0f} tokens/s")
            if (cfg.save_steps and trainer.step_count % cfg.save_steps == 0) or run.is_stopping():
                save()
            if run.is_stopping():
                raise Interrupted
    save_model(run.folder / MODEL, model, chat.tokenizer, chat.name)
    keep_limit(run.folder / MODEL, model, chat, families(cfg.families))


def open_model(cfg: PretrainConfig) -> tuple[Transformer, ChatFormat]:
    """The model to train and the format of its questions: fresh ones, or those of cfg.start."""
    if cfg.start:
        return load_model(cfg.start), load_chat(cfg.start)
    model_cfg = cfg.model_config
    corpus = documents(families(cfg.families), cfg.corpus, cfg.seed)
    texts = [f"{doc.question}\n{doc.text}" for doc in islice(corpus, TOKENIZER_DOCUMENTS)]
    texts += [Path(path).read_text(encoding="utf-8", errors="replace") for path in cfg.text_files]
    tokenizer = train_tokenizer(texts, model_cfg.vocab_size, (ANSWER_OPEN, ANSWER_CLOSE))
    generator = torch.Generator().manual_seed(digest("weights", cfg.seed) % 2**63)
    return Transformer(model_cfg).initialise(generator), chat_format(cfg.chat_format, tokenizer)


def make_source(cfg: PretrainConfig, suite: list[Family], chat: ChatFormat) -> Source:
    """Documents by index: the generated corpus, with the user's texts mixed in."""
    bos = chat.tokenizer.control_id(BOS)
    own = text_source([Path(path) for path in cfg.text_files], chat.tokenizer.encode, bos, cfg.row_tokens)

    def source(index: int) -> Sample:
        draw = digest("text", cfg.seed, index)
        if own and draw % 10_000 < cfg.text_share * 10_000:
            return own[draw // 10_000 % len(own)]
        return sample_of(document(suite, cfg.corpus, cfg.seed, index), chat, bos)

    return source


def sample_of(doc: Document, chat: ChatFormat, bos: int) -> Sample:
    """A document as tokens; all but BOS are learnt, the question too, as in any pre-training corpus."""
    prompt = chat.prompt([Message(role="user", content=doc.question)]) if doc.question else [bos]
    ids = (*prompt, *chat.answer(doc.text))
    return Sample(ids, (0,) + (1,) * (len(ids) - 1))
