"""Supervised fine-tuning: what is learnt, what is left out, resume, files of conversations."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.stopping import StopWhen
from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.config import build
from thinkstack.log import CURVE, Run
from thinkstack.stages.conversations import read_conversations
from thinkstack.stages.sft import SftConfig, make_lessons, sft
from thinkstack.text.chat import chat_format
from thinkstack.types import ConfigError, Interrupted, Message

ROWS = [
    {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": str(i + 1)}]}
    for i in range(24)
]


def written(folder: Path, rows: list[object], name: str = "talks.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def start(tmp_path: Path) -> str:
    model = tiny_model(GQA_TINY, vocab_size=360)
    save_model(tmp_path / "start", model, tiny_tokenizer(), "v3")
    return str(tmp_path / "start")


def config(start: str, folder: Path, **changes: object) -> SftConfig:
    table = {
        "start": start,
        "data": [written(folder, ROWS)],
        "rows": 2,
        "row_tokens": 48,
        "epochs": 3.0,
        "save_steps": 2,
    }
    trainer = {"dtype": "fp32", "micro_tokens": 96, "bias_speed": 0.0, "optim": {"learning_rate": 1e-2}}
    return build(SftConfig, table | {"trainer": trainer} | changes, "sft")


def test_the_forms_of_published_files_are_read(tmp_path: Path):
    rows = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                      {"role": "assistant", "content": "a", "reasoning_content": "t"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "thinking": "t", "response": "a", "model": "deepseek-r1"},
        {"question": "q", "answer": "a"},
    ]  # fmt: skip
    found = read_conversations([written(tmp_path, rows)])
    thought = Message(role="assistant", content="a", reasoning="t")
    asked, plain = Message(role="user", content="q"), Message(role="assistant", content="a")
    assert found == [
        [Message(role="system", content="s"), asked, thought],
        [asked, plain],
        [asked, thought],
        [asked, plain],
    ]
    assert read_conversations([str(tmp_path / "*.jsonl")]) == found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, "line 1, is no conversation"),
        ({"messages": [{"role": "user", "content": "q"}]}, "does not end with an answer of the assistant"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "role 'robot'"),
        ({"prompt": "q", "response": None}, "content NoneType"),
    ],
)
def test_rows_that_are_no_conversations_are_refused_with_their_place(tmp_path: Path, row: object, message: str):
    with pytest.raises(ConfigError, match=message):
        read_conversations([written(tmp_path, [row])])


def test_only_the_assistants_tokens_are_learnt(start: str, tmp_path: Path):
    chat = chat_format("v3", tiny_tokenizer())
    talk = [Message(role="user", content="1+2?"), Message(role="assistant", content="3")]
    (sample,) = make_lessons([talk], chat, config(start, tmp_path, held_out=0.0)).trained
    learnt = [token for token, is_learnt in zip(sample.ids, sample.learnt, strict=True) if is_learnt]
    assert learnt == chat.answer("3")
    assert list(sample.ids) == chat.prompt(talk[:1]) + chat.answer("3")


def test_long_conversations_are_left_out_and_counted_and_held_out_prompts_are_never_trained(start: str, tmp_path: Path):
    chat = chat_format("v3", tiny_tokenizer())
    talks = [[Message(role="user", content=f"{i}?"), Message(role="assistant", content="yes")] for i in range(200)]
    talks += [[talk[0], Message(role="assistant", content="no")] for talk in talks]
    talks.append([Message(role="user", content="long?"), Message(role="assistant", content="1 2 3 4 5 " * 40)])
    lessons = make_lessons(talks, chat, config(start, tmp_path, held_out=0.1))
    assert lessons.too_long == 1
    assert 20 <= len(lessons.held_out) <= 70
    prompts = [
        {sample.ids[: sample.learnt.index(1)] for sample in part} for part in (lessons.trained, lessons.held_out)
    ]
    assert not prompts[0] & prompts[1]


def test_fine_tuning_lowers_the_loss_on_conversations_it_never_saw(start: str, tmp_path: Path):
    run = Run(tmp_path / "run")
    sft(config(start, tmp_path, epochs=12.0, held_out=0.2), run)
    before, after = (row["held_out_nats"] for row in run.rows(CURVE))
    assert after < 0.8 * before
    assert load_chat(run.folder / "model").name == "v3"
    load_model(run.folder / "model")


def test_a_resumed_fine_tuning_ends_in_the_same_bytes(start: str, tmp_path: Path):
    cfg = config(start, tmp_path)
    sft(cfg, Run(tmp_path / "whole"))
    stopped = Run(tmp_path / "cut")
    stopped.stop = StopWhen(lambda: len(stopped.rows()) >= 2)
    with pytest.raises(Interrupted):
        sft(cfg, stopped)
    sft(cfg, Run(tmp_path / "cut"))
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(whole[name].equal(cut[name]) for name in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_nothing_left_to_learn_is_an_error_that_says_why(start: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="24 samples are longer than row_tokens=2"):
        sft(config(start, tmp_path, row_tokens=2, held_out=0.0), Run(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"data=\[\] teaches nothing"):
        config(start, tmp_path, data=[])


def test_adapters_of_a_4_bit_base_are_trained_and_merged(start: str, tmp_path: Path):
    """QLoRA from a checkpoint to a checkpoint that everybody opens."""
    trainer = {"dtype": "bf16", "bias_speed": 0.0, "lora": {"rank": 4, "base": "nf4"}, "optim": {"moments": "bf16"}}
    run = Run(tmp_path / "run")
    sft(config(start, tmp_path, trainer=trainer), run)
    assert (run.folder / "adapter" / "adapter_config.json").is_file()
    load_model(run.folder / "model")
