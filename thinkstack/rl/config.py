"""Settings of reinforcement learning, presets of published algorithms, and checks for conflicting settings.

A preset is a table of default settings; the user's settings override it.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from thinkstack.config import Count, CountOrZero, ModelInput, Seed, Share, Weight
from thinkstack.engine.remote import ServersConfig
from thinkstack.kernels.precision import RequestedPrecision
from thinkstack.models.precision import Quantization
from thinkstack.rl.critic import CriticConfig
from thinkstack.tasks.mixture import PhaseConfig, check_mixture
from thinkstack.tasks.reward import RewardConfig
from thinkstack.tasks.task import TaskConfig, default_tasks
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

log = logging.getLogger(__name__)

GroupKind = Literal["centered", "standardized"]
AdvantageKind = Literal["centered", "standardized", "batch", "gae"]
GROUP_KINDS: tuple[str, ...] = ("centered", "standardized")

Preset = Literal["default", "paper", "dr_grpo", "dapo", "gspo", "cispo", "reinforce++", "ppo"]
PPO_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "group_size": 16,
        "prompts_per_step": 32,
        "advantage": "standardized",
        "loss": {
            "reduction": "sequence",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "kl": 0.001,
            "kl_estimator": "k3",
            "importance_cap": 0.0,
        },
        "reward": {"parts": {"accuracy": 1.0, "format": 1.0}},
        "dynamic_sampling": False,
        "reference_steps": 400,
    },
    "dr_grpo": {"advantage": "centered", "dynamic_sampling": False, "loss": {"reduction": "fixed", **PPO_CLIP}},
    "dapo": {
        "advantage": "standardized",
        "dynamic_sampling": True,
        "overlong_penalty": 0.5,
        "overlong_share": 0.2,
        "loss": {"reduction": "token", "clip_low": 0.2, "clip_high": 0.28},
    },
    "gspo": {
        "advantage": "standardized",
        "dynamic_sampling": False,
        "minibatches": 4,
        "loss": {"ratio_level": "sequence", "reduction": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    },
    "cispo": {
        "advantage": "standardized",
        "dynamic_sampling": False,
        "loss": {"clip_kind": "cap", "cispo_cap": 4.0, "reduction": "token"},
    },
    "reinforce++": {
        "advantage": "batch",
        "dynamic_sampling": False,
        "loss": {"reduction": "token", "kl": 0.01, "kl_estimator": "k1", "kl_placement": "reward", **PPO_CLIP},
    },
    "ppo": {"advantage": "gae", "dynamic_sampling": False, "loss": {"reduction": "token", **PPO_CLIP}},
}
"""Default settings of each preset; docs/algorithms/grpo.md gives the source of each number. "paper": R1 paper, section
2.2.1 and supplement 2.4; the paper does not state the clip of R1-Zero, so 0.2 is PPO's."""
DEFINING: dict[str, dict[str, Any]] = {
    "dr_grpo": {"advantage": "centered", "loss.reduction": "fixed"},
    "dapo": {"loss.reduction": "token", "dynamic_sampling": True},
    "gspo": {"loss.ratio_level": "sequence"},
    "cispo": {"loss.clip_kind": "cap"},
    "reinforce++": {"advantage": "batch"},
    "ppo": {"advantage": "gae"},
}
"""The settings that define the algorithm of each preset and cannot be overridden."""


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Settings of a reinforcement learning stage."""

    start: ModelInput
    """Checkpoint, or the stage that writes it, to start from."""
    reference: ModelInput = ""
    """Checkpoint of the reference model, or the stage that writes it; empty: start. Only with a KL term."""
    preset: Preset = "default"
    """Name of the algorithm whose defaults apply (PRESETS); the settings in DEFINING cannot be overridden."""
    tasks: dict[str, TaskConfig] = field(default_factory=default_tasks)
    """Tasks of training and of evaluations during training, by name."""
    phases: tuple[PhaseConfig, ...] = ()
    """Curriculum: the tasks of each part of the run; empty: train on all tasks for the entire run."""
    held_out_levels: tuple[int, ...] = ()
    """Difficulty levels excluded from training."""
    steps: Count = 100
    """Number of optimizer steps."""
    prompts_per_step: Count = 24
    """Number of prompts (groups) per rollout step."""
    group_size: Count = 16
    """Number of completions sampled per prompt (G)."""
    minibatches: Count = 1
    """Number of optimizer steps per rollout step; from the second step on, the ratio differs from 1."""
    max_tokens: Count = 128
    """Maximum number of tokens of a completion; truncated completions are scored as they are, mostly with 0."""
    max_prompt_tokens: CountOrZero = 0
    """Maximum number of tokens of a prompt; problems with longer prompts are skipped and counted. 0: the context length
    minus max_tokens."""
    rollout_dtype: RequestedPrecision = "fp32"
    """Precision of sampling; "auto": bf16 if it is faster. The loss corrects for a different precision of the
    trainer."""
    rollout_quantization: Quantization = "none"
    """Quantization of the weights for sampling: "none", "int8", "fp8" or "nf4"; the loss corrects for it."""
    servers: ServersConfig = ServersConfig()
    """vLLM servers that sample the completions instead of this process; with servers, rollout_dtype is the precision of
    the weights sent to them."""
    truncated: Literal["keep", "mask", "drop"] = "keep"
    """Truncated completions: "keep" uses them in baseline and loss, "mask" only in the baseline, "drop" in neither."""
    overlong_penalty: Weight = 0.0
    """Subtracted from the reward of a completion of max_tokens (DAPO, arXiv:2503.14476, section 3.4); 0 is off."""
    overlong_share: Share = 0.2
    """Last share of max_tokens, over which the overlong penalty grows from 0."""
    top_p: Share = 1.0
    """Must be 1: tokens outside a nucleus have probability 0 in the engine and a positive one in the trainer."""
    advantage: AdvantageKind = "centered"
    """Baseline of the rewards: the group ("centered", "standardized"), the entire step ("batch") or a critic
    ("gae")."""
    critic: CriticConfig = CriticConfig()
    """The value model; only with advantage="gae"."""
    reward: RewardConfig = RewardConfig()
    """The reward function."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """The policy loss; loss.temperature is also the sampling temperature of the rollouts."""
    trainer: TrainerConfig = TrainerConfig(bias_speed=0.0, balance_weight=0.0, mtp_detached=True)
    """Precision and optimizer. The balance bias is frozen, so that the policy of a step is defined by the weights."""
    row_tokens: Count = 256
    """Number of tokens per packed row."""
    router_replay: bool = False
    """Train each token with the experts that the engine chose for it, so that rounding cannot change the choice
    (arXiv:2510.11370; "keep routing" in V3.2, arXiv:2512.02556). Only for models with experts."""
    dynamic_sampling: bool = True
    """Replace zero-variance groups, whose completions all have the same reward (arXiv:2503.14476, section 3.2)."""
    max_rounds: Count = 3
    """Maximum number of sampling rounds per rollout step."""
    unscorable_limit: Share = 0.1
    """Share of unscorable completions of a step above which the run fails, because the verifier is likely broken."""
    reference_steps: CountOrZero = 400
    """Optimizer steps between two updates of the reference model to the policy; 0: never. Only with a KL term."""
    rollout_steps: CountOrZero = 1
    """Steps between two writes of the rollouts to disk; 0: never write."""
    eval_steps: CountOrZero = 10
    """Steps between two evaluations during training; 0: no evaluations."""
    eval_problems: Count = 48
    """Number of held-out problems per evaluation."""
    eval_samples: Count = 16
    """Number of completions sampled per problem of an evaluation."""
    save_steps: CountOrZero = 20
    """Steps between two saves of the training state; 0: never save."""
    seed: Seed = 0
    """Seed of the problems and of sampling."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "group_size", "minibatches", "max_tokens", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        check_mixture(self.tasks, self.phases, self.held_out_levels)
        if self.top_p != 1:
            raise ConfigError(
                f"top_p={self.top_p}: training rollouts must be sampled from the full distribution, or the engine's "
                "probabilities differ from the trainer's; use top_p=1 (evaluation and chat may use less)"
            )
        if self.group_size == 1 and self.advantage in GROUP_KINDS:
            log.warning(
                "group_size=1 has no baseline: every advantage is 0 and the policy does not change; use 2 or more"
            )
        if self.minibatches > self.prompts_per_step:
            raise ConfigError(
                f"minibatches={self.minibatches} exceeds prompts_per_step={self.prompts_per_step}; lower minibatches"
            )
        if self.overlong_penalty < 0 or not 0 < self.overlong_share <= 1:
            raise ConfigError(
                f"overlong_penalty={self.overlong_penalty} must not be negative and overlong_share="
                f"{self.overlong_share} must lie in (0, 1]"
            )
        check_contradictions(self)


