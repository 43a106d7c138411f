"""Pack documents into batches: text, conversations and rollouts.

A row contains several documents one after another. Targets never cross document boundaries; attention and positions
cross them only if `isolated` is False. The stream of batches is a pure function of source and position, so that a
resumed run gets the same rows.
"""

# Shapes in this file: R rows, T tokens per row.

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from thinkstack.files import has_rows, kind_of, log_unused_keys, read_rows, read_text
from thinkstack.types import Batch, ConfigError


class Columns(NamedTuple):
    """The entries of a document in a row: one per column, that is, one per prediction."""

    ids: list[int]
    targets: list[int]
    loss_mask: list[int]
    """1 = the target is trained."""
    positions: list[int]
    branches: list[int]
    """Same meaning as types.Batch.branches."""


class Document(Protocol):
    """Consecutive tokens of a row that attend only to each other."""

    @property
    def width(self) -> int:
        """Number of columns in a row: one per prediction."""

    def columns(self) -> Columns:
        """The contents of the columns."""


@dataclass(frozen=True)
class Example:
    """Token ids and loss mask (1 = trained) of one document; the first token is not predicted and never trained."""

    ids: tuple[int, ...]
    loss_mask: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.loss_mask) > 1, "a document predicts at least one token"

    @property
    def width(self) -> int:
        return len(self.ids) - 1

    def columns(self) -> Columns:
        positions, branches = list(range(self.width)), [0] * self.width
        return Columns(list(self.ids[:-1]), list(self.ids[1:]), list(self.loss_mask[1:]), positions, branches)


