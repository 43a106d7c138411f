"""Which problems a run asks when: phases of a mixture of generated families and published data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from thinkstack.config import did_you_mean
from thinkstack.tasks.benchmarks.datasets import DataStream, split_file
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import BENCHMARKS, ProblemStream, puzzle_tasks
from thinkstack.types import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A part of a run and what is asked in it."""

    until: float = 1.0
    """Share of the run at which it ends; phases follow each other and the last one ends at 1."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Weight of each task: families of tasks/table.py, and data sets whose folder `files` names."""
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Difficulties asked, by task; all where a task is not named."""


class Stream(Protocol):
    """Problems without end; its state is its position."""

    def take(self, count: int) -> list[Problem]:
        """The next problems."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""


class ProblemMixture:
    """Problems of the phase that is on. Each task of each phase has a stream of its own, and a draw by (seed, number of
    problems so far) says whose turn it is; so a resumed run asks the same problems."""

    def __init__(self, phases: Sequence[PhaseConfig], streams: Sequence[Mapping[str, Stream]], seed: int):
        """streams: of each phase, by task."""
        self.phases, self.streams, self.seed = list(phases), list(streams), seed
        self.taken, self.progress = 0, 0.0
        """Problems given so far; share of the run that is over, set by who runs it."""

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems of the phase at `progress`."""
        place = next((i for i, phase in enumerate(self.phases) if self.progress < phase.until), len(self.phases) - 1)
        phase, streams = self.phases[place], self.streams[place]
        found = []
        for number in range(self.taken, self.taken + count):
            found += streams[_drawn(phase.tasks, digest("curriculum", self.seed, number) / 2**64)].take(1)
        self.taken += count
        return found

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {"taken": self.taken, "streams": [{k: v.state() for k, v in part.items()} for part in self.streams]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.taken = state["taken"]
        for part, states in zip(self.streams, state["streams"], strict=True):
            for name, stream in part.items():
                stream.restore(states[name])


def _drawn(weights: Mapping[str, float], place: float) -> str:
    """The task at `place`, 0..1, of all weights laid end to end."""
    left = place * sum(weights.values())
    for name, weight in weights.items():
        left -= weight
        if left < 0:
            return name
    return next(reversed(list(weights)))


def one_phase(stream: Stream) -> ProblemMixture:
    """The same stream from beginning to end."""
    return ProblemMixture([PhaseConfig(tasks={"all": 1.0})], [{"all": stream}], seed=0)


def make_mixture(
    phases: Sequence[PhaseConfig], files: Mapping[str, str], seed: int, languages: Sequence[str] = ()
) -> ProblemMixture:
    """The training problems of `phases`. files: folder of each data set. languages: of generated problems, all if none.

    Raises ConfigError for phases that do not cover the run, unknown tasks or levels, and files that cannot be read.
    """
    check_phases(phases, files)
    loaded = {name: load_split(name, folder, "train") for name, folder in files.items()}
    streams: list[dict[str, Stream]] = []
    for place, phase in enumerate(phases):
        part: dict[str, Stream] = {}
        for name in phase.tasks:
            levels, own = phase.levels.get(name), digest("phase", seed, place, name) % 2**31
            if name in loaded:
                part[name] = DataStream([p for p in loaded[name] if levels is None or p.level in levels], own)
            else:
                part[name] = ProblemStream(puzzle_tasks([name]), "train", own, levels, languages=languages)
        streams.append(part)
    return ProblemMixture(phases, streams, seed)


def load_split(name: str, folder: str, split: str) -> list[Problem]:
    """All problems of a split of a data set. Raises ConfigError if its file is missing or is another's."""
    return BENCHMARKS[name].load(split_file(folder, split, BENCHMARKS[name].SOURCE))


def check_phases(phases: Sequence[PhaseConfig], files: Mapping[str, str]) -> None:
    """Raise ConfigError for what `make_mixture` cannot use, without reading a file."""
    ends = [phase.until for phase in phases]
    if ends != sorted(set(ends)) or not ends or ends[0] <= 0 or ends[-1] != 1:
        raise ConfigError(f"phases end at {ends} of the run; let them rise above 0, and the last one end at 1.0")
    for name in files:
        if name not in BENCHMARKS:
            raise ConfigError(f"files.{name} is no data set{did_you_mean(name, BENCHMARKS)}")
    for phase in phases:
        if not phase.tasks or min(phase.tasks.values()) < 0 or not sum(phase.tasks.values()):
            raise ConfigError(f"tasks={phase.tasks} of a phase must have weights from 0 on, not all of them 0")
        for name in phase.tasks:
            if name in BENCHMARKS and name not in files:
                raise ConfigError(
                    f"the task {name} needs its data: say files.{name}=FOLDER, with {BENCHMARKS[name].SOURCE}"
                )
            if name not in files:
                puzzle_tasks([name])
        for name in phase.levels.keys() - phase.tasks.keys():
            raise ConfigError(f"levels.{name} belongs to no task of its phase{did_you_mean(name, phase.tasks)}")
