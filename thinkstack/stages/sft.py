"""Supervised fine-tuning on conversations packed into rows, with the loss on assistant turns only.

Writes `model/` in Hugging Face layout, and `adapter/` in PEFT's layout if an adapter is trained.
"""

import functools
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.config import Count, CountOrZero, DataInput, ModelInput, Positive, Seed, Share
from thinkstack.data import Example, PackedStream, collate, pack
from thinkstack.log import CURVE, Run
from thinkstack.stages.conversations import Conversation, read_conversations, worked_conversations
from thinkstack.stages.supervised import SupervisedRun
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.tasks.task import TaskConfig
from thinkstack.text.chat import ChatFormat
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.schedule import BatchSchedule
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch, ConfigError, RequestError

log = logging.getLogger(__name__)

SHORT_RUN_STEPS = 10
"""Number of steps below which a run logs which settings give more steps; a short file fits into a few rows."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Settings of a supervised fine-tuning stage."""

    start: ModelInput
    """Checkpoint, or the stage that writes it, to start from."""
    data: DataInput = ()
    """Files of conversations, in the formats of docs/guides/sft.md."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Generated tasks whose worked solutions are added to the data as thinking, by name."""
    num_examples: Count = 2000
    """Total number of worked solutions; the tasks alternate."""
    epochs: Positive = 2.0
    """Number of passes over the conversations."""
    max_steps: CountOrZero = 0
    """Maximum number of optimizer steps, also the length of the learning-rate schedule; 0: `epochs` is the only
    limit."""
    rows: Count = 8
    """Number of packed rows per step."""
    row_tokens: Count = 1024
    """Tokens per row; longer conversations are skipped and counted, never truncated."""
    held_out: Share = 0.05
    """Share of the conversations that are held out from training and evaluated before and after it. The split is by
    prompt, so that no prompt is in both parts."""
    trainer: TrainerConfig = TrainerConfig(bias_speed=0.0, mtp_detached=True)
    """Precision and optimizer."""
    ema_decay: Share = 0.0
    """Decay of a moving average of the weights, saved as model-ema; 0: no average."""
    save_steps: CountOrZero = 100
    """Steps between two saves of the training state; 0: never save."""
    seed: Seed = 0
    """Seed of the order of the examples and of the held-out split."""

    def __post_init__(self) -> None:
        if not self.data and not self.tasks:
            raise ConfigError(
                "data=[] and tasks={}: there is nothing to train on; set data to files of conversations, or set tasks"
            )
        if self.epochs <= 0 or self.rows < 1 or self.row_tokens < 2:
            raise ConfigError(
                f"epochs={self.epochs}, rows={self.rows} and row_tokens={self.row_tokens} must be positive"
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must be at least 0 and below 1; 0 holds nothing out")


@functools.lru_cache(maxsize=2)  # packing looks ahead into the next epoch
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in an epoch."""
    order = list(range(count))
    random.Random(digest("sft", seed, epoch)).shuffle(order)
    return order


@dataclass(frozen=True)
class SftDataset:
    """The conversations of a run as training and held-out examples."""

    trained: list[Example]
    held_out: list[Example]
    num_too_long: int
    """Number of examples skipped because they are longer than a row."""

    def document(self, index: int, seed: int) -> Example:
        """Example `index` of the infinite training order, which is reshuffled each epoch."""
        epoch, position = divmod(index, len(self.trained))
        return self.trained[epoch_order(len(self.trained), seed, epoch)[position]]


def make_sft_dataset(conversations: Sequence[Conversation], chat: ChatFormat, cfg: SftConfig) -> SftDataset:
    """The examples of all conversations. Raises ConfigError if no training example is left, and for a conversation that
    the chat format cannot render."""
    trained: list[Example] = []
    held_out: list[Example] = []
    num_too_long = 0
    for messages in conversations:
        prompt = next((message.content for message in messages if message.role == "user"), "")
        target = held_out if digest("held out", cfg.seed, prompt) % 10_000 < cfg.held_out * 10_000 else trained
        try:
            examples = chat.example(messages, messages.tools)
        except (RequestError, ConfigError) as error:
            raise ConfigError(f"{messages.where}: {error}") from error
        for ids, loss_mask in examples:
            example = Example(tuple(ids), tuple(loss_mask))
            num_too_long += example.width > cfg.row_tokens
            target += [example] if example.width <= cfg.row_tokens else []
    if not trained:
        raise ConfigError(
            f"no training example is left of {len(conversations)} conversations ({num_too_long} examples are longer "
            f"than row_tokens={cfg.row_tokens}); raise row_tokens or lower held_out={cfg.held_out}"
        )
    return SftDataset(trained, held_out, num_too_long)


def sft(cfg: SftConfig, run: Run) -> None:
    """Train cfg.start and write run.folder/model; resumes from run.folder/state if it exists."""
    model, chat = load_model(cfg.start), load_chat(cfg.start)
    conversations = read_conversations(cfg.data, with_masks=True)
    if cfg.tasks:
        conversations += worked_conversations(puzzle_tasks(cfg.tasks), cfg.num_examples, cfg.seed)
    dataset = make_sft_dataset(conversations, chat, cfg)
    steps = max(round(cfg.epochs * len(pack(dataset.trained, cfg.row_tokens)) / cfg.rows), 1)
    steps = min(steps, cfg.max_steps or steps)
    log.info(
        "%d training examples in %d step(s), %d held out, %d skipped because they are longer than a row",
        *(len(dataset.trained), steps, len(dataset.held_out), dataset.num_too_long),
    )
    if steps < SHORT_RUN_STEPS and steps != cfg.max_steps:
        log.info(
            "for more steps, lower rows=%d or row_tokens=%d, or raise epochs=%g", cfg.rows, cfg.row_tokens, cfg.epochs
        )
    stream = PackedStream(partial(dataset.document, seed=cfg.seed), cfg.rows, cfg.row_tokens)
    training = SupervisedRun("fine-tuning", cfg, run, model, chat, stream, BatchSchedule(steps, cfg.rows))
    training.train(partial(evaluate_held_out, dataset, cfg))
    training.write_models()


def evaluate_held_out(dataset: SftDataset, cfg: SftConfig, training: SupervisedRun) -> None:
    """Append the loss on the held-out conversations to the curve, if there are any."""
    if dataset.held_out:
        batch: Batch = collate(dataset.held_out, pack(dataset.held_out, cfg.row_tokens), cfg.row_tokens)
        logprobs = batch_logprobs(training.model, batch, 1.0, cfg.trainer.micro_batch_tokens)
        nats = -float(logprobs.sum() / batch.loss_mask.sum())
        training.run.append(CURVE, {"step": training.trainer.step_count, "held_out_nats": nats})
