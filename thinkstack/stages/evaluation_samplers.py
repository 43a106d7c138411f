"""The sources of an evaluation's completions: a checkpoint, an endpoint, or a file of answers, with one interface.

Whatever is finished is saved at once, so that an evaluation that was interrupted or killed samples nothing twice.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import thinkstack
from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.endpoint import Endpoint
from thinkstack.endpoint.requests import EndpointCompletion, EndpointRequest
from thinkstack.engine.engine import EngineConfig
from thinkstack.engine.interface import AnyEngine
from thinkstack.engine.remote import open_engine
from thinkstack.evals.budgets import Grade, force_close, forced_points
from thinkstack.evals.choices import choice_record, choose
from thinkstack.evals.loglikelihood import ChoiceResult
from thinkstack.evals.metrics import ForcedPoint
from thinkstack.evals.protocol import SamplerFacts
from thinkstack.evals.records import ProblemRecord
from thinkstack.evals.sample_endpoint import sample_from_endpoint
from thinkstack.evals.sampling import (
    EvalConfig,
    SampledProblem,
    longest_prompt,
    num_samples,
    read_answers,
    sample_from_engine,
    sampling_params_for,
)
from thinkstack.kernels.precision import DTYPES, Precision, resolve_precision
from thinkstack.log import Progress, Run, commit_of, write_text
from thinkstack.machine import describe_machine, pick_device
from thinkstack.models.precision import inference_copy
from thinkstack.models.transformer import Transformer
from thinkstack.stages.saved_completions import SavedCompletions
from thinkstack.tasks.benchmarks.datasets import DatasetTask
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.task import Task, encode_prompt
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import Interrupted, Problem

if TYPE_CHECKING:
    from thinkstack.stages.evaluate import EvaluateConfig

CACHE = "endpoint"
"""Folder of an endpoint's completions, beside the folder of the stage, which moves if settings change."""
CHOICES = "choices.jsonl"
"""Log-likelihoods of the choices of finished questions; exists only while the stage runs."""


class Sampler:
    """A source of completions: a context manager. A source without a checkpoint cannot choose by log-likelihood."""

    facts: SamplerFacts
    """What samples the completions."""
    max_model_len = 0
    """Maximum tokens of prompt and completion together; 0: unknown."""

    def sample(self, problems: Sequence[Problem], tasks: Mapping[str, Task], cfg: EvalConfig) -> list[SampledProblem]:
        """Return the problems with their responses."""
        raise NotImplementedError

    def choose(self, problems: Sequence[Problem], tasks: Mapping[str, Task]) -> list[ProblemRecord]:
        """Return the records of questions that are answered by log-likelihood."""
        assert not problems, "EvaluateConfig refuses these tasks"
        return []

    def force_close(
        self, sampled: Sequence[SampledProblem], budgets: Sequence[int], grade: Grade
    ) -> dict[str, tuple[ForcedPoint, ...]]:
        """Return the accuracy with thinking that is closed by force, by task."""
        assert not budgets, "EvaluateConfig refuses them"
        return {}

    def delete_saved(self) -> None:
        """Delete what a resumed evaluation would need; called after the results are written."""

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class EngineSampler(Sampler):
    """Samples from a checkpoint, in this process or on vLLM servers with its weights."""

    def __init__(self, cfg: EvaluateConfig, run: Run, parts: Sequence[tuple[EvalConfig, Sequence[Problem]]]):
        """parts: the settings and problems of each evaluation of the stage; their prompts decide the context length."""
        self.cfg, self.run, self._progress = cfg, run, ExitStack()
        self.chat = load_chat(cfg.start)
        tasks = make_tasks(cfg.tasks)
        sizes, self._num_completions = [0], 0
        for config, problems in parts:
            for task, one in ((tasks[one.task], one) for one in problems):
                size = len(encode_prompt(self.chat, task, one)) if task.cfg.method == "sampled" else 0
                if size and size <= (longest_prompt(cfg) or size):
                    sizes.append(size)
                    self._num_completions += num_samples(task, config)
        whole = max(sizes) + cfg.max_tokens
        self.max_model_len = min(cfg.max_model_len or whole, whole)
        if cfg.thinking_budgets:
            self.max_model_len += cfg.answer_tokens + 8  # the tokens that close thinking
        self.facts = SamplerFacts(
            kind="servers" if cfg.servers.addresses else "engine",
            model=_end_of(cfg.start),
            engine=f"thinkstack {thinkstack.__version__} ({commit_of(Path(thinkstack.__file__).parent)})",
            template=self.chat.name,
            dtype=self._precision,
            quantization=cfg.quantization,
            machine=describe_machine(),
            max_num_seqs=cfg.max_num_seqs,
            price_per_hour=cfg.price_per_hour,
        )

    @property
    def _precision(self) -> Precision:
        return resolve_precision(self.cfg.dtype, pick_device(self.cfg.device))

    @functools.cached_property
    def model(self) -> Transformer:
        """The checkpoint on its device, in the precision of its file."""
        return load_model(self.cfg.start).to(pick_device(self.cfg.device))

    @functools.cached_property
    def _saved(self) -> SavedCompletions:
        saved = SavedCompletions(self._engine, self.run, self._num_completions, self.cfg.max_num_seqs)
        self._progress.enter_context(saved.progress)
        return saved

    @functools.cached_property
    def _engine(self) -> AnyEngine:
        size = EngineConfig(
            max_num_seqs=self.cfg.max_num_seqs,
            max_model_len=self.max_model_len,
            dtype=self.cfg.dtype,
            quantization=self.cfg.quantization,
        )
        return open_engine(self.model, size, self.cfg.servers)

    def sample(self, problems: Sequence[Problem], tasks: Mapping[str, Task], cfg: EvalConfig) -> list[SampledProblem]:
        return sample_from_engine(self._saved.generate, self.chat, problems, tasks, cfg, self.cfg.thinking_format)

    def choose(self, problems: Sequence[Problem], tasks: Mapping[str, Task]) -> list[ProblemRecord]:
        if not problems:
            return []
        model = inference_copy(self.model, DTYPES[self._precision], self.cfg.quantization)
        rows = self.run.rows(CHOICES)
        write_text(self.run.folder / CHOICES, "".join(json.dumps(row) + "\n" for row in rows))  # without a cut last row
        found = {(row["task"], row["key"]): _choice_result(row) for row in rows}
        missing = [one for one in problems if (one.task, one.key) not in found]
        with Progress("log-likelihoods", len(problems), len(problems) - len(missing)) as progress:
            for name in dict.fromkeys(one.task for one in missing):

                def save(results: Sequence[ChoiceResult], task: str = name) -> None:
                    for result in results:
                        found[task, result.key] = result
                        self.run.append(CHOICES, {"task": task} | vars(result))
                    progress.advance(len(results))
                    if self.run.stop.is_requested:
                        raise Interrupted

                choose(model, self.chat, [one for one in missing if one.task == name], _dataset(tasks[name]), save)
        return [
            choice_record(one, found[one.task, one.key], _dataset(tasks[one.task]), self.chat, self.facts)
            for one in problems
        ]

    def force_close(
        self, sampled: Sequence[SampledProblem], budgets: Sequence[int], grade: Grade
    ) -> dict[str, tuple[ForcedPoint, ...]]:
        if not (budgets and sampled):
            return {}
        tasks = make_tasks(self.cfg.tasks)

        def close(budget: int) -> tuple[list[SampledProblem], list[int]]:
            return force_close(
                self._saved.generate,
                self.chat,
                sampled,
                budget,
                lambda problem: sampling_params_for(problem, tasks[problem.task], self.chat, self.cfg),
                self.cfg.answer_tokens,
                self.cfg.thinking_format,
            )

        return forced_points(budgets, close, grade)

    def __exit__(self, *_: object) -> None:
        self._progress.close()

    def delete_saved(self) -> None:
        if "_saved" in vars(self):
            self._saved.delete()
        (self.run.folder / CHOICES).unlink(missing_ok=True)


