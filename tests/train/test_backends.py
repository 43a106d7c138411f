"""Other ways to compute a step: 8-bit blocks, compiled blocks, another device."""

import statistics
from dataclasses import replace

import pytest
import torch

from tests.tiny import MLA_TINY, random_batch, tiny_model
from thinkstack.data import Example, PackedStream
from thinkstack.machine import pick_device
from thinkstack.models.config import named
from thinkstack.models.lora import LoRAConfig
from thinkstack.models.transformer import Transformer
from thinkstack.train.fp8 import FP8Linear
from thinkstack.train.loss import next_token_loss
from thinkstack.train.optim import OptimConfig
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

LENGTHS = [9, 5, 12, 3, 11, 7, 4, 8]
EXACT = TrainerConfig(dtype="fp32", micro_batch_tokens=64)


def test_auto_is_the_cpu_where_there_is_no_other_device_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match='use device="auto" or device="cpu"'):
        pick_device("cuda")
    with pytest.raises(ConfigError, match="no CUDA device"):
        Trainer(tiny_model(), replace(EXACT, device="cuda"), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fp8": "fp32", "dtype": "fp32"}, "dtype='bf16'"), ({"device": "cuda", "workers": 2}, "workers=2")],
)
def test_settings_that_undo_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(EXACT, **changes)


def test_a_batch_moves_to_the_device_and_logprobs_come_back():
    """The meta device stands for any other: nothing may be left behind on the CPU."""
    batch = replace(random_batch(LENGTHS, 16), advantages=torch.ones(1), experts=torch.ones(1, dtype=torch.int16))
    moved = batch.to(torch.device("meta"))
    given = {name for name, value in vars(batch).items() if value is not None}
    assert {name for name, value in vars(moved).items() if value is not None and value.is_meta} == given
    assert batch_logprobs(tiny_model(), random_batch(LENGTHS, 16), 1.0, 64).device == batch.ids.device


@pytest.mark.parametrize("fp8", ["fp32", "ue8m0"])
@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=4)], ids=["whole", "adapters"])
def test_a_step_in_8_bit_blocks_moves_the_fp32_weights(fp8, lora):
    """The masters stay fp32, the copies multiply in 8 bits; the direction is that of bf16 up to rounding."""
    batch, gradients = random_batch([30] * 8, 32), []
    for kind in ("off", fp8):
        model = tiny_model(hidden_size=64)
        cfg = TrainerConfig(dtype="bf16", fp8=kind, micro_batch_tokens=128, bias_speed=0.0, lora=lora)
        trainer = Trainer(model, replace(cfg, optim=OptimConfig(clip_norm=1e9)), 3)
        seen: dict[str, torch.Tensor] = {}
        trainer.optimizer.register_step_pre_hook(
            lambda *_, m=model, s=seen: s.update(
                {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
            )
        )
        trainer.step(batch, next_token_loss)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert any(isinstance(m, FP8Linear) for m in trainer.workers.compute_model.modules()) == (kind != "off")
        gradients.append(torch.cat([g.flatten() for g in seen.values()]))
    similar = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert 0.8 < similar < 0.99999


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["fp32", "ue8m0"])
def test_v3_tiny_in_8_bit_blocks_learns_like_in_bf16(fp8):
    """50 steps of one stream from equal weights: the mean loss of the last 10 within 2 %."""
    ends = []
    for kind in ("off", fp8):
        model = Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0))
        cfg = TrainerConfig(optim=OptimConfig(learning_rate=2e-3, warmup_steps=10), fp8=kind, micro_batch_tokens=640)
        trainer, stream = Trainer(model, cfg, 50), PackedStream(_sums, 8, 160)
        losses = [trainer.step(stream.take(), next_token_loss)["loss/next_token_nats"] for _ in range(50)]
        ends.append(statistics.fmean(losses[-10:]))
    print(f"bf16 {ends[0]:.4f} nats, fp8 with {fp8} scales {ends[1]:.4f}: {ends[1] / ends[0] - 1:+.2%}")
    assert ends[0] < 3.0, "something was learnt"
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def _sums(index: int) -> Example:
    """Sentences with something to learn: two numbers and their sum, digit by digit."""
    a, b = (index * 7919 + 13) % 1000, (index * 104729 + 7) % 1000
    ids = [1, *(10 + int(digit) for digit in f"{a:03d}{b:03d}{a + b:04d}"), 2]
    return Example(tuple(ids), (0, *(1,) * (len(ids) - 1)))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_compiled_blocks_take_the_step_of_eager_ones(checkpoint_layers):
    """Compiled once; the model that the engine shares is not the compiled one."""
    ends = []
    for compiled in (False, True):
        model = tiny_model(MLA_TINY)
        cfg = replace(EXACT, compile=compiled, checkpoint_layers=checkpoint_layers)
        trainer = Trainer(model, cfg, 3)
        for step in range(2):
            trainer.step(random_batch(LENGTHS, 16, seed=step), next_token_loss)
        assert (trainer.workers.compute_model is model) != compiled
        ends.append(batch_logprobs(model, random_batch(LENGTHS, 16), 1.0, 64))
    torch.testing.assert_close(*ends, atol=1e-3, rtol=1e-3)
