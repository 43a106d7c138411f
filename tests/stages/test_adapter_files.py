"""What a stage that trained adapters leaves: a PEFT folder beside the merged model."""

import json

import pytest
import torch

from thinkstack.checkpoint.model import load_model
from thinkstack.checkpoint.peft.adapter import load_adapter
from thinkstack.checkpoint.state import ADAPTER, AVERAGE, MODEL
from thinkstack.config import build
from thinkstack.log import Run
from thinkstack.models.lora import merge_adapters
from thinkstack.rl.config import RLConfig
from thinkstack.stages.pretrain import pretrain
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.stages.rl import train_rl
from thinkstack.types import ConfigError

SIZE = {"hidden_size": 32, "num_layers": 2, "intermediate_size": 32, "vocab_size": 400, "mtp_layers": 0}
LORA = {"bias_speed": 0.0, "dtype": "fp32", "lora": {"rank": 2, "targets": ["attention", "feed_forward", "experts"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of a few steps."""
    folder = tmp_path_factory.mktemp("base")
    settings = {"model": SIZE, "steps": 2, "rows": 2, "tasks": ["chain"], "save_steps": 0}
    pretrain(build(PretrainConfig, settings), Run(folder))
    return folder / MODEL


def assert_folders_agree(base, folder, name=MODEL):
    model = load_model(base)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    load_adapter(model, folder / ADAPTER)
    expected, found = merge_adapters(model).state_dict(), load_model(folder / name).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6, msg=key)
    assert any(not torch.equal(found[key], value) for key, value in start.items())
    assert torch.equal(found["embed.weight"], start["embed.weight"])


def test_further_pretraining_of_adapters_leaves_both_folders(base, tmp_path):
    settings = {"start": str(base), "steps": 3, "rows": 2, "tasks": ["chain"], "trainer": LORA, "ema_decay": 0.9}
    pretrain(build(PretrainConfig, settings), Run(tmp_path))
    assert_folders_agree(base, tmp_path)
    assert (tmp_path / AVERAGE / "model.safetensors").exists()
    config = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_reinforcement_learning_of_adapters_leaves_both_folders(base, tmp_path, monkeypatch):
    settings = {
        "start": str(base), "tasks": ["chain"], "steps": 1, "prompts_per_step": 2, "group_size": 2, "max_tokens": 4,
        "dynamic_sampling": False, "eval_steps": 0, "trainer": LORA | {"optim": {"learning_rate": 1e-2}},
        "loss": {"kl": 0.1}, "reward": {"parts": {"random": 1.0}},
    }  # fmt: skip
    train_rl(build(RLConfig, settings), Run(tmp_path))
    assert_folders_agree(base, tmp_path)


def test_adapters_of_fresh_weights_are_refused():
    with pytest.raises(ConfigError, match="randomly initialized weights"):
        build(PretrainConfig, {"trainer": LORA})
