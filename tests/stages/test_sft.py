"""Supervised fine-tuning: what is trained on, what is left out, resume."""

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.stopping import StopWhen
from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.config import build
from thinkstack.data import Example, collate
from thinkstack.log import CURVE, Run
from thinkstack.stages.conversations import Conversation, read_conversations
from thinkstack.stages.sft import SftConfig, SftDataset, make_sft_dataset, sft
from thinkstack.text.chat import chat_format
from thinkstack.text.tokenizer import CONTROL, TOOLS, train_tokenizer
from thinkstack.types import ConfigError, Interrupted, Message

ROWS = [
    {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": str(i + 1)}]}
    for i in range(24)
]


def write_rows(folder: Path, rows: list[object], name: str = "talks.jsonl") -> str:
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
        "data": [write_rows(folder, ROWS)],
        "rows": 2,
        "row_tokens": 48,
        "epochs": 3.0,
        "save_steps": 2,
    }
    trainer = {"dtype": "fp32", "micro_batch_tokens": 96, "bias_speed": 0.0, "optim": {"learning_rate": 1e-2}}
    return build(SftConfig, table | {"trainer": trainer} | changes, "sft")


def test_only_the_assistants_tokens_are_trained_on(start: str, tmp_path: Path):
    chat = chat_format("v3", tiny_tokenizer())
    messages = [Message(role="user", content="1+2?"), Message(role="assistant", content="3")]
    (example,) = make_sft_dataset([Conversation(messages)], chat, config(start, tmp_path, held_out=0.0)).trained
    loss_mask = [token for token, is_trained in zip(example.ids, example.loss_mask, strict=True) if is_trained]
    assert loss_mask == chat.answer("3")
    assert list(example.ids) == chat.prompt(messages[:1]) + chat.answer("3")


@pytest.mark.parametrize("name", ["r1_zero_short", "v3", "r1", "r1_0528", "v3_1"])
def test_a_masked_turn_is_context_and_not_trained_on(start: str, tmp_path: Path, name: str):
    """There was nowhere to keep the weight, so the bad answer was trained on."""
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "5", "weight": 0}]
    turns += [{"role": "user", "content": "no"}, {"role": "assistant", "content": "3", "weight": 1}]
    turns += [{"role": "user", "content": "and 4?"}, {"role": "assistant", "content": "9", "train": False}]
    chat = chat_format(name, tiny_tokenizer())
    conversations = read_conversations([write_rows(tmp_path, [{"messages": turns}], "masked.jsonl")], with_masks=True)
    (example,) = make_sft_dataset(conversations, chat, config(start, tmp_path, held_out=0.0)).trained
    batch = collate([example], [[0]], 48)
    prompt, loss_mask = chat.prompt(conversations[0][:3]), batch.targets[batch.loss_mask > 0].tolist()
    assert list(example.ids) == prompt + loss_mask
    assert chat.text_of(loss_mask).endswith("3") and "5" in chat.text_of(prompt)


@pytest.mark.parametrize("tools", [(), ({"type": "function", "function": {"name": "add", "description": "Adds."}},)])
def test_tools_and_calls_of_a_row_are_trained_on_or_refused_with_its_place(start: str, tmp_path: Path, tools: tuple):
    """A format without calls trained the model on the empty words beside one."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    conversations = read_conversations(
        [write_rows(tmp_path, [*ROWS[:2], {"messages": turns, "tools": tools}], "calls.jsonl")]
    )
    cfg = config(start, tmp_path, held_out=0.0, row_tokens=1000)
    tokenizer = train_tokenizer(["1+2? add"], 340, control=(*CONTROL, *TOOLS))
    example = make_sft_dataset(conversations, chat_format("v3", tokenizer), cfg).trained[2]
    loss_mask = [token for token, is_trained in zip(example.ids, example.loss_mask, strict=True) if is_trained]
    assert 'add\n```json\n{"a": 1}\n```' in tokenizer.decode(loss_mask)
    assert ("Adds." in tokenizer.decode(example.ids)) == bool(tools)
    for name, message in (
        ("r1_zero", "'r1_zero' does not support tools"),
        ("v3", "no (control )?token '?<｜tool▁calls▁begin｜>"),
    ):
        with pytest.raises(ConfigError, match=rf"calls\.jsonl line 3: .*{message}"):
            make_sft_dataset(conversations, chat_format(name, tiny_tokenizer()), cfg)


def test_long_conversations_are_left_out_and_counted_and_held_out_prompts_are_never_trained(start: str, tmp_path: Path):
    chat = chat_format("v3", tiny_tokenizer())
    conversations = [
        [Message(role="user", content=f"{i}?"), Message(role="assistant", content="yes")] for i in range(200)
    ]
    conversations += [[messages[0], Message(role="assistant", content="no")] for messages in conversations]
    conversations.append([Message(role="user", content="long?"), Message(role="assistant", content="1 2 3 4 5 " * 40)])
    dataset = make_sft_dataset(list(map(Conversation, conversations)), chat, config(start, tmp_path, held_out=0.1))
    assert dataset.num_too_long == 1
    assert 20 <= len(dataset.held_out) <= 70
    prompts = [
        {example.ids[: example.loss_mask.index(1)] for example in part} for part in (dataset.trained, dataset.held_out)
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
    uninterrupted, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(uninterrupted[name].equal(cut[name]) for name in uninterrupted)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_nothing_left_to_learn_is_an_error_that_says_why(start: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="24 examples are longer than row_tokens=2"):
        sft(config(start, tmp_path, row_tokens=2, held_out=0.0), Run(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"data=\[\] and tasks={}: there is nothing to train on"):
        config(start, tmp_path, data=[])


def test_adapters_of_a_4_bit_base_are_trained_and_merged(start: str, tmp_path: Path):
    """QLoRA from a checkpoint to a checkpoint that everybody opens."""
    trainer = {"dtype": "bf16", "bias_speed": 0.0, "lora": {"rank": 4, "base": "nf4"}, "optim": {"moments": "bf16"}}
    run = Run(tmp_path / "run")
    sft(config(start, tmp_path, trainer=trainer), run)
    assert (run.folder / "adapter" / "adapter_config.json").is_file()
    load_model(run.folder / "model")


def test_an_epoch_is_shuffled_once_and_not_for_each_document(monkeypatch):
    """All examples were shuffled again for each document: 0.6 s a document with 800,000 examples."""
    shuffles = []

    class Counting(random.Random):
        def shuffle(self, x):
            shuffles.append(len(x))
            super().shuffle(x)

    monkeypatch.setattr(random, "Random", Counting)
    examples = [Example((index, 0), (0, 1)) for index in range(50)]
    dataset = SftDataset(examples, [], 0)
    order = [dataset.document(index, seed=123_456).ids[0] for index in range(100)]
    assert shuffles == [50, 50]
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50)) and order[:50] != order[50:]
