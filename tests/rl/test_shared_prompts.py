"""Answers of a group share their prompt in a training row: the same numbers as one by one, for fewer tokens."""

from functools import partial

import pytest
import torch

from tests.rl.test_batches import packed, rollout
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.rl.batches import gather_tokens
from thinkstack.train.loss import token_weights
from thinkstack.train.passes import StepContext, batch_logprobs, compute_loss
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.train.trainer_config import TrainerConfig

BOTH = pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
COMPLETIONS = [(5, 9, 1), (6, 7, 8, 9, 10, 1), (11, 1), (12, 13, 14, 1)]
PROMPT = (0, 20, 21, 22, 23, 24, 25)


def group(separate: bool):
    """Four completions to one prompt; `separate` gives each a group of its own, so that nothing is shared."""
    return [rollout(i * separate, 0.0, ids, prompt_token_ids=PROMPT) for i, ids in enumerate(COMPLETIONS)]


def batch_of(separate: bool, row_tokens: int = 40):
    return packed(group(separate), row_tokens, [0.5, -0.25, 1.0, -1.25])


def test_the_prompt_is_in_the_row_once():
    shared, separate = batch_of(False), batch_of(True)
    answers = sum(map(len, COMPLETIONS))
    assert int((separate.document_ids > 0).sum()) == answers + 4 * (len(PROMPT) - 1)
    assert int((shared.document_ids > 0).sum()) == answers + len(PROMPT) - 1
    assert shared.ids[0, : len(PROMPT) + 2].tolist() == [*PROMPT, 5, 9]
    assert shared.positions[0, len(PROMPT) - 1 : len(PROMPT) + 4].tolist() == [6, 7, 8, 6, 7]


@BOTH
def test_shared_prompts_change_no_log_probability(cfg):
    model = tiny_model(cfg)
    shared, separate = (gather_tokens(batch_logprobs(model, b, 1.0, 64), b) for b in (batch_of(False), batch_of(True)))
    for mine, alone in zip(shared, separate, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(alone), atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_shared_prompts_change_no_gradient(cfg, reduction):
    """Multi-token prediction included, which must not look from one answer into the next; experts are used as often
    per answer, but once for the prompt, so the balance loss is off."""
    settings = TrainerConfig(dtype="fp32", balance_weight=0.0, mtp_weight=0.3)
    loss = partial(policy_loss, cfg=PolicyLossConfig(reduction=reduction, importance_cap=0.0))
    found = []
    for separate in (False, True):
        model, batch = tiny_model(cfg), batch_of(separate)
        batch = batch.with_weights(token_weights(batch, reduction))
        total, _, _ = compute_loss(model, batch, StepContext(loss, 1.0, False, 1 / 15, 1 / 15), settings)
        found.append([total.detach(), *torch.autograd.grad(total, list(model.parameters()), allow_unused=True)])
    for mine, alone in zip(*found, strict=True):
        if alone is not None:
            assert float((mine - alone).detach().norm()) <= 1e-5 * float(alone.norm()) + 1e-7


def test_a_group_too_wide_for_a_row_is_split_in_order():
    narrow = batch_of(False, row_tokens=16)
    assert narrow.ids.shape[1] == 16
    model = tiny_model(GQA_TINY)
    wide = batch_of(False)
    for a, b in zip(*(gather_tokens(batch_logprobs(model, x, 1.0, 64), x) for x in (narrow, wide)), strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)
