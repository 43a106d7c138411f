"""Commands on stored completions: grade them again, compare two evaluations."""

import json
import logging
from pathlib import Path

from thinkstack.evals import compare, regrade
from thinkstack.evals.records import read_samples
from thinkstack.evals.report import markdown_table
from thinkstack.log import write_text
from thinkstack.tasks.verify.pool import VerifierPool

log = logging.getLogger(__name__)
DISAGREEMENTS = "disagreements.jsonl"
SHOWN_DISAGREEMENTS = 5


def print_regraded(run: Path, graders: str, thinking_format: str, out: Path | None) -> None:
    """Print the verdicts of graders on the samples of a run and write their disagreements as JSON lines.

    graders: names separated by commas. out: the file to write; None: disagreements.jsonl beside the samples.
    """
    names = list(dict.fromkeys(name.strip() for name in graders.split(",") if name.strip()))
    regrade.check_names(names)
    samples, records, format_name = regrade.load(run, thinking_format)
    with VerifierPool() as pool:
        found = regrade.regrade(records, names, format_name, pool, regrade.RunTasks.of(samples))
    print("\n".join(markdown_table(regrade.GRADER_HEAD, regrade.grader_rows(found))))
    if len(names) > 1:
        print("\n" + "\n".join(markdown_table(regrade.PAIR_HEAD, regrade.pair_rows(found))))
    rows = regrade.disagreements(found)
    path = out or samples.parent / DISAGREEMENTS
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"\n{len(rows)} disagreements in {path}")
    for row in rows[:SHOWN_DISAGREEMENTS]:
        verdicts = ", ".join(f"{name}: {_word(verdict)}" for name, verdict in row["verdicts"].items())
        print(f"  reference {row['reference']!r}, answer {row['answer']!r}: {verdicts}")


def _word(verdict: bool | None) -> str:
    return {True: "correct", False: "wrong", None: "not scored"}[verdict]


def print_comparison(first: Path, second: Path) -> None:
    """Print the differences of two evaluations per task, second minus first."""
    found = compare.compare_tasks(*(read_samples(regrade.find_samples(run)) for run in (first, second)))
    print("\n".join(markdown_table(compare.HEAD, compare.comparison_rows(found))))
    for text in compare.warnings(found):
        log.warning(text)
