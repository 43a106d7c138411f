"""Activation checkpointing: the same step for less memory."""

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.kernels.cpu import calls
from thinkstack.models.transformer import Transformer
from thinkstack.train.loss import next_token_loss
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch


def batch() -> Batch:
    return random_batch([20, 9, 14, 3, 17, 8], 24)


def step(model: Transformer, checkpoint_layers: bool, **changes: object) -> tuple[dict[str, float], Trainer]:
    cfg = TrainerConfig(**({"dtype": "fp32", "micro_batch_tokens": 48} | changes), checkpoint_layers=checkpoint_layers)
    trainer = Trainer(model, cfg, 4)
    trainer.step(batch(), next_token_loss)
    return trainer.step(batch(), next_token_loss), trainer


@pytest.fixture(params=["kernels", "torch"])
def path(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a block."""
    if request.param == "torch":
        monkeypatch.setattr("thinkstack.kernels.cpu.calls.available", lambda: False)
    elif not calls.available():
        pytest.skip("no compiler")
    return request.param


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["experts and MTP", "dense"])
def test_the_same_step_to_the_last_bit(cfg, dtype: str, workers: int, path: str):
    metrics, plain = step(tiny_model(cfg), False, dtype=dtype, workers=workers)
    again, saving = step(tiny_model(cfg), True, dtype=dtype, workers=workers)
    assert again == metrics, "experts' loads included: a block computed twice is counted once"
    for (name, mine), theirs in zip(saving.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def saved_between_passes(model: Transformer) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    num_bytes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def save(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            num_bytes[storage.data_ptr()] = storage.nbytes()
        return x

    given = batch()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        hidden = model.trunk(given.ids, given.positions, given.document_ids).hidden
    del hidden
    return sum(num_bytes.values())


def test_only_the_input_of_a_block_is_saved(path: str):
    """Four bytes for each number of x, once a layer; the rest is what the final norm keeps."""
    shallow, deep = tiny_model(GQA_TINY, num_layers=2), tiny_model(GQA_TINY, num_layers=6)
    plain = saved_between_passes(deep) - saved_between_passes(shallow)
    for block in (*shallow.blocks(), *deep.blocks()):
        block.checkpoints_activations = True
    saving = saved_between_passes(deep) - saved_between_passes(shallow)
    inputs = 4 * batch().ids.numel() * GQA_TINY.hidden_size * 4  # 4 more layers, 4 bytes
    assert inputs <= saving <= 1.1 * inputs
    assert plain > 8 * inputs


def test_generation_does_not_pay_for_it():
    model = tiny_model(MLA_TINY)
    Trainer(model, TrainerConfig(dtype="fp32", checkpoint_layers=True), 1)
    called = []
    model.layers[0].compute = lambda *given: called.append(given) or (given[0], None)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert len(called) == 1
