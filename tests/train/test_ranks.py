"""Two processes over gloo against one: the sum over ranks is taken exactly once."""

from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from tests.tiny import random_batch, tiny_model
from thinkstack.train.loss import next_token_loss
from thinkstack.train.optim import OptimConfig
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig

LENGTHS = [9, 5, 12, 3, 11, 7, 4, 8, 6, 10]
CFG = TrainerConfig(
    dtype="fp32", micro_batch_tokens=16, balance_weight=0.1, bias_speed=0.01, optim=OptimConfig(clip_norm=1e9, eps=1e-3)
)


def train(rows: slice) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Two steps on these rows of the same batches."""
    model = tiny_model()
    trainer = Trainer(model, CFG, total_steps=2)
    for seed in range(2):
        batch = random_batch(LENGTHS, 16, seed=seed, prompt=2)
        metrics = trainer.step(batch.rows(rows), next_token_loss)
    return model.state_dict(), metrics


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    weights, metrics = train(slice(0, 2) if rank == 0 else slice(2, None))
    torch.distributed.destroy_process_group()
    numbers = {f"metric:{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    save_file(
        {name: value.contiguous() for name, value in weights.items()} | numbers, Path(folder) / f"{rank}.safetensors"
    )


def test_two_ranks_take_the_step_of_one(tmp_path):
    """Gradients that are averaged over ranks, or summed twice, train at another rate; rows are dealt 2 : 4 here.
    Statistics were once those of the own rank only."""
    weights, metrics = train(slice(None))
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, value in weights.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    for name, value in metrics.items():
        found = [ranks[f"metric:{name}"].item() for ranks in (first, second)]
        torch.testing.assert_close(torch.tensor(found), torch.full((2,), value), rtol=1e-4, atol=1e-6, msg=name)
