"""Drawings on disk before anything is learnt from them, so that a step that was cut off is taken again with the same
answers and the same verdicts.

Weights and seeds bring the answers back, but a verdict may have depended on the clock (a checker that ran out of time).
A drawing is written once it is judged, and dropped once a state that contains its step is.
"""

from pathlib import Path
from typing import Any

from thinkstack.rl.groups import by_group
from thinkstack.rl.rollout import Counter, RolloutStep
from thinkstack.rl.rollout_log import group_from_dict, group_to_dict, read_lines, write_lines
from thinkstack.tasks.mixture import Stream
from thinkstack.text.chat import ChatFormat
from thinkstack.types import Rollout

FOLDER = "drawings"


def path_of(folder: Path, number: int) -> Path:
    """The file of one drawing."""
    return folder / FOLDER / f"drawing_{number:06d}.jsonl.gz"


def numbers_of(folder: Path) -> list[int]:
    """The drawings on disk."""
    return sorted(int(path.name[8:14]) for path in (folder / FOLDER).glob("drawing_*.jsonl.gz"))


def save_rollouts(
    folder: Path, number: int, rollout_step: RolloutStep, stream: Stream, counter: Counter, chat: ChatFormat
) -> None:
    """Keep drawing `number` of a run, with where stream and counter stand after it.

    Later drawings are dropped: they followed from another one that is no longer there.
    """
    for later in numbers_of(folder):
        if later > number:
            path_of(folder, later).unlink()
    head: dict[str, Any] = {
        "rounds": rollout_step.rounds,
        "too_long": rollout_step.too_long,
        "kept": [group[0].group_id for group in by_group(rollout_step.trainable)],
        "stream": stream.state(),
        "next_group": counter.value,
    }
    write_lines(
        path_of(folder, number), [head, *(group_to_dict(group, {}, chat) for group in by_group(rollout_step.rollouts))]
    )


def load_rollouts(folder: Path, number: int, stream: Stream, counter: Counter) -> RolloutStep | None:
    """Drawing `number` with `stream` and `counter` moved to where they stood after it; None if it is not on disk."""
    path = path_of(folder, number)
    if not path.exists():
        return None
    head, *rows = read_lines(path)
    groups: dict[int, list[Rollout]] = {row["group_id"]: group_from_dict(row) for row in rows}
    stream.restore(head["stream"])
    counter.value = head["next_group"]
    return RolloutStep(
        trainable=[rollout for group in head["kept"] for rollout in groups[group]],
        rollouts=[rollout for group in groups.values() for rollout in group],
        rounds=head["rounds"],
        too_long=head["too_long"],
    )


def drop_saved_rollouts(folder: Path, before: int) -> None:
    """Forget the drawings with numbers below `before`."""
    for number in numbers_of(folder):
        if number < before:
            path_of(folder, number).unlink()
