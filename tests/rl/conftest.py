"""The bandit as a fixture."""

from pathlib import Path

import pytest
import torch

from tests.rl.bandit import ARMS, ArmChat, ArmStream, arm_config, arm_reward
from thinkstack.log import Run
from thinkstack.models.config import GQAConfig, ModelConfig
from thinkstack.models.transformer import Transformer
from thinkstack.rl.trainer import RLTrainer


@pytest.fixture
def make_bandit(tmp_path: Path):
    """Builds a RLTrainer on the bandit; `name` tells runs of one test apart, `shape` is another model than the
    usual."""

    def make(seed: int = 0, name: str = "run", shape: ModelConfig | None = None, **changes: object) -> RLTrainer:
        cfg = shape or ModelConfig(
            family="llama",
            vocab_size=2 + ARMS,
            hidden_size=32,
            num_layers=1,
            attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=16),
            intermediate_size=64,
            max_positions=64,
            init_std=0.1,
        )
        model = Transformer(cfg).initialize(torch.Generator().manual_seed(seed))
        rl = RLTrainer(arm_config(seed=seed, **changes), Run(tmp_path / name), model, ArmChat())  # type: ignore[arg-type]
        rl.stream = ArmStream(seed)  # type: ignore[assignment]
        rl.reward = arm_reward()
        return rl

    return make
