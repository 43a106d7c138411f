"""A report of one experiment: report.md, report.html, report.json and pictures, all from the same figures."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkstack.evals.page import render_page
from thinkstack.evals.plots import compared, plot_all
from thinkstack.evals.results import CONS_SAMPLES, Evaluation, Figures, ShownAnswer
from thinkstack.log import write_json, write_text
from thinkstack.types import ConfigError

Rows = list[tuple[str, list[str]]]

MISSING = "-"
NOTHING_READ = "no answer read"
"""Instead of an accuracy of 0, where no answer could be read in the form asked for."""


def write_report(
    folder: Path,
    title: str,
    columns: Mapping[str, Evaluation],
    greedy: Mapping[str, Evaluation],
    curve: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
) -> None:
    """Write the report into `folder`.

    columns: what is compared, in order ("base", "zero", then controls), each with its sampled evaluation. greedy:
    greedy evaluations of some of them. curve: points of figures.curve_point. metrics: rows of metrics.jsonl. facts:
    provenance (machine, seed, commit, command, time). Each file is written whole or not at all.
    Raises ConfigError if nothing is compared or greedy names an unknown column.
    """
    if not columns:
        raise ConfigError("a report needs at least one evaluation")
    if unknown := set(greedy) - set(columns):
        raise ConfigError(f"greedy evaluations of {', '.join(sorted(unknown))} have no column")
    folder.mkdir(parents=True, exist_ok=True)
    plots = plot_all(folder, columns, curve, metrics)
    rows, setting = table_rows(columns, greedy), setting_line(columns)
    answers = {name: evaluation.shown for name, evaluation in compared(columns).items()}
    write_text(folder / "report.md", markdown(title, setting, list(columns), rows, plots, answers, facts))
    write_text(folder / "report.html", render_page(folder, title, setting, list(columns), rows, plots, answers, facts))
    write_json(
        folder / "report.json",
        {
            "title": title,
            "facts": dict(facts),
            "columns": {name: evaluation.to_dict() for name, evaluation in columns.items()},
            "greedy": {name: evaluation.to_dict() for name, evaluation in greedy.items()},
            "curve": [dict(point) for point in curve],
        },
    )


def table_rows(columns: Mapping[str, Evaluation], greedy: Mapping[str, Evaluation]) -> Rows:
    """The table: label, then a cell per column; figures in percent unless the label says otherwise."""
    found = list(columns.values())
    votes = min(CONS_SAMPLES, max(part.samples for part in found))
    rows: Rows = [("pass@1", [accuracy(part) for part in found])]
    if votes > 1:
        rows.append((f"cons@{votes}", [percent(part.cons_at_16) for part in found]))
        rows.append((f"pass@{votes}", [percent(part.pass_at_k.get(votes)) for part in found]))
    if greedy:
        rows.append(("greedy", [accuracy(greedy[name]) if name in greedy else MISSING for name in columns]))
    rows += [
        ("answers read", [percent(part.answer_rate) for part in found]),
        ("well-formed", [percent(part.format_rate) for part in found]),
        ("truncated", [percent(part.truncation_rate) for part in found]),
        ("tokens per answer (number)", [f"{part.mean_tokens:.1f}" for part in found]),
        ("worked answers", [percent(part.worked_share) for part in found]),
        ("pass@1 of worked answers", [percent(part.worked_accuracy) for part in found]),
        ("pass@1 of direct answers", [percent(part.direct_accuracy) for part in found]),
    ]
    if any(part.unscorable for part in found):
        rows.append(("not judged (number)", [str(part.unscorable) for part in found]))
    chance = {name: value for part in reversed(found) for name, value in part.chance.items()}
    for task in sorted({task for part in found for task in part.by_task}):
        label = f"{task} (chance {percent(chance[task])})" if task in chance else task
        rows.append((label, [accuracy(part.by_task.get(task)) for part in found]))
    languages = sorted({language for part in found for language in part.by_language})
    if len(languages) > 1:
        rows += [(name, [accuracy(part.by_language.get(name)) for part in found]) for name in languages]
    return rows


def percent(value: float | None) -> str:
    """A share in percent, without the sign."""
    return MISSING if value is None else f"{100 * value:.1f}"


def accuracy(part: Figures | None) -> str:
    """pass@1 with its standard error, in percent; says so if no answer could be read."""
    if part is None or part.pass_at_1 is None:
        return MISSING
    if part.answer_rate == 0:
        return NOTHING_READ
    error = "" if part.stderr is None else f" \N{PLUS-MINUS SIGN} {percent(part.stderr)}"
    return percent(part.pass_at_1) + error


def each(samples: int) -> str:
    """How many answers a problem was given, in words."""
    return f"{samples} answer{'s' if samples > 1 else ''} each"


def setting_line(columns: Mapping[str, Evaluation]) -> str:
    """What the figures are computed from, in one sentence per distinct setting."""
    settings: dict[str, list[str]] = {}
    for name, part in columns.items():
        settings.setdefault(f"{part.problems:,} held-out problems, {each(part.samples)}", []).append(name)
    told = "; ".join(
        setting if len(settings) == 1 else f"{', '.join(names)}: {setting}" for setting, names in settings.items()
    )
    return f"{told}. Percent; \N{PLUS-MINUS SIGN} is one standard error over problems."


def markdown(
    title: str,
    setting: str,
    columns: Sequence[str],
    rows: Rows,
    plots: Mapping[str, str],
    answers: Mapping[str, Mapping[str, Sequence[ShownAnswer]]],
    facts: Mapping[str, str],
) -> str:
    """The report as Markdown, its pictures beside it."""
    lines = [f"# {title}", "", setting, "", *markdown_table(["", *columns], rows)]
    for name, caption in plots.items():
        lines += ["", f"![{caption}]({name})"]
    for column, tasks in answers.items():
        lines += ["", f"## Answers: {column}"]
        for task, shown in tasks.items():
            for answer in shown:
                verdict = {None: "not judged", True: "right", False: "wrong"}[answer.correct]
                lines += ["", f"{task}, {verdict} (right answer: {_inline(answer.reference)})", ""]
                lines += _fenced(f"{answer.question}\n\n{answer.text}")
    lines += ["", "## Provenance", "", *markdown_table(["", ""], [(name, [value]) for name, value in facts.items()])]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Rows) -> list[str]:
    """Lines of a table; columns but the first are aligned to the right."""
    aligned = ["---", *["---:"] * (len(head) - 1)]
    body = [[label, *cells] for label, cells in rows]
    return [f"| {' | '.join(_inline(cell) for cell in row)} |" for row in (head, aligned, *body)]


def _inline(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> list[str]:
    """Text as a code block that nothing in it can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return [f"{fence}text", text, fence]
