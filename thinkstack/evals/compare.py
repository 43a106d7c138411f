"""Compare two evaluations on the questions that both have, from their stored completions."""

from collections.abc import Sequence

from thinkstack.evals.records import ProblemRecord
from thinkstack.evals.statistics import Comparison, compare, few_questions, holm
from thinkstack.types import ConfigError

HEAD = ("task", "questions", "first", "second", "difference", "95 % interval", "p", "p (Holm)", "detectable")


def compare_tasks(first: Sequence[ProblemRecord], second: Sequence[ProblemRecord]) -> dict[str, Comparison]:
    """Return the comparison of each task that both evaluations have.

    Questions are matched by key, language and wording. Raises ConfigError if there is no common question.
    """
    found = {}
    for task in dict.fromkeys(record.task for record in first):
        before, after = (
            {_address(record): record.share_correct for record in records if record.task == task}
            for records in (first, second)
        )
        clusters = {_address(record): record.cluster or record.key for record in first}
        if before.keys() & after.keys():
            found[task] = compare(before, after, clusters)
    if not found:
        raise ConfigError("the two evaluations have no question in common; evaluate both on the same task and seed")
    return found


def _address(record: ProblemRecord) -> str:
    return f"{record.task}/{record.key}/{record.language}/{record.wording}"


def comparison_rows(found: dict[str, Comparison]) -> list[tuple[str, list[str]]]:
    """Return a row per task: in percent, except the p-values, which are also adjusted for the number of tasks."""
    adjusted = holm({task: part.p_value for task, part in found.items()})
    return [
        (
            task,
            [
                str(part.num_questions),
                f"{100 * part.first:.1f}",
                f"{100 * part.second:.1f}",
                f"{100 * part.difference:+.1f}",
                "-" if part.low is None or part.high is None else f"{100 * part.low:+.1f} to {100 * part.high:+.1f}",
                f"{part.p_value:.4f}",
                f"{adjusted[task]:.4f}",
                "-" if part.smallest_detectable is None else f"{100 * part.smallest_detectable:.1f}",
            ],
        )
        for task, part in found.items()
    ]


def warnings(found: dict[str, Comparison]) -> list[str]:
    """Return a warning for each task with few questions."""
    texts = {task: few_questions(part.num_clusters) for task, part in found.items()}
    return [f"{task}: {text}" for task, text in texts.items() if text]
