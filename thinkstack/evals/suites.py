"""Suites: tasks and settings of a published protocol, by name; tables of evals/suites.toml."""

from dataclasses import dataclass
from pathlib import Path

from thinkstack.config import Count, CountOrZero, Share, Temperature, Tree, build, check_keys, did_you_mean, read_toml
from thinkstack.tasks.table import BENCHMARKS, PUZZLES, RETRIEVAL
from thinkstack.tasks.task import TaskConfig
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError

FILE = Path(__file__).parent / "suites.toml"


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """Settings of an evaluation that a suite may give; what it leaves out is the evaluation's own."""

    num_problems: CountOrZero = 0
    """Maximum number of problems of each task; 0: all."""
    samples: Count = 1
    """Completions sampled per problem, where the row of a task has no num_samples."""
    temperature: Temperature = 0.0
    top_p: Share = 1.0
    max_tokens: Count = 1
    thinking_format: ThinkingFormat = "flexible_extract"
    """How the final answer is read (text/parse.py)."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The tasks of a protocol, without their data."""

    tasks: dict[str, Tree]
    """Rows of the tasks (TaskConfig), by name."""
    settings: Tree
    """Settings of the evaluation (SuiteSettings): those that the suite gives."""
    source: str
    """Where the protocol is published."""
    note: str = ""
    """What a reader must know, such as what the source does not state."""


def load_suite(name: str, path: Path = FILE) -> Suite:
    """Return a suite by its name. Raises ConfigError for an unknown suite, and for one that is not of this form."""
    suites = read_toml(path)
    if name not in suites:
        raise ConfigError(f"unknown suite {name!r}{did_you_mean(name, suites)}")
    where = f"{path.name}: {name}"
    suite = build(Suite, suites[name], where)
    build(SuiteSettings, suite.settings, f"{where}.settings")
    if not suite.tasks:
        raise ConfigError(f"{where} has no tasks; add a row to {name}.tasks")
    tasks = (*BENCHMARKS, *RETRIEVAL, *PUZZLES)
    for task, row in suite.tasks.items():
        if task not in tasks:
            raise ConfigError(f"{where}.tasks: unknown task {task!r}{did_you_mean(task, tasks)}")
        check_keys(TaskConfig, row, f"{where}.tasks.{task}")
    return suite


def suite_names(path: Path = FILE) -> list[str]:
    """Return the names of all suites, in the order of the file."""
    return list(read_toml(path))
