"""Evaluate a checkpoint on held-out problems: with sampling, greedily, and on unseen wordings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.config import Count, ModelInput, Seed, Share, Temperature
from thinkstack.engine.engine import EngineConfig
from thinkstack.engine.remote import ServersConfig, open_engine
from thinkstack.evals.results import Evaluation, write_samples
from thinkstack.evals.runner import EvalConfig, evaluate, held_out_problems, warn_if_no_answer_read
from thinkstack.files import read_object
from thinkstack.log import Run, write_json
from thinkstack.machine import pick_device
from thinkstack.models.precision import Quantization, RequestedPrecision
from thinkstack.rl.rollout import encode_prompt
from thinkstack.stages.saved_completions import SavedCompletions
from thinkstack.tasks.reward import RewardConfig, score
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError

SAMPLED, GREEDY, UNSEEN, SAMPLES = "sampled.json", "greedy.json", "unseen_wordings.json", "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation stage."""

    start: ModelInput
    """Checkpoint, or the stage that writes it, to evaluate."""
    tasks: tuple[str, ...] = ("chain", "nested", "cups", "kinship")
    """Generated tasks to evaluate on."""
    files: dict[str, str] = field(default_factory=dict)
    """Published data sets to evaluate on, with the folder of each; the test split is used."""
    languages: tuple[str, ...] = ()
    """Languages of generated questions; empty: all languages."""
    num_problems: Count = 200
    """Number of held-out problems: in total for the generated tasks, and for each data set."""
    samples: Count = 16
    """Number of completions sampled per problem."""
    thinking_format: ThinkingFormat = "think_answer_tags"
    """Format of thinking and final answer: "think_answer_tags" of R1-Zero, "think_then_answer" of R1, or
    "flexible_extract" for models that were not trained on a format (text/parse.py)."""
    temperature: Temperature = 1.0
    """Temperature of the sampled completions."""
    top_p: Share = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with at least this total probability; 1 is off."""
    greedy: bool = True
    """Also evaluate greedy decoding, on the same problems and on generated problems in wordings excluded from
    training."""
    max_tokens: Count = 128
    """Maximum number of tokens of a completion."""
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
    seed: Seed = 0
    """Seed of the problems and of sampling."""


def evaluate_checkpoint(cfg: EvaluateConfig, run: Run) -> None:
    """Evaluate cfg.start and write the results into run.folder."""
    chat = load_chat(cfg.start)
    sampled = EvalConfig(
        tasks=cfg.tasks,
        files=cfg.files,
        languages=cfg.languages,
        thinking_format=cfg.thinking_format,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        num_problems=cfg.num_problems,
        samples=cfg.samples,
        max_tokens=cfg.max_tokens,
        seed=cfg.seed,
    )
    greedy = replace(sampled, samples=1, temperature=0.0, top_p=1.0)
    configs = {SAMPLED: sampled}
    if cfg.greedy:
        configs[GREEDY] = greedy
    if cfg.greedy and cfg.tasks:
        configs[UNSEEN] = replace(greedy, unseen_wordings=True, files={})
    problems = {file: held_out_problems(config) for file, config in configs.items()}
    all_problems = [problem for chosen in problems.values() for problem in chosen]
    max_model_len = max(len(encode_prompt(chat, problem)) for problem in all_problems) + cfg.max_tokens
    size = EngineConfig(
        max_num_seqs=cfg.max_num_seqs, max_model_len=max_model_len, dtype=cfg.dtype, quantization=cfg.quantization
    )
    engine = open_engine(load_model(cfg.start).to(pick_device(cfg.device)), size, cfg.servers)
    saved = SavedCompletions(engine, run, len(all_problems))
    with saved.progress:
        for file, config in configs.items():
            reward = partial(score, cfg=RewardConfig(thinking_format=cfg.thinking_format))
            result = evaluate(saved.generate, chat, problems[file], config, reward)
            write_json(run.folder / file, result.to_dict())
            if file == SAMPLED:
                warn_if_no_answer_read(result, cfg.thinking_format)
                write_samples(run.folder / SAMPLES, result.records)
    saved.delete()


def read_evaluations(folders: Mapping[str, Path], file: str) -> dict[str, Evaluation]:
    """The evaluation in `file` of each stage folder that has this file, by column."""
    return {name: read_evaluation(folder, file) for name, folder in folders.items() if (folder / file).exists()}


def read_evaluation(folder: Path, file: str) -> Evaluation:
    """An evaluation that `evaluate_checkpoint` wrote. Raises ConfigError if it does not exist."""
    if not (folder / file).exists():
        raise ConfigError(f"{folder} has no {file}; run its stage first")
    return Evaluation.from_dict(read_object(folder / file))
