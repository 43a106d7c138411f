"""Evaluate a checkpoint, an endpoint or a file of answers on held-out problems."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from thinkstack.config import Count, Input, ModelInput, Weight
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.engine.remote import ServersConfig
from thinkstack.evals.protocol import TaskProtocol
from thinkstack.evals.records import ProblemRecord, grader_of, write_samples
from thinkstack.evals.results import Evaluation, summarize
from thinkstack.evals.runner import chances, grade_problems, held_out_problems, warn_if_no_answer_read
from thinkstack.evals.sampling import EvalConfig, max_tokens_of, num_samples, temperature_of
from thinkstack.files import read_object
from thinkstack.kernels.precision import RequestedPrecision
from thinkstack.log import Run, write_json
from thinkstack.models.precision import Quantization
from thinkstack.stages.evaluation_samplers import AnswersSampler, EndpointSampler, EngineSampler, Sampler
from thinkstack.tasks.reward import Reward, RewardConfig
from thinkstack.tasks.table import generated_tasks, make_tasks
from thinkstack.tasks.task import Task
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError, Problem

SAMPLED, GREEDY, UNSEEN, SAMPLES = "sampled.json", "greedy.json", "unseen_wordings.json", "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvalConfig):
    """Settings of an evaluation stage; those of `EvalConfig` apply to the sampled completions."""

    start: ModelInput = ""
    """Checkpoint, or the stage that writes it, to evaluate; empty for an endpoint or a file of answers."""
    endpoint: EndpointConfig = EndpointConfig()
    """OpenAI-compatible endpoint that samples the completions, if it has a url."""
    answers: Annotated[str, Input(SAMPLES)] = ""
    """File with completions to grade, in the format of samples.jsonl or with key or question, and completions."""
    thinking_format: ThinkingFormat = "think_answer_tags"
    """Format of thinking and final answer: "think_answer_tags" of R1-Zero, "think_then_answer" of R1, or
    "flexible_extract" for models that were not trained on a format, or "last_number" (text/parse.py)."""
    greedy: bool = True
    """Also evaluate greedy decoding, on the same problems and on generated problems in wordings excluded from
    training."""
    thinking_budgets: tuple[int, ...] = ()
    """Numbers of thinking tokens at which the sampled thinking is also cut and closed by force, after which the model
    answers: accuracy over budgets from one run (evals/budgets.py)."""
    answer_tokens: Count = 256
    """Maximum tokens of the answer after thinking that was closed by force."""
    max_num_seqs: Count = 384
    """Maximum number of sequences sampled at once."""
    dtype: RequestedPrecision = "fp32"
    """Precision of sampling; "auto": bf16 if it is faster on this machine."""
    quantization: Quantization = "none"
    """Quantization of the weights; "none" is off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; "auto": CUDA if available."""
    servers: ServersConfig = ServersConfig()
    """vLLM servers that sample the completions instead of this process; with servers, dtype is the precision of the
    weights sent to them."""
    price_per_hour: Weight = 0.0
    """Price of the machine that samples, for the cost of a solved problem; an endpoint has prices of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("start", "answers") if getattr(self, name)] + ["endpoint"] * bool(self.endpoint.url)
        if len(given) != 1:
            raise ConfigError(
                f"an evaluation needs one of start, endpoint.url and answers; it has {' and '.join(given) or 'none'}"
            )
        if not self.start and self.thinking_budgets:
            raise ConfigError(f"thinking_budgets need a checkpoint, not {given[0]}; leave them out")
        if any(budget < 0 for budget in self.thinking_budgets):
            raise ConfigError(f"thinking_budgets={list(self.thinking_budgets)} must be 0 or more tokens")
        by_likelihood = [name for name, row in self.tasks.items() if row.method != "sampled"]
        if by_likelihood and not self.start:
            raise ConfigError(
                f"tasks.{by_likelihood[0]}.method={self.tasks[by_likelihood[0]].method!r} needs a checkpoint, not "
                f"{given[0]}; use method='sampled'"
            )


