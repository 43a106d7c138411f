"""What the studies measure of a model, and how they draw it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from thinkstack.checkpoint.model import load_chat
from thinkstack.data import PackedStream
from thinkstack.models.transformer import Transformer
from thinkstack.stages.documents import make_source
from thinkstack.stages.pretrain import HELD_OUT
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.train.balance import expert_counts, max_violation
from thinkstack.train.passes import batch_logprobs
from thinkstack.types import Batch

HELD_OUT_ROWS = 96
MICRO_TOKENS = 2560


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A model on documents that nobody trains on."""

    loss: float
    """Mean cross-entropy of the next token in nats."""
    violation: float
    """Load of the busiest expert over the mean, minus 1, over all these rows; mean over layers."""


def held_out_rows(cfg: PretrainConfig, checkpoint: Path) -> Batch:
    """Rows of the corpus that lie beyond everything trained on."""
    stream = PackedStream(
        make_source(cfg, puzzle_tasks(cfg.tasks), load_chat(checkpoint)), HELD_OUT_ROWS, cfg.row_tokens
    )
    stream.restore({"position": HELD_OUT, "waiting": []})
    return stream.take()


@torch.no_grad()
def measure(model: Transformer, batch: Batch) -> HeldOut:
    """Loss and load of `model` on `batch`."""
    logprobs = batch_logprobs(model, batch, 1.0, MICRO_TOKENS)
    routings = model.trunk(batch.ids, batch.positions, batch.document_ids).routing
    loads = [max_violation(expert_counts(routing, batch.document_ids > 0)) for routing in routings]
    return HeldOut(
        loss=-float(logprobs.sum() / batch.loss_mask.sum()),
        violation=float(torch.stack(loads).mean()) if loads else 0.0,
    )


def panel(canvas: Figure, axes: Axes, title: str, x: str, y: str) -> None:
    """The look of every panel."""
    canvas.patch.set_facecolor("white")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def band(axes: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, color: str) -> None:
    """Mean over runs as a line, least to largest as a band."""
    columns = list(zip(*runs, strict=True))
    axes.plot(x, [sum(column) / len(column) for column in columns], color=color, label=label, linewidth=1.8)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def smoothed(values: Sequence[float], every: int) -> list[float]:
    """Means of `every` values after each other; a last incomplete group is left out."""
    return [sum(values[i : i + every]) / every for i in range(0, len(values) - every + 1, every)]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table of equal rows."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows]
    return "\n".join(lines)
