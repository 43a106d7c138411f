"""Supervised fine-tuning: conversations packed into rows, loss on what the assistant says and nothing else.

Leaves `model/` in Hugging Face layout, and `adapter/` in PEFT's where an adapter was trained.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.config import Count, CountOrZero, Positive, Seed, Share
from thinkstack.data import Example, PackedStream, collate, pack
from thinkstack.log import CURVE, Run
from thinkstack.stages.conversations import Conversation, read_conversations, worked_conversations
from thinkstack.stages.supervised import SupervisedRun
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.chat import ChatFormat
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.schedule import BatchPlan
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch, ConfigError, RequestError

log = logging.getLogger(__name__)

FEW_STEPS = 10
"""Fewer are told with what makes more: short files fit into a row or two."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """One run of supervised fine-tuning."""

    start: str
    """Checkpoint or earlier stage to start from."""
    data: tuple[str, ...] = ()
    """Files of conversations: docs/sft.md says in which forms."""
    tasks: tuple[str, ...] = ()
    """Generated tasks whose worked solutions are learnt as thinking, beside the files."""
    num_examples: Count = 2000
    """Worked solutions in all, of `tasks` in turn."""
    languages: tuple[str, ...] = ()
    """Languages of worked solutions; empty takes all that a task has."""
    epochs: Positive = 2.0
    """Times that each conversation is seen."""
    max_steps: CountOrZero = 0
    """Optimizer steps at most, as the schedule counts them too; 0 sets no limit beside epochs."""
    rows: Count = 8
    """Packed rows of one step."""
    row_tokens: Count = 1024
    """Tokens of a row; longer conversations are left out and counted, never cut."""
    held_out: Share = 0.05
    """Share of the conversations that is never trained on and measured before and after; by prompt, so that no prompt
    is in both."""
    trainer: TrainerConfig = TrainerConfig(bias_speed=0.0, mtp_detached=True)
    """Precision and optimizer."""
    ema_decay: Share = 0.0
    """Decay of a moving average of the weights, saved beside the model as model-ema; 0 keeps none."""
    save_steps: CountOrZero = 100
    """Steps between two states to resume from; 0 keeps none."""
    seed: Seed = 0
    """Fixes the order and what is held out."""

    def __post_init__(self) -> None:
        if not self.data and not self.tasks:
            raise ConfigError("data=[] and tasks=[] teach nothing; name files of conversations or generated tasks")
        if self.epochs <= 0 or self.rows < 1 or self.row_tokens < 2:
            raise ConfigError(
                f"epochs={self.epochs}, rows={self.rows} and row_tokens={self.row_tokens} must be positive"
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must lie in 0..1, below 1; 0 holds nothing out")


@dataclass(frozen=True)
class SftDataset:
    """The conversations of a run as samples."""

    trained: list[Example]
    held_out: list[Example]
    too_long: int
    """Samples left out because no row takes them."""

    def document(self, index: int, seed: int) -> Example:
        """Sample `index` of the endless training order, which is shuffled anew each epoch."""
        epoch, place = divmod(index, len(self.trained))
        order = list(range(len(self.trained)))
        random.Random(digest("sft", seed, epoch)).shuffle(order)
        return self.trained[order[place]]


def make_sft_dataset(conversations: Sequence[Conversation], chat: ChatFormat, cfg: SftConfig) -> SftDataset:
    """Samples of all conversations. Raises ConfigError if none is left to train on, and for one that the chat format
    cannot write."""
    trained: list[Example] = []
    held_out: list[Example] = []
    too_long = 0
    for messages in conversations:
        asked = next((message.content for message in messages if message.role == "user"), "")
        target = held_out if digest("held out", cfg.seed, asked) % 10_000 < cfg.held_out * 10_000 else trained
        try:
            examples = chat.example(messages, messages.tools)
        except (RequestError, ConfigError) as error:
            raise ConfigError(f"{messages.where}: {error}") from error
        for ids, loss_mask in examples:
            sample = Example(tuple(ids), tuple(loss_mask))
            too_long += sample.width > cfg.row_tokens
            target += [sample] if sample.width <= cfg.row_tokens else []
    if not trained:
        raise ConfigError(
            f"none of {len(conversations)} conversations is left to train on ({too_long} samples are longer than "
            f"row_tokens={cfg.row_tokens}); raise row_tokens or lower held_out={cfg.held_out}"
        )
    return SftDataset(trained, held_out, too_long)


def sft(cfg: SftConfig, run: Run) -> None:
    """Train cfg.start and write run.folder/model; resumes from run.folder/state where that exists."""
    model, chat = load_model(cfg.start), load_chat(cfg.start)
    conversations = read_conversations(cfg.data, with_masks=True)
    if cfg.tasks:
        conversations += worked_conversations(cfg.tasks, cfg.num_examples, cfg.seed, cfg.languages)
    dataset = make_sft_dataset(conversations, chat, cfg)
    steps = max(round(cfg.epochs * len(pack(dataset.trained, cfg.row_tokens)) / cfg.rows), 1)
    steps = min(steps, cfg.max_steps or steps)
    log.info(
        "%d samples to learn in %d step(s), %d held out, %d left out as longer than a row",
        *(len(dataset.trained), steps, len(dataset.held_out), dataset.too_long),
    )
    if steps < FEW_STEPS and steps != cfg.max_steps:
        log.info("few steps: lower rows=%d or row_tokens=%d, or raise epochs=%g", cfg.rows, cfg.row_tokens, cfg.epochs)
    stream = PackedStream(partial(dataset.document, seed=cfg.seed), cfg.rows, cfg.row_tokens)
    learning = SupervisedRun("fine-tuning", cfg, run, model, chat, stream, BatchPlan(steps, cfg.rows))
    learning.go(partial(measure, dataset, cfg))
    learning.write_models()


def measure(dataset: SftDataset, cfg: SftConfig, learning: SupervisedRun) -> None:
    """Append the loss on the held-out conversations to the curve, if there are any."""
    if dataset.held_out:
        batch: Batch = collate(dataset.held_out, pack(dataset.held_out, cfg.row_tokens), cfg.row_tokens)
        logprobs = batch_logprobs(learning.model, batch, 1.0, cfg.trainer.micro_batch_tokens)
        nats = -float(logprobs.sum() / batch.loss_mask.sum())
        learning.run.append(CURVE, {"step": learning.trainer.step_count, "held_out_nats": nats})
