"""The stage: ramps and averages that resume, and a context made longer from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.stopping import StopWhen
from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.config import build, merge
from thinkstack.log import Run
from thinkstack.stages import pretrain as stage
from thinkstack.stages.pretrain import pretrain
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.text.tokenizer import CONTROL, FIM_HOLE
from thinkstack.types import ConfigError, Interrupted

MODEL = {
    "hidden_size": 32,
    "num_layers": 2,
    "vocab_size": 480,
    "intermediate_size": 48,
    "max_positions": 256,
    "attention": {
        "num_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "moe": {"moe_intermediate_size": 16},
}
TINY = {"model": MODEL, "steps": 6, "rows": 4, "row_tokens": 256, "save_steps": 0, "trainer": {"dtype": "fp32"}}


@pytest.fixture(autouse=True)
def short_tokenizer_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "TOKENIZER_DOCUMENTS", 200)


def config(**changes: Any) -> PretrainConfig:
    return build(PretrainConfig, merge(TINY, changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def stopped_after(steps: int, folder: Path) -> Run:
    """A run that is asked to stop once its metrics have that many rows."""
    run = Run(folder)
    run.stop = StopWhen(lambda: len(run.rows()) >= steps)
    return run


RAMP = {"rows_start": 2, "ramp_share": 0.5, "ema_decay": 0.9}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_ramp_with_an_average_resumes_to_the_last_bit(optimizer: str, tmp_path: Path):
    cfg = config(**RAMP, trainer={"optim": {"optimizer": optimizer, "schedule": "v3"}}, position_edges=(64,))
    straight = Run(tmp_path / "straight")
    pretrain(cfg, straight)
    with pytest.raises(Interrupted):
        pretrain(cfg, stopped_after(3, tmp_path / "stopped"))
    resumed = Run(tmp_path / "stopped")
    pretrain(cfg, resumed)
    assert [row["train/rows"] for row in straight.rows()] == cfg.batch_schedule().rows == [2, 2, 2, 3, 3, 4, 4, 4]
    assert resumed.rows() == straight.rows()
    assert resumed.rows("curve.jsonl") == straight.rows("curve.jsonl") and len(straight.rows("curve.jsonl")) == 2
    for name in ("model", "model-ema"):
        first, second = weights(tmp_path / "straight" / name), weights(tmp_path / "stopped" / name)
        assert all(torch.equal(second[key], value) for key, value in first.items())


def test_the_rate_follows_the_tokens_of_a_ramp(tmp_path: Path):
    """Rows 2, 2, 2, 3, 3, 4, 4, 4 of 24: half of the tokens are seen after five steps, not after four."""
    optim = {"learning_rate": 1.0, "schedule": "linear", "final_share": 0.0}
    pretrain(config(**RAMP, trainer={"optim": optim}), Run(tmp_path))
    found = [row["train/learning_rate"] for row in Run(tmp_path).rows()]
    assert found == pytest.approx([1 - seen / 24 for seen in (0, 2, 4, 6, 9, 12, 16, 20)])


def test_the_average_is_a_model_of_its_own(tmp_path: Path):
    pretrain(config(ema_decay=0.9), Run(tmp_path / "averaged"))
    pretrain(config(), Run(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "model-ema").exists()
    last, plain = weights(tmp_path / "averaged" / "model"), weights(tmp_path / "plain" / "model")
    assert all(torch.equal(last[key], value) for key, value in plain.items()), "the average changes no training"
    average = weights(tmp_path / "averaged" / "model-ema")
    assert not torch.equal(average["model.norm.weight"], last["model.norm.weight"])
    assert load_model(tmp_path / "averaged" / "model-ema").cfg == load_model(tmp_path / "averaged" / "model").cfg


def test_holes_and_joined_tokens_are_in_a_new_tokenizer_only_where_they_are_used(tmp_path: Path):
    pretrain(config(steps=1), Run(tmp_path / "plain"))
    pretrain(config(steps=1, fim_rate=0.1, boundary_split_share=0.1), Run(tmp_path / "both"))
    plain, both = (load_chat(tmp_path / name / "model").tokenizer for name in ("plain", "both"))
    assert tuple(plain.control) == CONTROL
    assert both.control[FIM_HOLE] == len(CONTROL) and plain.vocab_size == both.vocab_size == 480
    later = build(PretrainConfig, {"start": str(tmp_path / "plain" / "model"), "row_tokens": 256, "fim_rate": 0.1})
    with pytest.raises(ConfigError, match="set fim_rate=0"):
        pretrain(later, Run(tmp_path / "later"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fim_rate": 1.5}, "fim_rate=1.5"),
        ({"boundary_split_share": -0.1}, "boundary_split_share=-0.1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"rows_start": 9, "ramp_share": 0.1}, "rows_start=9"),
        ({"position_edges": (64, 32)}, "position_edges"),
        ({"row_tokens": 257}, "row_tokens=257 exceeds the model's max_positions=256"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_ramp_in_micro_batches_takes_the_steps_of_whole_batches(tmp_path: Path):
    """Steps of 2, 3 and 4 rows, cut into single rows or not cut: every loss is divided by its own step's tokens."""
    found = []
    for micro_batch_tokens in (256, 1024):
        trainer = {"micro_batch_tokens": micro_batch_tokens, "balance_weight": 0.1, "optim": {"eps": 1e-3}}
        pretrain(config(**RAMP, trainer=trainer), Run(tmp_path / str(micro_batch_tokens)))
        found.append(Run(tmp_path / str(micro_batch_tokens)).rows())
    for cut, unsplit in zip(*found, strict=True):
        for name in ("loss/next_token_nats", "loss/mtp_nats", "train/grad_norm", "router/balance_loss"):
            assert cut[name] == pytest.approx(unsplit[name], rel=1e-4), (name, cut["step"])
