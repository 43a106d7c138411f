"""The curriculum of a run: phases, each a mixture of puzzle tasks and benchmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from thinkstack.config import did_you_mean
from thinkstack.tasks.puzzles.generated import GeneratedTask, alternate
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import generated_tasks, make_task, make_tasks
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of a run and its task mixture."""

    until: float = 1.0
    """Share of the run at which this phase ends. It starts at `until` of the previous phase; the last phase has 1."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Sampling weight of each task of the stage's `tasks`."""
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Allowed levels, by task; a task without an entry has the levels of its row in `tasks`."""


class Stream(Protocol):
    """An endless stream of problems; its state is its position."""

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems."""

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` accepts."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""


class ProblemMixture:
    """Samples problems from the current phase.

    Each task of each phase has its own stream; a hash of (seed, number of problems so far) picks the task of the next
    problem. A resumed run therefore gets the same problems.
    """

    def __init__(self, phases: Sequence[PhaseConfig], streams: Sequence[Mapping[str, Stream]], seed: int):
        """streams: for each phase, the stream of each task."""
        self.phases, self.streams, self.seed = list(phases), list(streams), seed
        self.num_taken, self.progress = 0, 0.0
        """num_taken: number of problems returned so far. progress: completed share of the run, set by the trainer."""

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems of the phase at `progress`."""
        place = next((i for i, phase in enumerate(self.phases) if self.progress < phase.until), len(self.phases) - 1)
        phase, streams = self.phases[place], self.streams[place]
        found = []
        for number in range(self.num_taken, self.num_taken + count):
            found += streams[_task_at(phase.tasks, digest("curriculum", self.seed, number) / 2**64)].take(1)
        self.num_taken += count
        return found

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` accepts."""
        return {"taken": self.num_taken, "streams": [{k: v.state() for k, v in part.items()} for part in self.streams]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.num_taken = state["taken"]
        for part, states in zip(self.streams, state["streams"], strict=True):
            for name, stream in part.items():
                stream.restore(states[name])


def _task_at(weights: Mapping[str, float], place: float) -> str:
    """Return the task at `place`, 0..1, on the cumulative weights."""
    left = place * sum(weights.values())
    for name, weight in weights.items():
        left -= weight
        if left < 0:
            return name
    return next(reversed(list(weights)))


def make_mixture(
    tasks: Mapping[str, TaskConfig], phases: Sequence[PhaseConfig], seed: int, held_out_levels: Sequence[int] = ()
) -> ProblemMixture:
    """Build the training problems of a run from the rows of its tasks.

    phases: the curriculum; () uses all tasks for the entire run: generated tasks in turn, without held_out_levels, and
    with data sets among them all tasks with equal weights.
    Raises ConfigError for settings that `check_mixture` refuses, and for files that cannot be read.
    """
    check_mixture(tasks, phases, held_out_levels)
    made = make_tasks(tasks)
    if not phases and len(generated_tasks(made)) == len(made):
        trained = [_without_levels(task, held_out_levels) for task in generated_tasks(made)]
        return ProblemMixture([PhaseConfig(tasks={"all": 1.0})], [{"all": alternate(trained, "train", seed)}], seed=0)
    phases = phases or (PhaseConfig(tasks=dict.fromkeys(tasks, 1.0)),)
    streams = [
        {
            name: make_task(name, replace(tasks[name], levels=phase.levels.get(name, tasks[name].levels))).problems(
                "train", digest("phase", seed, place, name) % 2**31
            )
            for name in phase.tasks
        }
        for place, phase in enumerate(phases)
    ]
    return ProblemMixture(phases, streams, seed)


def check_mixture(
    tasks: Mapping[str, TaskConfig], phases: Sequence[PhaseConfig], held_out_levels: Sequence[int] = ()
) -> None:
    """Raise ConfigError for settings that `make_mixture` rejects, without reading a file."""
    made = make_tasks(tasks)
    if held_out_levels and (phases or len(generated_tasks(made)) < len(made)):
        raise ConfigError(
            f"held_out_levels={list(held_out_levels)} needs generated tasks without phases; set the levels of each "
            "task in phases"
        )
    ends = [phase.until for phase in phases]
    if phases and (ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1):
        raise ConfigError(f"the phases have until={ends}; `until` must increase from above 0 to exactly 1.0")
    for phase in phases:
        if not phase.tasks or min(phase.tasks.values()) < 0 or not sum(phase.tasks.values()):
            raise ConfigError(f"tasks={phase.tasks} of a phase must have weights >= 0, at least one weight above 0")
        for name in phase.tasks.keys() - tasks.keys():
            raise ConfigError(f"the task {name!r} of a phase is not in tasks{did_you_mean(name, tasks)}")
        for name in phase.levels.keys() - phase.tasks.keys():
            raise ConfigError(f"levels.{name} is not a task of its phase{did_you_mean(name, phase.tasks)}")


def _without_levels(task: GeneratedTask, levels: Sequence[int]) -> GeneratedTask:
    """The task without some of its levels. Raises ConfigError if none is left."""
    left = tuple(level for level in task.puzzle.levels if level not in levels)
    if not left:
        raise ConfigError(f"held_out_levels={list(levels)} leaves {task.name} no level to train on; hold out fewer")
    return GeneratedTask(task.puzzle, replace(task.cfg, levels=left))
