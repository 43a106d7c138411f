"""The report of an evaluation: results with their errors, protocol, published rows beside, measures of the texts.

report.md, report.html, report.json and plots are written from the same values. A published figure stands beside ours as
comparable only if its source states the whole protocol and it is ours; else its row says what differs.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkstack.evals.benchmark_plots import plot_benchmarks
from thinkstack.evals.contests import RATED, ContestRating, contest_summary
from thinkstack.evals.metrics import cost_per_solution
from thinkstack.evals.page import ReportTable, render_page
from thinkstack.evals.protocol import SamplerFacts, TaskProtocol
from thinkstack.evals.published import PublishedRow, differences, not_stated, published_rows
from thinkstack.evals.report import MISSING, accuracy, interval, markdown, number, percent, setting_line
from thinkstack.evals.results import EvalMetrics, Evaluation
from thinkstack.evals.statistics import few_questions
from thinkstack.log import clock, write_json, write_text
from thinkstack.tasks.table import BENCHMARKS
from thinkstack.tasks.verify.ifeval import instruction_accuracy

Rows = list[tuple[str, list[str]]]
RESULT_COLUMNS = ("pass@1", "95 % interval over questions", "re-run error", "problems", "samples")
MEASURES = {
    "repeated": "repeated runs of words",
    "looping": "ends in a loop",
    "mixed_language": "words of another language",
    "unclosed_thinking": "unclosed thinking",
}
"""Headings of the measures of texts."""


def write_benchmark_report(
    folder: Path, title: str, found: Evaluation, facts: Mapping[str, Any], left_out: Sequence[str] = ()
) -> None:
    """Write the report into `folder`. facts: the provenance of the run. left_out: tasks without data."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = {task: beside_published(found, task) for task in found.by_task}
    plots = plot_benchmarks(folder, found, {task: rows for task, rows in beside.items() if rows})
    setting = setting_line({"": found})
    if left_out:
        setting += f" Left out, without data: {', '.join(left_out)}."
    tables = [*result_tables(found), protocol_table(found), length_table(found)]
    tables += task_measures(found)
    tables += [contest_table(found.contests)] if found.contests else []
    tables += [published_table(task, rows) for task, rows in beside.items() if rows]
    program, *arguments = facts.get("command", ()) or ("",)
    facts = dict(facts) | {"command": [Path(program).name, *arguments]}  # without the place of the installation
    quoted = {
        task: rows for task, rows in found.shown.items() if task not in BENCHMARKS or BENCHMARKS[task].MAY_BE_SHOWN
    }
    shown, provenance = {"": quoted}, describe(found, facts)
    write_text(folder / "report.md", markdown(title, setting, tables, plots, shown, provenance))
    write_text(folder / "report.html", render_page(folder, title, setting, tables, plots, shown, provenance))
    rows_as_json = {
        task: [{"row": vars(one.row), "ours": one.ours, "differences": one.unlike} for one in rows]
        for task, rows in beside.items()
    }
    write_json(
        folder / "report.json",
        {"title": title, "facts": facts, "evaluation": found.to_dict() | {"shown": {}}, "published": rows_as_json},
    )


def result_tables(found: Evaluation) -> list[ReportTable]:
    """Return the columns of `result_rows` as two tables: accuracies with their errors, and what they depend on."""
    (_, *columns), rows = result_rows(found)
    at = columns.index("answers read")
    first = [(label, cells[:at]) for label, cells in rows]
    second = [(label, cells[at:]) for label, cells in rows]
    return [
        ReportTable(title="Results", corner="task", columns=columns[:at], rows=first, note=_result_note(found)),
        ReportTable(title="Truncation, bounds and cost", corner="task", columns=columns[at:], rows=second),
    ]


def result_rows(found: Evaluation) -> tuple[list[str], Rows]:
    """Return the heading and a row per task: in percent unless the heading says otherwise."""
    parts = list(found.by_task.values())
    votes = max((k for part in parts for k in part.cons_at_k), default=0)
    optional = {
        f"cons@{votes}": [percent(part.cons_at_k.get(votes)) for part in parts] if votes else [],
        f"pass@{votes}": [percent(part.pass_at_k.get(votes)) for part in parts] if votes else [],
        "answers read": [percent(part.answer_rate) for part in parts],
        "truncated": [percent(part.truncation_rate) for part in parts],
        "pass@1, not truncated": [percent(part.pass_at_1_finished) for part in parts]
        if any(part.truncation_rate for part in parts)
        else [],
        "not scored, counted as wrong (number)": [str(part.unscorable) for part in parts]
        if any(part.unscorable for part in parts)
        else [],
        "pass@1 if these were correct": [percent(part.pass_at_1_bound) for part in parts]
        if any(part.unscorable for part in parts)
        else [],
        "tokens per correct answer (number)": [number(part.tokens_per_solution) for part in parts],
    }
    columns = {name: cells for name, cells in optional.items() if cells}
    costs = [cost_of(part, found.sampler) for part in parts]
    if any(cost is not None for cost in costs):
        columns["cost per correct answer (price)"] = [MISSING if cost is None else f"{cost:.4g}" for cost in costs]
    rows: Rows = []
    for place, (task, part) in enumerate(found.by_task.items()):
        chance = f" (chance {percent(found.chance[task])})" if task in found.chance else ""
        protocol = found.protocols.get(task)
        problems = f"{part.problems:,}"
        if protocol and protocol.num_available and not protocol.is_complete:
            problems += f" of {protocol.num_available:,}"
        cells = [accuracy(part), interval(part), percent(part.rerun_error), problems, str(part.samples)]
        rows.append((f"{task}{chance}", [*cells, *(cells_of[place] for cells_of in columns.values())]))
    return ["task", *RESULT_COLUMNS, *columns], rows


