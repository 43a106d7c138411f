"""The report of one experiment: report.md, report.html, report.json and plots, all from the same metrics."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkstack.evals.page import ReportTable, render_page
from thinkstack.evals.plots import compared_columns, plot_all
from thinkstack.evals.results import CONS_SAMPLES, EvalMetrics, Evaluation, ShownAnswer
from thinkstack.evals.statistics import few_questions
from thinkstack.log import write_json, write_text
from thinkstack.types import ConfigError

Rows = list[tuple[str, list[str]]]

MISSING = "-"
NO_ANSWER_READ = "no answer read"
"""Replaces an accuracy of 0 if no answer could be read in the configured thinking_format."""


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

    columns: the sampled evaluation of each compared model, in order ("base", "zero", then controls). greedy: greedy
    evaluations of some of the columns. curve: points from results.curve_point. metrics: rows of metrics.jsonl. facts:
    provenance (machine, seed, commit, command, time). Each file is written atomically.
    Raises ConfigError if `columns` is empty or `greedy` has an unknown column.
    """
    if not columns:
        raise ConfigError("a report needs at least one evaluation")
    if unknown := set(greedy) - set(columns):
        raise ConfigError(f"greedy evaluations of {', '.join(sorted(unknown))} have no column in the report")
    folder.mkdir(parents=True, exist_ok=True)
    plots = plot_all(folder, columns, curve, metrics)
    table = ReportTable(title="Results", columns=list(columns), rows=table_rows(columns, greedy), is_first_bold=True)
    setting = setting_line(columns)
    answers = {name: evaluation.shown for name, evaluation in compared_columns(columns).items()}
    write_text(folder / "report.md", markdown(title, setting, [table], plots, answers, facts))
    write_text(folder / "report.html", render_page(folder, title, setting, [table], plots, answers, facts))
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
    """Return the rows of the table: a label and one cell per column; in percent unless the label says otherwise."""
    found = list(columns.values())
    num_votes = min(CONS_SAMPLES, max(part.samples for part in found))
    rows: Rows = [("pass@1", [accuracy(part) for part in found])]
    rows.append(("95 % interval over questions", [interval(part) for part in found]))
    if num_votes > 1:
        rows.append(("re-run error", [percent(part.rerun_error) for part in found]))
        rows.append((f"cons@{num_votes}", [percent(part.cons_at_16) for part in found]))
        rows.append((f"pass@{num_votes}", [percent(part.pass_at_k.get(num_votes)) for part in found]))
    if greedy:
        rows.append(("greedy", [accuracy(greedy[name]) if name in greedy else MISSING for name in columns]))
    rows += [
        ("answers read", [percent(part.answer_rate) for part in found]),
        ("well-formed", [percent(part.format_rate) for part in found]),
        ("truncated", [percent(part.truncation_rate) for part in found]),
    ]
    if any(part.truncation_rate for part in found):
        rows.append(("pass@1 of answers not truncated", [percent(part.pass_at_1_finished) for part in found]))
    rows += [
        ("tokens per answer (number)", [number(part.mean_tokens) for part in found]),
        ("tokens per correct answer (number)", [number(part.tokens_per_solution) for part in found]),
    ]
    if any(part.worked_share is not None for part in found):
        rows += [
            ("worked answers", [percent(part.worked_share) for part in found]),
            ("pass@1 of worked answers", [percent(part.worked_accuracy) for part in found]),
            ("pass@1 of direct answers", [percent(part.direct_accuracy) for part in found]),
        ]
    if any(part.unscorable for part in found):
        rows.append(("not scored, counted as wrong (number)", [str(part.unscorable) for part in found]))
        rows.append(("pass@1 if these were correct", [percent(part.pass_at_1_bound) for part in found]))
    chance = {name: value for part in reversed(found) for name, value in part.chance.items()}
    for task in sorted({task for part in found for task in part.by_task}):
        label = f"{task} (chance {percent(chance[task])})" if task in chance else task
        rows.append((label, [accuracy(part.by_task.get(task)) for part in found]))
    languages = sorted({language for part in found for language in part.by_language})
    if len(languages) > 1:
        rows += [(name, [accuracy(part.by_language.get(name)) for part in found]) for name in languages]
    return rows


