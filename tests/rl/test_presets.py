"""Named algorithms are values, contradictions are refused, and no setting of the objective is a dead letter."""

from dataclasses import fields, replace

import pytest
import torch

from tests.tiny import GQA_TINY, random_batch, tiny_model
from thinkstack.config import build, merge
from thinkstack.rl.config import DEFINING, PRESETS, RLConfig
from thinkstack.train.loss import token_weights
from thinkstack.train.passes import trained_tokens
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.types import ConfigError


def preset_config(preset: str, **given: object) -> RLConfig:
    """The settings of a preset with `given` on top, as a recipe makes them."""
    return build(RLConfig, merge(PRESETS[preset], {"start": "x", "preset": preset} | given))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_set_of_settings_without_contradiction(preset):
    assert preset_config(preset).preset == preset


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_a_step(make_bandit, preset):
    given = preset_config(preset)
    names = (
        "advantage",
        "dynamic_sampling",
        "minibatches",
        "overlong_penalty",
        "overlong_share",
        "loss",
        "reference_steps",
    )
    rl = make_bandit(**{name: getattr(given, name) for name in names})
    before = rl.trainer.model.head.weight.detach().clone()
    rl.step()
    assert rl.trainer.step_count == given.minibatches
    assert not torch.equal(rl.trainer.model.head.weight, before)


def test_the_presets_are_those_of_their_papers():
    dr, dapo, gspo = preset_config("dr_grpo"), preset_config("dapo"), preset_config("gspo")
    assert (dr.advantage, dr.loss.reduction, dr.loss.kl) == ("centered", "fixed", 0.0)  # arXiv:2503.20783, section 3.2
    assert (dapo.loss.clip_low, dapo.loss.clip_high, dapo.loss.reduction) == (0.2, 0.28, "token")  # arXiv:2503.14476
    assert dapo.dynamic_sampling and dapo.overlong_share == 4096 / 20480 and dapo.loss.kl == 0
    assert (gspo.loss.clip_low, gspo.loss.clip_high) == (3e-4, 4e-4)  # arXiv:2507.18071, section 5.1
    assert (gspo.loss.ratio_level, gspo.loss.reduction, gspo.minibatches) == ("sequence", "sequence", 4)
    assert preset_config("cispo").loss.clip_kind == "cap" and preset_config("ppo").advantage == "gae"
    plus = preset_config("reinforce++").loss
    assert (plus.kl_estimator, plus.kl_placement) == ("k1", "reward")  # arXiv:2501.03262


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("dr_grpo", {"advantage": "standardized"}, "advantage='standardized' restores the bias"),
        (
            "dr_grpo",
            {"loss": {"reduction": "token"}},
            "loss.reduction='token' conflicts with preset='dr_grpo', which requires 'fixed'",
        ),
        ("default", {"loss": {"reduction": "fixed"}, "advantage": "standardized"}, "use advantage='centered'"),
        ("dapo", {"dynamic_sampling": False}, "dynamic_sampling=False conflicts with preset='dapo'"),
        ("gspo", {"loss": {"reduction": "token"}}, "gives long completions more weight"),
        ("gspo", {"loss": {"reduction": "fixed"}}, "use loss.reduction='sequence'"),
        ("default", {"top_p": 0.9}, "top_p=0.9: training rollouts must be sampled from the full distribution"),
        ("default", {"loss": {"kl": 0.1, "kl_estimator": "k1"}}, "in the loss does not depend on the reference model"),
        ("default", {"loss": {"kl_placement": "reward"}}, "has no effect with loss.kl=0"),
        (
            "default",
            {"loss": {"kl": 0.1, "kl_estimator": "k2", "kl_ratio": True}},
            "loss.kl_ratio=true needs loss.kl_estimator='k3'",
        ),
        ("default", {"loss": {"clip_kind": "cap"}}, "loss.clip_kind='cap' has no cap with loss.cispo_cap=0.0"),
        ("default", {"loss": {"cispo_cap": 4.0}}, "has no effect with loss.clip_kind='clip'"),
        ("cispo", {"loss": {"clip_low": 0.1}}, "does not use clip_low=0.1"),
        ("cispo", {"loss": {"clip_kind": "clip", "cispo_cap": 0.0}}, "conflicts with preset='cispo'"),
        ("default", {"loss": {"dual_clip": 0.5}}, "dual_clip=0.5 would also bound the loss on policy"),
        ("default", {"loss": {"importance_cap": 0.0, "importance_kind": "mask"}}, "set loss.importance_cap"),
        (
            "reinforce++",
            {"dynamic_sampling": True},
            "drops zero-variance groups, which advantage='batch' trains on",
        ),
        ("default", {"critic": {"gae_lambda": 0.9}}, "critic settings have no effect with advantage='centered'"),
        ("ppo", {"critic": {"gae_lambda": 1.5}}, "critic.gae_lambda=1.5: input should be less than or equal to 1"),
        ("ppo", {"critic": {"clip": -1.0}}, "critic.clip=-1.0"),
        ("dapo", {"overlong_share": 0.0}, "overlong_share=0.0 must lie in (0, 1]"),
    ],
)
def test_a_setting_that_contradicts_another_is_refused_with_the_reason(preset, given, message):
    """One peer's dr_grpo kept the deviation, another summed GSPO over tokens; both ran."""
    with pytest.raises(ConfigError) as caught:
        preset_config(preset, **given)
    assert message in str(caught.value)