def cost_of(part: EvalMetrics, sampler: SamplerFacts | None) -> float | None:
    """Return the price of a correct answer by the prices of tokens; None without prices or correct answers."""
    if sampler is None or not (sampler.prompt_price or sampler.completion_price):
        return None
    num_sampled = round(part.mean_tokens * part.num_completions)
    return cost_per_solution(
        part.num_prompt_tokens, num_sampled, part.num_correct, sampler.prompt_price, sampler.completion_price
    )


def _result_note(found: Evaluation) -> str:
    warnings = [f"{task}: {text}" for task, part in found.by_task.items() if (text := few_questions(part.num_clusters))]
    text = (
        "The question error (after \N{PLUS-MINUS SIGN}) and its interval are for other questions of this kind; the "
        "re-run error is for the same questions sampled again. They are never added."
    )
    return " ".join((text, *(f"{warning}." for warning in warnings)))


def protocol_table(found: Evaluation) -> ReportTable:
    """Return how each task was evaluated."""
    columns = ("method", "prompt", "examples", "T", "top-p", "maximum tokens", "answer read by", "grader", "window")
    rows = [(task, _protocol_cells(found.protocols[task])) for task in found.by_task if task in found.protocols]
    return ReportTable(title="Protocol", corner="task", columns=columns, rows=rows)


def _protocol_cells(one: TaskProtocol) -> list[str]:
    is_sampled = one.method == "sampled"
    budget = f", thinking {one.thinking_budget:,}" if one.thinking_budget else ""
    return [
        one.method,
        one.prompt or "default",
        str(one.num_shots),
        f"{one.temperature:g}" if is_sampled else MISSING,
        f"{one.top_p:g}" if is_sampled and one.temperature else MISSING,
        f"{one.max_tokens:,}{budget}" if is_sampled else MISSING,
        one.thinking_format if is_sampled else MISSING,
        one.grader,
        f"{one.since or 'first'} to {one.until or 'last'}" if one.since or one.until else MISSING,
    ]


def length_table(found: Evaluation) -> ReportTable:
    """Return the lengths of completions and the measures of their texts."""
    names = [name for name in MEASURES if any(name in part.measures for part in found.by_task.values())]
    percentiles = sorted({share for part in found.by_task.values() for share in part.tokens_at})
    labels = [f"{share} % have at most" if share < 100 else "longest" for share in percentiles]
    rows = [
        (
            task,
            [
                number(part.mean_tokens),
                *(f"{part.tokens_at.get(share, 0):,}" for share in percentiles),
                *(percent(part.measures.get(name)) for name in names),
            ],
        )
        for task, part in found.by_task.items()
        if part.mean_tokens
    ]
    columns = ["mean tokens", *labels, *(f"{MEASURES[name]} (%)" for name in names)]
    return ReportTable(title="Length and text", corner="task", columns=columns, rows=rows)


def task_measures(found: Evaluation) -> list[ReportTable]:
    """Return the measures that only some tasks have, such as the four figures of IFEval; no table without any."""
    rows = [
        (f"{task}: {name}", [percent(value)])
        for task, part in found.by_task.items()
        for name, value in _shares(part.measures).items()
    ]
    return [ReportTable(title="Measures of tasks", corner="measure", columns=("%",), rows=rows)] if rows else []


def _shares(measures: Mapping[str, float]) -> dict[str, float]:
    """The measures of a task as shares; counts of IFEval's instructions become their accuracies."""
    found = {name: value for name, value in measures.items() if name not in MEASURES}
    if "num_instructions" in found:
        found |= {f"instructions_{kind}": instruction_accuracy([found], kind) for kind in ("strict", "loose")}
        del found["num_instructions"]
    return found


def contest_table(found: ContestRating) -> ReportTable:
    """Return the result in each contest and the rating."""
    columns = ("solved", "points", "penalty", "place", "rating")
    rows = [
        (
            one.contest,
            [
                f"{one.num_solved} of {one.num_problems}",
                f"{one.points:g}",
                f"{one.penalty:g}",
                f"{one.rank:,} of {one.num_participants:,}",
                f"{one.rating:.0f}",
            ],
        )
        for one in found.results
    ]
    return ReportTable(title="Contests", corner="contest", columns=columns, rows=rows, note=contest_summary(found))


