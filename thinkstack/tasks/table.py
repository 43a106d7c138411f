"""The tasks by name."""

from collections.abc import Mapping

from thinkstack.config import did_you_mean
from thinkstack.tasks.benchmarks import reasoning_gym as gym
from thinkstack.tasks.benchmarks.aime import Aime
from thinkstack.tasks.benchmarks.choices import ChoiceTask, Gpqa, Mmlu, MmluPro, MmluRedux
from thinkstack.tasks.benchmarks.codeforces import Codeforces
from thinkstack.tasks.benchmarks.cruxeval import CruxEvalInput, CruxEvalOutput
from thinkstack.tasks.benchmarks.datasets import DatasetTask, Gsm8k, Math, Math500
from thinkstack.tasks.benchmarks.evalplus import HumanEvalPlus, MbppPlus
from thinkstack.tasks.benchmarks.humaneval import HumanEval
from thinkstack.tasks.benchmarks.ifeval import IFEval
from thinkstack.tasks.benchmarks.infilling import Infilling
from thinkstack.tasks.benchmarks.jsonl import JsonlTask
from thinkstack.tasks.benchmarks.livecodebench import LiveCodeBench
from thinkstack.tasks.benchmarks.mathematics import Amc23, Cmath, Mgsm, Minerva
from thinkstack.tasks.benchmarks.mbpp import Mbpp
from thinkstack.tasks.benchmarks.retrieval import MultiKeyRetrieval, NeedleRetrieval, RetrievalTask
from thinkstack.tasks.benchmarks.swe_bench import SweBench
from thinkstack.tasks.puzzles.arithmetic import Chain, Nested
from thinkstack.tasks.puzzles.choice import Choice
from thinkstack.tasks.puzzles.cups import Cups
from thinkstack.tasks.puzzles.generated import GeneratedTask
from thinkstack.tasks.puzzles.kin import Kin
from thinkstack.tasks.puzzles.kinship import Kinship
from thinkstack.tasks.puzzles.modular import Modular
from thinkstack.tasks.puzzles.programs import Bug, Program
from thinkstack.tasks.puzzles.puzzle import PuzzleTask
from thinkstack.tasks.puzzles.quadratic import Quadratic
from thinkstack.tasks.puzzles.sums import Sums, Times
from thinkstack.tasks.puzzles.table_lookup import Table
from thinkstack.tasks.task import Task, TaskConfig
from thinkstack.types import ConfigError

PUZZLES: dict[str, PuzzleTask] = {
    "chain": Chain(),
    "nested": Nested(),
    "cups": Cups(),
    "kinship": Kinship(),
    "modular": Modular(),
    "quadratic": Quadratic(),
    "kin": Kin(),
    "table": Table(),
    "program": Program(),
    "bug": Bug(),
    "choice": Choice(),
    "sums": Sums(),
    "times": Times(),
}

BENCHMARKS: dict[str, type[DatasetTask]] = {
    "aime": Aime,
    "aime24": Aime,
    "aime25": Aime,
    "amc23": Amc23,
    "cmath": Cmath,
    "fim": Infilling,
    "gpqa": Gpqa,
    "gsm8k": Gsm8k,
    "ifeval": IFEval,
    "math": Math,
    "math500": Math500,
    "mgsm": Mgsm,
    "minerva": Minerva,
    "mmlu": Mmlu,
    "mmlu_pro": MmluPro,
    "mmlu_redux": MmluRedux,
    "humaneval": HumanEval,
    "humaneval_plus": HumanEvalPlus,
    "mbpp": Mbpp,
    "mbpp_plus": MbppPlus,
    "livecodebench": LiveCodeBench,
    "cruxeval_input": CruxEvalInput,
    "cruxeval_output": CruxEvalOutput,
    "codeforces": Codeforces,
    "swe_bench": SweBench,
    "swe_bench_verified": SweBench,
    "swe_bench_multilingual": SweBench,
}
"""Published benchmarks, read from local files."""

RETRIEVAL: dict[str, type[RetrievalTask]] = {"needle": NeedleRetrieval, "multi_key": MultiKeyRetrieval}
"""Generated tasks that need a long context."""


