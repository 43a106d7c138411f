"""A trainer put back is the trainer that was saved, to the last bit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.train.loss import next_token_loss
from thinkstack.train.optim import OptimConfig
from thinkstack.train.resume import restore_trainer, trainer_state
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig

CFG = TrainerConfig(micro_batch_tokens=16, workers=2, optim=OptimConfig(warmup_steps=3, schedule="linear"))


def advance(trainer: Trainer, first: int, last: int) -> None:
    for seed in range(first, last):
        trainer.step(random_batch([9, 5, 12, 3], 16, seed=seed), next_token_loss)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cfg", [MLA_TINY, replace(GQA_TINY, tie_embeddings=True)], ids=["mla", "tied"])
def test_stopped_and_resumed_equals_straight(cfg, dtype, tmp_path):
    """Weights, biases, moments and the place in the schedule all come back; bitwise, through a file."""
    chosen = replace(CFG, dtype=dtype)
    straight = Trainer(tiny_model(cfg), chosen, 4)
    advance(straight, 0, 4)
    stopped = Trainer(tiny_model(cfg), chosen, 4)
    advance(stopped, 0, 2)
    tensors, numbers = trainer_state(stopped)
    save_file(tensors, tmp_path / "state.safetensors")
    resumed = Trainer(tiny_model(cfg, seed=5), chosen, 4)
    restore_trainer(resumed, load_file(tmp_path / "state.safetensors"), numbers)
    advance(resumed, 2, 4)
    assert resumed.step_count == 4
    for (name, mine), theirs in zip(
        resumed.model.state_dict().items(), straight.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
