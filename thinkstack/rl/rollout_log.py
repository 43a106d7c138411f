"""The rollout log: one gzipped JSON-lines file per step with one group per line, for inspection and replay."""

import base64
import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import TypeAdapter
from torch import Tensor

from thinkstack.files import read_rows
from thinkstack.rl.groups import by_group
from thinkstack.text.chat import ChatFormat
from thinkstack.types import Completion, ConfigError, Problem, Rollout, Score

FOLDER = "rollouts"
PROBLEM = TypeAdapter(Problem)


def path_of(folder: Path, step: int) -> Path:
    """The file of one step."""
    return folder / FOLDER / f"step_{step:06d}.jsonl.gz"


def write_rollouts(
    folder: Path, step: int, rollouts: Sequence[Rollout], advantages: dict[int, float], chat: ChatFormat
) -> None:
    """Write the rollouts of a step. advantages: by id() of the rollout, without an entry if it was not trained on."""
    path = path_of(folder, step)
    write_lines(path, [group_to_dict(group, advantages, chat) for group in by_group(rollouts)])


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


def group_to_dict(group: Sequence[Rollout], advantages: dict[int, float], chat: ChatFormat) -> dict[str, Any]:
    """One group as JSON values. advantages: as in `write_rollouts`."""
    completions = [
        {
            "text": chat.text_of(rollout.completion.token_ids),
            "reward": rollout.score.total if rollout.score and not rollout.score.unscorable else None,
            "parts": rollout.score.parts if rollout.score else {},
            "unscorable": rollout.score.unscorable if rollout.score else None,
            "advantage": advantages.get(id(rollout)),
            "finish_reason": rollout.completion.finish_reason,
            "weights_version": rollout.completion.weights_version,
            "token_ids": rollout.completion.token_ids,
            "logprobs": rollout.completion.logprobs,
            **({} if rollout.completion.experts is None else {"experts": tensor_to_dict(rollout.completion.experts)}),
        }
        for rollout in group
    ]
    return {
        "group_id": group[0].group_id,
        "problem": PROBLEM.dump_python(group[0].problem, mode="json", exclude_defaults=True),
        "prompt_token_ids": group[0].prompt_token_ids,
        "completions": completions,
    }


def group_from_dict(group: dict[str, Any]) -> list[Rollout]:
    """The rollouts of a group; the inverse of `group_to_dict`."""
    problem = PROBLEM.validate_python(group["problem"])
    return [
        Rollout(
            problem=problem,
            group_id=group["group_id"],
            prompt_token_ids=tuple(group["prompt_token_ids"]),
            completion=Completion(
                token_ids=tuple(row["token_ids"]),
                logprobs=tuple(row["logprobs"]),
                finish_reason=row["finish_reason"],
                weights_version=row["weights_version"],
                experts=tensor_from_dict(row["experts"]) if "experts" in row else None,
            ),
            score=Score(total=row["reward"] or 0.0, parts=row["parts"], unscorable=row["unscorable"]),
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
