"""Settings of reinforcement learning: what can be chosen, which choices contradict each other, and named ones.

An algorithm of the literature is a value: a table of settings laid under the user's own.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from thinkstack.config import Count, CountOrZero, Seed, Share, Weight
from thinkstack.engine.remote import ServersConfig
from thinkstack.models.precision import AskedPrecision, Quantization
from thinkstack.rl.critic import CriticConfig
from thinkstack.rl.groups import GROUP_KINDS, AdvantageKind
from thinkstack.tasks.mixture import PhaseConfig, check_phases
from thinkstack.tasks.reward import RewardConfig
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

log = logging.getLogger(__name__)

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
        "reward": {"combine": "additive"},
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
"""Settings a preset lays under the user's own; docs/grpo.md gives the source of each number. "paper": R1 paper, section
2.2.1 and supplement 2.4; it leaves the clip of R1-RLTrainer open, 0.2 is PPO's."""
DEFINING: dict[str, dict[str, Any]] = {
    "dr_grpo": {"advantage": "centered", "loss.reduction": "fixed"},
    "dapo": {"loss.reduction": "token", "dynamic_sampling": True},
    "gspo": {"loss.ratio_level": "sequence"},
    "cispo": {"loss.clip_kind": "cap"},
    "reinforce++": {"advantage": "batch"},
    "ppo": {"advantage": "gae"},
}
"""What makes a preset the algorithm of its name; everything else may be changed."""


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """One run of group-relative policy optimization."""

    start: str
    """Checkpoint or earlier stage to start from."""
    preset: Preset = "default"
    """What was laid under these settings; see PRESETS. What makes it the algorithm of that name cannot be changed."""
    tasks: tuple[str, ...] = ("chain", "nested", "cups", "kinship")
    """Task families to be measured by on the way, and to learn from where no phases are given."""
    phases: tuple[PhaseConfig, ...] = ()
    """A curriculum: what is asked in which part of the run; empty asks all families all along."""
    files: dict[str, str] = field(default_factory=dict)
    """Published data sets to learn from and be measured by (tasks/table.py): the folder of each, with the files of its
    splits."""
    languages: tuple[str, ...] = ()
    """Languages of generated questions; empty asks in all of them."""
    held_out_levels: tuple[int, ...] = ()
    """Difficulties never asked in training."""
    steps: Count = 100
    """Optimizer steps."""
    prompts_per_step: Count = 24
    """Groups a step is made of."""
    group_size: Count = 16
    """Answers drawn to each prompt (G)."""
    minibatches: Count = 1
    """Optimizer steps the groups of one drawing are split into; from the second on the clipped ratio differs from 1."""
    max_tokens: Count = 128
    """Most tokens of an answer; longer ones are cut off and earn what their text earns, mostly nothing."""
    max_prompt_tokens: CountOrZero = 0
    """Longest prompt; problems with longer ones are left out and counted. 0: as long as context and answer allow."""
    rollout_dtype: AskedPrecision = "fp32"
    """Precision that answers are drawn in; auto: bf16 where that is faster. The loss corrects for the trainer's being
    another one."""
    rollout_quantization: Quantization = "plain"
    """How matrices are kept for drawing: as they are, or packed (int8, fp8, nf4), which the loss corrects for too."""
    servers: ServersConfig = ServersConfig()
    """vLLM servers that draw the answers instead of this process; rollout_dtype is then that of the weights they
    get."""
    truncated: Literal["keep", "mask", "drop"] = "keep"
    """Answers cut off: "keep" in baseline and loss, "mask" out of the loss only, "drop" from both."""
    overlong_penalty: Weight = 0.0
    """Taken off the reward of an answer of max_tokens (DAPO, arXiv:2503.14476, section 3.4); 0 takes nothing off."""
    overlong_share: Share = 0.2
    """Share of max_tokens, at its end, in which that penalty grows from 0."""
    top_p: Share = 1.0
    """Must be 1: tokens outside a nucleus would have probability 0 in the engine and more in the trainer."""
    advantage: AdvantageKind = "centered"
    """What a reward is compared with: its group ("centered", "standardized"), the step ("batch") or a critic
    ("gae")."""
    critic: CriticConfig = CriticConfig()
    """The value model; only with advantage="gae"."""
    reward: RewardConfig = RewardConfig()
    """How answers are judged."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """The policy loss; its temperature is also that of the rollouts."""
    trainer: TrainerConfig = TrainerConfig(bias_speed=0.0, balance_weight=0.0, mtp_detached=True)
    """Precision and optimizer. The balance bias is frozen: the same weights must mean the same policy all step long."""
    row_tokens: Count = 256
    """Tokens of a packed row."""
    router_replay: bool = False
    """Train with the experts that the engine chose for each token, so that rounding cannot send it to others
    (arXiv:2510.11370; V3.2's "keep routing", arXiv:2512.02556). Only for models with experts."""
    dynamic_sampling: bool = True
    """Replace groups whose answers all earned the same."""
    max_rounds: Count = 3
    """Most rounds of drawing in a step."""
    unscorable_limit: Share = 0.1
    """Share of unscorable answers of a step above which the run fails: then the checker is broken, not the model."""
    reference_steps: CountOrZero = 400
    """Steps after which the reference is replaced by the policy; only with a KL term."""
    rollout_steps: CountOrZero = 1
    """Every so many steps the answers are kept on disk; 0 keeps none."""
    eval_steps: CountOrZero = 10
    """Steps between two evaluations on the way; 0 makes none."""
    eval_problems: Count = 48
    """Held-out problems of an evaluation on the way."""
    eval_samples: Count = 16
    """Answers drawn to each of them."""
    save_steps: CountOrZero = 20
    """Steps between two states to resume from; 0 keeps none."""
    seed: Seed = 0
    """Fixes problems and draws."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "group_size", "minibatches", "max_tokens", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        puzzle_tasks(self.tasks)
        if self.phases:
            check_phases(self.phases, self.files)
            if self.held_out_levels:
                raise ConfigError(
                    f"held_out_levels={list(self.held_out_levels)} says nothing in phases; name the levels of each task"
                )
        elif self.files:
            raise ConfigError(f"files={self.files} are asked in phases; give them, with the weight of each task")
        if self.top_p != 1:
            raise ConfigError(
                f"top_p={self.top_p}: training rollouts must draw from the whole distribution, or the engine's "
                "probabilities are not the trainer's; use top_p=1 (evaluation and chat may use less)"
            )
        if self.group_size == 1 and self.advantage in GROUP_KINDS:
            log.warning("group_size=1 compares an answer with nothing: every advantage is 0 and nothing is learnt")
        if self.minibatches > self.prompts_per_step:
            raise ConfigError(f"minibatches={self.minibatches} exceed prompts_per_step={self.prompts_per_step}")
        if self.overlong_penalty < 0 or not 0 < self.overlong_share <= 1:
            raise ConfigError(
                f"overlong_penalty={self.overlong_penalty} must not be negative and overlong_share="
                f"{self.overlong_share} must lie in (0, 1]"
            )
        refuse_contradictions(self)


def refuse_contradictions(cfg: RLConfig) -> None:
    """Raise ConfigError for settings that undo each other, or that a named preset is not."""
    if cfg.loss.reduction == "fixed" and cfg.advantage == "standardized":
        raise ConfigError(
            "advantage='standardized' brings back the bias that loss.reduction='fixed' (Dr. GRPO) takes out: easy and "
            "hard problems get larger steps; use advantage='centered', or reduction='sequence'"
        )
    if cfg.dynamic_sampling and cfg.advantage not in GROUP_KINDS:
        raise ConfigError(
            f"dynamic_sampling=true drops groups of equal rewards, from which advantage={cfg.advantage!r} learns; use "
            "dynamic_sampling=false"
        )
    if cfg.trainer.lora.rank and cfg.loss.kl and cfg.steps > cfg.reference_steps:
        raise ConfigError(
            f"reference_steps={cfg.reference_steps} would replace the reference, which with lora.rank="
            f"{cfg.trainer.lora.rank} is the frozen model itself; use reference_steps={cfg.steps} or more"
        )
    if cfg.advantage != "gae" and cfg.critic != CriticConfig():
        raise ConfigError(f"critic settings do nothing with advantage={cfg.advantage!r}; use 'gae' or leave them out")
    for path, wanted in DEFINING.get(cfg.preset, {}).items():
        found: Any = cfg
        for name in path.split("."):
            found = getattr(found, name)
        if found != wanted:
            raise ConfigError(
                f"{path}={found!r} is not preset {cfg.preset!r}, which has {wanted!r}; leave it out, or use "
                "preset='default' and say each setting"
            )
