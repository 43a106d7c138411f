"""Published results with the protocol of each, as data, and the ways in which a protocol of ours is unlike theirs.

A published figure says little without its protocol, and published protocols are incomplete. What a source does not
state is left out of its row, and counts neither as like nor as unlike.

Files (evals/published/*.toml), one for each source: `defaults` of all rows; `settings`, a table for each column of the
source, which may name another `benchmark`; `figures`, a table for each model, from column to figure or to a table with
`figure` and what differs in this row. `defaults` of a model holds what differs in its rows, such as `mode`.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from thinkstack.config import Tree, build, did_you_mean, read_toml
from thinkstack.evals.protocol import Method, TaskProtocol
from thinkstack.tasks.benchmarks.datasets import DatasetTask
from thinkstack.tasks.table import BENCHMARKS
from thinkstack.types import ConfigError

FOLDER = Path(__file__).parent
OTHER_BENCHMARKS = (
    "aider_edit",
    "aider_polyglot",
    "alpaca_eval_2",
    "arc_average",
    "arena_hard",
    "bbh",
    "browsecomp",
    "browsecomp_zh",
    "c_eval",
    "c_simpleqa",
    "cluewsc",
    "cnmo24",
    "codeforces_div1",
    "drop",
    "frames",
    "hellaswag",
    "hle",
    "hle_with_tools",
    "hmmt25",
    "humaneval_mul",
    "longbench_v2",
    "piqa",
    "simpleqa",
    "simpleqa_with_search",
    "terminal_bench",
)
"""Benchmarks with published rows that are no tasks of ours (tasks/table.py)."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The scale of a published figure."""

    unit: str
    highest: float
    is_accuracy: bool = False
    """Whether the figure estimates the share of correct answers of one attempt, as our pass@1 does."""


