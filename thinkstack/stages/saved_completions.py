"""Save the completions of each finished prompt, so that an interrupted evaluation resumes where it stopped."""

import hashlib
import json
from collections.abc import Sequence

from thinkstack.engine.interface import AnyEngine
from thinkstack.log import Progress, Run, write_text
from thinkstack.types import Completion, SamplingParams

FILE = "completions.jsonl"
"""Name of the file in the stage's folder; exists only while the stage runs."""


class SavedCompletions:
    """Engine.generate with a file of results: prompts in the file are not sampled again; new completions are
    appended."""

    def __init__(self, engine: AnyEngine, run: Run, total: int, max_num_seqs: int):
        """total: number of completions of the evaluation, for the progress line. max_num_seqs: those that run at
        once."""
        self.engine, self.run = engine, run
        rows = run.rows(FILE)
        self.completions = {row["key"]: list(map(completion_from_dict, row["completions"])) for row in rows}
        if rows:  # rewrite the file: the next row must not be appended to a truncated last one
            write_text(run.folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
        self.progress = Progress("evaluation", total, sum(map(len, self.completions.values())), max_num_seqs)

    def generate(self, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams]) -> list[list[Completion]]:
        """Return sampling.n completions for each prompt. Raises Interrupted on a request to stop."""
        keys = [request_key(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
        ahead = sum(sampling.n for key, sampling in zip(keys, samplings, strict=True) if key not in self.completions)
        self.progress.total = max(self.progress.total, self.progress.done + ahead)
        missing = [index for index, key in enumerate(keys) if key not in self.completions]
        missing.sort(key=keys.__getitem__)  # by hash: tasks mix, so that the estimate of the time left holds for all

        def append(index: int, completions: list[Completion]) -> None:
            key = keys[missing[index]]
            self.completions[key] = completions
            self.run.append(FILE, {"key": key, "completions": list(map(completion_to_dict, completions))})
            self.progress.advance(len(completions))

        with self.run.stop.may_interrupt():
            self.engine.generate([prompts[i] for i in missing], [samplings[i] for i in missing], on_finish=append)
        return [self.completions[key] for key in keys]

    def delete(self) -> None:
        """Delete the file; called after the results are written."""
        (self.run.folder / FILE).unlink(missing_ok=True)


def request_key(prompt: Sequence[int], sampling: SamplingParams) -> str:
    """A hash of all inputs that determine the completions of a request, except the weights."""
    return hashlib.sha256(repr((tuple(prompt), sampling)).encode()).hexdigest()[:24]


def completion_to_dict(completion: Completion) -> dict[str, object]:
    """A completion as JSON values; log-probabilities are written with all digits."""
    return {
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
        "weights_version": completion.weights_version,
    }


def completion_from_dict(row: dict[str, object]) -> Completion:
    """The inverse of `completion_to_dict`."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Completion(**values)  # type: ignore[arg-type]
