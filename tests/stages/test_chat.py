"""Streaming a turn: halves wait for their other half."""

import random
from pathlib import Path

import pytest
import torch

from thinkstack.checkpoint.model import pick_precision, save_model
from thinkstack.kernels import choice
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.stages.chat import ChatSession
from thinkstack.text.chat import chat_format
from thinkstack.text.stream import StreamEvent, parse_stream, stream_text
from thinkstack.text.tokenizer import train_tokenizer
from thinkstack.types import SamplingParams

TURN = "<think>\n1+2=3\n</think>\n<answer>3</answer>"


def merged_events(chunks: list[str]) -> list[tuple[str, str]]:
    """Pieces with neighbors of one kind put together."""
    out: list[tuple[str, str]] = []
    for piece in parse_stream(iter(chunks)):
        if out and out[-1][0] == piece.kind:
            out[-1] = (piece.kind, out[-1][1] + piece.text)
        else:
            out.append((piece.kind, piece.text))
    return out


def test_a_turn_is_sorted_the_same_however_it_is_cut():
    unsplit = merged_events([TURN])
    assert unsplit == [("thinking", "\n1+2=3\n"), ("text", "\n"), ("answer", "3")]
    rng = random.Random(0)
    for _ in range(200):
        cuts = sorted(rng.sample(range(1, len(TURN)), rng.randrange(1, 12)))
        chunks = [TURN[a:b] for a, b in zip([0, *cuts], [*cuts, len(TURN)], strict=True)]
        assert merged_events(chunks) == unsplit


def test_half_a_tag_waits_and_an_unfinished_one_is_shown_in_the_end():
    pieces = parse_stream(iter(["a<thi", "s"]))
    assert next(pieces) == StreamEvent("text", "a")
    assert merged_events(["1 < 2 <"]) == [("text", "1 < 2 <")]


def test_half_a_character_waits_for_its_other_half():
    tokenizer = train_tokenizer(["hello"], 300)
    chat = chat_format("r1_zero_short", tokenizer)
    ids = tokenizer.encode("从a")
    assert len(ids) == 4, "three bytes and a letter"
    assert list(stream_text(chat.text_of, iter(ids))) == ["从", "a"]


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
