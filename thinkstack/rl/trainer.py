"""R1-RLTrainer: reinforcement learning with group-relative advantages and rule-based rewards alone (R1 paper, section
2.2).

`RLTrainer.step` is the algorithm; everything it calls is called once per step, and none of it calls back.
"""

import copy
import itertools
import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from thinkstack.checkpoint.state import STATE, save_state
from thinkstack.engine.engine import EngineConfig
from thinkstack.engine.remote import open_engine
from thinkstack.evals.results import Evaluation, curve_point
from thinkstack.evals.runner import EvalConfig, evaluate, held_out
from thinkstack.log import CURVE, Run, timed
from thinkstack.models.lora import adapters_off, merged
from thinkstack.models.transformer import Transformer
from thinkstack.rl.advantages import RolloutAdvantages, compute_advantages, usable
from thinkstack.rl.config import RLConfig
from thinkstack.rl.critic import Critic
from thinkstack.rl.groups import by_group, gather_tokens, reward_of, to_batch
from thinkstack.rl.health import describe
from thinkstack.rl.rollout import Counter, RolloutConfig, RolloutStep, ScoreFunction, collect_rollouts
from thinkstack.rl.rollout_log import write_rollouts
from thinkstack.rl.saved_rollouts import drop_saved_rollouts, load_rollouts, save_rollouts
from thinkstack.tasks.mixture import ProblemMixture, make_mixture, one_phase
from thinkstack.tasks.reward import RewardConfig, score
from thinkstack.tasks.table import ProblemStream, puzzle_tasks
from thinkstack.text.chat import ChatFormat
from thinkstack.train.loss import token_weights
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.policy_loss import kl_estimate, policy_loss
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.types import Batch, Interrupted, Rollout, SamplingParams, TrainingError

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_STEPS_WITHOUT_SIGNAL = 5
"""Drawings in a row without anything to learn after which a run gives up."""


