"""NF4: levels and scales by hand, the error against the published one, training with adapters."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.kernels.cpu import calls
from thinkstack.kernels.ops import dequantize_
from thinkstack.models.lora import LoRAConfig, adapters, merge_adapters
from thinkstack.models.quantized import quantized_weights
from thinkstack.quant.nf4 import LEVELS, NF4Blocks
from thinkstack.train.loss import next_token_loss
from thinkstack.train.optim import OptimConfig
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

needs_kernels = pytest.mark.skipif(not calls.available(), reason="no C++ compiler")


def there_and_back(weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(weight)
    dequantize_(NF4Blocks(), NF4Blocks().quantize(weight), out)
    return out


def test_the_levels_times_a_scale_come_back_exactly():
    weight = torch.tensor(LEVELS).repeat(4)[None] * 2.0
    assert torch.equal(there_and_back(weight), weight)
    qweight = NF4Blocks().quantize(weight)["qweight"]
    assert qweight.shape == (1, 32) and qweight[0, :3].tolist() == [0x01, 0x23, 0x45]


def test_the_error_on_normal_numbers_is_that_of_the_format():
    """arXiv:2305.14314 measures by perplexity; the mean square of NF4's rounding at blocks of 64 is about 0.9 % of the
    variance, for uniform 4-bit steps about 1.2 %."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = float((there_and_back(weight) - weight).square().mean())
    uniform = weight.unflatten(-1, (-1, 64))
    step = uniform.abs().amax(-1, keepdim=True) / 7
    worse = float(((uniform / step).round() * step - uniform).square().mean())
    assert error < 0.0095 < worse


def test_ragged_rows_zeros_and_stacks():
    weight = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    back = there_and_back(weight)
    assert torch.equal(back[1], torch.zeros(5, 70))
    assert float((back - weight).abs().max()) < 0.16 * float(weight.abs().max())
    parts = NF4Blocks().quantize(weight)
    assert sum(part.nbytes for part in parts.values()) == 3 * 5 * (64 + 2 * 2)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 70), (7, 64), (1, 4, 192), (2, 1), (0, 64), (3, 127)])
def test_the_kernel_dequantizes_as_torch_does(dtype, shape, on_torch):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(there_and_back(weight), on_torch(there_and_back, weight))


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
def test_adapters_learn_beside_a_4_bit_base(cfg):
    """QLoRA: only the adapters change, the loss falls, and the merged model computes what the adapted one does."""
    settings = TrainerConfig(
        dtype="fp32", bias_speed=0.0, balance_weight=0.0, mtp_weight=0.0, optim=OptimConfig(learning_rate=3e-2),
        lora=LoRAConfig(rank=4, base="nf4"),
    )  # fmt: skip
    model = tiny_model(cfg)
    trainer, batch = Trainer(model, settings, 20), random_batch([9, 12, 7], 16)
    before = {name: part.clone() for name, p in quantized_weights(model).items() for part in p.buffers()}
    losses = [trainer.step(batch, next_token_loss)["loss/next_token_nats"] for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    after = {name: part for name, p in quantized_weights(model).items() for part in p.buffers()}
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(adapter.lora_b.any()) for adapter in adapters(model).values())
    plain = merge_adapters(model)
    assert not quantized_weights(plain)
    torch.testing.assert_close(plain(batch.ids), model(batch.ids), atol=2e-4, rtol=2e-4)


def test_a_4_bit_base_takes_less_than_a_fifth_of_fp32():
    model = tiny_model(replace(GQA_TINY, hidden_size=128, intermediate_size=256))
    linear = [p for n, p in model.layers.named_parameters() if p.dim() > 1]
    total = sum(p.nbytes for p in linear)
    Trainer(model, TrainerConfig(dtype="fp32", bias_speed=0.0, lora=LoRAConfig(rank=2, base="nf4")), 1)
    assert sum(part.nbytes for p in quantized_weights(model).values() for part in p.buffers()) < total / 7


def test_experts_cannot_be_adapted_in_a_quantized_base():
    settings = TrainerConfig(bias_speed=0.0, lora=LoRAConfig(rank=2, base="nf4", targets=("experts",)))
    with pytest.raises(ConfigError, match="is quantized as nf4"):
        Trainer(tiny_model(), settings, 1)
