"""Scored rollouts on disk until the training state that includes them is saved; a resumed run reuses them.

Completions are reproducible from weights and seeds, but scores can depend on timing, because a verifier may time out in
one run and not in another. Rollouts are therefore saved after they are scored, and deleted after a training state
that includes their step is saved.
"""

from pathlib import Path
from typing import Any

from thinkstack.rl.rollout import GroupIds, RolloutStep
from thinkstack.rl.rollout_log import group_from_dict, groups_to_dicts, read_lines, write_lines
from thinkstack.tasks.mixture import Stream
from thinkstack.text.chat import ChatFormat

FOLDER = "saved_rollouts"


def path_of(folder: Path, number: int) -> Path:
    """The file of rollout step `number`."""
    return folder / FOLDER / f"step_{number:06d}.jsonl.gz"


def saved_numbers(folder: Path) -> list[int]:
    """Numbers of the rollout steps on disk, ascending."""
    return sorted(int(path.name[5:11]) for path in (folder / FOLDER).glob("step_*.jsonl.gz"))


def save_rollouts(
    folder: Path, number: int, rollout_step: RolloutStep, stream: Stream, group_ids: GroupIds, chat: ChatFormat
) -> None:
    """Save rollout step `number` with the states of `stream` and `group_ids` after it.

    Files of later steps are deleted, because they depend on an earlier version of this step.
    """
    for later in saved_numbers(folder):
        if later > number:
            path_of(folder, later).unlink()
    head: dict[str, Any] = {
        "num_rounds": rollout_step.num_rounds,
        "num_prompts_too_long": rollout_step.num_prompts_too_long,
        "stream": stream.state(),
        "next_group_id": group_ids.next_id,
    }
    write_lines(path_of(folder, number), [head, *groups_to_dicts(rollout_step.rollouts, {}, chat)])


def load_rollouts(folder: Path, number: int, stream: Stream, group_ids: GroupIds) -> RolloutStep | None:
    """Rollout step `number`, or None if it is not on disk; restores the states of `stream` and `group_ids` after this
    step."""
    path = path_of(folder, number)
    if not path.exists():
        return None
    head, *rows = read_lines(path)
    stream.restore(head["stream"])
    group_ids.next_id = head["next_group_id"]
    return RolloutStep(
        rollouts=[rollout for row in rows for rollout in group_from_dict(row)],
        num_rounds=head["num_rounds"],
        num_prompts_too_long=head["num_prompts_too_long"],
    )


def delete_saved_rollouts(folder: Path, before: int) -> None:
    """Delete the files of rollout steps with numbers below `before`."""
    for number in saved_numbers(folder):
        if number < before:
            path_of(folder, number).unlink()
