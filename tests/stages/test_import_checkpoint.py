"""Checkpoints taken over, and what is written into their templates."""

import json
from pathlib import Path

import jinja2
import pytest

from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import load_chat, save_model
from thinkstack.log import Run
from thinkstack.stages.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from thinkstack.text.chat import TemplateFormat
from thinkstack.text.shots import with_few_shots
from thinkstack.text.tokenizer import BOS, EOS
from thinkstack.types import ConfigError, Message

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def start(tmp_path: Path) -> str:
    tokenizer = tiny_tokenizer()
    chat = TemplateFormat(tokenizer, TEMPLATE, BOS, EOS)
    save_model(tmp_path / "start", tiny_model(GQA_TINY, vocab_size=360), tokenizer, chat)
    return str(tmp_path / "start")


def imported(start: str, tmp_path: Path, **changes: object):
    import_checkpoint(ImportCheckpointConfig(start=start, **changes), Run(tmp_path / "out"))  # type: ignore[arg-type]
    return load_chat(tmp_path / "out" / "model")


def spoken(chat, messages: list[Message]) -> str:
    return chat.tokenizer.decode(chat.prompt(messages))


def test_shots_preamble_and_prefill_are_in_every_prompt_and_stay_in_the_checkpoint(start: str, tmp_path: Path):
    shots = (("1+1?", "<think>1+1=2</think><answer>2</answer>"),)
    chat = imported(start, tmp_path, preamble="Be brief.", shots=shots, prefill="<think>")
    text = spoken(chat, [Message(role="user", content="2+2?")])
    assert text.startswith(f"{BOS}system: Be brief.{EOS}user: 1+1?{EOS}assistant: <think>1+1=2")
    assert text.endswith(f"user: 2+2?{EOS}assistant: <think>")
    assert "user: 1+1?" in text and "1+1=2</think><answer>2</answer>" in text
    assert chat.prefill == "<think>"
    assert chat.text_of(chat.tokenizer.encode("3")) == "<think>3"


def test_the_tokenizer_config_is_copied_with_the_new_template(start: str, tmp_path: Path):
    path = Path(start) / "tokenizer_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) | {"padding_side": "left"}
    path.write_text(json.dumps(known), encoding="utf-8")
    imported(start, tmp_path, prefill="<think>")
    found = json.loads((tmp_path / "out/model/tokenizer_config.json").read_text(encoding="utf-8"))
    assert found["padding_side"] == "left"
    assert found["chat_template"] != known["chat_template"] and "<think>" in found["chat_template"]


def test_drop_thinking_removes_earlier_thinking(start: str, tmp_path: Path):
    session = [
        Message(role="user", content="1?"),
        Message(role="assistant", content="<think>\nsecret\n</think>\n\n2"),
        Message(role="user", content="3?"),
    ]
    assert "secret" in spoken(load_chat(start), session)
    text = spoken(imported(start, tmp_path, drop_thinking=True), session)
    assert "secret" not in text and f"assistant: 2{EOS}" in text


def test_a_format_of_ours_takes_no_additions(tmp_path: Path):
    save_model(tmp_path / "ours", tiny_model(GQA_TINY, vocab_size=360), tiny_tokenizer(), "r1_zero_short")
    with pytest.raises(ConfigError, match="need a checkpoint with a chat template"):
        import_checkpoint(
            ImportCheckpointConfig(start=str(tmp_path / "ours"), prefill="<think>"), Run(tmp_path / "out")
        )
    import_checkpoint(ImportCheckpointConfig(start=str(tmp_path / "ours")), Run(tmp_path / "out"))
    assert load_chat(tmp_path / "out" / "model").name == "r1_zero_short"


def test_text_that_spells_template_code_stays_text():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = with_few_shots(template, "{{ 7 * 7 }}", [("{% if %}", "'\"}}\n")], "{# no #}")
    rendered = jinja2.Environment().from_string(asked).render(messages=[], add_generation_prompt=True)
    assert rendered == "{{ 7 * 7 }}{% if %}'\"}}\n{# no #}"