METRICS = {
    "pass@1": Metric(unit="%", highest=100, is_accuracy=True),
    "EM": Metric(unit="%", highest=100, is_accuracy=True),
    "accuracy": Metric(unit="%", highest=100, is_accuracy=True),
    "correct": Metric(unit="%", highest=100, is_accuracy=True),
    "prompt-strict": Metric(unit="%", highest=100, is_accuracy=True),
    "mean of prompt and instruction": Metric(unit="%", highest=100),
    "acc_norm": Metric(unit="%", highest=100),
    "F1": Metric(unit="%", highest=100),
    "cons@64": Metric(unit="%", highest=100),
    "pass@64": Metric(unit="%", highest=100),
    "LC win rate": Metric(unit="%", highest=100),
    "win rate": Metric(unit="%", highest=100),
    "% resolved": Metric(unit="%", highest=100, is_accuracy=True),
    "percentile": Metric(unit="%", highest=100),
    "rating": Metric(unit="points", highest=4000),
}
"""Metrics of published figures. percentile: share of human participants with a lower rating. acc_norm: the choice with
the highest log-likelihood per character."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One published figure. Empty text, None, and 0 where a field says so, mean that the source does not state it."""

    model: str
    mode: Literal["", "thinking", "non-thinking"] = ""
    """Mode of a hybrid model; empty for all others."""
    benchmark: str
    """Name of our task, or of OTHER_BENCHMARKS."""
    figure: float
    """In the unit of the metric."""
    metric: str
    """A name of METRICS."""
    k: int = 0
    """Samples per problem over which the figure is averaged, or which vote; 0: not stated."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int = 0
    """Maximum tokens of a completion; 0: not stated."""
    method: Literal["", "sampled", "letters", "cloze", "loglikelihood"] = ""
    """How the model answers; "loglikelihood": of the choices, by letter or text, which the source does not state."""
    grader: str = ""
    """How the source says that answers are graded."""
    same_graders: tuple[str, ...] = ()
    """Graders of ours, up to their first comma, that give the same verdicts on answers in the form of the prompt."""
    prompt: str = ""
    """Name of a prompt of the task (tasks/benchmarks/prompts.py), or a description of one that we do not have."""
    shots: int | None = None
    """Solved examples in the prompt."""
    num_problems: int = 0
    """Problems of the benchmark; 0: not stated."""
    since: str = ""
    """First date of the problems, YYYY-MM-DD, of benchmarks with dates."""
    until: str = ""
    """Last date of the problems."""
    source: str
    """Document and table or section."""
    date: str
    """Date of the document, YYYY-MM-DD."""
    note: str = ""
    """What a reader must know, such as a figure that articles quote wrongly."""

    def __post_init__(self) -> None:
        for name in ("model", "source", "date"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty; a published figure needs its {name}")
        known = [*BENCHMARKS, *OTHER_BENCHMARKS]
        if self.benchmark not in known:
            raise ConfigError(f"unknown benchmark {self.benchmark!r}{did_you_mean(self.benchmark, known)}")
        if self.metric not in METRICS:
            raise ConfigError(f"unknown metric {self.metric!r}{did_you_mean(self.metric, METRICS)}")
        if not 0 <= self.figure <= METRICS[self.metric].highest:
            raise ConfigError(
                f"figure={self.figure} is outside the scale of {self.metric}, 0 to {METRICS[self.metric].highest:g}"
            )
        for name in ("date", "since", "until"):
            _check_date(name, getattr(self, name))

    @property
    def unit(self) -> str:
        return METRICS[self.metric].unit

    @property
    def identity(self) -> tuple[str, ...]:
        """What no two rows share."""
        return (self.model, self.mode, self.benchmark, self.metric, self.prompt, str(self.shots), self.date)


def _check_date(name: str, text: str) -> None:
    try:
        if text:
            datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a date; write YYYY-MM-DD") from error


def read_published(path: Path) -> list[PublishedRow]:
    """Return the rows of one file. Raises ConfigError with the address of a row that is wrong."""
    tree = read_toml(path)
    tables = {name: _table(tree.pop(name, {}), f"{path.name}: {name}") for name in ("defaults", "settings", "figures")}
    if tree:
        raise ConfigError(f"{path.name}: unknown key {next(iter(tree))}{did_you_mean(next(iter(tree)), tables)}")
    found, used = [], set[str]()
    for model, figures in tables["figures"].items():
        own = _table(figures, f"{path.name}: figures.{model}").get("defaults", {})
        for column, value in figures.items():
            if column == "defaults":
                continue
            row = value if isinstance(value, dict) else {"figure": value}
            settings = tables["settings"].get(column, {})
            values: Tree = {"model": model, "benchmark": column} | tables["defaults"] | settings | own | row
            found.append(_build_row(values, f"{path.name}: figures.{model}.{column}"))
            used.add(column)
    if unused := sorted(tables["settings"].keys() - used):
        raise ConfigError(f"{path.name}: settings.{unused[0]} has no figures{did_you_mean(unused[0], used)}")
    return found


def _table(value: Any, where: str) -> Tree:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}={value!r} must be a table")
    return value


def _build_row(values: Tree, where: str) -> PublishedRow:
    missing = [name for name in ("figure", "metric", "source", "date") if name not in values]
    if missing:
        raise ConfigError(f"{where} has no {', '.join(missing)}; add it to the row, its settings or the defaults")
    try:
        return build(PublishedRow, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_no_duplicates(rows: Sequence[PublishedRow]) -> None:
    """Raise ConfigError for two rows with the same model, benchmark, metric, prompt, shots and date."""
    seen = set[tuple[str, ...]]()
    for row in rows:
        if row.identity in seen:
            raise ConfigError(f"{row.model} has two rows of {row.benchmark} ({row.metric}) in {row.source}; keep one")
        seen.add(row.identity)


@lru_cache(maxsize=1)
def all_published() -> tuple[PublishedRow, ...]:
    """Return all rows, by model as in the files, then by benchmark. Raises ConfigError like `read_published`."""
    found = [row for path in sorted(FOLDER.glob("*.toml")) for row in read_published(path)]
    check_no_duplicates(found)
    places = {model: place for place, model in enumerate(dict.fromkeys(row.model for row in found))}
    return tuple(sorted(found, key=lambda row: (places[row.model], row.mode, row.benchmark, row.metric, row.date)))


def published_rows(benchmark: str = "", model: str = "") -> list[PublishedRow]:
    """Return the rows of a benchmark, of a model, or of both; empty: all."""
    return [row for row in all_published() if benchmark in ("", row.benchmark) and model in ("", row.model)]


@dataclass(frozen=True, kw_only=True)
class Aspect:
    """One property of the protocol of an evaluation beside that of a published figure."""

    name: str
    ours: str
    published: str
    """Empty: not stated."""
    is_like: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.ours} here, {self.published} published"


def differences(protocol: TaskProtocol, row: PublishedRow, metric: str = "pass@1") -> list[str]:
    """Return in which ways an evaluation is unlike a published one; only if there are none may figures be compared.

    metric: that of our figure. Properties that the source does not state are left out: see `not_stated`.
    """
    return [str(one) for one in aspects(protocol, row, metric) if one.published and not one.is_like]


def not_stated(protocol: TaskProtocol, row: PublishedRow, metric: str = "pass@1") -> list[str]:
    """Return the names of the properties that the source of a published figure does not state."""
    return [one.name for one in aspects(protocol, row, metric) if not one.published]


def aspects(protocol: TaskProtocol, row: PublishedRow, metric: str = "pass@1") -> list[Aspect]:
    """Compare property by property. Those that do not apply are left out, such as top-p of greedy decoding."""
    is_sampled = protocol.method == "sampled" and row.method in ("", "sampled")
    compared: list[Callable[[TaskProtocol, PublishedRow], Aspect | None]] = [
        _benchmark,
        _method,
        _problems,
        _window,
        _prompt,
        _shots,
        _grader,
    ]
    if is_sampled:
        compared += [_samples, _temperature, _top_p, _max_tokens, _thinking_budget]
    return [one for one in (_metric(protocol, row, metric), *(compare(protocol, row) for compare in compared)) if one]


def _metric(protocol: TaskProtocol, row: PublishedRow, metric: str) -> Aspect:
    """By log-likelihood, pass@1 is that of the choice of the method: of texts, normalized by their lengths."""
    if metric == "pass@1" and protocol.method != "sampled":
        metric = "acc_norm" if protocol.method == "cloze" else "accuracy"
    both = METRICS.get(metric), METRICS[row.metric]
    is_like = metric == row.metric or all(one is not None and one.is_accuracy for one in both)
    return Aspect(name="metric", ours=metric, published=row.metric, is_like=is_like)


def _benchmark(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    is_like = protocol.task == row.benchmark
    return Aspect(name="benchmark", ours=protocol.task, published=row.benchmark, is_like=is_like)


def _method(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    is_like = protocol.method == row.method or (protocol.method != "sampled" and row.method == "loglikelihood")
    return Aspect(name="method", ours=protocol.method, published=row.method, is_like=is_like)


def _problems(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    count, available = protocol.num_problems, protocol.num_available
    ours = f"{count:,}" if protocol.is_complete else f"{count:,} of {available:,}"
    is_like = protocol.is_complete and row.num_problems in (0, count)
    return Aspect(
        name="problems", ours=ours, published=f"{row.num_problems:,}" if row.num_problems else "all", is_like=is_like
    )


def _window(protocol: TaskProtocol, row: PublishedRow) -> Aspect | None:
    cls = BENCHMARKS.get(row.benchmark)
    if cls is None or "since" not in cls.CODE_SETTINGS:
        return None
    published = f"{row.since} to {row.until}" if row.since or row.until else ""
    ours = f"{protocol.since or 'first'} to {protocol.until or 'last'}"
    return Aspect(name="window", ours=ours, published=published, is_like=ours == published)


def _prompt(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    ours = prompt_name(protocol)
    return Aspect(name="prompt", ours=ours, published=row.prompt, is_like=ours == row.prompt)


DEFAULT_PROMPTS: Mapping[Method, str] = {"letters": "lm-eval", "cloze": "lm-eval-cloze"}
"""Prompts of choices by log-likelihood where the row of a task names none."""


def prompt_name(protocol: TaskProtocol) -> str:
    """Return the name of the prompt of an evaluation; "a text of its own" if it is written out."""
    prompts = BENCHMARKS.get(protocol.task, DatasetTask).PROMPTS
    if not protocol.prompt:
        return DEFAULT_PROMPTS.get(protocol.method) or next(iter(prompts))
    return protocol.prompt if protocol.prompt in prompts else "a text of its own"


def _shots(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    published = "" if row.shots is None else str(row.shots)
    return Aspect(
        name="examples", ours=str(protocol.num_shots), published=published, is_like=protocol.num_shots == row.shots
    )


def _grader(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    kind = protocol.grader.partition(", ")[0]  # without the sandbox, or the method of a log-likelihood
    is_like = protocol.grader == row.grader or kind in row.same_graders
    return Aspect(name="grader", ours=protocol.grader, published=row.grader, is_like=is_like)


def _samples(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    published = str(row.k) if row.k else ""
    return Aspect(name="samples", ours=str(protocol.samples), published=published, is_like=protocol.samples == row.k)


def _temperature(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    return _number("temperature", protocol.temperature, row.temperature)


def _top_p(protocol: TaskProtocol, row: PublishedRow) -> Aspect | None:
    is_greedy = protocol.temperature == 0 and row.temperature == 0
    return None if is_greedy else _number("top-p", protocol.top_p, row.top_p)


def _number(name: str, ours: float, published: float | None) -> Aspect:
    text = "" if published is None else f"{published:g}"
    return Aspect(name=name, ours=f"{ours:g}", published=text, is_like=ours == published)


def _max_tokens(protocol: TaskProtocol, row: PublishedRow) -> Aspect:
    """The context of the model bounds a completion as well."""
    ours = min(protocol.max_tokens, protocol.max_model_len or protocol.max_tokens)
    published = f"{row.max_tokens:,}" if row.max_tokens else ""
    return Aspect(name="maximum tokens", ours=f"{ours:,}", published=published, is_like=ours == row.max_tokens)


def _thinking_budget(protocol: TaskProtocol, row: PublishedRow) -> Aspect | None:
    """No published figure here has thinking closed by force."""
    if protocol.thinking_budget is None:
        return None
    return Aspect(name="thinking budget", ours=f"{protocol.thinking_budget:,}", published="none", is_like=False)