class RLTrainer:
    """The parts of a run and the one step that drives them."""

    def __init__(self, cfg: RLConfig, run: Run, model: Transformer, chat: ChatFormat):
        self.cfg, self.run, self.chat = cfg, run, chat
        self.stream = training_problems(cfg)
        self.counter = Counter()
        self.num_rollout_steps = 0
        """Drawings made so far."""
        self.steps_without_signal = 0
        """Of these, how many in a row taught nothing, at the end."""
        self.trainer = Trainer(model, cfg.trainer, cfg.steps, dump_folder=run.folder)
        longest = cfg.max_prompt_tokens or model.cfg.max_positions - cfg.max_tokens
        asked = EngineConfig(
            max_num_seqs=cfg.prompts_per_step * cfg.group_size,
            max_model_len=longest + cfg.max_tokens,
            dtype=cfg.rollout_dtype,
            weights=cfg.rollout_quantization,
            return_routed_experts=cfg.router_replay,
        )
        self.engine = open_engine(model, asked, cfg.servers)
        # adapters are the whole difference between policy and reference: without them no second copy is needed
        needs_copy = cfg.loss.kl and not cfg.trainer.lora.rank
        self.reference = copy.deepcopy(model).requires_grad_(False) if needs_copy else None
        self.reference_step = 0
        """Optimizer steps of the policy that the reference is a copy of."""
        self.critic: Critic | None = None
        if cfg.advantage == "gae":
            self.critic = Critic(merged(model), cfg.critic, cfg.trainer, cfg.steps, cfg.row_tokens, run.folder)
        self.score: ScoreFunction = partial(score, cfg=cfg.reward)
        self.rollout_config = RolloutConfig(
            sampling=SamplingParams(
                temperature=cfg.loss.temperature,
                max_tokens=cfg.max_tokens,
                stop_token_ids=chat.stop_token_ids,
                n=cfg.group_size,
            ),
            seed=cfg.seed,
            prompts_per_step=cfg.prompts_per_step,
            dynamic_sampling=cfg.dynamic_sampling,
            max_rounds=cfg.max_rounds,
            max_prompt_tokens=longest,
        )

    def step(self) -> dict[str, float]:
        """One step of GRPO (cfg.minibatches optimizer steps): ask, score, compare, learn, hand the weights over."""
        cfg = self.cfg
        times: dict[str, float] = {}
        before = self.trainer.step_count
        self.stream.progress = before / cfg.steps
        self.fit_critic()
        with timed(times, "rollout"):
            rollout_step, metrics = self.collect_rollouts()
        with timed(times, "train"):
            self.refresh_reference()
            kept = usable(rollout_step.trainable, cfg)
            advantages = compute_advantages(kept, self.kl_penalties(kept, metrics), cfg, self.critic)
            parts = split_groups(advantages.rollouts, advantages.advantages, cfg.minibatches)
            # all of them before the first update: the old policy is the one that drew the answers
            for batch in [self.add_logprobs(to_batch(*part, cfg.row_tokens, cfg.router_replay)) for part in parts]:
                batch = batch.with_weights(token_weights(batch, cfg.loss.reduction, cfg.max_tokens))
                loss = partial(policy_loss, cfg=cfg.loss)
                metrics |= self.trainer.step(batch, loss, cfg.loss.temperature, with_entropy=True)
            if self.critic is not None:
                metrics |= self.critic.update(split_groups(advantages.rollouts, advantages.targets, cfg.minibatches))
        self.engine.load_weights(self.trainer.weights(), version=self.trainer.step_count)
        self.steps_without_signal = 0 if self.trainer.step_count > before else self.steps_without_signal + 1
        self.log_rollouts(rollout_step, advantages, max(self.trainer.step_count, before + 1))
        tokens = sum(len(rollout.completion.token_ids) for rollout in rollout_step.rollouts)
        return metrics | times | {"rollout/tokens_per_second": tokens / times["time/rollout_seconds"]}

    def collect_rollouts(self) -> tuple[RolloutStep, dict[str, float]]:
        """Ask and score, with statistics; a drawing whose step was cut off is taken from the disk, verdicts and all."""
        with self.interruptible():
            known = load_rollouts(self.run.folder, self.num_rollout_steps, self.stream, self.counter)
            rollout_step = known or collect_rollouts(
                self.engine.generate, self.chat, self.score, self.stream, self.counter, self.rollout_config
            )
        metrics = describe(rollout_step)
        self.check(rollout_step, metrics)
        if known is None and self.cfg.save_steps:
            save_rollouts(self.run.folder, self.num_rollout_steps, rollout_step, self.stream, self.counter, self.chat)
        self.num_rollout_steps += 1
        return rollout_step, metrics

    def fit_critic(self) -> None:
        """Train the critic alone, before the policy's first step, on what the policy as it is earns (lambda = 1)."""
        if self.critic is None:
            return
        for _ in range(self.critic.trainer.step_count, self.cfg.critic.prefit_steps):
            rollout_step, _ = self.collect_rollouts()
            kept = usable(rollout_step.trainable, self.cfg)
            advantages = compute_advantages(kept, self.kl_penalties(kept, {}), self.cfg, self.critic, gae_lambda=1.0)
            if advantages.rollouts:
                metrics = self.critic.update([(advantages.rollouts, advantages.targets)])
                log.info("critic alone: explained variance %.2f", metrics["critic/explained_variance"])

    def kl_penalties(self, rollouts: Sequence[Rollout], metrics: dict[str, float]) -> list[list[float]]:
        """What KL takes off the reward of each token (0 where it is part of the loss); its mean goes to `metrics`."""
        loss = self.cfg.loss
        found = [[0.0] * len(rollout.completion.token_ids) for rollout in rollouts]
        scored = [place for place, rollout in enumerate(rollouts) if reward_of(rollout) is not None]
        if not loss.kl or loss.kl_placement == "loss" or not scored:
            return found
        answers = [rollouts[place] for place in scored]
        batch = to_batch(answers, [0.0] * len(scored), self.cfg.row_tokens, self.cfg.router_replay)
        policy, reference = self.logprobs(self.trainer.workers.running, batch), self.reference_logprobs(batch)
        kl = kl_estimate(policy, reference, loss.kl_estimator)
        metrics["policy/kl_nats"] = float((kl * batch.loss_mask).sum() / batch.loss_mask.sum())
        for place, lost in zip(scored, gather_tokens(loss.kl * kl, batch), strict=True):
            found[place] = lost
        return found

    def check(self, rollout_step: RolloutStep, metrics: dict[str, float]) -> None:
        """Refuse a step whose answers came from other weights or could not be judged."""
        versions = {rollout.completion.weights_version for rollout in rollout_step.rollouts}
        assert versions <= {self.trainer.step_count}, f"answers of weights {versions} in step {self.trainer.step_count}"
        if metrics.get("rollout/unscorable", 0.0) > self.cfg.unscorable_limit:
            reasons = {r.score.unscorable for r in rollout_step.rollouts if r.score and r.score.unscorable}
            raise TrainingError(
                f"{metrics['rollout/unscorable']:.0%} of the answers of step {self.trainer.step_count} could not "
                f"be scored (limit {self.cfg.unscorable_limit:.0%}): {'; '.join(sorted(reasons)[:3])}; "
                "repair the checker, then resume"
            )

    def logprobs(self, model: Transformer, batch: Batch) -> Tensor:
        """Of all trained tokens under `model`, at the temperature they were drawn at."""
        return batch_logprobs(model, batch, self.cfg.loss.temperature, self.cfg.trainer.micro_batch_tokens)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """`logprobs` of the reference, which routes itself: a copy, or the policy without its adapters."""
        batch = replace(batch, experts=None)
        if self.reference is not None:
            return self.logprobs(self.reference, batch)
        with adapters_off(self.trainer.workers.running) as start:
            return self.logprobs(start, batch)

    def refresh_reference(self) -> None:
        """Replace the reference by the policy whenever another reference_steps optimizer steps are done."""
        done, every = self.trainer.step_count, self.cfg.reference_steps
        if self.reference is not None and done // every > self.reference_step // every:
            self.reference.load_state_dict(self.trainer.model.state_dict())
            self.reference_step = done
            log.info("step %d: the reference is now the policy", done)

    def add_logprobs(self, batch: Batch) -> Batch:
        """Log-probabilities under the policy before the step, and under the reference, where the loss asks for them."""
        if self.cfg.minibatches > 1:
            batch = replace(batch, old_logprobs=self.logprobs(self.trainer.workers.running, batch))
        if self.cfg.loss.kl and self.cfg.loss.kl_placement == "loss":
            batch = replace(batch, reference_logprobs=self.reference_logprobs(batch))
        return batch

    def log_rollouts(self, rollout_step: RolloutStep, advantages: RolloutAdvantages, step: int) -> None:
        """Write the answers of `step` to disk; of advantages by token their mean.

        Those of a drawing that taught nothing stay until one teaches.
        """
        if self.cfg.rollout_steps and step % self.cfg.rollout_steps == 0:
            known = {
                id(rollout): value if isinstance(value, float) else statistics.fmean(value)
                for rollout, value in zip(advantages.rollouts, advantages.advantages, strict=True)
            }
            write_rollouts(self.run.folder, step, rollout_step.rollouts, known, self.chat)

    def evaluate(self) -> None:
        """Evaluate on the way and keep the point of the curve."""
        cfg = EvalConfig(
            num_problems=self.cfg.eval_problems,
            samples=self.cfg.eval_samples,
            max_tokens=self.cfg.max_tokens,
            tasks=self.cfg.tasks,
            files=self.cfg.files,
            languages=self.cfg.languages,
        )
        with self.interruptible():
            found = evaluate(self.engine.generate, self.chat, held_out(cfg), cfg, partial(score, cfg=RewardConfig()))
        self.run.append(CURVE, curve_point(self.trainer.step_count, found, _only(found, self.cfg)))

    def should_evaluate(self) -> bool:
        """Whether an evaluation on the way is due: at the start, and once for each eval_steps."""
        every, points = self.cfg.eval_steps, self.run.rows(CURVE)
        return bool(every) and (not points or self.trainer.step_count // every > points[-1]["step"] // every)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this block a request to stop does not wait; the state saved is that before it."""
        stream, group = self.stream.state(), self.counter.value
        try:
            with self.run.stop.may_interrupt():
                yield
        except Interrupted:
            self.stream.restore(stream)
            self.counter.value = group
            self.save()
            raise

    def save(self) -> None:
        """Write everything that a resumed run needs."""
        tensors, numbers = trainer_state(self.trainer)
        if self.reference is not None:
            tensors |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        numbers |= {
            "stream": self.stream.state(),
            "next_group": self.counter.value,
            "reference_step": self.reference_step,
            "drawings": self.num_rollout_steps,
            "fruitless": self.steps_without_signal,
            "rows": self.run.mark(),
        }
        if self.critic is not None:
            more_tensors, more_numbers = self.critic.state()
            tensors, numbers = tensors | more_tensors, numbers | more_numbers
        save_state(self.run.folder / STATE, tensors, numbers)
        drop_saved_rollouts(self.run.folder, before=self.num_rollout_steps)

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from what `save` wrote."""
        restore_trainer(self.trainer, tensors, numbers)
        self.stream.restore(numbers["stream"])
        self.counter.value, self.reference_step = numbers["next_group"], numbers["reference_step"]
        self.num_rollout_steps, self.steps_without_signal = numbers["drawings"], numbers["fruitless"]
        if self.critic is not None:
            self.critic.restore(tensors, numbers)
        if self.reference is not None:
            prefix = "reference."
            kept = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            self.reference.load_state_dict(kept, strict=False)
        self.engine.load_weights(self.trainer.weights(), version=self.trainer.step_count)


def training_problems(cfg: RLConfig) -> ProblemMixture:
    """What a run asks: its phases, or all its families but for the held-out levels."""
    if cfg.phases:
        return make_mixture(cfg.phases, cfg.files, cfg.seed, cfg.languages)
    suite = puzzle_tasks(cfg.tasks)
    levels = sorted({level for family in suite for level in family.levels} - set(cfg.held_out_levels))
    return one_phase(ProblemStream(suite, "train", cfg.seed, levels, languages=cfg.languages))


def split_groups(rollouts: Sequence[Rollout], values: Sequence[T], parts: int) -> list[tuple[list[Rollout], list[T]]]:
    """Cut into at most `parts` pieces of whole groups, as even as possible, each answer with its value; nothing to
    train on gives no piece."""
    value_of = {id(rollout): value for rollout, value in zip(rollouts, values, strict=True)}
    groups = by_group(rollouts)
    pieces = [list(itertools.chain(*groups[part::parts])) for part in range(parts)]
    return [(piece, [value_of[id(rollout)] for rollout in piece]) for piece in pieces if piece]


def _only(found: Evaluation, cfg: RLConfig) -> Any:
    """The figures of the first level that training never asks, or None."""
    return next((found.by_level[level] for level in cfg.held_out_levels if level in found.by_level), None)
