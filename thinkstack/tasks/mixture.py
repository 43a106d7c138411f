"""The curriculum of a run: phases, each a mixture of puzzle tasks and benchmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from thinkstack.config import did_you_mean
from thinkstack.tasks.benchmarks.datasets import DatasetStream, split_file
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import BENCHMARKS, ProblemStream, puzzle_tasks
from thinkstack.types import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of a run and its task mixture."""

    until: float = 1.0
    """Share of the run at which this phase ends. It starts at `until` of the previous phase; the last phase has 1."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Sampling weight of each task: puzzle tasks of tasks/table.py, and benchmarks whose folder `files` gives."""
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Allowed levels, by task; a task without an entry uses all its levels."""


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


def single_phase(stream: Stream) -> ProblemMixture:
    """Return a mixture of one phase that always uses `stream`."""
    return ProblemMixture([PhaseConfig(tasks={"all": 1.0})], [{"all": stream}], seed=0)


def make_mixture(
    phases: Sequence[PhaseConfig], files: Mapping[str, str], seed: int, languages: Sequence[str] = ()
) -> ProblemMixture:
    """Build the training problems of `phases`.

    files: folder of each benchmark. languages: languages of generated problems; () allows all.
    Raises ConfigError for phases that do not cover the run, unknown tasks or levels, and unreadable files.
    """
    check_phases(phases, files)
    loaded = {name: load_split(name, folder, "train") for name, folder in files.items()}
    streams: list[dict[str, Stream]] = []
    for place, phase in enumerate(phases):
        part: dict[str, Stream] = {}
        for name in phase.tasks:
            levels, own = phase.levels.get(name), digest("phase", seed, place, name) % 2**31
            if name in loaded:
                part[name] = DatasetStream([p for p in loaded[name] if levels is None or p.level in levels], own)
            else:
                part[name] = ProblemStream(puzzle_tasks([name]), "train", own, levels, languages=languages)
        streams.append(part)
    return ProblemMixture(phases, streams, seed)


def load_split(name: str, folder: str, split: str) -> list[Problem]:
    """Return all problems of a split of a benchmark.

    Raises ConfigError if the file is missing or belongs to another benchmark.
    """
    return BENCHMARKS[name].load(split_file(folder, split, BENCHMARKS[name].SOURCE))


def check_phases(phases: Sequence[PhaseConfig], files: Mapping[str, str]) -> None:
    """Raise ConfigError for settings that `make_mixture` rejects, without reading a file."""
    ends = [phase.until for phase in phases]
    if ends != sorted(set(ends)) or not ends or ends[0] <= 0 or ends[-1] != 1:
        raise ConfigError(f"the phases have until={ends}; `until` must increase from above 0 to exactly 1.0")
    for name in files:
        if name not in BENCHMARKS:
            raise ConfigError(f"files.{name} is not a known benchmark{did_you_mean(name, BENCHMARKS)}")
    for phase in phases:
        if not phase.tasks or min(phase.tasks.values()) < 0 or not sum(phase.tasks.values()):
            raise ConfigError(f"tasks={phase.tasks} of a phase must have weights >= 0, at least one weight above 0")
        for name in phase.tasks:
            if name in BENCHMARKS and name not in files:
                raise ConfigError(
                    f"the task {name} needs its data: set files.{name}=FOLDER, with {BENCHMARKS[name].SOURCE}"
                )
            if name not in files:
                puzzle_tasks([name])
        for name in phase.levels.keys() - phase.tasks.keys():
            raise ConfigError(f"levels.{name} is not a task of its phase{did_you_mean(name, phase.tasks)}")
