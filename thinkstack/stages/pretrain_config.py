"""Settings of a pre-training stage."""

from dataclasses import dataclass, field, replace
from typing import Any

from thinkstack.config import Count, CountOrZero, Seed, Share, build, dump, merge
from thinkstack.models.config import ModelConfig, named
from thinkstack.tasks.puzzles.corpus import CorpusConfig
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.train.schedule import BatchSchedule
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

CONTEXT_FIELDS = ("max_positions", "rope")
"""ModelConfig fields that may change for a loaded model: those without weights."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One run of pre-training."""

    size: str = "v3-tiny"
    """Named size of the model; see models/config.py."""
    model: dict[str, Any] = field(default_factory=dict)
    """ModelConfig fields that override the size; with `start` only those of the context (rope, max_positions)."""
    start: str = ""
    """Checkpoint or earlier stage to continue from, tokenizer included; empty initializes new weights."""
    tasks: tuple[str, ...] = ("chain", "nested", "cups", "kinship")
    """Tasks of the generated corpus."""
    corpus: CorpusConfig = CorpusConfig()
    """Composition of the generated corpus."""
    text_files: tuple[str, ...] = ()
    """Your own texts, mixed into the corpus: UTF-8 text files, or JSON lines and parquet with a "text" in each row."""
    text_share: Share = 0.5
    """Share of the documents taken from text_files, if there are any."""
    fim_rate: Share = 0.0
    """Share of plain-text documents in fill-in-the-middle format (text/fim.py); 0.1 in V3. Above 0 a new tokenizer gets
    the control tokens for it."""
    boundary_split_share: Share = 0.0
    """Share of tokens joining punctuation and line breaks that are split (text/boundary.py). Above 0 a new tokenizer
    has such tokens."""
    document_mask: bool = True
    """Whether attention and positions stop at document boundaries; V3 was trained without."""
    chat_format: str = "r1_zero_short"
    """Chat format of the questions; see text/chat.py."""
    steps: Count = 1000
    """Optimizer steps of `rows` rows; with a batch-size ramp, more and smaller steps over the same tokens."""
    rows: Count = 16
    """Packed rows per step."""
    rows_start: CountOrZero = 0
    """Rows of the first step of a batch-size ramp to `rows` (train/schedule.py); 0: no ramp."""
    ramp_share: Share = 0.0
    """Share of the run's tokens over which the rows grow; 469B of 14.8T in V3."""
    row_tokens: Count = 160
    """Tokens per row."""
    position_edges: tuple[int, ...] = ()
    """Edges of position intervals whose held-out loss is evaluated before and after training; empty: no evaluation."""
    trainer: TrainerConfig = TrainerConfig()
    """Precision, optimizer and auxiliary losses."""
    ema_decay: Share = 0.0
    """Decay of a moving average of the weights, saved as model-ema; 0: no average."""
    save_steps: CountOrZero = 500
    """Steps between two saves of the training state; 0 saves none."""
    seed: Seed = 0
    """Seed of the weights and the corpus."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or self.row_tokens < 2:
            raise ConfigError(f"steps={self.steps}, rows={self.rows} and row_tokens={self.row_tokens} must be positive")
        for name in ("text_share", "fim_rate", "boundary_split_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a probability; use a number in 0..1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in 0..1, below 1; 0 means no average")
        if any(edge <= 0 for edge in self.position_edges) or list(self.position_edges) != sorted(
            set(self.position_edges)
        ):
            raise ConfigError(
                f"position_edges={self.position_edges} must be positive and ascending, such as [160, 640]"
            )
        if self.trainer.lora.rank and not self.start:
            raise ConfigError(
                f"trainer.lora.rank={self.trainer.lora.rank} would train an adapter of untrained weights; "
                "set start to the checkpoint to adapt, or use rank=0"
            )
        puzzle_tasks(self.tasks)
        self.batch_schedule()
        if self.start:
            for key in self.model.keys() - set(CONTEXT_FIELDS):
                raise ConfigError(
                    f"model.{key} cannot change with start={self.start!r}, whose weights exist; "
                    f"only {' and '.join(CONTEXT_FIELDS)} can"
                )
        else:
            self.check_rows(self.model_config)

    @property
    def model_config(self) -> ModelConfig:
        """Configuration of the new model."""
        return build(ModelConfig, merge(dump(named(self.size)), self.model), "model")

    def extended(self, base: ModelConfig) -> ModelConfig:
        """`base` with the context of this stage. Raises ConfigError if a row does not fit it."""
        changed = build(ModelConfig, merge(dump(base), self.model), "model")
        self.check_rows(changed)
        return replace(base, rope=changed.rope, max_positions=changed.max_positions)

    def check_rows(self, model: ModelConfig) -> None:
        """Raise ConfigError if a row does not fit the model's context."""
        if self.row_tokens > model.max_positions:
            raise ConfigError(
                f"row_tokens={self.row_tokens} exceeds the model's max_positions={model.max_positions}; set "
                "model.max_positions, with model.rope.yarn for a model that has been trained on shorter rows"
            )

    def batch_schedule(self) -> BatchSchedule:
        """Number of rows of each step."""
        return BatchSchedule(self.steps, self.rows, self.rows_start, self.ramp_share)