def make_task(name: str, cfg: TaskConfig) -> Task:
    """Return a task with the settings of its row of a recipe; gym/NAME is a data set of reasoning-gym.

    A name outside the tables with cfg.data is a user's own task. Raises ConfigError for any other unknown name, for
    settings that do not apply to the task, and if the task needs a package that is not installed. No file is read.
    """
    where, is_generated = f"tasks.{name}", name in PUZZLES or name in RETRIEVAL or name.startswith(gym.PREFIX)
    if is_generated and cfg.data:
        raise ConfigError(f"{where}.data={cfg.data!r}: {name} is generated and reads no files; leave it out")
    if cfg.verifier and (is_generated or (name in BENCHMARKS and BENCHMARKS[name].default_grader is None)):
        raise ConfigError(f"{where}.verifier={cfg.verifier!r} has no effect: {name} has a verifier; leave it out")
    if cfg.prompt and is_generated:
        raise ConfigError(
            f"{where}.prompt has no effect: {name} is generated and has wordings of its own; leave it out"
        )
    if cfg.choice_seed is not None and (is_generated or not has_choices(name)):
        raise ConfigError(f"{where}.choice_seed={cfg.choice_seed} has no effect: {name} has no choices; leave it out")
    if cfg.method != "sampled" and (is_generated or not has_choices(name)):
        raise ConfigError(f"{where}.method={cfg.method!r} has no effect: {name} has no choices; leave it out")
    if cfg.num_shots and (is_generated or not BENCHMARKS.get(name, JsonlTask).SHOTS_SPLIT):
        raise ConfigError(f"{where}.num_shots={cfg.num_shots} has no effect: {name} has no examples; leave it out")
    if is_generated:
        _check_code_settings(name, cfg)
    if name in RETRIEVAL:
        return RETRIEVAL[name](name, cfg)
    if is_generated:
        return GeneratedTask(gym.puzzle_task(name) if name.startswith(gym.PREFIX) else PUZZLES[name], cfg)
    if cfg.unseen_wordings:
        raise ConfigError(f"{where}.unseen_wordings=true has no effect: {name} is not generated; leave it out")
    _check_code_settings(name, cfg)
    if not cfg.data and name in BENCHMARKS:
        raise ConfigError(f"the task {name} needs its data: set {where}.data=FOLDER, with {BENCHMARKS[name].SOURCE}")
    if not cfg.data:
        hint = did_you_mean(name, [*PUZZLES, *RETRIEVAL, *BENCHMARKS])
        raise ConfigError(f"unknown task {name!r}{hint} (a task of your own needs {where}.data=FOLDER)")
    return BENCHMARKS.get(name, JsonlTask)(name, cfg)


def has_choices(name: str) -> bool:
    """Whether the questions of a task may have choices: of the benchmarks for multiple choice, and of your own."""
    return issubclass(BENCHMARKS.get(name, JsonlTask), ChoiceTask | JsonlTask)


def _check_code_settings(name: str, cfg: TaskConfig) -> None:
    """Raise ConfigError for settings that only tasks of code have."""
    allowed = BENCHMARKS[name].CODE_SETTINGS if name in BENCHMARKS else ()
    for setting in ("since", "until", "time_limit_seconds", "unsafe_code"):
        value = getattr(cfg, setting)
        if value and setting not in allowed:
            raise ConfigError(f"tasks.{name}.{setting}={value!r} has no effect on {name}; leave it out")


def make_tasks(table: Mapping[str, TaskConfig]) -> dict[str, Task]:
    """Return the tasks of a recipe's `tasks`, in their order. Raises ConfigError like `make_task`, or for no task."""
    if not table:
        raise ConfigError(f"no task is given; choose from {', '.join(PUZZLES)}")
    return {name: make_task(name, cfg) for name, cfg in table.items()}


def generated_tasks(tasks: Mapping[str, Task]) -> list[GeneratedTask]:
    """Return the generated ones of some tasks."""
    return [task for task in tasks.values() if isinstance(task, GeneratedTask)]


def puzzle_tasks(table: Mapping[str, TaskConfig]) -> list[PuzzleTask]:
    """Return the puzzles of a recipe's `tasks` with only their allowed levels and languages, for worked solutions.

    Raises ConfigError like `make_tasks`, and for a task that is not generated.
    """
    tasks = make_tasks(table)
    puzzles = [task.puzzle for task in generated_tasks(tasks)]
    for name in tasks.keys() - {puzzle.name for puzzle in puzzles}:
        raise ConfigError(f"the task {name} has no worked solutions; leave tasks.{name} out of this stage")
    return puzzles