def percent(value: float | None) -> str:
    """Format a share in percent, without the sign."""
    return MISSING if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    """Format a number with one decimal."""
    return MISSING if value is None else f"{value:.1f}"


def interval(part: EvalMetrics) -> str:
    """Format the interval of pass@1 over questions, in percent."""
    found = part.over_questions
    if found is None or part.answer_rate == 0:
        return MISSING
    return f"{percent(max(found.low, 0.0))} to {percent(min(found.high, 1.0))}"  # t may pass the ends of the scale


def accuracy(part: EvalMetrics | None) -> str:
    """Format pass@1 with its question error, in percent; NO_ANSWER_READ if no answer could be read."""
    if part is None:
        return MISSING
    if part.answer_rate == 0:
        return NO_ANSWER_READ
    error = "" if part.question_error is None else f" \N{PLUS-MINUS SIGN} {percent(part.question_error)}"
    return percent(part.pass_at_1) + error


def describe_samples(part: EvalMetrics) -> str:
    """Describe the number of answers per problem."""
    if part.fewest_samples != part.samples:
        return f"{part.fewest_samples} to {part.samples} answers each"
    return f"{part.samples} answer{'s' if part.samples > 1 else ''} each"


def setting_line(columns: Mapping[str, Evaluation]) -> str:
    """Describe problems, samples and graders, once per distinct setting, and what the errors mean."""
    settings: dict[str, list[str]] = {}
    for name, part in columns.items():
        settings.setdefault(f"{part.problems:,} held-out problems, {describe_samples(part)}", []).append(name)
    text = "; ".join(
        setting if len(settings) == 1 else f"{', '.join(names)}: {setting}" for setting, names in settings.items()
    )
    graders = {task: grader for part in columns.values() for task, grader in part.graders.items() if task != grader}
    named = "".join(f" {task} is graded by {grader}." for task, grader in graders.items())
    warning = few_questions(min(part.num_clusters for part in columns.values()))
    return (
        f"{text}.{named} Percent; \N{PLUS-MINUS SIGN} is the question error, one standard error over questions; the "
        f"re-run error is that of sampling the same questions again.{f' {warning}.' if warning else ''}"
    )


def markdown(
    title: str,
    setting: str,
    tables: Sequence[ReportTable],
    plots: Mapping[str, str],
    answers: Mapping[str, Mapping[str, Sequence[ShownAnswer]]],
    facts: Mapping[str, str],
) -> str:
    """Return the report as Markdown; the plots are in the same folder."""
    lines = [f"# {title}", "", setting]
    for table in tables:
        heading = ["", f"## {table.title}"] if len(tables) > 1 else []
        lines += [*heading, "", *markdown_table([table.corner, *table.columns], table.rows)]
        lines += ["", table.note] if table.note else []
    for name, caption in plots.items():
        lines += ["", f"![{caption}]({name})"]
    for column, tasks in answers.items():
        lines += ["", f"## Answers: {column}"]
        for task, shown in tasks.items():
            for answer in shown:
                status = {None: "not scored", True: "correct", False: "wrong"}[answer.correct]
                lines += ["", f"{task}, {status} (reference answer: {_inline(answer.reference)})", ""]
                lines += _fenced(f"{answer.question}\n\n{answer.text}")
    lines += ["", "## Provenance", "", *markdown_table(["", ""], [(name, [value]) for name, value in facts.items()])]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the lines of a table; all columns except the first are right-aligned."""
    aligned = ["---", *["---:"] * (len(head) - 1)]
    body = [[label, *cells] for label, cells in rows]
    return [f"| {' | '.join(_inline(cell) for cell in row)} |" for row in (head, aligned, *body)]


def _inline(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> list[str]:
    """Return the lines of a code block that the text cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return [f"{fence}text", text, fence]