def _end_of(path: str) -> str:
    """The last two parts of a path: results do not depend on the place of the run."""
    return "/".join(Path(path).parts[-2:])


def _dataset(task: Task) -> DatasetTask:
    assert isinstance(task, DatasetTask), "make_task refuses other tasks with log-likelihoods"
    return task


def _choice_result(row: Mapping[str, object]) -> ChoiceResult:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items() if name != "task"}
    return ChoiceResult(**values)  # type: ignore[arg-type]


class EndpointSampler(Sampler):
    """Samples from an OpenAI-compatible endpoint; its cache holds what is paid for."""

    def __init__(self, cfg: EndpointConfig, thinking_format: ThinkingFormat, run: Run):
        self._thinking_format, self._run = thinking_format, run
        self._endpoint = Endpoint(replace(cfg, cache=cfg.cache or str(run.folder.parent / CACHE)))
        self.facts = SamplerFacts(
            kind="endpoint",
            model=self._endpoint.model,
            engine=cfg.url,
            prompt_price=cfg.prompt_price,
            completion_price=cfg.completion_price,
        )

    def sample(self, problems: Sequence[Problem], tasks: Mapping[str, Task], cfg: EvalConfig) -> list[SampledProblem]:
        fingerprints = set[str]()

        def complete(requests: Sequence[EndpointRequest]) -> list[EndpointCompletion]:
            with Progress("evaluation", len(requests)) as progress:

                def advance(*_: object) -> None:
                    progress.advance(note=self._note())

                found = self._endpoint.complete(requests, advance, self._run.stop, accept_refusals=True)
            fingerprints.update(one.system_fingerprint for one in found if one.system_fingerprint)
            return found

        sampled = sample_from_endpoint(complete, problems, tasks, cfg, self._thinking_format)
        names = ", ".join((self._endpoint.cfg.url, *sorted(fingerprints)))
        self.facts = replace(self.facts, engine=names)
        return sampled

    def _note(self) -> str:
        """What is spent, and what the rest will cost."""
        spent, left = self._endpoint.spent, self._endpoint.estimate()
        if not spent.cost:
            return f"{spent.total_tokens:,} tokens"
        rest = f", {left.cost:,.2f} left" if left else ""
        return f"{spent.total_tokens:,} tokens, cost {spent.cost:,.2f}{rest}"

    def __exit__(self, *_: object) -> None:
        self._endpoint.close()


class AnswersSampler(Sampler):
    """Reads completions that were sampled elsewhere."""

    def __init__(self, path: str, thinking_format: ThinkingFormat):
        self._path, self._thinking_format = path, thinking_format
        self.facts = SamplerFacts(kind="answers", model=_end_of(path), engine="unknown")

    def sample(self, problems: Sequence[Problem], tasks: Mapping[str, Task], cfg: EvalConfig) -> list[SampledProblem]:
        return read_answers(self._path, problems, tasks, cfg, self._thinking_format)
