"""RL with group-relative advantages and rule-based rewards, as in R1-Zero (R1 paper, section 2.2), and variants.

`RLTrainer.step` is the algorithm; it calls each part once per step.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from thinkstack.checkpoint.state import STATE, save_state
from thinkstack.engine.engine import EngineConfig
from thinkstack.engine.remote import open_engine
from thinkstack.evals.results import Evaluation, curve_point
from thinkstack.evals.runner import evaluate, held_out_problems
from thinkstack.evals.sampling import EvalConfig
from thinkstack.log import CURVE, Run, timed
from thinkstack.models.lora import adapters_off, merge_adapters
from thinkstack.models.transformer import Transformer
from thinkstack.rl.advantages import with_advantages
from thinkstack.rl.batches import mean_advantages, minibatches
from thinkstack.rl.config import RLConfig
from thinkstack.rl.critic import Critic
from thinkstack.rl.health import rollout_metrics
from thinkstack.rl.rollout import GroupIds, collect_rollouts
from thinkstack.rl.rollout_log import write_rollouts
from thinkstack.rl.saved_rollouts import delete_saved_rollouts, load_rollouts, save_rollouts
from thinkstack.tasks.mixture import make_mixture
from thinkstack.tasks.reward import Reward
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.chat import ChatFormat
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.policy_loss import kl_estimate, policy_loss
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.types import Batch, Interrupted, Rollout, TrainingError

log = logging.getLogger(__name__)

MAX_STEPS_WITHOUT_SIGNAL = 5
"""Number of consecutive rollout steps without an optimizer step after which a run fails."""


class RLTrainer:
    """Policy, engine, reference model and critic of a run, and the training step."""

    def __init__(
        self, cfg: RLConfig, run: Run, model: Transformer, chat: ChatFormat, reference: Transformer | None = None
    ):
        """reference: the reference model of the KL term; None: `model` as it is now."""
        self.cfg, self.run, self.chat = cfg, run, chat
        self.stream = make_mixture(cfg.tasks, cfg.phases, cfg.seed, cfg.held_out_levels)
        self.reward, self.pool = Reward(cfg.reward, make_tasks(cfg.tasks)), VerifierPool()
        self.group_ids = GroupIds()
        self.num_rollout_steps = 0
        """Number of completed rollout steps, including the steps that trained only the critic."""
        self.steps_without_signal = 0
        """Number of most recent consecutive rollout steps without an optimizer step."""
        self.trainer = Trainer(model, cfg.trainer, cfg.steps, dump_folder=run.folder)
        max_prompt_tokens = cfg.max_prompt_tokens or model.cfg.max_positions - cfg.max_tokens
        engine_config = EngineConfig(
            max_num_seqs=cfg.prompts_per_step * cfg.group_size,
            max_model_len=max_prompt_tokens + cfg.max_tokens,
            dtype=cfg.rollout_dtype,
            quantization=cfg.rollout_quantization,
            return_routed_experts=cfg.router_replay,
        )
        self.engine = open_engine(model, engine_config, cfg.servers)
        if reference is None and cfg.loss.kl and not cfg.trainer.lora.rank:
            reference = copy.deepcopy(model)
        self.reference = None if reference is None else reference.requires_grad_(False)
        """None without a KL term, and with adapters if the reference model is the policy without its adapters."""
        self.reference_step = 0
        """Optimizer step of the policy that the reference model is a copy of."""
        self.critic: Critic | None = None
        if cfg.advantage == "gae":
            self.critic = Critic(merge_adapters(model), cfg.critic, cfg.trainer, cfg.steps, run.folder)

    def step(self) -> dict[str, float]:
        """One RL step: rollouts, advantages, cfg.minibatches optimizer steps, new weights for the engine."""
        cfg, before, times = self.cfg, self.trainer.step_count, dict[str, float]()
        self.prefit_critic()
        with timed(times, "rollout"):
            rollouts, metrics = self.collect_rollouts()
        with timed(times, "train"):
            self.update_reference()
            # all before the first update: the old policy is the policy that sampled the rollouts
            batches = [self.with_logprobs(batch) for batch in minibatches(rollouts, cfg)]
            batches = with_advantages(batches, rollouts, cfg)
            for batch in batches:
                loss = partial(policy_loss, cfg=cfg.loss)
                metrics |= self.trainer.step(batch, loss, cfg.loss.temperature, with_entropy=True)
                metrics |= self.critic.update(batch) if self.critic is not None else {}
        self.engine.load_weights(self.trainer.weights(), version=self.trainer.step_count)
        self.steps_without_signal = 0 if self.trainer.step_count > before else self.steps_without_signal + 1
        self.log_rollouts(rollouts, batches, max(self.trainer.step_count, before + 1))
        return metrics | batch_metrics(batches) | times | token_rate(rollouts, times)

    def collect_rollouts(self) -> tuple[list[Rollout], dict[str, float]]:
        """Sample and score the rollouts of a step, with metrics; reuses saved rollouts of an interrupted step."""
        self.stream.progress = self.trainer.step_count / self.cfg.steps
        with self.interruptible():
            saved = load_rollouts(self.run.folder, self.num_rollout_steps, self.stream, self.group_ids)
            rollout_step = saved or collect_rollouts(
                *(self.engine, self.chat, self.reward, self.pool, self.stream, self.group_ids), self.cfg
            )
        metrics = rollout_metrics(rollout_step)
        self.check_rollouts(rollout_step.rollouts, metrics)
        if saved is None and self.cfg.save_steps:
            save_rollouts(self.run.folder, self.num_rollout_steps, rollout_step, self.stream, self.group_ids, self.chat)
        self.num_rollout_steps += 1
        return rollout_step.rollouts, metrics

    def check_rollouts(self, rollouts: Sequence[Rollout], metrics: dict[str, float]) -> None:
        """Raise AssertionError if the rollouts were sampled with other weights, TrainingError if too many are
        unscorable."""
        versions = {rollout.completion.weights_version for rollout in rollouts}
        assert versions <= {self.trainer.step_count}, (
            f"completions of weights {versions} in step {self.trainer.step_count}"
        )
        if metrics.get("rollout/unscorable", 0.0) > self.cfg.unscorable_limit:
            reasons = {r.score.unscorable for r in rollouts if r.score and r.score.unscorable}
            raise TrainingError(
                f"{metrics['rollout/unscorable']:.0%} of the completions of step {self.trainer.step_count} could not "
                f"be scored (limit {self.cfg.unscorable_limit:.0%}): {'; '.join(sorted(reasons)[:3])}; "
                "fix the verifier, then resume"
            )

    def prefit_critic(self) -> None:
        """Train only the critic on rollouts of the initial policy, with lambda = 1; runs only before the first step."""
        if self.critic is None:
            return
        for _ in range(self.critic.trainer.step_count, self.cfg.critic.prefit_steps):
            rollouts, _ = self.collect_rollouts()
            batches = [self.with_logprobs(batch) for batch in minibatches(rollouts, replace(self.cfg, minibatches=1))]
            for batch in with_advantages(batches, rollouts, self.cfg, gae_lambda=1.0):
                metrics = self.critic.update(batch)
                log.info("critic pre-training: explained variance %.2f", metrics["critic/explained_variance"])

    def with_logprobs(self, batch: Batch) -> Batch:
        """Add what advantages and loss use of the models before the step: log-probabilities of the policy and of the
        reference model, the KL estimate if it is part of the reward, and the predictions of the critic."""
        loss, columns = self.cfg.loss, dict[str, Tensor]()
        if self.cfg.minibatches > 1 or (loss.kl and loss.kl_placement == "reward"):
            policy = self.logprobs(self.trainer.workers.compute_model, batch)
            columns |= {"old_logprobs": policy} if self.cfg.minibatches > 1 else {}
        if loss.kl:
            reference = self.reference_logprobs(batch)
            is_loss = loss.kl_placement == "loss"
            kl = reference if is_loss else kl_estimate(policy, reference, loss.kl_estimator)
            columns["reference_logprobs" if is_loss else "kl"] = kl
        if self.critic is not None:
            columns["values"] = self.critic.values(batch)
        return replace(batch, **columns)

    def logprobs(self, model: Transformer, batch: Batch) -> Tensor:
        """Log-probabilities of all trained tokens under `model`, at the sampling temperature."""
        return batch_logprobs(model, batch, self.cfg.loss.temperature, self.cfg.trainer.micro_batch_tokens)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """`logprobs` of the reference model (a copy, or the policy without its adapters), without router replay."""
        batch = replace(batch, experts=None)
        if self.reference is not None:
            return self.logprobs(self.reference, batch)
        with adapters_off(self.trainer.workers.compute_model) as start:
            return self.logprobs(start, batch)

    def update_reference(self) -> None:
        """Update the reference model to the policy after every cfg.reference_steps optimizer steps."""
        step, every = self.trainer.step_count, self.cfg.reference_steps
        if self.reference is not None and every and step // every > self.reference_step // every:
            self.reference.load_state_dict(self.trainer.model.state_dict())
            self.reference_step = step
            log.info("step %d: updated the reference model to the policy", step)

    def log_rollouts(self, rollouts: Sequence[Rollout], batches: Sequence[Batch], step: int) -> None:
        """Write the rollouts of `step` with their advantages to disk.

        A rollout step without an optimizer step is overwritten by the next one.
        """
        if self.cfg.rollout_steps and step % self.cfg.rollout_steps == 0:
            write_rollouts(self.run.folder, step, rollouts, mean_advantages(batches), self.chat)

    def evaluate(self) -> None:
        """Evaluate the policy and append the result to the curve."""
        cfg = EvalConfig(
            num_problems=self.cfg.eval_problems,
            samples=self.cfg.eval_samples,
            max_tokens=self.cfg.max_tokens,
            tasks=self.cfg.tasks,
        )
        with self.interruptible():
            result = evaluate(self.engine.generate, self.chat, held_out_problems(cfg), cfg, self.reward, self.pool)
        self.run.append(CURVE, curve_point(self.trainer.step_count, result, _held_out_level(result, self.cfg)))

    def should_evaluate(self) -> bool:
        """Whether an evaluation is due: at the start, and every eval_steps optimizer steps."""
        every, points = self.cfg.eval_steps, self.run.rows(CURVE)
        return bool(every) and (not points or self.trainer.step_count // every > points[-1]["step"] // every)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Allow a request to stop to interrupt this block at once; the state before the block is saved."""
        stream, next_id = self.stream.state(), self.group_ids.next_id
        try:
            with self.run.stop.may_interrupt():
                yield
        except Interrupted:
            self.stream.restore(stream)
            self.group_ids.next_id = next_id
            self.save()
            raise

    def save(self) -> None:
        """Write the training state."""
        tensors, numbers = trainer_state(self.trainer)
        if self.reference is not None:
            tensors |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        numbers |= {
            "stream": self.stream.state(),
            "next_group_id": self.group_ids.next_id,
            "reference_step": self.reference_step,
            "num_rollout_steps": self.num_rollout_steps,
            "steps_without_signal": self.steps_without_signal,
            "rows": self.run.mark(),
        }
        if self.critic is not None:
            critic_tensors, critic_numbers = self.critic.state()
            tensors, numbers = tensors | critic_tensors, numbers | critic_numbers
        save_state(self.run.folder / STATE, tensors, numbers)
        delete_saved_rollouts(self.run.folder, before=self.num_rollout_steps)

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore the training state written by `save`."""
        restore_trainer(self.trainer, tensors, numbers)
        self.stream.restore(numbers["stream"])
        self.group_ids.next_id, self.reference_step = numbers["next_group_id"], numbers["reference_step"]
        self.num_rollout_steps = numbers["num_rollout_steps"]
        self.steps_without_signal = numbers["steps_without_signal"]
        if self.critic is not None:
            self.critic.restore(tensors, numbers)
        if self.reference is not None:
            prefix = "reference."
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            self.reference.load_state_dict(state, strict=False)
        self.engine.load_weights(self.trainer.weights(), version=self.trainer.step_count)


def batch_metrics(batches: Sequence[Batch]) -> dict[str, float]:
    """The mean KL over the tokens of a step, if it is part of the reward."""
    parts = [(batch.kl * batch.loss_mask, batch.loss_mask) for batch in batches if batch.kl is not None]
    if not parts:
        return {}
    kl, count = (float(sum(part[index].sum() for part in parts)) for index in (0, 1))
    return {"policy/kl_nats": kl / count}


def token_rate(rollouts: Sequence[Rollout], times: dict[str, float]) -> dict[str, float]:
    """Sampled tokens per second of the rollouts."""
    num_tokens = sum(rollout.num_sampled_tokens for rollout in rollouts)
    return {"rollout/tokens_per_second": num_tokens / times["time/rollout_seconds"]}


def _held_out_level(result: Evaluation, cfg: RLConfig) -> Any:
    """The results of the first held-out level, or None."""
    return next((result.by_level[level] for level in cfg.held_out_levels if level in result.by_level), None)
