"""R1-Zero: reinforcement learning with group-relative advantages and rule-based rewards alone (R1 paper, section 2.2).

`Zero.step` is the algorithm; everything it calls is called once per step, and none of it calls back.
"""

import copy
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.state import load_state, save_state
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.evals.figures import Evaluation, curve_point
from thinkstack.evals.runner import EvalConfig, evaluate, held_out
from thinkstack.log import Progress, Run, timed
from thinkstack.models.transformer import Transformer
from thinkstack.stages.groups import AdvantageKind, advantages_of, by_group, to_batch
from thinkstack.stages.health import describe, early_warnings, health_line
from thinkstack.stages.pretrain import MODEL, STATE
from thinkstack.stages.rollout import Asking, Counter, Round, ScoreFunction, roll_out
from thinkstack.stages.rollout_log import write_rollouts
from thinkstack.stages.talk import keep_limit
from thinkstack.tasks.reward import RewardConfig, score
from thinkstack.tasks.table import ProblemStream, families
from thinkstack.text.chat import ChatFormat
from thinkstack.train.loss import token_weights
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer, TrainerConfig, batch_log_probs
from thinkstack.types import Batch, ConfigError, Interrupted, Rollout, Sampling, TrainingError

log = logging.getLogger(__name__)

CURVE_FILE = "curve.jsonl"
FRUITLESS_DRAWINGS = 5
"""Drawings in a row without anything to learn after which a run gives up."""
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "group_size": 16,
        "prompts_per_step": 32,
        "advantage": "standardised",
        "loss": {
            "reduction": "sequence",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "kl": 0.001,
            "kl_estimator": "k3",
            "importance_cap": 0.0,
        },
        "reward": {"combine": "additive"},
        "dynamic_sampling": False,
        "reference_steps": 400,
    },
}
"""Settings a preset lays under the user's own. "paper": R1 paper, section 2.2.1 and supplement 2.4; it leaves the
clip of R1-Zero open, 0.2 is PPO's."""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """One run of group-relative policy optimisation."""

    start: str
    """Checkpoint or earlier stage to start from."""
    preset: Literal["default", "paper"] = "default"
    """What was laid under these settings; see PRESETS."""
    families: tuple[str, ...] = ("chain", "nested", "cups", "kinship")
    """Task families to learn from."""
    held_out_levels: tuple[int, ...] = ()
    """Difficulties never asked in training."""
    steps: int = 100
    """Optimizer steps."""
    prompts_per_step: int = 24
    """Groups a step is made of."""
    group_size: int = 16
    """Answers drawn to each prompt (G)."""
    minibatches: int = 1
    """Optimizer steps the groups of one drawing are split into; from the second on the clipped ratio differs from 1."""
    max_tokens: int = 128
    """Most tokens of an answer; longer ones are cut off, earn what their text earns (mostly nothing) and are kept."""
    top_p: float = 1.0
    """Must be 1: tokens outside a nucleus would have probability 0 in the engine and more in the trainer."""
    advantage: AdvantageKind = "centred"
    """How rewards of a group are compared; see stages/groups.py."""
    reward: RewardConfig = RewardConfig()
    """How answers are judged."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """The policy loss; its temperature is also that of the rollouts."""
    trainer: TrainerConfig = TrainerConfig(bias_speed=0.0, balance_weight=0.0, mtp_detached=True)
    """Precision and optimizer. The balance bias is frozen: the same weights must mean the same policy all step long."""
    row_tokens: int = 256
    """Tokens of a packed row."""
    dynamic_sampling: bool = True
    """Replace groups whose answers all earned the same."""
    max_rounds: int = 3
    """Most rounds of drawing in a step."""
    unscorable_limit: float = 0.1
    """Share of unscorable answers of a step above which the run fails: then the checker is broken, not the model."""
    reference_steps: int = 400
    """Steps after which the reference is replaced by the policy; only with a KL term."""
    rollout_steps: int = 1
    """Every so many steps the answers are kept on disk; 0 keeps none."""
    way_steps: int = 10
    """Steps between two evaluations on the way; 0 makes none."""
    way_problems: int = 48
    """Held-out problems of an evaluation on the way."""
    way_samples: int = 16
    """Answers drawn to each of them."""
    save_steps: int = 20
    """Steps between two states to resume from; 0 keeps none."""
    seed: int = 0
    """Fixes problems and draws."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "group_size", "minibatches", "max_tokens", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        families(self.families)
        if self.top_p != 1:
            raise ConfigError(
                f"top_p={self.top_p}: training rollouts must draw from the whole distribution, or the engine's "
                "probabilities are not the trainer's; use top_p=1 (evaluation and chat may use less)"
            )
        if self.group_size == 1:
            log.warning("group_size=1 compares an answer with nothing: every advantage is 0 and nothing is learnt")
        if self.minibatches > self.prompts_per_step:
            raise ConfigError(f"minibatches={self.minibatches} exceed prompts_per_step={self.prompts_per_step}")