@dataclass(frozen=True)
class SharedPromptGroup:
    """A prompt and several completions. The row contains the prompt once, without its last token; each completion
    starts with that token. A completion does not attend to the other completions."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    loss_masks: tuple[tuple[int, ...], ...]
    """1 = trained, for each token of each completion."""

    def __post_init__(self) -> None:
        assert self.prompt and self.completions and all(self.completions), (
            "the prompt and every completion have at least one token"
        )

    @property
    def width(self) -> int:
        return len(self.prompt) - 1 + sum(map(len, self.completions))

    def columns(self) -> Columns:
        shared = len(self.prompt) - 1
        columns = Columns(
            list(self.prompt[:-1]), list(self.prompt[1:]), [0] * shared, list(range(shared)), [0] * shared
        )
        for branch, (completion, mask) in enumerate(zip(self.completions, self.loss_masks, strict=True), start=1):
            columns.ids.extend((self.prompt[-1], *completion[:-1]))
            columns.targets.extend(completion)
            columns.loss_mask.extend(mask)
            columns.positions.extend(range(shared, shared + len(completion)))
            columns.branches.extend([branch] * len(completion))
        return columns


DocumentSource = Callable[[int], Example]
"""A deterministic function from an index 0, 1, 2, ... to a document."""


def pack(examples: Sequence[Document], row_tokens: int) -> list[list[int]]:
    """Assign examples to rows: longest first, each to the fullest row with enough space. Returns the indices of the
    examples in each row.

    Raises ConfigError for an example wider than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: -examples[i].width):
        width = examples[index].width
        if width > row_tokens:
            raise ConfigError(f"a document of {width + 1} tokens exceeds row_tokens={row_tokens}; raise row_tokens")
        row = min((r for r, space in enumerate(free) if space >= width), key=free.__getitem__, default=None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(row_tokens)
        rows[row].append(index)
        free[row] -= width
    return rows


def collate(
    examples: Sequence[Document], rows: Sequence[Sequence[int]], row_tokens: int, isolated: bool = True
) -> Batch:
    """Write `examples` into the rows that `pack` chose. Document ids are example indices + 1; 0 marks padding.

    isolated: False makes each row one document with id 1 and consecutive positions, so that attention crosses document
    boundaries.
    """
    shape = (len(rows), row_tokens)
    ids, positions, document_ids, targets, branches = (torch.zeros(shape, dtype=torch.int64) for _ in range(5))
    loss_mask = torch.zeros(shape)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            columns, span = examples[index].columns(), slice(start, start + examples[index].width)
            ids[row, span] = torch.tensor(columns.ids)
            targets[row, span] = torch.tensor(columns.targets)
            loss_mask[row, span] = torch.tensor(columns.loss_mask, dtype=torch.float32)
            positions[row, span] = torch.tensor(columns.positions) + (0 if isolated else start)
            branches[row, span] = torch.tensor(columns.branches)
            document_ids[row, span] = index + 1 if isolated else 1
            start = span.stop
    return Batch(
        ids=ids,
        positions=positions,
        document_ids=document_ids,
        targets=targets,
        loss_mask=loss_mask,
        branches=branches if bool(branches.any()) else None,
    )


def collate_values(
    values: Sequence[Sequence[float]], examples: Sequence[Document], rows: Sequence[Sequence[int]], row_tokens: int
) -> torch.Tensor:
    """Per-token values of each example, one per prediction, in the layout of the batch: (R, T) fp32, 0 in padding."""
    out = torch.zeros(len(rows), row_tokens)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            assert len(values[index]) == examples[index].width, "one value per prediction"
            out[row, start : start + examples[index].width] = torch.tensor(values[index], dtype=torch.float32)
            start += examples[index].width
    return out


class PackedStream:
    """A resumable stream of batches of `rows` x `row_tokens` from a source."""

    def __init__(
        self,
        source: DocumentSource,
        rows: int,
        row_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        isolated: bool = True,
    ):
        """With world_size > 1 this rank reads documents rank, rank + world_size, ... For isolated see `collate`."""
        self.source, self.num_rows, self.row_tokens, self.isolated = source, rows, row_tokens, isolated
        self.rank, self.world_size = rank, world_size
        self.position = 0
        """Number of documents that this rank has read."""
        self.waiting: list[int] = []
        """Indices of documents that were read and did not fit the last batch."""

    def take(self, num_rows: int | None = None) -> Batch:
        """The next batch. num_rows: number of rows of the batch; None: the `rows` of the stream."""
        num_rows = self.num_rows if num_rows is None else num_rows
        indices, examples = list(self.waiting), [self.source(index) for index in self.waiting]
        while sum(example.width for example in examples) < num_rows * self.row_tokens:
            indices.append(self.position * self.world_size + self.rank)
            examples.append(self.source(indices[-1]))
            self.position += 1
        rows = pack(examples, self.row_tokens)
        chosen, rest = rows[:num_rows], rows[num_rows:]
        self.waiting = sorted(indices[i] for row in rest for i in row)
        return collate(examples, chosen, self.row_tokens, self.isolated)

    def state(self) -> dict[str, Any]:
        """The state for `restore`."""
        return {"position": self.position, "waiting": list(self.waiting)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state`."""
        self.position, self.waiting = state["position"], list(state["waiting"])


def text_source(
    paths: Sequence[Path], encode: Callable[[str], list[int]], bos_id: int, row_tokens: int
) -> list[Example]:
    """The user's texts as examples that fit a row. Raises ConfigError like `read_texts`."""
    examples = []
    for text in (text for path in paths for text in read_texts(path)):
        ids = encode(text)
        for start in range(0, len(ids), row_tokens):
            chunk = (bos_id, *ids[start : start + row_tokens])
            examples.append(Example(chunk, (0,) + (1,) * (len(chunk) - 1)))
    return examples


def read_texts(path: Path) -> list[str]:
    """The documents of a file: the content of a text file, or the "text" of each row of JSON lines or parquet.

    Raises ConfigError for a file that cannot be read or has no text, and for rows without "text".
    """
    if has_rows(path):
        texts, unused = [], Counter[str]()
        for where, row in read_rows(path):
            if "text" not in row:
                raise ConfigError(f'{where} has no key "text" (it has {", ".join(row)}); rename the key')
            if not isinstance(row["text"], str):
                raise ConfigError(f'{where}: "text" is {kind_of(row["text"])}, not text; correct or remove the row')
            texts.append(row["text"])
            unused.update(key for key in row if key != "text")
        log_unused_keys(path, unused)
    else:
        texts = [read_text(path, "text file")]
    if not any(texts):
        raise ConfigError(f"{path} has no text; remove it from the list of files")
    return texts