@pytest.mark.parametrize("preset", DEFINING)
def test_a_presets_name_without_its_settings_is_refused(preset):
    """A run labelled GSPO that was the default all along would be believed."""
    with pytest.raises(ConfigError):
        RLConfig(start="x", preset=preset, dynamic_sampling=False)


MODEL = tiny_model(GQA_TINY)


def objective(cfg: PolicyLossConfig) -> torch.Tensor:
    """Gradient of the head under `cfg` on a fixed batch far off policy, as the trainer would make it."""
    generator = torch.Generator().manual_seed(1)
    batch = random_batch([9, 5, 12, 3], 16, prompt=2)
    signs = torch.where(batch.document_ids % 2 == 0, 1.0, -1.0) * batch.loss_mask

    def near(scale: float) -> torch.Tensor:
        return torch.randn(batch.ids.shape, generator=generator) * scale - 4

    batch = replace(batch, advantages=signs, old_logprobs=near(1.0), rollout_logprobs=near(1.0))
    batch = replace(batch, reference_logprobs=near(1.0), weights=token_weights(batch, cfg.reduction, 16))
    hidden = MODEL.trunk(batch.ids, batch.positions, batch.document_ids).hidden
    tokens = trained_tokens(MODEL, hidden, batch, 1 / float(batch.loss_mask.sum()), cfg.temperature)
    (gradient,) = torch.autograd.grad(policy_loss(tokens, cfg)[0], MODEL.head.weight)
    return gradient


BASE = PolicyLossConfig()
KL = PolicyLossConfig(kl=0.1)
SEQUENCE = PolicyLossConfig(reduction="sequence")
CAP = PolicyLossConfig(clip_kind="cap", cispo_cap=2.0)
COEFFICIENTS = {
    "clip_low": (BASE, 0.6),
    "clip_high": (BASE, 0.9),
    "clip_kind": (replace(BASE, importance_cap=3.0), {"clip_kind": "cap", "cispo_cap": 2.0}),
    "cispo_cap": (CAP, 1.1),
    "dual_clip": (BASE, 1.5),
    "ratio_level": (SEQUENCE, "sequence"),
    "reduction": (BASE, "sequence"),
    "kl": (BASE, 0.1),
    "kl_estimator": (KL, "k2"),
    "kl_placement": (KL, "reward"),
    "kl_ratio": (KL, True),
    "importance_cap": (BASE, 0.5),
    "importance_kind": (BASE, "mask"),
    "importance_level": (BASE, "sequence"),
    "temperature": (BASE, 0.7),
}


def test_the_list_of_coefficients_is_complete():
    assert sorted(COEFFICIENTS) == sorted(field.name for field in fields(PolicyLossConfig))


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_coefficient_of_the_objective_changes_its_gradient(name):
    """A peer parsed, logged and documented its KL coefficient, and never multiplied by it (slime#397)."""
    base, value = COEFFICIENTS[name]
    changed = replace(base, **(value if isinstance(value, dict) else {name: value}))
    assert not torch.allclose(objective(base), objective(changed), rtol=1e-3)


STAGE = {
    "advantage": "standardized",
    "truncated": "mask",
    "overlong_penalty": 0.7,
    "overlong_share": 0.9,
    "minibatches": 2,
    "dynamic_sampling": False,
    "group_size": 8,
    "prompts_per_step": 4,
    "max_tokens": 3,
    "seed": 5,
}


@pytest.mark.parametrize("name", STAGE)
def test_every_setting_of_the_advantages_changes_the_step(make_bandit, name):
    """The same for what happens before the loss: each must move the weights of a run of two steps."""
    base = {"overlong_penalty": 0.3} if name == "overlong_share" else {}
    ends = []
    for run, changes in (("base", base), ("changed", base | {name: STAGE[name]})):
        rl = make_bandit(name=run, max_tokens=changes.pop("max_tokens", 2), **changes)
        rl.step()
        rl.step()
        ends.append(rl.trainer.model.head.weight.detach().clone())
    assert not torch.equal(*ends)
