"""The reinforcement learning stage: train a checkpoint; a run resumes from the last saved step."""

import logging
from collections.abc import Sequence

from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.peft.adapter import save_adapter
from thinkstack.checkpoint.state import ADAPTER, MODEL, STATE, load_state
from thinkstack.log import Progress, Run
from thinkstack.models.lora import merge_adapters
from thinkstack.rl.config import RLConfig
from thinkstack.rl.health import early_warnings, health_line
from thinkstack.rl.trainer import MAX_STEPS_WITHOUT_SIGNAL, RLTrainer
from thinkstack.types import Interrupted, TrainingError

log = logging.getLogger(__name__)


def train_rl(cfg: RLConfig, run: Run) -> None:
    """Train cfg.start and write run.folder/model; resumes from run.folder/state if it exists."""
    model, chat = load_model(cfg.start), load_chat(cfg.start)
    rl = RLTrainer(cfg, run, model, chat, load_model(cfg.reference) if cfg.reference else None)
    state = load_state(run.folder / STATE)
    if state is not None:
        rl.restore(*state)
    run.rewind(state[1]["rows"] if state else {})
    if rl.should_evaluate():
        rl.evaluate()
    active: set[str] = set()
    history = run.rows()
    with Progress("reinforcement learning", cfg.steps, rl.trainer.step_count) as progress:
        while rl.trainer.step_count < cfg.steps:
            before = rl.trainer.step_count
            metrics = rl.step()
            step = rl.trainer.step_count
            if rl.steps_without_signal >= MAX_STEPS_WITHOUT_SIGNAL:
                raise TrainingError(
                    f"{rl.steps_without_signal} consecutive rollout steps at step {step} had only zero-variance "
                    "groups: the problems are too hard or too easy for this model, or the reward is wrong; check "
                    f"{run.folder}/metrics.jsonl"
                )
            run.log(step, metrics)
            progress.advance(step - before, health_line(metrics))
            history.append(metrics)
            active = warn(history, active)
            if rl.should_evaluate():
                rl.evaluate()
            if (cfg.save_steps and step // cfg.save_steps > before // cfg.save_steps) or run.stop.is_requested:
                rl.save()
            if run.stop.is_requested:
                raise Interrupted
    rl.pool.close()
    if cfg.trainer.lora.rank:
        save_adapter(run.folder / ADAPTER, model, cfg.trainer.lora, cfg.start)
    save_model(run.folder / MODEL, merge_adapters(model), chat.tokenizer, chat, like=cfg.start)


def warn(history: Sequence[dict[str, float]], active: set[str]) -> set[str]:
    """Log early warnings that are not in `active`; returns the names of all warnings that apply now."""
    warnings = early_warnings(history)
    for name in warnings.keys() - active:
        log.warning("%s: %s", name, warnings[name])
    return set(warnings)
