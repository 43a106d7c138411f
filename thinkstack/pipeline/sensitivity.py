"""`thinkstack eval sensitivity`: the same questions under several prompts and orders of their choices."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from thinkstack.config import Tree
from thinkstack.evals.compare import compare_tasks
from thinkstack.evals.records import read_samples
from thinkstack.evals.report import accuracy, interval, markdown_table, percent
from thinkstack.evals.sensitivity import plot_sensitivity, spread_line
from thinkstack.log import write_json
from thinkstack.pipeline.evaluation import EvaluationRequest, evaluation_values
from thinkstack.pipeline.run import run_single
from thinkstack.stages.evaluate import SAMPLED, SAMPLES, read_evaluation
from thinkstack.tasks.table import has_choices
from thinkstack.types import ConfigError

MIN_VARIANTS = 3
"""Fewer say little about a spread."""


def run_sensitivity(request: EvaluationRequest, prompts: Sequence[str], choice_seeds: Sequence[int], out: Path) -> None:
    """Evaluate one task under each prompt and each order of choices, and print accuracies, their spread and p-values.

    Each variant is an evaluation of its own below `out`, which resumes like any other. prompts: names, or "" for the
    task's default. choice_seeds: shuffles of the choices, with the first prompt.
    Raises ConfigError for fewer than MIN_VARIANTS variants and for more than one task.
    """
    if len(request.tasks) != 1 or request.suite:
        raise ConfigError("prompts belong to one task; give one with --task")
    (task,) = request.tasks
    if choice_seeds and not has_choices(task):
        raise ConfigError(f"--choice-seeds has no effect: {task} has no choices; leave it out")
    rows: dict[str, Tree] = {name or "default": {"prompt": name} for name in dict.fromkeys(prompts)}
    rows |= {
        f"choices {seed}": {"prompt": prompts[0] if prompts else "", "choice_seed": seed}
        for seed in dict.fromkeys(choice_seeds)
    }
    if len(rows) < MIN_VARIANTS:
        raise ConfigError(f"{len(rows)} variants say little about a spread; give {MIN_VARIANTS} or more prompts")
    found, records = {}, {}
    for number, (name, row) in enumerate(rows.items()):
        values, _ = evaluation_values(replace(request, row=request.row | row))
        values["tasks"][task].update(row)
        folder = out / f"variant-{number}"
        run_single("evaluate", values, (), folder)
        found[name] = read_evaluation(folder / "evaluate", SAMPLED)
        records[name] = read_samples(folder / "evaluate" / SAMPLES)
    first = next(iter(rows))
    cells = []
    for name, part in found.items():
        compared = compare_tasks(records[first], records[name])[task]
        beside = ["-", "-"] if name == first else [f"{100 * compared.difference:+.1f}", f"{compared.p_value:.4f}"]
        cells.append((name, [accuracy(part), interval(part), percent(part.answer_rate), *beside]))
    head = (task, "pass@1", "95 % interval over questions", "answers read", f"minus {first}", "p")
    print("\n".join(markdown_table(head, cells)))
    print(f"\n{spread_line(found)}")
    plot_sensitivity(out / "sensitivity.png", task, found)
    write_json(out / "sensitivity.json", {name: part.to_dict() for name, part in found.items()})
    print(f"plot: {out / 'sensitivity.png'}")