def check_contradictions(cfg: RLConfig) -> None:
    """Raise ConfigError for settings that cancel each other, or that differ from the defining settings of the
    preset."""
    if cfg.loss.reduction == "fixed" and cfg.advantage == "standardized":
        raise ConfigError(
            "advantage='standardized' restores the bias that loss.reduction='fixed' (Dr. GRPO) removes: easy and "
            "hard problems get larger steps; use advantage='centered', or loss.reduction='sequence'"
        )
    if cfg.dynamic_sampling and cfg.advantage not in GROUP_KINDS:
        raise ConfigError(
            f"dynamic_sampling=true drops zero-variance groups, which advantage={cfg.advantage!r} trains on; "
            "use dynamic_sampling=false"
        )
    if cfg.trainer.lora.rank and cfg.loss.kl and 0 < cfg.reference_steps < cfg.steps:
        raise ConfigError(
            f"reference_steps={cfg.reference_steps} would update the reference model, which with "
            f"trainer.lora.rank={cfg.trainer.lora.rank} stays as it is; use reference_steps=0"
        )
    if cfg.reference and not cfg.loss.kl:
        raise ConfigError(
            f"reference={cfg.reference!r} has no effect with loss.kl=0; set loss.kl, or leave reference out"
        )
    if cfg.advantage != "gae" and cfg.critic != CriticConfig():
        raise ConfigError(
            f"critic settings have no effect with advantage={cfg.advantage!r}; use advantage='gae' or leave them out"
        )
    for path, required in DEFINING.get(cfg.preset, {}).items():
        value: Any = cfg
        for name in path.split("."):
            value = getattr(value, name)
        if value != required:
            raise ConfigError(
                f"{path}={value!r} conflicts with preset={cfg.preset!r}, which requires {required!r}; "
                "leave it out, or use "
                "preset='default' and set each value"
            )
