"""The rollout log: one gzipped JSON-lines file per step with one group per line, for inspection and replay."""

import base64
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import TypeAdapter
from torch import Tensor

from thinkstack.files import read_rows
from thinkstack.text.chat import ChatFormat
from thinkstack.types import Completion, ConfigError, GivenTokens, Problem, Rollout, Score

FOLDER = "rollouts"
PROBLEM = TypeAdapter(Problem)


def path_of(folder: Path, step: int) -> Path:
    """The file of one step."""
    return folder / FOLDER / f"step_{step:06d}.jsonl.gz"


def write_rollouts(
    folder: Path, step: int, rollouts: Sequence[Rollout], advantages: Mapping[int, float], chat: ChatFormat
) -> None:
    """Write the rollouts of a step. advantages: by index in `rollouts`, without an entry if it was not trained on."""
    write_lines(path_of(folder, step), groups_to_dicts(rollouts, advantages, chat))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write gzipped JSON lines atomically; equal rows give equal bytes."""
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    try:
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_suffix(".writing")
        with fresh.open("wb") as file:
            file.write(gzip.compress(text.encode(), compresslevel=1, mtime=0))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; free space, then resume") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file written by `write_lines`. Raises ConfigError for a damaged file."""
    return [row for _, row in read_rows(path)]


def groups_to_dicts(
    rollouts: Sequence[Rollout], advantages: Mapping[int, float], chat: ChatFormat
) -> list[dict[str, Any]]:
    """The groups of the rollouts as JSON values. advantages: as in `write_rollouts`."""
    groups: dict[int, dict[str, Any]] = {}
    for index, rollout in enumerate(rollouts):
        head = {
            "group_id": rollout.group_id,
            "problem": PROBLEM.dump_python(rollout.problem, mode="json", exclude_defaults=True),
            "prompt_token_ids": rollout.prompt_token_ids,
            "is_trainable": rollout.is_trainable,
            "completions": [],
        }
        group = groups.setdefault(rollout.group_id, head)
        group["completions"].append(rollout_to_dict(rollout, chat) | {"advantage": advantages.get(index)})
    return list(groups.values())


def rollout_to_dict(rollout: Rollout, chat: ChatFormat) -> dict[str, Any]:
    """A rollout without its problem and prompt as JSON values. Segments before the last completion, if any, are in
    "earlier"."""
    score, completion = rollout.score or Score(total=0.0), rollout.completion
    earlier = [segment_to_dict(segment) for segment in rollout.segments[:-1]]
    return {
        "text": chat.text_of(completion.token_ids),
        "reward": None if score.unscorable or rollout.score is None else score.total,
        "parts": score.parts,
        "unscorable": score.unscorable,
        **({"earlier": earlier} if earlier else {}),
        **segment_to_dict(completion),
    }


def segment_to_dict(segment: Completion | GivenTokens) -> dict[str, Any]:
    """A segment of a rollout as JSON values."""
    if isinstance(segment, GivenTokens):
        return {"token_ids": segment.token_ids}
    return {
        "finish_reason": segment.finish_reason,
        "weights_version": segment.weights_version,
        "token_ids": segment.token_ids,
        "logprobs": segment.logprobs,
        **({} if segment.experts is None else {"experts": tensor_to_dict(segment.experts)}),
    }


def segment_from_dict(row: dict[str, Any]) -> Completion | GivenTokens:
    """The inverse of `segment_to_dict`."""
    if "logprobs" not in row:
        return GivenTokens(tuple(row["token_ids"]))
    return Completion(
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        finish_reason=row["finish_reason"],
        weights_version=row["weights_version"],
        experts=tensor_from_dict(row["experts"]) if "experts" in row else None,
    )


def group_from_dict(group: dict[str, Any]) -> list[Rollout]:
    """The rollouts of a group; the inverse of `groups_to_dicts`."""
    problem = PROBLEM.validate_python(group["problem"])
    return [
        Rollout(
            problem=problem,
            group_id=group["group_id"],
            prompt_token_ids=tuple(group["prompt_token_ids"]),
            segments=tuple(map(segment_from_dict, (*row.get("earlier", ()), row))),
            score=Score(total=row["reward"] or 0.0, parts=row["parts"], unscorable=row["unscorable"]),
            is_trainable=group["is_trainable"],
        )
        for row in group["completions"]
    ]


def tensor_to_dict(x: Tensor) -> dict[str, Any]:
    """A tensor as JSON values: its bytes in base64."""
    array = x.numpy()
    return {"dtype": array.dtype.name, "shape": array.shape, "base64": base64.b64encode(array.tobytes()).decode()}


def tensor_from_dict(values: dict[str, Any]) -> Tensor:
    """The inverse of `tensor_to_dict`."""
    array = numpy.frombuffer(bytearray(base64.b64decode(values["base64"])), dtype=values["dtype"])
    return torch.from_numpy(array.reshape(values["shape"]))


def read_rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    """The groups of one step. Raises ConfigError, with the logged steps, if that step was not logged."""
    path = path_of(folder, step)
    if not path.exists():
        steps = sorted(int(p.name[5:11]) for p in (folder / FOLDER).glob("step_*.jsonl.gz"))
        logged = f"{steps[0]} to {steps[-1]} ({len(steps)} steps)" if steps else "none"
        nearby = sorted(
            {str(path.parent) for path in (*folder.glob(f"*/{FOLDER}"), *folder.parent.glob(f"*/{FOLDER}"))}
        )
        logged += f"; did you mean {' or '.join(nearby)}?" if nearby and not steps else ""
        raise ConfigError(f"{folder} has no rollouts of step {step}; logged steps: {logged}")
    groups = read_lines(path)
    if any("messages" not in group["problem"] for group in groups):
        raise ConfigError(f"{path} has the format of an older version; read it with commit 46a34e5 of thinkstack")
    return groups


def show_group(group: dict[str, Any], width: int) -> str:
    """One group as text for a terminal: the problem, then each completion with its reward, reward parts and
    advantage."""
    problem = PROBLEM.validate_python(group["problem"])
    lines = [
        f"=== group {group['group_id']}: {problem.task}, level {problem.level}, {problem.language}",
        *(message.content for message in problem.messages),
        f"reference answer: {problem.answer}",
    ]
    for number, row in enumerate(group["completions"]):
        parts = "  ".join(f"{name} {value:.4g}" for name, value in row["parts"].items())
        reward = f"unscorable: {row['unscorable']}"
        if row["reward"] is not None:
            reward = f"reward {row['reward']:.4g} ({parts})"
        advantage = "not trained on" if row["advantage"] is None else f"advantage {row['advantage']:+.3f}"
        size = f"{len(row['token_ids'])} tokens, {row['finish_reason']}"
        text = row["text"] if len(row["text"]) <= width else row["text"][:width] + " ..."
        lines += [f"--- {number}: {reward}  {advantage}  {size}", text]
    return "\n".join(lines) + "\n"
