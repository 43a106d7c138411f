"""Pre-training: train a tokenizer, initialize a model, and train it on the generated corpus and the user's texts.

Writes `model/` in Hugging Face layout, and `model-ema/` with the moving average of the weights if `ema_decay` is set.
With `start`, training continues from that checkpoint instead, with a longer context if `model` sets one.
"""

from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from thinkstack.checkpoint.hf.config import to_hf
from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.data import PackedStream, read_texts
from thinkstack.log import CURVE, Run
from thinkstack.models.transformer import Transformer
from thinkstack.stages.documents import make_source
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.stages.supervised import SupervisedRun
from thinkstack.tasks.puzzles.corpus import documents
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.text.chat import ChatFormat, chat_format
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN
from thinkstack.text.tokenizer import CONTROL, FIM, train_tokenizer
from thinkstack.train.passes import batch_logprobs
from thinkstack.types import Batch

TOKENIZER_DOCUMENTS = 4000
"""Number of documents that the tokenizer is trained on."""
HELD_OUT = 1 << 40
"""Index of the first held-out document; the loss by position is evaluated on documents from this index on."""
HELD_OUT_TOKENS = 1 << 14
"""Number of tokens for the loss by position, rounded up to full rows."""


def pretrain(cfg: PretrainConfig, run: Run) -> None:
    """Train and write run.folder/model; resumes from run.folder/state if it exists."""
    training = start_pretraining(cfg, run)
    training.train(partial(evaluate_by_position, cfg))
    training.write_models()


def start_pretraining(cfg: PretrainConfig, run: Run) -> SupervisedRun:
    """The training run of a new or loaded model; restores the state in run.folder if there is one."""
    model, chat = open_model(cfg)
    source = make_source(cfg, puzzle_tasks(cfg.tasks), chat)
    stream = PackedStream(source, cfg.rows, cfg.row_tokens, isolated=cfg.document_mask)
    return SupervisedRun("pre-training", cfg, run, model, chat, stream, cfg.batch_schedule())


def evaluate_by_position(cfg: PretrainConfig, training: SupervisedRun) -> None:
    """Append the loss by position on held-out rows to the curve, if position_edges are set."""
    if cfg.position_edges:
        rows = -(-HELD_OUT_TOKENS // cfg.row_tokens)
        held_out = PackedStream(training.stream.source, rows, cfg.row_tokens, isolated=cfg.document_mask)
        held_out.restore({"position": HELD_OUT, "waiting": []})
        table = loss_by_position(training.model, held_out.take(), cfg.position_edges, cfg.trainer.micro_batch_tokens)
        training.run.append(CURVE, {"step": training.trainer.step_count, "loss_by_position": table})


def open_model(cfg: PretrainConfig) -> tuple[Transformer, ChatFormat]:
    """The model to train and its chat format: newly initialized, or loaded from cfg.start.

    Raises ConfigError for a model that cannot be saved after training.
    """
    if cfg.start:
        return with_context(load_model(cfg.start), cfg), load_chat(cfg.start)
    model_cfg = cfg.model_config
    to_hf(model_cfg)
    corpus = documents(puzzle_tasks(cfg.tasks), cfg.corpus, cfg.seed)
    texts = [f"{doc.question}\n{doc.text}" for doc in islice(corpus, TOKENIZER_DOCUMENTS)]
    texts += [text for path in cfg.text_files for text in read_texts(Path(path))]
    control = (*CONTROL, *FIM) if cfg.fim_rate else CONTROL
    tags, join_boundaries = (ANSWER_OPEN, ANSWER_CLOSE), cfg.boundary_split_share > 0
    tokenizer = train_tokenizer(texts, model_cfg.vocab_size, tags, control, join_boundaries)
    generator = torch.Generator().manual_seed(digest("weights", cfg.seed) % 2**63)
    return Transformer(model_cfg).initialize(generator), chat_format(cfg.chat_format, tokenizer)


def with_context(model: Transformer, cfg: PretrainConfig) -> Transformer:
    """The model with unchanged weights and with the rotary settings and max_positions of the stage."""
    changed = cfg.extended(model.cfg)
    to_hf(changed)
    if changed == model.cfg:
        return model
    extended = Transformer(changed)
    extended.load_state_dict(model.state_dict())
    return extended


@torch.no_grad()
def loss_by_position(
    model: Transformer, batch: Batch, edges: tuple[int, ...], micro_batch_tokens: int
) -> list[dict[str, Any]]:
    """Mean cross-entropy in nats of the trained targets in each position interval; the boundaries of the intervals are
    0, the edges and the end of the row.

    Returns one entry per interval with targets: "from" and "to" (positions, "to" excluded), "nats", "tokens".
    """
    losses = -batch_logprobs(model, batch, 1.0, micro_batch_tokens)
    bounds = (0, *edges, int(batch.positions.max()) + 1)
    table = []
    for low, high in pairwise(bounds):
        inside = (batch.positions >= low) & (batch.positions < high) & (batch.loss_mask > 0)
        if inside.any():
            mean = float(losses[inside].mean())
            table.append({"from": low, "to": high, "nats": mean, "tokens": int(inside.sum())})
    return table
