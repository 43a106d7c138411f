"""Documents to packed batches: one path for text, chats and rollouts.

A row holds several documents side by side; targets never cross from one to the next, attention and positions only
where that is asked for. The stream of batches is a pure function of its source and position, so a run resumed in the
middle sees the same rows.
"""

# Shapes in this file: R rows, T tokens a row.

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from thinkstack.files import has_rows, kind_of, log_unused_keys, read_rows, read_text
from thinkstack.types import Batch, ConfigError


class Columns(NamedTuple):
    """A document as it stands in a row, one entry a column."""

    ids: list[int]
    targets: list[int]
    loss_mask: list[int]
    """1 = the target is trained."""
    positions: list[int]
    branches: list[int]
    """As in types.Batch."""


class Document(Protocol):
    """Tokens that lie side by side in a row and see no others."""

    @property
    def width(self) -> int:
        """Columns it takes in a row: one per prediction."""

    def columns(self) -> Columns:
        """What stands in them."""


@dataclass(frozen=True)
class Example:
    """Token ids of one document, and for each token 1 if it is to be learnt (never the first: nothing predicts it)."""

    ids: tuple[int, ...]
    loss_mask: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.loss_mask) > 1, "a document predicts at least one token"

    @property
    def width(self) -> int:
        return len(self.ids) - 1

    def columns(self) -> Columns:
        places, none = list(range(self.width)), [0] * self.width
        return Columns(list(self.ids[:-1]), list(self.ids[1:]), list(self.loss_mask[1:]), places, none)


@dataclass(frozen=True)
class SharedPromptGroup:
    """A prompt and answers to it, all of whose tokens are learnt. The prompt stands in the row once, but for its last
    token, from which each answer begins: column by column the answers are computed as if each stood alone."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert self.prompt and self.answers and all(self.answers), "every answer has a token, and one before it"

    @property
    def width(self) -> int:
        return len(self.prompt) - 1 + sum(map(len, self.answers))

    def columns(self) -> Columns:
        shared = len(self.prompt) - 1
        found = Columns(list(self.prompt[:-1]), list(self.prompt[1:]), [0] * shared, list(range(shared)), [0] * shared)
        for branch, answer in enumerate(self.answers, start=1):
            found.ids.extend((self.prompt[-1], *answer[:-1]))
            found.targets.extend(answer)
            found.loss_mask.extend([1] * len(answer))
            found.positions.extend(range(shared, shared + len(answer)))
            found.branches.extend([branch] * len(answer))
        return found


DocumentSource = Callable[[int], Example]
"""Where documents come from: the document of each index 0, 1, 2, ..., always the same one."""


def pack(samples: Sequence[Document], row_tokens: int) -> list[list[int]]:
    """Choose rows: longest sample first, each into the fullest row that still takes it. Returns sample indices per row.

    Raises ConfigError for a sample wider than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: -samples[i].width):
        width = samples[index].width
        if width > row_tokens:
            raise ConfigError(f"a document of {width + 1} tokens does not fit a row of {row_tokens}; raise row_tokens")
        row = min((r for r, room in enumerate(left) if room >= width), key=left.__getitem__, default=None)
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(row_tokens)
        rows[row].append(index)
        left[row] -= width
    return rows


def collate(
    samples: Sequence[Document], rows: Sequence[Sequence[int]], row_tokens: int, isolated: bool = True
) -> Batch:
    """Write `samples` into the rows that `pack` chose. Document ids are sample indices + 1; 0 marks padding.

    isolated: False makes each row one document with id 1, whose positions run on, so that tokens attend across borders.
    """
    shape = (len(rows), row_tokens)
    ids, positions, document_ids, targets, branches = (torch.zeros(shape, dtype=torch.int64) for _ in range(5))
    loss_mask = torch.zeros(shape)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            columns, span = samples[index].columns(), slice(start, start + samples[index].width)
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
    values: Sequence[Sequence[float]], samples: Sequence[Document], rows: Sequence[Sequence[int]], row_tokens: int
) -> torch.Tensor:
    """Per-token numbers of each sample, one per prediction, laid out like the batch: (R, T) fp32, 0 in padding."""
    out = torch.zeros(len(rows), row_tokens)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            assert len(values[index]) == samples[index].width, "one number per prediction"
            out[row, start : start + samples[index].width] = torch.tensor(values[index], dtype=torch.float32)
            start += samples[index].width
    return out


class PackedStream:
    """Batches of `rows` x `row_tokens` from a source, in order, resumable."""

    def __init__(
        self,
        source: DocumentSource,
        rows: int,
        row_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        isolated: bool = True,
    ):
        """With world_size > 1 this rank reads documents rank, rank + world_size, ... isolated: as in `collate`."""
        self.source, self.num_rows, self.row_tokens, self.isolated = source, rows, row_tokens, isolated
        self.rank, self.world_size = rank, world_size
        self.position = 0
        """Documents read so far by this rank."""
        self.waiting: list[int] = []
        """Documents that were read and did not fit the last batch."""

    def take(self, num_rows: int | None = None) -> Batch:
        """The next batch, of num_rows rows where that is given."""
        num_rows = self.num_rows if num_rows is None else num_rows
        indices, samples = list(self.waiting), [self.source(index) for index in self.waiting]
        while sum(sample.width for sample in samples) < num_rows * self.row_tokens:
            indices.append(self.position * self.world_size + self.rank)
            samples.append(self.source(indices[-1]))
            self.position += 1
        rows = pack(samples, self.row_tokens)
        kept, left = rows[:num_rows], rows[num_rows:]
        self.waiting = sorted(indices[place] for row in left for place in row)
        return collate(samples, kept, self.row_tokens, self.isolated)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {"position": self.position, "waiting": list(self.waiting)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.position, self.waiting = state["position"], list(state["waiting"])


def text_source(
    paths: Sequence[Path], encode: Callable[[str], list[int]], bos_id: int, row_tokens: int
) -> list[Example]:
    """The user's texts as samples of at most a row each. Raises ConfigError as `read_texts`."""
    samples = []
    for text in (text for path in paths for text in read_texts(path)):
        ids = encode(text)
        for start in range(0, len(ids), row_tokens):
            chunk = (bos_id, *ids[start : start + row_tokens])
            samples.append(Example(chunk, (0,) + (1,) * (len(chunk) - 1)))
    return samples


def read_texts(path: Path) -> list[str]:
    """The documents of a file: the whole of a text file, or the "text" of each row of JSON lines or parquet.

    Raises ConfigError for a file that cannot be read or holds no text, and for rows without a "text".
    """
    if has_rows(path):
        texts, unused = [], Counter[str]()
        for where, row in read_rows(path):
            if "text" not in row:
                raise ConfigError(f'{where} has no key "text" (it has {", ".join(row)}); rename the key')
            if not isinstance(row["text"], str):
                raise ConfigError(
                    f'{where}: "text" is {kind_of(row["text"])}, not text; correct it or leave the row out'
                )
            texts.append(row["text"])
            unused.update(key for key in row if key != "text")
        log_unused_keys(path, unused)
    else:
        texts = [read_text(path, "text file")]
    if not any(texts):
        raise ConfigError(f"{path} holds no text; leave it out")
    return texts
