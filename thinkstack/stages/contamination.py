"""`thinkstack eval contamination`: whether training text, a model or a run's dates say that questions were seen."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.evals.contamination import (
    EXACT_WORDS,
    compare_dates,
    complete_halves,
    corpus_overlap,
    memorization,
)
from thinkstack.evals.records import read_samples
from thinkstack.evals.regrade import find_samples
from thinkstack.files import has_rows, lines, matching_files, read_rows
from thinkstack.kernels.precision import RequestedPrecision, resolve_precision
from thinkstack.log import Progress, write_text
from thinkstack.machine import pick_device
from thinkstack.tasks.overlap import RUN_WORDS
from thinkstack.types import Completion, ConfigError, Problem, SamplingParams

SHOWN = 5
"""Findings that are printed; all are in the file."""
MAX_NUM_SEQS = 64
PART_CHARACTERS, SHARED_CHARACTERS = 200_000, 4_000
"""Characters of a part of a text file, and of the text that it shares with the next one."""


def print_corpus_overlap(problems: Sequence[Problem], files: Sequence[str], out: Path) -> None:
    """Print which test problems occur in text files or JSON lines, and write them to `out` as JSON lines."""
    found = corpus_overlap(problems, documents(files))
    order, contaminated = sorted(found.found.items(), key=lambda item: -item[1].share), set(found.contaminated)
    rows = [
        {"key": key, "share": overlap.share, "run": overlap.run, "document": found.documents[key],
         "is_contaminated": key in contaminated}
        for key, overlap in order
    ]  # fmt: skip
    write_rows(out, rows)
    print(
        f"{len(found.contaminated)} of {found.num_problems} questions occur in {found.num_documents:,} documents (more "
        f"than half of their runs of {RUN_WORDS} words in one), {len(found.found) - len(found.contaminated)} others "
        f"share a run, {len(found.too_short)} are too short to be searched; all in {out}"
    )
    for key, overlap in order[:SHOWN]:
        print(f"  {100 * overlap.share:3.0f} %  {key}  {found.documents[key]}: {overlap.run}")


def documents(files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Return the address and text of each document: all texts of a row of JSON lines or parquet, the parts of a text
    file. Raises ConfigError for a missing file."""
    for name in files:
        for path in matching_files(Path(name)):
            if has_rows(path):
                yield from ((where, "\n".join(texts_of(row))) for where, row in read_rows(path))
            else:
                yield from text_parts(path)


def text_parts(path: Path) -> Iterator[tuple[str, str]]:
    """Return the text of a file in parts of PART_CHARACTERS, each with the end of the one before."""
    part, first = "", 1
    for number, line in enumerate(lines(path), start=1):
        part += line
        if len(part) >= PART_CHARACTERS:
            yield f"{path} line {first}", part
            part, first = part[-SHARED_CHARACTERS:], number
    if part.strip():
        yield f"{path} line {first}", part


def texts_of(value: object) -> Iterator[str]:
    """Return all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_of(part)


def print_completed_halves(problems: Sequence[Problem], model: str, dtype: RequestedPrecision, out: Path) -> None:
    """Print how well a model continues questions from their first halves, and write its texts to `out`."""
    chat, device = load_chat(model), pick_device("auto")
    engine = Engine(
        load_model(model).to(device),
        EngineConfig(max_num_seqs=MAX_NUM_SEQS, dtype=resolve_precision(dtype, device)),
    )

    def generate(prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams]) -> list[list[Completion]]:
        with Progress("halves", len(prompts)) as progress:
            return engine.generate(prompts, samplings, on_finish=lambda *_: progress.advance())

    found = complete_halves(generate, chat.tokenizer, problems, chat.stop_token_ids)
    write_rows(out, [vars(one) for one in sorted(found, key=lambda one: one.chance - one.similarity)])
    error = memorization(found)
    spread = "" if error is None else f" (95 % interval {error.low:+.3f} to {error.high:+.3f})"
    mean = sum(one.similarity - one.chance for one in found) / len(found)
    print(
        f"{sum(one.is_exact for one in found)} of {len(found)} questions are continued with their own next "
        f"{EXACT_WORDS} words; ROUGE-L is {mean:+.3f} above that with another question{spread}; all in {out}"
    )


def print_dates(run: Path, cutoff: str) -> None:
    """Print the accuracy of a run on problems from before and after a date."""
    found = compare_dates(read_samples(find_samples(run)), cutoff)
    print(
        f"before {cutoff}: {100 * found.before.mean:.1f} % of {found.num_before} problems; from then on: "
        f"{100 * found.after.mean:.1f} % of {found.num_after}; difference {100 * found.difference:+.1f} (95 % interval "
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}), p = {found.p_value:.4f}. Newer problems may be harder as "
        "well."
    )


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write JSON lines atomically. Raises ConfigError if the folder does not exist."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} does not exist; create it, or give another --out")
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
