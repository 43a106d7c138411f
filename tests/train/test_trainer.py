"""The optimizer step: what micro-batches, workers, ranks, precision and bad numbers may and may not change."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.tiny import MLA_TINY, random_batch, tiny_model
from thinkstack.data import Example, collate
from thinkstack.models.transformer import Transformer
from thinkstack.train.balance import moe_layers
from thinkstack.train.loss import next_token_loss, token_weights
from thinkstack.train.optim import OptimConfig
from thinkstack.train.passes import batch_logprobs, mtp_loss, split_micro_batches
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.train.trainer import MAX_BAD_STEPS, Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch, ConfigError, TrainingError

LENGTHS = [9, 5, 12, 3, 11, 7, 4, 8, 6, 10]
EXACT = TrainerConfig(dtype="fp32", micro_batch_tokens=64, optim=OptimConfig(clip_norm=1e9))
PLAIN = replace(EXACT, mtp_weight=0.0, balance_weight=0.0, bias_speed=0.0)


def gradients_of(model: Transformer, cfg: TrainerConfig, batch: Batch, **given) -> dict[str, torch.Tensor]:
    """Gradients as the optimizer sees them in one step."""
    trainer, seen = Trainer(model, cfg, total_steps=1), {}

    def note(optimizer, args, kwargs):
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(note)
    trainer.step(batch, next_token_loss, **given)
    return seen


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **bounds) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **bounds, msg=lambda m, name=name: f"{name}: {m}")


CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("micro_batch_tokens", [16, 32, 128])
def test_how_a_step_is_cut_into_micro_batches_changes_nothing(micro_batch_tokens):
    """Means of means weigh short micro-batches too much; all losses here have unequal lengths."""
    batch = random_batch(LENGTHS, 16)
    whole = gradients_of(tiny_model(), replace(EXACT, micro_batch_tokens=10**6, balance_weight=0.1), batch)
    cut = gradients_of(tiny_model(), replace(EXACT, micro_batch_tokens=micro_batch_tokens, balance_weight=0.1), batch)
    assert_same(whole, cut, **CLOSE)


def test_the_gradient_is_that_of_the_mean_over_all_trained_tokens():
    """Nothing divides again, by accumulation steps, rows or documents; compared with one plain cross-entropy."""
    batch, model = random_batch(LENGTHS, 16, prompt=3), tiny_model()
    found = gradients_of(model, replace(PLAIN, micro_batch_tokens=16), batch)
    plain = tiny_model()
    logits = plain(batch.ids, batch.positions, batch.document_ids)
    F.cross_entropy(logits[batch.loss_mask > 0], batch.targets[batch.loss_mask > 0]).backward()
    for name, parameter in plain.named_parameters():
        if name in found and parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, **CLOSE)
    assert found.keys() == {name for name, p in plain.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing_but_the_time(workers):
    batch = random_batch(LENGTHS, 16)
    cfg = replace(EXACT, micro_batch_tokens=16)
    assert_same(
        gradients_of(tiny_model(), cfg, batch),
        gradients_of(tiny_model(), replace(cfg, workers=workers), batch),
        **CLOSE,
    )


def test_more_workers_than_micro_batches_is_no_fault():
    batch = random_batch([5], 16)
    first = gradients_of(tiny_model(), EXACT, batch)
    assert_same(first, gradients_of(tiny_model(), replace(EXACT, workers=4), batch), **CLOSE)


def test_a_step_is_a_function_of_its_inputs():
    batch, found = random_batch(LENGTHS, 16), []
    for _ in range(2):
        model = tiny_model()
        trainer = Trainer(model, replace(EXACT, workers=2, micro_batch_tokens=16), total_steps=3)
        for _ in range(3):
            trainer.step(batch, next_token_loss)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_statistics_are_means_over_the_trained_tokens_of_the_step():
    batch, model = random_batch(LENGTHS, 16, prompt=2), tiny_model()
    logits = model(batch.ids, batch.positions, batch.document_ids)
    expected = F.cross_entropy(logits[batch.loss_mask > 0], batch.targets[batch.loss_mask > 0]).item()
    found = Trainer(model, replace(EXACT, micro_batch_tokens=16), 1).step(batch, next_token_loss)
    assert found["loss/next_token_nats"] == pytest.approx(expected, rel=1e-5)


def test_large_gradients_are_scaled_down_and_reported_unscaled():
    batch = random_batch(LENGTHS, 16)
    free = gradients_of(tiny_model(), EXACT, batch)
    norm = sum(float(g.square().sum()) for g in free.values()) ** 0.5
    cfg = replace(EXACT, optim=OptimConfig(clip_norm=norm / 4))
    clipped = gradients_of(tiny_model(), cfg, batch)
    assert_same({name: g / 4 for name, g in free.items()}, clipped, **CLOSE)
    assert Trainer(tiny_model(), cfg, 1).step(batch, next_token_loss)["train/grad_norm"] == pytest.approx(
        norm, rel=1e-4
    )


def poisoned_loss(tokens):
    loss, stats = next_token_loss(tokens)
    return loss * float("nan"), stats


def test_a_step_without_finite_gradient_changes_nothing_and_is_counted(tmp_path):
    """Neither weights, nor optimizer moments, nor schedule, nor balance biases may take a bad step."""
    batch, model = random_batch(LENGTHS, 16), tiny_model()
    trainer = Trainer(model, replace(EXACT, optim=OptimConfig(warmup_steps=10)), 10, dump_folder=tmp_path)
    trainer.step(batch, next_token_loss)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [value.clone() for state in trainer.optimizer.state.values() for value in state.values()]
    metrics = trainer.step(batch, poisoned_loss)
    assert (metrics["train/skipped"], trainer.step_count, trainer.bad_steps) == (1.0, 1, 1)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert torch.equal(load_file(tmp_path / "bad_batch_1.safetensors")["ids"], batch.ids)


def test_a_good_step_after_a_bad_one_clears_the_count():
    """The bad gradient must not linger and spoil the next step."""
    batch, trainer = random_batch(LENGTHS, 16), Trainer(tiny_model(), EXACT, 10)
    trainer.step(batch, poisoned_loss)
    assert trainer.step(batch, next_token_loss)["train/skipped"] == 0.0
    assert (trainer.step_count, trainer.bad_steps) == (1, 0)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_several_bad_steps_in_a_row_end_the_training():
    batch, trainer = random_batch(LENGTHS, 16), Trainer(tiny_model(), EXACT, 10)
    for _ in range(MAX_BAD_STEPS - 1):
        trainer.step(batch, poisoned_loss)
    with pytest.raises(TrainingError, match="learning_rate"):
        trainer.step(batch, poisoned_loss)


def policy_batch() -> Batch:
    batch = random_batch(LENGTHS, 16, prompt=2)
    signs = torch.where(batch.document_ids % 2 == 0, 1.0, -1.0)
    return replace(batch, advantages=signs * batch.loss_mask)


def test_trainer_and_reference_logprobs_are_the_same_arithmetic():
    """Log-probabilities recomputed by batch_logprobs give ratios of exactly 1 in the step that follows."""
    model, batch = tiny_model(), policy_batch()
    old = batch_logprobs(model, batch, 0.8, micro_batch_tokens=64)
    batch = replace(batch, old_logprobs=old, rollout_logprobs=old)
    stats = Trainer(model, PLAIN, 1).step(batch, partial(policy_loss, cfg=PolicyLossConfig()), temperature=0.8)
    assert stats["mismatch/abs_nats_max"] == 0.0
    assert stats["policy/clipped_low"] == stats["policy/clipped_high"] == 0.0


def test_temperature_reaches_the_loss():
    """A temperature that only the rollouts know of makes every ratio wrong."""
    batch = random_batch(LENGTHS, 16)
    values = [
        Trainer(tiny_model(), PLAIN, 1).step(batch, next_token_loss, t)["loss/next_token_nats"] for t in (1.0, 0.7)
    ]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_packed_rows_train_like_separate_ones():
    """Attention, positions, targets and MTP targets stop at the border of a document."""
    together, alone = random_batch(LENGTHS, 40), random_batch(LENGTHS, 12)
    assert len(together.ids) < len(alone.ids)
    assert_same(gradients_of(tiny_model(), EXACT, together), gradients_of(tiny_model(), EXACT, alone), **CLOSE)


def test_mtp_learns_the_token_after_next_within_its_document():
    """Hand-worked: documents 5 6 7 8 and 1 2 3 share a row; depth 1 predicts 7 and 8 in the first, 3 in the second."""
    model = tiny_model()
    samples = [Example((5, 6, 7, 8), (0, 1, 1, 1)), Example((1, 2, 3), (0, 1, 1))]
    batch = collate(samples, [[0, 1]], 6)
    trunk = model.trunk(batch.ids, batch.positions, batch.document_ids)
    loss, _ = mtp_loss(model, trunk, batch, share=1 / 5, detached=False)
    logprobs = model.head(model.mtp_hidden_states(trunk, batch.ids)[0][0]).log_softmax(-1)
    expected = -(logprobs[0, 0, 7] + logprobs[0, 1, 8] + logprobs[0, 3, 3]) / 5
    torch.testing.assert_close(loss, expected)


def test_mtp_does_not_train_prompt_tokens():
    """With a prompt of three, only the targets after it count, though the module sees all positions."""
    model = tiny_model()
    batch = collate([Example((5, 6, 7, 8, 9), (0, 0, 0, 1, 1))], [[0]], 4)
    trunk = model.trunk(batch.ids, batch.positions, batch.document_ids)
    loss, _ = mtp_loss(model, trunk, batch, share=1 / 2, detached=False)
    logprobs = model.head(model.mtp_hidden_states(trunk, batch.ids)[0][0]).log_softmax(-1)
    torch.testing.assert_close(loss, -(logprobs[0, 1, 8] + logprobs[0, 2, 9]) / 2)


def test_mtp_loss_off_computes_and_trains_no_module():
    """Weight 0 must not leave weight decay or momentum moving modules that nobody trains."""
    found = gradients_of(tiny_model(), replace(EXACT, mtp_weight=0.0), random_batch(LENGTHS, 16))
    assert not any(name.startswith("mtp") for name in found)


def test_detached_mtp_leaves_the_policy_gradient_alone():
    """In RL the modules may follow for speculative decoding, without pulling the trunk or the head."""
    batch = random_batch(LENGTHS, 16)
    base = replace(EXACT, balance_weight=0.0)
    without = gradients_of(tiny_model(), replace(base, mtp_weight=0.0), batch)
    beside = gradients_of(tiny_model(), replace(base, mtp_detached=True), batch)
    assert_same(without, {name: g for name, g in beside.items() if not name.startswith("mtp")}, **CLOSE)
    assert any(name.startswith("mtp") for name in beside)


COEFFICIENTS = [
    ("optim", replace(EXACT.optim, learning_rate=1e-2)),
    ("optim", replace(EXACT.optim, weight_decay=0.5)),
    ("optim", replace(EXACT.optim, beta1=0.5)),
    ("optim", replace(EXACT.optim, beta2=0.5)),
    ("optim", replace(EXACT.optim, eps=1e-2)),
    ("optim", replace(EXACT.optim, warmup_steps=5)),
    ("optim", replace(EXACT.optim, schedule="linear")),
    ("dtype", "bf16"),
    ("mtp_weight", 0.6),
    ("mtp_detached", True),
    ("balance_weight", 0.5),
    ("bias_speed", 0.1),
]


@pytest.mark.parametrize(("name", "value"), COEFFICIENTS)
def test_every_coefficient_of_the_trainer_changes_the_weights(name, value):
    """Coefficients that are parsed, logged and never used."""
    found = []
    for cfg in (EXACT, replace(EXACT, **{name: value})):
        model = tiny_model()
        trainer = Trainer(model, cfg, total_steps=4)
        for seed in range(2):
            trainer.step(random_batch(LENGTHS, 16, seed=seed), next_token_loss)
        found.append(model.state_dict())
    assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])


def biases(model: Transformer) -> torch.Tensor:
    return torch.stack([layer.bias.clone() for layer in moe_layers(model)])


def test_a_frozen_bias_does_not_move():
    """In RL the bias is frozen, so that fixed weights have fixed log-probabilities."""
    model = tiny_model()
    before = biases(model)
    Trainer(model, replace(EXACT, bias_speed=0.0), 1).step(random_batch(LENGTHS, 16), next_token_loss)
    assert torch.equal(biases(model), before)


def test_the_bias_moves_once_a_step_and_never_in_a_forward_pass():
    """Moving it between old log-probabilities and the training pass would change the policy under the ratio."""
    model, batch = tiny_model(), policy_batch()
    before = biases(model)
    batch_logprobs(model, batch, 1.0, 16)
    model(batch.ids)
    assert torch.equal(biases(model), before)
    Trainer(model, replace(EXACT, bias_speed=0.01, micro_batch_tokens=16), 1).step(batch, next_token_loss)
    moved = (biases(model) - before).abs()
    assert 0 < float(moved.max()) <= 0.02 + 1e-6


def test_counts_hold_every_real_token_once_in_every_layer(monkeypatch):
    """Counting in forward counts recomputed, evaluated and padded tokens too."""
    import thinkstack.train.trainer as trainer_file

    model, batch, seen = tiny_model(), random_batch(LENGTHS, 16), []
    monkeypatch.setattr(trainer_file, "update_bias", lambda layer, counts, speed: seen.append(counts))
    batch_logprobs(model, batch, 1.0, 16)
    Trainer(model, replace(EXACT, micro_batch_tokens=16, workers=2), 1).step(batch, next_token_loss)
    real = int((batch.document_ids > 0).sum())
    assert [int(counts.sum()) for counts in seen] == [2 * real] * 3


def test_biases_are_saved_in_fp32_and_the_bf16_worker_uses_the_moved_ones():
    """A step of 1e-3 must survive, in the state that is saved and in the copy that computes."""
    model = tiny_model()
    trainer = Trainer(model, replace(EXACT, dtype="bf16", bias_speed=1e-3), 1)
    trainer.step(random_batch(LENGTHS, 16), next_token_loss)
    names = [name for name in model.state_dict() if name.endswith("ffn.bias")]
    assert len(names) == 3
    assert all(model.state_dict()[name].dtype == torch.float32 for name in names)
    assert torch.equal(biases(trainer.workers.compute_model), biases(model))


def test_bf16_steps_follow_fp32_steps():
    batch = random_batch(LENGTHS, 16)
    exact = gradients_of(tiny_model(), PLAIN, batch)
    rough = gradients_of(tiny_model(), replace(PLAIN, dtype="bf16"), batch)
    for name in exact:
        assert rough[name].dtype == torch.float32
    first, second = (torch.cat([found[name].flatten() for name in exact]) for found in (exact, rough))
    assert F.cosine_similarity(first, second, dim=0) > 0.99
    assert not torch.equal(first, second)


def test_a_small_corpus_is_memorized():
    model = tiny_model()
    cfg = replace(EXACT, optim=OptimConfig(learning_rate=1e-2))
    trainer, batch = Trainer(model, cfg, 60), random_batch([9, 8, 7], 16)
    losses = [trainer.step(batch, next_token_loss)["loss/next_token_nats"] for _ in range(60)]
    assert losses[0] > 3.5
    assert losses[-1] < 0.1


def test_micro_batches_are_whole_rows_in_order():
    batch = random_batch(LENGTHS, 16)
    pieces = split_micro_batches(batch, 40)
    assert {len(piece.ids) for piece in pieces[:-1]} == {2}
    assert torch.equal(torch.cat([piece.ids for piece in pieces]), batch.ids)
    assert len(split_micro_batches(batch, 1)) == len(batch.ids)


def test_given_weights_are_used_as_they_are():
    batch = random_batch(LENGTHS, 16)
    doubled = gradients_of(tiny_model(), PLAIN, batch.with_weights(2 * token_weights(batch, "token")))
    single = gradients_of(tiny_model(), PLAIN, batch)
    assert_same({name: 2 * g for name, g in single.items()}, doubled, **CLOSE)


def test_a_model_without_experts_or_mtp_trains_too():
    model = tiny_model(MLA_TINY, moe=None, mtp_layers=0)
    metrics = Trainer(model, EXACT, 1).step(random_batch(LENGTHS, 16), next_token_loss)
    assert "router/max_violation" not in metrics and "loss/mtp_nats" not in metrics


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 0}, {"workers": 0}])
def test_a_trainer_without_work_or_workers_is_refused(changes):
    with pytest.raises(ConfigError):
        TrainerConfig(**changes)