class Zero:
    """The parts of a run and the one step that drives them."""

    def __init__(self, cfg: GrpoConfig, run: Run, model: Transformer, chat: ChatFormat):
        self.cfg, self.run, self.chat = cfg, run, chat
        suite = families(cfg.families)
        levels = sorted({level for family in suite for level in family.levels} - set(cfg.held_out_levels))
        self.stream = ProblemStream(suite, "train", cfg.seed, levels)
        self.counter = Counter()
        self.trainer = Trainer(model, cfg.trainer, cfg.steps, dump_folder=run.folder)
        self.engine = Engine(model, EngineConfig(max_batch=cfg.prompts_per_step * cfg.group_size))
        self.reference = copy.deepcopy(model).requires_grad_(False) if cfg.loss.kl else None
        self.score: ScoreFunction = partial(score, cfg=cfg.reward)
        self.ask = Asking(
            sampling=Sampling(
                temperature=cfg.loss.temperature, max_tokens=cfg.max_tokens, stop_ids=chat.stop_ids, n=cfg.group_size
            ),
            seed=cfg.seed,
            prompts=cfg.prompts_per_step,
            refill=cfg.dynamic_sampling,
            max_rounds=cfg.max_rounds,
            max_prompt_tokens=model.cfg.max_positions - cfg.max_tokens,
        )

    def step(self) -> dict[str, float]:
        """One step of GRPO (cfg.minibatches optimizer steps): ask, score, compare, learn, hand the weights over."""
        cfg = self.cfg
        times: dict[str, float] = {}
        with timed(times, "rollout"):
            drawn = roll_out(self.engine.generate, self.chat, self.score, self.stream, self.counter, self.ask)
        metrics = describe(drawn)
        self.check(drawn, metrics)
        advantages = advantages_of(drawn.kept, cfg.advantage)
        with timed(times, "train"):
            parts = split_groups(drawn.kept, advantages, cfg.minibatches)
            # all of them before the first update: the old policy is the one that drew the answers
            for batch in [self.add_log_probs(to_batch(*part, cfg.row_tokens)) for part in parts]:
                batch = batch.with_weights(token_weights(batch, cfg.loss.reduction, cfg.max_tokens))
                loss = partial(policy_loss, cfg=cfg.loss)
                metrics |= self.trainer.step(batch, loss, cfg.loss.temperature, with_entropy=True)
        self.engine.load_weights(self.trainer.weights(), version=self.trainer.step_count)
        self.keep(drawn, advantages)
        tokens = sum(len(rollout.completion.token_ids) for rollout in drawn.drawn)
        return metrics | times | {"rollout/tokens_per_second": tokens / times["time/rollout_seconds"]}

    def check(self, drawn: Round, metrics: dict[str, float]) -> None:
        """Refuse a step whose answers came from other weights or could not be judged."""
        versions = {rollout.completion.weights_version for rollout in drawn.drawn}
        assert versions <= {self.trainer.step_count}, f"answers of weights {versions} in step {self.trainer.step_count}"
        if metrics.get("rollout/unscorable", 0.0) > self.cfg.unscorable_limit:
            reasons = {r.score.unscorable for r in drawn.drawn if r.score and r.score.unscorable}
            raise TrainingError(
                f"{metrics['rollout/unscorable']:.0%} of the answers of step {self.trainer.step_count} could not "
                f"be scored (limit {self.cfg.unscorable_limit:.0%}): {'; '.join(sorted(reasons)[:3])}; "
                "repair the checker, then resume"
            )

    def add_log_probs(self, batch: Batch) -> Batch:
        """Log-probabilities under the policy before the step, and under the reference, where the loss asks for them."""
        loss, micro = self.cfg.loss, self.cfg.trainer.micro_tokens
        if self.cfg.minibatches > 1:
            old = batch_log_probs(self.trainer.workers[0], batch, loss.temperature, micro)
            batch = replace(batch, old_log_probs=old)
        if self.reference is not None:
            if self.trainer.step_count and self.trainer.step_count % self.cfg.reference_steps == 0:
                self.reference.load_state_dict(self.trainer.model.state_dict())
                log.info("step %d: the reference is now the policy", self.trainer.step_count)
            reference = batch_log_probs(self.reference, batch, loss.temperature, micro)
            batch = replace(batch, reference_log_probs=reference)
        return batch

    def keep(self, drawn: Round, advantages: Sequence[float]) -> None:
        """Write the answers of this step to disk."""
        if self.cfg.rollout_steps and self.trainer.step_count % self.cfg.rollout_steps == 0:
            known = {id(rollout): value for rollout, value in zip(drawn.kept, advantages, strict=True)}
            write_rollouts(self.run.folder, self.trainer.step_count, drawn.drawn, known, self.chat)

    def look(self) -> None:
        """Evaluate on the way and keep the point of the curve."""
        cfg = EvalConfig(
            num_problems=self.cfg.way_problems,
            samples=self.cfg.way_samples,
            max_tokens=self.cfg.max_tokens,
            families=self.cfg.families,
        )
        found = evaluate(self.engine.generate, self.chat, held_out(cfg), cfg, partial(score, cfg=RewardConfig()))
        self.run.log(
            self.trainer.step_count, curve_point(self.trainer.step_count, found, _only(found, self.cfg)), CURVE_FILE
        )

    def save(self) -> None:
        """Write everything that a resumed run needs."""
        tensors, numbers = trainer_state(self.trainer)
        if self.reference is not None:
            tensors |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        numbers |= {"stream": self.stream.state(), "next_group": self.counter.value}
        save_state(self.run.folder / STATE, tensors, numbers)

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from what `save` wrote."""
        restore_trainer(self.trainer, tensors, numbers)
        self.stream.restore(numbers["stream"])
        self.counter.value = numbers["next_group"]
        if self.reference is not None:
            prefix = "reference."
            kept = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            self.reference.load_state_dict(kept, strict=False)
        self.engine.load_weights(self.trainer.weights(), version=self.trainer.step_count)


def split_groups(
    rollouts: Sequence[Rollout], advantages: Sequence[float], parts: int
) -> list[tuple[list[Rollout], list[float]]]:
    """Cut into at most `parts` pieces of whole groups, as even as possible; nothing to train on gives no piece."""
    value_of = {id(rollout): value for rollout, value in zip(rollouts, advantages, strict=True)}
    groups = by_group(rollouts)
    pieces = [list(itertools.chain(*groups[part::parts])) for part in range(parts)]
    return [(piece, [value_of[id(rollout)] for rollout in piece]) for piece in pieces if piece]


def _only(found: Evaluation, cfg: GrpoConfig) -> Any:
    """The figures of the first level that training never asks, or None."""
    return next((found.by_level[level] for level in cfg.held_out_levels if level in found.by_level), None)


def grpo(cfg: GrpoConfig, run: Run) -> None:
    """Train cfg.start and write run.folder/model; resumes from run.folder/state where that exists."""
    model, chat = load_model(cfg.start), load_chat(cfg.start)
    zero = Zero(cfg, run, model, chat)
    state = load_state(run.folder / STATE)
    if state is not None:
        zero.restore(*state)
    run.rewind(zero.trainer.step_count)
    run.rewind(zero.trainer.step_count, CURVE_FILE)
    if zero.trainer.step_count == 0 and cfg.way_steps:
        zero.look()
    warned: set[str] = set()
    history = run.rows()
    fruitless = 0
    with Progress("reinforcement learning", cfg.steps, zero.trainer.step_count) as progress:
        while zero.trainer.step_count < cfg.steps:
            before = zero.trainer.step_count
            metrics = zero.step()
            done = zero.trainer.step_count
            fruitless = 0 if done > before else fruitless + 1
            if fruitless >= FRUITLESS_DRAWINGS:
                raise TrainingError(
                    f"{fruitless} drawings in a row at step {done} had no group with answers of different reward: the "
                    "problems are too hard or too easy for this model, or the reward is wrong; look at "
                    f"{run.folder}/metrics.jsonl"
                )
            run.log(done, metrics)
            progress.advance(done - before, health_line(metrics))
            history.append(metrics)
            warned = warn(history, warned)
            if cfg.way_steps and done // cfg.way_steps > before // cfg.way_steps:
                zero.look()
            if (cfg.save_steps and done // cfg.save_steps > before // cfg.save_steps) or run.is_stopping():
                zero.save()
            if run.is_stopping():
                raise Interrupted
    save_model(run.folder / MODEL, model, chat.tokenizer, chat.name)
    keep_limit(run.folder / MODEL, model, chat, families(cfg.families))


def warn(history: Sequence[dict[str, float]], known: set[str]) -> set[str]:
    """Log early warnings that were not there a step ago; returns those that are there now."""
    found = early_warnings(history)
    for name in found.keys() - known:
        log.warning("%s: %s", name, found[name])
    return set(found)
