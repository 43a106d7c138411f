"""Chats: precision, and which turns a model is shown."""

from pathlib import Path

import pytest
import torch

from thinkstack.checkpoint.model import pick_precision, save_model
from thinkstack.kernels import choice
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.stages.chat import ChatSession
from thinkstack.text.tokenizer import train_tokenizer
from thinkstack.types import SamplingParams


def test_large_models_are_run_in_bf16_where_it_is_fast_unless_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_model(tmp_path / "model", Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0)))
    assert pick_precision(tmp_path / "model", "auto") == "fp32"
    monkeypatch.setattr("thinkstack.checkpoint.model.AUTO_BF16_PARAMETERS", 1_000_000)
    for fast in ("bf16", "fp32"):
        monkeypatch.setattr(choice.choices(), "auto_dtype", fast)
        assert pick_precision(tmp_path / "model", "auto") == fast
        assert pick_precision(tmp_path / "model", "auto", "int8") == "bf16"
    assert pick_precision(tmp_path / "model", "fp32") == "fp32"


def test_r1_zero_gets_one_question_at_a_time_and_a_chat_model_the_whole_conversation(tmp_path: Path):
    """R1-Zero, trained on single questions, answered the second one as if it went on from the first."""
    tokenizer = train_tokenizer(["What is the last digit?"], 640)
    model = Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0))
    remembered = {}
    for name in ("r1_zero_short", "v3"):
        save_model(tmp_path / name, model, tokenizer, name)
        session = ChatSession(str(tmp_path / name), SamplingParams(max_tokens=4))
        for question in ("one", "two"):
            list(session.ask(question))
        remembered[name] = [message.content for message in session.messages if message.role == "user"]
    assert remembered == {"r1_zero_short": ["two"], "v3": ["one", "two"]}
