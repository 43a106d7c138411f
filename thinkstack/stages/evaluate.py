"""Evaluate a checkpoint on held-out problems: with sampling, greedily, and on unseen wordings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.config import Count, ModelInput
from thinkstack.engine.engine import EngineConfig
from thinkstack.engine.remote import ServersConfig, open_engine
from thinkstack.evals.results import Evaluation, write_samples
from thinkstack.evals.runner import EvalConfig, evaluate, held_out_problems, warn_if_no_answer_read
from thinkstack.files import read_object
from thinkstack.kernels.precision import RequestedPrecision
from thinkstack.log import Run, write_json
from thinkstack.machine import pick_device
from thinkstack.models.precision import Quantization
from thinkstack.stages.saved_completions import SavedCompletions
from thinkstack.tasks.reward import Reward, RewardConfig
from thinkstack.tasks.table import generated_tasks, make_tasks
from thinkstack.tasks.task import encode_prompt
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError

SAMPLED, GREEDY, UNSEEN, SAMPLES = "sampled.json", "greedy.json", "unseen_wordings.json", "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvalConfig):
    """Settings of an evaluation stage; those of `EvalConfig` apply to the sampled completions."""

    start: ModelInput
    """Checkpoint, or the stage that writes it, to evaluate."""
    thinking_format: ThinkingFormat = "think_answer_tags"
    """Format of thinking and final answer: "think_answer_tags" of R1-Zero, "think_then_answer" of R1, or
    "flexible_extract" for models that were not trained on a format, or "last_number" (text/parse.py)."""
    greedy: bool = True
    """Also evaluate greedy decoding, on the same problems and on generated problems in wordings excluded from
    training."""
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


def evaluate_checkpoint(cfg: EvaluateConfig, run: Run) -> None:
    """Evaluate cfg.start and write the results into run.folder."""
    chat = load_chat(cfg.start)
    greedy = replace(cfg, samples=1, temperature=0.0, top_p=1.0)
    generated = {task.name for task in generated_tasks(make_tasks(cfg.tasks))}
    unseen = {name: replace(row, unseen_wordings=True) for name, row in cfg.tasks.items() if name in generated}
    configs = {SAMPLED: cfg}
    if cfg.greedy:
        configs[GREEDY] = greedy
    if cfg.greedy and unseen:
        configs[UNSEEN] = replace(greedy, tasks=unseen)
    reward_config = RewardConfig(thinking_format=cfg.thinking_format)
    rewards = {file: Reward(reward_config, make_tasks(config.tasks)) for file, config in configs.items()}
    problems = {file: held_out_problems(config) for file, config in configs.items()}
    tasks = rewards[SAMPLED].tasks
    prompts = [encode_prompt(chat, tasks[one.task], one) for part in problems.values() for one in part]
    size = EngineConfig(
        max_num_seqs=cfg.max_num_seqs,
        max_model_len=max(map(len, prompts)) + cfg.max_tokens,
        dtype=cfg.dtype,
        quantization=cfg.quantization,
    )
    engine = open_engine(load_model(cfg.start).to(pick_device(cfg.device)), size, cfg.servers)
    saved = SavedCompletions(engine, run, len(prompts))
    with saved.progress, VerifierPool() as pool:
        for file, config in configs.items():
            result = evaluate(saved.generate, chat, problems[file], config, rewards[file], pool)
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