def evaluate_checkpoint(cfg: EvaluateConfig, run: Run) -> None:
    """Evaluate cfg.start, cfg.endpoint or cfg.answers and write the results into run.folder."""
    started = time.perf_counter() - Run.record_of(run.folder).get("seconds", 0.0)  # with what was stopped before
    configs = variants(cfg)
    tasks = make_tasks(cfg.tasks)
    problems = {file: held_out_problems(config) for file, config in configs.items()}
    parts = [(config, problems[file]) for file, config in configs.items()]
    with make_sampler(cfg, run, parts) as sampler, VerifierPool() as pool:
        for file, config in configs.items():
            reward = Reward(RewardConfig(thinking_format=cfg.thinking_format), make_tasks(config.tasks))
            likely = [one for one in problems[file] if tasks[one.task].cfg.method != "sampled"]
            others = [one for one in problems[file] if tasks[one.task].cfg.method == "sampled"]
            records = sampler.choose(likely, tasks) if file == SAMPLED else []
            sampled = sampler.sample(others, reward.tasks, config) if others else []
            records += grade_problems(sampled, reward, pool, sampler.facts)
            if not records:
                continue
            result = replace(
                summarize(records, time.perf_counter() - started, chances(reward.tasks)),
                protocols=protocols(records, reward.tasks, config, sampler.max_model_len),
                sampler=sampler.facts,
            )
            if file == SAMPLED:
                warn_if_no_answer_read(result, cfg.thinking_format)
                grade = partial(grade_problems, reward=reward, pool=pool)
                result = replace(result, forced=sampler.force_close(sampled, cfg.thinking_budgets, grade))
                write_samples(run.folder / SAMPLES, records)
            write_json(run.folder / file, result.to_dict())
        sampler.delete_saved()


def replace_records(folder: Path, records: Sequence[ProblemRecord], **changes: Any) -> None:
    """Write the results of a finished evaluation again, from records with other verdicts and the same completions.

    changes: fields of Evaluation.
    """
    old = read_evaluation(folder, SAMPLED)
    kept = {name: getattr(old, name) for name in ("protocols", "sampler", "forced", "contests")}
    result = replace(summarize(records, old.seconds, old.chance), **kept | changes)
    write_samples(folder / SAMPLES, records)
    write_json(folder / SAMPLED, result.to_dict())


def variants(cfg: EvaluateConfig) -> dict[str, EvaluateConfig]:
    """Return the settings of each evaluation of the stage, by the file of its results."""
    configs = {SAMPLED: cfg}
    if not cfg.greedy or not cfg.start:
        return configs
    greedy = replace(cfg, samples=1, temperature=0.0, top_p=1.0)
    generated = {task.name for task in generated_tasks(make_tasks(cfg.tasks))}
    unseen = {name: replace(row, unseen_wordings=True) for name, row in cfg.tasks.items() if name in generated}
    configs[GREEDY] = greedy
    if unseen:
        configs[UNSEEN] = replace(greedy, tasks=unseen)
    return configs


def make_sampler(cfg: EvaluateConfig, run: Run, parts: Sequence[tuple[EvalConfig, Sequence[Problem]]]) -> Sampler:
    """Return the source of completions that cfg names. parts: settings and problems of each evaluation of the stage."""
    if cfg.answers:
        return AnswersSampler(cfg.answers, cfg.thinking_format)
    if cfg.endpoint.url:
        return EndpointSampler(cfg.endpoint, cfg.thinking_format, run)
    return EngineSampler(cfg, run, parts)


def protocols(
    records: Sequence[ProblemRecord], tasks: Mapping[str, Task], cfg: EvaluateConfig, max_model_len: int
) -> dict[str, TaskProtocol]:
    """Return how each task was evaluated."""
    found = {}
    for name in dict.fromkeys(record.task for record in records):
        task, own = tasks[name], [record for record in records if record.task == name]
        is_sampled = task.cfg.method == "sampled"
        found[name] = TaskProtocol(
            task=name,
            method=task.cfg.method,
            num_problems=len(own),
            num_available=task.problems("test", cfg.seed).size or 0,
            samples=num_samples(task, cfg) if is_sampled else 1,
            temperature=temperature_of(task, cfg) if is_sampled else 0.0,
            top_p=cfg.top_p if is_sampled else 1.0,
            max_tokens=max_tokens_of(task, cfg) if is_sampled else 0,
            thinking_budget=cfg.thinking_budget or None,
            max_model_len=max_model_len,
            prompt=task.cfg.prompt,
            num_shots=task.cfg.num_shots,
            thinking_format=cfg.thinking_format,
            grader=grader_of(own),
            since=task.cfg.since,
            until=task.cfg.until,
            seed=cfg.seed,
        )
    return found


def read_evaluations(folders: Mapping[str, Path], file: str) -> dict[str, Evaluation]:
    """The evaluation in `file` of each stage folder that has this file, by column."""
    return {name: read_evaluation(folder, file) for name, folder in folders.items() if (folder / file).exists()}


def read_evaluation(folder: Path, file: str) -> Evaluation:
    """An evaluation that `evaluate_checkpoint` wrote. Raises ConfigError if it does not exist."""
    if not (folder / file).exists():
        raise ConfigError(f"{folder} has no {file}; run its stage first")
    return Evaluation.from_dict(read_object(folder / file))
