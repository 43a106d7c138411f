"""On a CUDA device, against the CPU: run with `pytest -m gpu tests/gpu`. Bounds are those of the dtype."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.engine.requests import FUSED
from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.kernels import ops
from thinkstack.kernels.reference import padded_experts
from thinkstack.models.config import named
from thinkstack.models.quantized import dequantize_model
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import BLOCK, dequantize, quantize
from thinkstack.train.fp8 import linear
from thinkstack.train.loss import next_token_loss
from thinkstack.train.optim import OptimConfig
from thinkstack.train.passes import batch_logprobs
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
LENGTHS = [60, 50, 40, 30, 20, 90, 80, 10]
BOTH = pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
EXACT = TrainerConfig(dtype="fp32", micro_batch_tokens=256, optim=OptimConfig(clip_norm=1e9))


def trained(device: str, steps: int = 3, **changes) -> Trainer:
    trainer = Trainer(tiny_model(), replace(EXACT, device=device, **changes), 10)
    for step in range(steps):
        trainer.step(random_batch(LENGTHS, 96, seed=step), next_token_loss)
    return trainer


def logprobs(model: Transformer) -> torch.Tensor:
    return batch_logprobs(model, random_batch(LENGTHS, 96), 1.0, 256)


@BOTH
def test_the_model_gives_the_cpus_logprobs_in_fp32(cfg):
    model = tiny_model(cfg)
    expected = logprobs(model)
    torch.testing.assert_close(logprobs(model.cuda()), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"checkpoint_layers": True}], ids=["none", "checkpointed"])
def test_training_steps_in_fp32_are_those_of_the_cpu(changes):
    there, here = trained("cuda", **changes), trained("cpu")
    assert next(there.model.parameters()).is_cuda
    torch.testing.assert_close(logprobs(there.model), logprobs(here.model), atol=1e-2, rtol=1e-2)


def test_a_run_resumes_on_the_device():
    """Optimizer moments must come back to where the parameters are."""
    straight, first = trained("cuda", 3), trained("cuda", 2)
    tensors, numbers = trainer_state(first)
    second = Trainer(tiny_model(), replace(EXACT, device="cuda"), 10)
    restore_trainer(second, {name: value.cpu() for name, value in tensors.items()}, numbers)
    second.step(random_batch(LENGTHS, 96, seed=2), next_token_loss)
    torch.testing.assert_close(logprobs(second.model), logprobs(straight.model), atol=1e-3, rtol=1e-3)


@BOTH
@pytest.mark.parametrize("with_experts", [False, True])
def test_the_engine_samples_from_the_models_distribution(cfg, with_experts):
    if with_experts and cfg.moe is None:
        pytest.skip("no experts to return")
    model, prompt = tiny_model(cfg).cuda(), [3, 1, 4, 1, 5]
    engine = Engine(model, EngineConfig(max_num_seqs=16, return_routed_experts=with_experts))
    for found in engine.generate([prompt], [SamplingParams(max_tokens=20, n=4)])[0]:
        ids = torch.tensor([[*prompt, *found.token_ids]], device="cuda")
        logits = model(ids[:, :-1])[0, len(prompt) - 1 :]
        expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).detach().cpu()
        torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=1e-3, rtol=1e-3)
        assert (found.experts is not None) == with_experts


@pytest.mark.parametrize("cfg", [FUSED, GQA_TINY], ids=["mla", "gqa"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recorded_steps_say_what_plain_ones_say(cfg, dtype):
    """Rows that end one after the other, a change of weights in place and one of the model; drawn tokens may part where
    two are as likely, their log-probabilities are those of the model. Experts in fp32 are not recorded."""
    model = tiny_model(cfg, max_positions=400).cuda()
    asked = [[3, 1, 4, 1, 5] * n for n in (1, 20, 7, 2, 40)]
    samplings = [SamplingParams(max_tokens=60 + 9 * n, seed=n, n=1 + n % 2) for n in range(5)]
    engine, plain = (Engine(model, EngineConfig(max_num_seqs=16, dtype=dtype, graphs=on)) for on in (True, False))
    assert plain.runner.graphs is None
    assert (engine.runner.graphs is None) == (cfg.moe is not None and dtype == "fp32")
    for change in range(3):
        if change == 1:
            with torch.no_grad():
                model.head.weight.mul_(1.5)
        if change == 2:
            model = tiny_model(cfg, max_positions=400, seed=1).cuda()
        for each in (engine, plain):
            each.load_weights(model, version=change)
        pairs = zip(engine.generate(asked, samplings), plain.generate(asked, samplings), strict=True)
        pairs = [pair for group in pairs for pair in zip(*group, strict=True)]
        same = [a.token_ids == b.token_ids for a, b in pairs]
        assert sum(same) > (len(same) - 1 if dtype == "fp32" else len(same) // 3)
        for (a, b), is_same in zip(pairs, same, strict=True):
            if is_same:
                bound = 1e-3 if dtype == "fp32" else 0.1
                torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=bound, rtol=0)
    if engine.runner.graphs is not None:  # seven answers, which end at five different lengths
        assert sorted(engine.runner.graphs._recordings) == [1, 4, 8]


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_weights_sample_what_dequantized_ones_sample(weights):
    model = tiny_model(GQA_TINY).cuda()
    engine = Engine(model, EngineConfig(max_num_seqs=4, dtype="bf16", weights=weights))
    wide = dequantize_model(copy.deepcopy(engine.runner._model))
    found = engine.generate([[3, 1, 4]], [SamplingParams(max_tokens=30)])[0][0]
    ids = torch.tensor([[3, 1, 4, *found.token_ids]], device="cuda")
    expected = torch.log_softmax(wide(ids[:, :-1])[0, 2:].float(), -1).gather(1, ids[0, 3:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(found.logprobs), expected.detach().cpu(), atol=0.1, rtol=0)


def test_grouped_experts_run_and_agree_with_the_reference():
    generator = torch.Generator().manual_seed(0)
    x, w_in, w_out = (torch.randn(s, generator=generator).mul_(0.3) for s in ((300, 64), (8, 256, 64), (8, 64, 128)))
    weights, experts = torch.rand(300, 2, generator=generator), torch.randint(8, (300, 2), generator=generator)
    given = [value.cuda().bfloat16().requires_grad_() for value in (x, w_in, w_out)]
    found = ops.experts(given[0], weights.cuda(), experts.cuda(), given[1], given[2])
    exact = [value.detach().double().requires_grad_() for value in given]
    expected = padded_experts(exact[0], weights.cuda(), experts.cuda(), exact[1], exact[2])
    assert (found - expected).norm() / expected.norm() < 0.02
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, given, grad.bfloat16()), torch.autograd.grad(expected, exact, grad), strict=True
    ):
        assert (ours - theirs).norm() / theirs.norm() < 0.03


def test_compiled_blocks_with_flex_attention_take_the_step_of_eager_ones():
    """v3-tiny in bf16: head sizes of 64 and 48, rows of several documents."""
    ends = []
    for compiled in (False, True):
        model = Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0))
        cfg = TrainerConfig(device="cuda", compile=compiled, micro_batch_tokens=1024)
        trainer = Trainer(model, cfg, 4)
        assert trainer.workers.compute_model.is_compiled == compiled
        stats = [
            trainer.step(random_batch([200, 56, 100, 156, 256], 256, vocab_size=640, seed=s), next_token_loss)
            for s in range(4)
        ]
        ends.append(torch.tensor([row["loss/next_token_nats"] for row in stats]))
    torch.testing.assert_close(*ends, atol=0.05, rtol=0.02)


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="block-scaled products need Hopper",
)


@hopper
@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("b_rows", [1, BLOCK])
@pytest.mark.parametrize("K", [128, 640, 1024])
def test_the_devices_block_products_are_the_plain_ones(b_rows, K, power_of_two):
    """Scales are laid out by rules of their own there; K of 640 is five blocks, which are padded to eight."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, K, generator=generator).exp().cuda() for n in (256, 384))
    qa, qb = quantize(a, 1, power_of_two), quantize(b, b_rows, power_of_two)
    expected = dequantize(*qa, 1).double() @ dequantize(*qb, b_rows).double().T
    found = ops.scaled_matmul(qa, qb, b_rows, torch.bfloat16)
    assert (found - expected).norm() / expected.norm() < 0.01


@hopper
def test_a_layer_in_8_bits_and_its_gradients_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(s, generator=generator) for s in ((256, 512), (384, 512), (256, 384)))
    found = []
    for device in ("cpu", "cuda"):
        given = [value.to(device).bfloat16().requires_grad_() for value in (x, w)]
        out = linear(*given, False)
        found.append([value.float().cpu() for value in (out, *torch.autograd.grad(out, given, grad.to(out)))])
    for here, there in zip(*found, strict=True):
        assert (here - there).norm() / here.norm() < 0.02
