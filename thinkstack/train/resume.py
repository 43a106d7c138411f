"""The state of a trainer as named tensors and numbers, and back. Nothing in the package draws from a global generator,
so weights, optimizer, step and the positions kept by the stages are all there is."""

from typing import Any

import torch
from torch import Tensor

from thinkstack.train.trainer import Trainer


def trainer_state(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, balance biases and optimizer moments as tensors (not copied), counts as numbers; frozen weights are
    where they came from."""
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items() if name not in frozen}
    for name, parameter in trainer.model.named_parameters():
        for slot, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{slot}.{name}"] = value
    return _unshared(tensors), {"step_count": trainer.step_count, "bad_steps": trainer.bad_steps}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights appear under two names; safetensors wants each memory once."""
    first_names: dict[int, str] = {}
    for name, value in tensors.items():
        first_names.setdefault(value.data_ptr(), name)
    return {name: tensors[name] for name in first_names.values()}


@torch.no_grad()
def restore_trainer(trainer: Trainer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put a trainer of the same configuration back to the state that `trainer_state` took."""
    for name, value in trainer.model.state_dict().items():
        if f"model.{name}" in tensors:
            value.copy_(tensors[f"model.{name}"])
    for name, parameter in trainer.model.named_parameters():
        slots = {key.split(".")[1] for key in tensors if key.startswith("optimizer.") and key.split(".", 2)[2] == name}
        if slots:
            trainer.optimizer.state[parameter] = {
                slot: tensors[f"optimizer.{slot}.{name}"].to(parameter.device, copy=True) for slot in sorted(slots)
            }
    trainer.workers.refresh()
    trainer.step_count, trainer.bad_steps = numbers["step_count"], numbers["bad_steps"]
