"""Convert the state of a trainer to and from named tensors and numbers.

No code of the package uses a global random generator, so weights, optimizer, step count and the stream positions that
the stages save are the complete state.
"""

from typing import Any

import torch
from torch import Tensor

from thinkstack.train.trainer import Trainer


def trainer_state(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained weights, balance biases and optimizer moments as tensors (not copied), and counters as numbers.

    Frozen weights are left out; they are loaded from the checkpoint that the run starts from.
    """
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items() if name not in frozen}
    for name, parameter in trainer.model.named_parameters():
        for slot, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{slot}.{name}"] = value
    return _unshared(tensors), {"step_count": trainer.step_count, "bad_steps": trainer.bad_steps}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the second name of tied weights: safetensors accepts each storage once."""
    first_names: dict[int, str] = {}
    for name, value in tensors.items():
        first_names.setdefault(value.data_ptr(), name)
    return {name: tensors[name] for name in first_names.values()}


@torch.no_grad()
def restore_trainer(trainer: Trainer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Restore the state from `trainer_state` into a trainer of the same configuration."""
    for name, value in trainer.model.state_dict().items():
        if f"model.{name}" in tensors:
            value.copy_(tensors[f"model.{name}"])
    for name, parameter in trainer.model.named_parameters():
        slots = {key.split(".")[1] for key in tensors if key.startswith("optimizer.") and key.split(".", 2)[2] == name}
        if slots:
            trainer.optimizer.state[parameter] = {
                slot: tensors[f"optimizer.{slot}.{name}"].to(parameter.device, copy=True) for slot in sorted(slots)
            }
    trainer.workers.update_copies()
    trainer.step_count, trainer.bad_steps = numbers["step_count"], numbers["bad_steps"]
