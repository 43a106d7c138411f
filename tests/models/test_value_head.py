"""The value head: one number per position, from the policy's trunk."""

import torch

from tests.tiny import MLA_TINY, tiny_model
from thinkstack.models.precision import cast_copy, update_copy
from thinkstack.models.value_head import ValueModel

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def critic(seed: int = 0) -> ValueModel:
    """A critic whose head is random instead of 0."""
    model = ValueModel.from_policy(tiny_model(seed=seed))
    with torch.no_grad():
        model.value_weight.normal_(generator=torch.Generator().manual_seed(seed))
        model.value_bias.fill_(0.25)
    return model


def test_a_new_critic_predicts_zero_from_the_policys_hidden_states():
    policy = tiny_model()
    model = ValueModel.from_policy(policy)
    assert torch.equal(model(IDS), torch.zeros(1, 5))
    assert torch.equal(model.trunk(IDS).hidden, policy.trunk(IDS).hidden)
    assert not model.mtp and not hasattr(model, "head")


def test_training_the_critic_does_not_touch_the_policy():
    policy = tiny_model()
    before = policy.embed.weight.detach().clone()
    model = ValueModel.from_policy(policy)
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    assert torch.equal(policy.embed.weight, before)


def test_a_tied_policy_gives_a_critic_without_a_head_too():
    model = ValueModel.from_policy(tiny_model(MLA_TINY, tie_embeddings=True, mtp_layers=0))
    assert model(IDS).shape == (1, 5)


def test_a_value_is_the_weighted_sum_of_the_hidden_state():
    model = critic()
    hidden = model.trunk(IDS).hidden
    expected = (hidden * model.value_weight).sum(-1) + 0.25
    torch.testing.assert_close(model(IDS), expected)


def test_no_value_depends_on_a_later_token():
    """A value that depends on later tokens predicts every return, so advantages would be 0."""
    model, other = critic(), IDS.clone()
    other[0, 3] = 7
    values, changed = model(IDS), model(other)
    torch.testing.assert_close(values[0, :3], changed[0, :3])
    assert not torch.allclose(values[0, 3:], changed[0, 3:])


def test_the_head_of_a_bf16_copy_stays_fp32():
    """bf16 rounds a return near 1 by up to 0.004: advantages of that size would be noise."""
    model = critic()
    copied = cast_copy(model, torch.bfloat16)
    assert isinstance(copied, ValueModel)
    assert copied.value_weight.dtype == copied.value_bias.dtype == copied(IDS).dtype == torch.float32
    assert copied.embed.weight.dtype == torch.bfloat16
    with torch.no_grad():
        model.value_bias.fill_(3.0)
    update_copy(copied, model)
    assert copied.value_bias.tolist() == [3.0]