class Beside:
    """A published row beside our figure. contests: of the task, if it has a rating."""

    def __init__(
        self, row: PublishedRow, part: EvalMetrics, protocol: TaskProtocol, contests: ContestRating | None = None
    ):
        found = {f"cons@{k}": value for k, value in part.cons_at_k.items()}
        found |= {f"pass@{k}": value for k, value in part.pass_at_k.items()}
        found |= {"rating": contests.rating, "percentile": contests.percentile} if contests else {}
        metric = row.metric if row.metric in found else "pass@1"
        self.row, self.metric = row, metric
        self.ours = found.get(metric, part.pass_at_1)
        self.unlike = differences(protocol, row, metric)
        if metric in ("rating", "percentile"):
            self.unlike.append("problems, tests and standings: your own here, not published")
        self.unstated = not_stated(protocol, row, metric)
        self.reruns = part.over_reruns if metric == "pass@1" else None

    @property
    def is_comparable(self) -> bool:
        """Whether the source states the whole protocol, and it is ours."""
        return not self.unlike and not self.unstated

    @property
    def verdict(self) -> str:
        """The difference, or why there is none."""
        if self.unlike:
            return "not comparable"
        return "protocol not stated" if self.unstated else self.difference

    @property
    def shown(self) -> str:
        """Our figure with its metric."""
        return f"{self.metric} " + (f"{self.ours:.0f}" if self.metric == "rating" else f"{percent(self.ours)} %")

    @property
    def difference(self) -> str:
        """Ours minus published, with its interval if the published figure has the same re-run error as ours."""
        if self.row.unit != "%":
            return MISSING
        text = f"{100 * self.ours - self.row.figure:+.1f}"
        if self.reruns is None:
            return text
        half = math.sqrt(2) * (self.reruns.high - self.reruns.mean)
        return f"{text} \N{PLUS-MINUS SIGN} {100 * half:.1f}"


def beside_published(found: Evaluation, task: str) -> list[Beside]:
    """Return the published rows of a task beside our figure, comparable ones first, then by figure."""
    protocol = found.protocols.get(task)
    if protocol is None:
        return []
    contests = found.contests if task == RATED else None
    rows = [Beside(row, found.by_task[task], protocol, contests) for row in published_rows(benchmark=task)]
    return sorted(rows, key=lambda one: (not one.is_comparable, -one.row.figure))


def published_table(task: str, rows: Sequence[Beside]) -> ReportTable:
    """Return the published rows of a task, with what differs."""
    cells: Rows = []
    ours = ", ".join(dict.fromkeys(one.shown for one in rows))
    comparable = sum(one.is_comparable for one in rows)
    for one in rows:
        row = one.row
        mode = f" ({row.mode})" if row.mode else ""
        unlike = f"unlike: {'; '.join(one.unlike)}" if one.unlike else ""
        unstated = f"not stated: {', '.join(one.unstated)}" if one.unstated else ""
        note = f"note: {row.note}" if row.note else ""
        cells.append(
            (
                f"{row.model}{mode}",
                [
                    f"{row.figure:g}",
                    f"{row.metric}{f', k={row.k}' if row.k else ''}",
                    one.verdict,
                    ". ".join(text for text in (unlike, unstated, note, f"{row.source}, {row.date}") if text),
                ],
            )
        )
    return ReportTable(
        title=f"{task}: {len(rows)} published figures, {comparable} comparable",
        is_folded=not comparable,
        corner="model",
        columns=("figure", "metric", "ours minus published", "what differs, and the source"),
        rows=cells,
        note=f"Ours: {ours}. A difference is given only where the source states the whole "
        "protocol and it is ours; its interval is of the re-run error of both, since the questions are the same.",
    )


def describe(found: Evaluation, facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the provenance of the report, by name."""
    sampler = found.sampler
    lines = {"model": sampler.model, "sampled by": f"{sampler.kind}, {sampler.engine}"} if sampler else {}
    if sampler and sampler.kind in ("engine", "servers"):
        precision = sampler.dtype + (f", {sampler.quantization}" if sampler.quantization != "none" else "")
        lines |= {"template": sampler.template, "precision": precision, "machine": sampler.machine}
        lines |= {"sequences at once, at most": str(sampler.max_num_seqs)}
    if sampler and sampler.price_per_hour and found.num_correct:
        price = sampler.price_per_hour * found.seconds / 3600
        lines |= {"cost": f"{price:.4g}, {price / found.num_correct:.4g} per correct answer"}
    lines |= {"time": clock(found.seconds), "seed": str(facts.get("seed", "")), "commit": str(facts.get("commit", ""))}
    command = " ".join(map(str, facts.get("command", ())))
    return lines | {"date": str(facts.get("date", "")), "command": command}
