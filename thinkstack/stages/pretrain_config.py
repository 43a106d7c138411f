"""Settings of a pre-training stage."""

from dataclasses import dataclass, field, replace
from typing import Any

from thinkstack.config import Count, CountOrZero, Seed, Share, build, dump, merge
from thinkstack.models.config import ModelConfig, named
from thinkstack.tasks.puzzles.corpus import CorpusConfig
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.train.schedule import BatchPlan
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

POSITIONAL = ("max_positions", "rope")
"""What may be changed of a model that is there already: settings without weights."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One run of pre-training."""

    size: str = "v3-tiny"
    """Named size of the model; see models/config.py."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to that size, as a table of ModelConfig; with `start`, of its context (rope, max_positions) only."""
    start: str = ""
    """Checkpoint or earlier stage to go on from, tokenizer included; empty begins with fresh weights."""
    tasks: tuple[str, ...] = ("chain", "nested", "cups", "kinship")
    """Task families the corpus talks about."""
    corpus: CorpusConfig = CorpusConfig()
    """How the corpus is mixed."""
    text_files: tuple[str, ...] = ()
    """Your own texts, mixed into the corpus: UTF-8 text files, or JSON lines and parquet with a "text" in each row."""
    text_share: Share = 0.5
    """Documents taken from text_files, where there are any."""
    fim_rate: Share = 0.0
    """Plain-text documents that are told with their middle last (text/fim.py); 0.1 in V3. Above 0 a new tokenizer gets
    the control tokens for it."""
    boundary_split_share: Share = 0.0
    """Tokens joining punctuation and line breaks that are split (text/boundary.py). Above 0 a new tokenizer joins
    them."""
    document_mask: bool = True
    """Whether attention and positions stop at the borders of documents; V3 was trained without."""
    chat_format: str = "r1_zero_short"
    """How questions are written; see text/chat.py."""
    steps: Count = 1000
    """Optimizer steps of `rows` rows that the run is worth; a ramp takes more, smaller ones over the same tokens."""
    rows: Count = 16
    """Packed rows of one step."""
    rows_start: CountOrZero = 0
    """Rows of the first step, growing to `rows` (train/schedule.py); 0 begins with `rows`."""
    ramp_share: Share = 0.0
    """Share of the run's tokens over which rows grow; 469B of 14.8T in V3."""
    row_tokens: Count = 160
    """Tokens of a row."""
    position_edges: tuple[int, ...] = ()
    """Positions between which the loss is measured before and after training, on held-out rows; empty measures none."""
    trainer: TrainerConfig = TrainerConfig()
    """Precision, optimizer and auxiliary losses."""
    ema_decay: Share = 0.0
    """Decay of a moving average of the weights, saved beside the model as model-ema; 0 keeps none."""
    save_steps: CountOrZero = 500
    """Steps between two states to resume from; 0 keeps none."""
    seed: Seed = 0
    """Fixes weights and corpus."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or self.row_tokens < 2:
            raise ConfigError(f"steps={self.steps}, rows={self.rows} and row_tokens={self.row_tokens} must be positive")
        for name in ("text_share", "fim_rate", "boundary_split_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a probability; use a number in 0..1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in 0..1, below 1; 0 keeps no average")
        if any(edge <= 0 for edge in self.position_edges) or list(self.position_edges) != sorted(
            set(self.position_edges)
        ):
            raise ConfigError(f"position_edges={self.position_edges} must be positive and rise, such as [160, 640]")
        if self.trainer.lora.rank and not self.start:
            raise ConfigError(
                f"trainer.lora.rank={self.trainer.lora.rank} would adapt fresh weights that stay as they were drawn; "
                "give the checkpoint to adapt as start, or use rank=0"
            )
        puzzle_tasks(self.tasks)
        self.batch_plan()
        if self.start:
            for key in self.model.keys() - set(POSITIONAL):
                raise ConfigError(
                    f"model.{key} cannot change with start={self.start!r}, whose weights are there already; "
                    f"only {' and '.join(POSITIONAL)} can"
                )
        else:
            self.check_rows(self.model_config)

    @property
    def model_config(self) -> ModelConfig:
        """The model to begin with."""
        return build(ModelConfig, merge(dump(named(self.size)), self.model), "model")

    def extended(self, known: ModelConfig) -> ModelConfig:
        """The model `known` with this stage's context. Raises ConfigError if a row does not fit it."""
        changed = build(ModelConfig, merge(dump(known), self.model), "model")
        self.check_rows(changed)
        return replace(known, rope=changed.rope, max_positions=changed.max_positions)

    def check_rows(self, model: ModelConfig) -> None:
        """Raise ConfigError if a row does not fit the model's context."""
        if self.row_tokens > model.max_positions:
            raise ConfigError(
                f"row_tokens={self.row_tokens} exceeds the model's max_positions={model.max_positions}; set "
                "model.max_positions, with model.rope.yarn for a model that has been trained on shorter rows"
            )

    def batch_plan(self) -> BatchPlan:
        """Rows of every step."""
        return BatchPlan(self.steps, self.rows, self.rows_start, self.ramp_share)
