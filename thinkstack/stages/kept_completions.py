"""Completions on disk as soon as a prompt is answered, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Sequence

from thinkstack.engine.interface import AnyEngine
from thinkstack.log import Progress, Run, write_text
from thinkstack.types import Completion, SamplingParams

FILE = "completions.jsonl"
"""In the folder of the stage, while it runs."""


class KeptCompletions:
    """Engine.generate over a file of rows: what is there is not sampled again, what comes is appended."""

    def __init__(self, engine: AnyEngine, run: Run, total: int):
        """total: prompts that will be asked in all, for the line of progress."""
        self.engine, self.run = engine, run
        rows = run.rows(FILE)
        self.kept = {row["key"]: list(map(completion_of, row["completions"])) for row in rows}
        if rows:  # whole again: a last row that was cut off would swallow the next one
            write_text(run.folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
        self.progress = Progress("evaluation", total, len(self.kept))

    def generate(self, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams]) -> list[list[Completion]]:
        """sampling.n completions for each prompt. Raises Interrupted as soon as the run is asked to stop."""
        keys = [request_key(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
        missing = [place for place, key in enumerate(keys) if key not in self.kept]

        def log_completions(place: int, completions: list[Completion]) -> None:
            key = keys[missing[place]]
            self.kept[key] = completions
            self.run.append(FILE, {"key": key, "completions": list(map(row_of, completions))})
            self.progress.advance()

        with self.run.stop.may_interrupt():
            asked = [(prompts[place], samplings[place]) for place in missing]
            self.engine.generate(
                [prompt for prompt, _ in asked], [sampling for _, sampling in asked], on_finish=log_completions
            )
        return [self.kept[key] for key in keys]

    def drop(self) -> None:
        """Forget the file: the figures are written."""
        (self.run.folder / FILE).unlink(missing_ok=True)


def request_key(prompt: Sequence[int], sampling: SamplingParams) -> str:
    """A hash of all that decides the completions of a request, but for the weights."""
    return hashlib.sha256(repr((tuple(prompt), sampling)).encode()).hexdigest()[:24]


def row_of(completion: Completion) -> dict[str, object]:
    """A completion as JSON; every log-probability has all its digits."""
    return {
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
        "weights_version": completion.weights_version,
    }


def completion_of(row: dict[str, object]) -> Completion:
    """What `row_of` wrote."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Completion(**values)  # type: ignore[arg-type]
