"""Settings of a pre-training stage."""

from dataclasses import dataclass, field, replace
from typing import Any

from thinkstack.config import Count, CountOrZero, DataInput, ModelInput, Seed, Share, build, dump, merge
from thinkstack.models.config import ModelConfig, named
from thinkstack.tasks.puzzles.corpus import CorpusConfig
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.tasks.task import TaskConfig, default_tasks
from thinkstack.train.schedule import BatchSchedule
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

CONTEXT_FIELDS = ("max_positions", "rope")
"""ModelConfig fields that may change for a loaded model, because no weights depend on them."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of a pre-training stage."""

    size: str = "v3-tiny"
    """Named size of the model; see models/config.py."""
    model: dict[str, Any] = field(default_factory=dict)
    """ModelConfig fields that override the named size; with `start`, only rope and max_positions may be set."""
    start: ModelInput = ""
    """Checkpoint, or the stage that writes it, to continue from, tokenizer included; empty: initialize new weights."""
    tasks: dict[str, TaskConfig] = field(default_factory=default_tasks)
    """Tasks of the generated corpus, by name."""
    corpus: CorpusConfig = CorpusConfig()
    """Composition of the generated corpus."""
    text_files: DataInput = ()
    """Your own texts, mixed into the corpus: UTF-8 text files, or JSON lines and parquet with key "text" in each
    row."""
    text_share: Share = 0.5
    """Share of the documents taken from text_files, if there are any."""
    fim_rate: Share = 0.0
    """Share of plain-text documents in fill-in-the-middle format (text/fim.py); 0.1 in V3. With a share above 0 a new
    tokenizer gets the control tokens of this format."""
    boundary_split_share: Share = 0.0
    """Share of boundary tokens (punctuation joined with a line break) that are split (text/boundary.py). With a share
    above 0 a new tokenizer has boundary tokens."""
    document_mask: bool = True
    """Mask attention across document boundaries and restart positions at each document; V3 was trained without it."""
    chat_format: str = "r1_zero_short"
    """Chat format of the questions; see text/chat.py."""
    steps: Count = 1000
    """Number of optimizer steps of `rows` rows; a batch-size ramp splits the same tokens into more, smaller steps."""
    rows: Count = 16
    """Number of packed rows per step."""
    rows_start: CountOrZero = 0
    """Number of rows in the first step of a batch-size ramp up to `rows` (train/schedule.py); 0: no ramp."""
    ramp_share: Share = 0.0
    """Share of the run's tokens over which the number of rows grows; 469B of 14.8T in V3."""
    row_tokens: Count = 160
    """Tokens per row."""
    position_edges: tuple[int, ...] = ()
    """Edges of position intervals; the held-out loss of each interval is evaluated before and after training. Empty: no
    evaluation."""
    trainer: TrainerConfig = TrainerConfig()
    """Precision, optimizer and auxiliary losses."""
    ema_decay: Share = 0.0
    """Decay of a moving average of the weights, saved as model-ema; 0: no average."""
    save_steps: CountOrZero = 500
    """Steps between two saves of the training state; 0: never save."""
    seed: Seed = 0
    """Seed of the weights and the corpus."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or self.row_tokens < 2:
            raise ConfigError(f"steps={self.steps}, rows={self.rows} and row_tokens={self.row_tokens} must be positive")
        for name in ("text_share", "fim_rate", "boundary_split_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a probability; use a number in 0..1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must be at least 0 and below 1; 0 means no average")
        if any(edge <= 0 for edge in self.position_edges) or list(self.position_edges) != sorted(
            set(self.position_edges)
        ):
            raise ConfigError(
                f"position_edges={self.position_edges} must be positive and in ascending order, such as [160, 640]"
            )
        if self.trainer.lora.rank and not self.start:
            raise ConfigError(
                f"trainer.lora.rank={self.trainer.lora.rank} would train an adapter on randomly initialized weights; "
                "set start to the checkpoint to adapt, or use trainer.lora.rank=0"
            )
        puzzle_tasks(self.tasks)
        self.batch_schedule()
        if self.start:
            for key in self.model.keys() - set(CONTEXT_FIELDS):
                raise ConfigError(
                    f"model.{key} cannot change with start={self.start!r}, because the loaded weights depend "
                    f"on it; only {' and '.join(f'model.{name}' for name in CONTEXT_FIELDS)} can change"
                )
        else:
            self.check_rows(self.model_config)

    @property
    def model_config(self) -> ModelConfig:
        """Configuration of the new model."""
        return build(ModelConfig, merge(dump(named(self.size)), self.model), "model")

    def extended(self, base: ModelConfig) -> ModelConfig:
        """`base` with this stage's max_positions and rope. Raises ConfigError if row_tokens exceeds max_positions."""
        changed = build(ModelConfig, merge(dump(base), self.model), "model")
        self.check_rows(changed)
        return replace(base, rope=changed.rope, max_positions=changed.max_positions)

    def check_rows(self, model: ModelConfig) -> None:
        """Raise ConfigError if row_tokens exceeds the model's maximum context length."""
        if self.row_tokens > model.max_positions:
            raise ConfigError(
                f"row_tokens={self.row_tokens} exceeds the model's max_positions={model.max_positions}; set "
                "model.max_positions, with model.rope.yarn for a model that was trained on shorter rows"
            )

    def batch_schedule(self) -> BatchSchedule:
        """The schedule of the number of rows per step."""
        return BatchSchedule(self.steps, self.rows, self.rows_start, self.ramp_share)
