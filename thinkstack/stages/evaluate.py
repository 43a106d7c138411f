"""Measure a checkpoint on held-out problems: sampled, greedy, and in wordings it never saw."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.config import Count, Seed, Share, Temperature
from thinkstack.engine.engine import EngineConfig
from thinkstack.engine.remote import ServersConfig, open_engine
from thinkstack.evals.results import Evaluation, write_samples
from thinkstack.evals.runner import EvalConfig, evaluate, held_out, warn_if_unread
from thinkstack.files import read_object
from thinkstack.log import Run, write_json
from thinkstack.machine import pick_device
from thinkstack.models.precision import AskedPrecision, Quantization
from thinkstack.rl.rollout import encode_prompt
from thinkstack.stages.kept_completions import KeptCompletions
from thinkstack.tasks.reward import RewardConfig, score
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError

SAMPLED, GREEDY, UNSEEN, SAMPLES = "sampled.json", "greedy.json", "unseen_wordings.json", "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured."""

    start: str
    """Checkpoint or earlier stage to measure."""
    tasks: tuple[str, ...] = ("chain", "nested", "cups", "kinship")
    """Task families asked."""
    files: dict[str, str] = field(default_factory=dict)
    """Folders of published data sets asked too, from their test split."""
    languages: tuple[str, ...] = ()
    """Languages of generated questions; empty asks in all of them."""
    num_problems: Count = 200
    """Held-out problems: of the families together, and of each data set."""
    samples: Count = 16
    """Answers drawn to each."""
    form: ThinkingFormat = "think_answer_tags"
    """Where the answer stands: "think_answer_tags" as R1-RLTrainer's, "think_then_answer" as R1's, "flexible_extract"
    in whatever a model writes that was never told of a form (text/parse.py)."""
    temperature: Temperature = 1.0
    """Divides the logits of the sampled answers."""
    top_p: Share = 1.0
    """Keeps the smallest set of tokens with at least this probability, in the sampled answers."""
    greedy: bool = True
    """Ask for the most likely answers too: to the same problems, and to generated ones in wordings never trained on."""
    max_tokens: Count = 128
    """Most tokens of an answer."""
    max_num_seqs: Count = 384
    """Answers drawn at once."""
    dtype: AskedPrecision = "fp32"
    """Precision that answers are drawn in; auto: bf16 where that is faster."""
    weights: Quantization = "plain"
    """How matrices are kept meanwhile: as they are, or packed (int8, fp8, nf4)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; "auto": on CUDA where there is some."""
    servers: ServersConfig = ServersConfig()
    """vLLM servers that draw the answers instead of this process; dtype is then that of the weights they get."""
    seed: Seed = 0
    """Chooses problems and draws."""


def measure(cfg: EvaluateConfig, run: Run) -> None:
    """Write the evaluations of cfg.start into run.folder."""
    chat = load_chat(cfg.start)
    sampled = EvalConfig(
        tasks=cfg.tasks,
        files=cfg.files,
        languages=cfg.languages,
        form=cfg.form,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        num_problems=cfg.num_problems,
        samples=cfg.samples,
        max_tokens=cfg.max_tokens,
        seed=cfg.seed,
    )
    greedy = replace(sampled, samples=1, temperature=0.0, top_p=1.0)
    asked = {SAMPLED: sampled}
    if cfg.greedy:
        asked[GREEDY] = greedy
    if cfg.greedy and cfg.tasks:
        asked[UNSEEN] = replace(greedy, unseen_wordings=True, files={})
    problems = {file: held_out(config) for file, config in asked.items()}
    everything = [problem for found in problems.values() for problem in found]
    longest = max(len(encode_prompt(chat, problem)) for problem in everything)
    context = longest + cfg.max_tokens
    size = EngineConfig(max_num_seqs=cfg.max_num_seqs, max_model_len=context, dtype=cfg.dtype, weights=cfg.weights)
    engine = open_engine(load_model(cfg.start).to(pick_device(cfg.device)), size, cfg.servers)
    kept = KeptCompletions(engine, run, len(everything))
    with kept.progress:
        for file, config in asked.items():
            reward = partial(score, cfg=RewardConfig(form=cfg.form))
            found = evaluate(kept.generate, chat, problems[file], config, reward)
            write_json(run.folder / file, found.to_dict())
            if file == SAMPLED:
                warn_if_unread(found, cfg.form)
                write_samples(run.folder / SAMPLES, found.records)
    kept.drop()


def read_evaluations(out: Path, columns: Mapping[str, str], file: str) -> dict[str, Evaluation]:
    """That evaluation of each stage in `out` that made it, by column."""
    found = {name: Run(out / stage) for name, stage in columns.items() if (out / stage / file).exists()}
    return {name: read_evaluation(run, file) for name, run in found.items()}


def read_evaluation(run: Run, file: str) -> Evaluation:
    """An evaluation that `measure` wrote. Raises ConfigError if it is not there."""
    path = run.folder / file
    if not path.exists():
        raise ConfigError(f"{run.folder} holds no {file}; let its stage run first")
    return Evaluation.from_dict(read_object(path))
